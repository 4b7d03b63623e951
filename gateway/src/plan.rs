//! Turns a request into the upstreams to try, in order. Pure: chance comes in as a seed, and what is known of each upstream
//! at this moment as a [`Look`].

use std::cmp::Ordering;
use std::sync::Arc;

use ledger::Label;

use crate::availability::{Availability, Look};
use crate::keys::KeyRecord;
use crate::settings::{Balance, ModelRoute, RouteTarget, Settings, Upstream};
use crate::surface::Inspected;

/// One try: the upstream, and the model to ask of it when that is not the client's own word.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where to.
    pub upstream: Arc<Upstream>,
    /// The model to write into the request.
    pub model: Option<Label>,
}

/// Where a request goes.
#[derive(Debug, Clone)]
pub enum Plan {
    /// To these, in this order, at most [`attempts_max`](crate::Limits::attempts_max): they speak the request's surface, the key may
    /// reach them, and they take requests.
    Try {
        /// Never empty.
        targets: Vec<Target>,
        /// What would have been chosen if everything took requests.
        wanted: Arc<Upstream>,
    },
    /// Nowhere now: what serves it takes no requests. This is what would have been chosen if it did.
    Wait(Arc<Upstream>),
    /// Nowhere ever.
    Nowhere,
}

/// Who asks for what of whom.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// What the gateway is told.
    pub settings: &'a Settings,
    /// What is asked.
    pub request: &'a Inspected,
    /// The key that asks.
    pub key: Option<&'a KeyRecord>,
    /// Any evenly spread number; it chooses among weighted targets, and among equals.
    pub seed: u64,
}

/// Where to send a request.
#[must_use]
pub fn plan(ask: Ask<'_>, look: impl Fn(&Upstream) -> Look) -> Plan {
    let Candidates { targets, fallbacks, balance, retries } = candidates(ask, look);
    let attempts_max = ask.settings.limits.attempts_max.max(1);
    let serving: Vec<&Candidate<'_>> = targets.iter().filter(|target| target.serves()).collect();
    let chosen = choose(&serving, balance, ask.seed);
    let wanted = match chosen {
        Some(chosen) if serving.len() == targets.len() => Some(chosen),
        _ => choose(&targets.iter().collect::<Vec<_>>(), Balance::Weighted, ask.seed).or(fallbacks.first()),
    };
    let Some(wanted) = wanted.map(|wanted| Arc::clone(wanted.upstream)) else { return Plan::Nowhere };
    let tries = (usize::from(retries) + 1).min(attempts_max);
    let first = chosen.into_iter().flat_map(|chosen| std::iter::repeat_n(chosen, tries));
    let order = first.chain(fallbacks.iter().filter(|fallback| fallback.serves()));
    let targets: Vec<Target> = order.take(attempts_max).map(Candidate::target).collect();
    if targets.is_empty() { Plan::Wait(wanted) } else { Plan::Try { targets, wanted } }
}

/// Another replica of the deployment that `failed` belongs to, which takes requests and was not tried yet.
#[must_use]
pub(crate) fn sibling(
    ask: Ask<'_>,
    failed: &Target,
    tried: &[Arc<Upstream>],
    look: impl Fn(&Upstream) -> Look,
) -> Option<Target> {
    let Candidates { targets, balance, .. } = candidates(ask, look);
    let untried = |upstream: &Arc<Upstream>| !tried.iter().any(|tried| Arc::ptr_eq(tried, upstream));
    let others = targets.iter().filter(|other| {
        let same_work = are_replicas(other.upstream, &failed.upstream) && other.model == failed.model.as_deref();
        other.serves() && same_work && untried(other.upstream)
    });
    choose(&others.collect::<Vec<_>>(), balance, ask.seed).map(Candidate::target)
}

/// An upstream that can be asked, before anybody is chosen.
#[derive(Debug, Clone, Copy)]
struct Candidate<'a> {
    upstream: &'a Arc<Upstream>,
    model: Option<&'a str>,
    weight: u32,
    look: Look,
}

struct Candidates<'a> {
    targets: Vec<Candidate<'a>>,
    fallbacks: Vec<Candidate<'a>>,
    balance: Balance,
    retries: u16,
}

impl Candidate<'_> {
    fn serves(&self) -> bool {
        self.look.availability == Availability::Serving
    }

    fn target(&self) -> Target {
        Target { upstream: Arc::clone(self.upstream), model: self.model.map(Label::from) }
    }
}

/// Those that speak the surface and may be reached: chance decides among them only, so that one which speaks another surface
/// takes no share away.
fn candidates<'a>(ask: Ask<'a>, look: impl Fn(&Upstream) -> Look) -> Candidates<'a> {
    let Ask { settings, request, key, .. } = ask;
    let usable = |upstream: &Upstream| {
        upstream.kind.speaks(request.dialect, request.operation)
            && key.is_none_or(|key| key.allows_upstream(&upstream.name))
    };
    let routed = |target: &'a RouteTarget| {
        let upstream = settings.upstream(&target.upstream).filter(|upstream| usable(upstream))?;
        Some(Candidate { upstream, model: target.model.as_deref(), weight: target.weight, look: look(upstream) })
    };
    let of = |targets: &'a [RouteTarget]| targets.iter().filter_map(routed).collect();
    match route(&settings.routes, request.model.as_deref()) {
        Some(route) => Candidates {
            targets: of(&route.targets),
            fallbacks: of(&route.fallbacks),
            balance: route.balance,
            retries: route.retries,
        },
        None if settings.routes.is_empty() || request.model.is_none() => {
            unrouted(settings.upstreams.iter().filter(|upstream| usable(upstream)), look)
        }
        None => Candidates { targets: Vec::new(), fallbacks: Vec::new(), balance: Balance::Weighted, retries: 0 },
    }
}

fn route<'a>(routes: &'a [ModelRoute], model: Option<&str>) -> Option<&'a ModelRoute> {
    let model = model?;
    let matches = |route: &&ModelRoute| match route.model.strip_suffix('*') {
        Some(start) => model.starts_with(start),
        None => route.model == model,
    };
    // An exact name beats a pattern of the same length.
    routes.iter().filter(matches).max_by_key(|route| (!route.model.ends_with('*'), route.model.len()))
}

/// Without a route the first upstream serves, or the first replica of the same deployment that takes requests.
fn unrouted<'a>(usable: impl Iterator<Item = &'a Arc<Upstream>>, look: impl Fn(&Upstream) -> Look) -> Candidates<'a> {
    let mut usable = usable;
    let candidate = |upstream: &'a Arc<Upstream>| Candidate { upstream, model: None, weight: 0, look: look(upstream) };
    let first = usable.next().map(candidate);
    let others = usable.filter(|other| first.is_some_and(|first| are_replicas(first.upstream, other))).map(candidate);
    let targets = first.into_iter().chain(others).collect();
    // Nobody has a weight here, so that the first one is chosen.
    Candidates { targets, fallbacks: Vec::new(), balance: Balance::Weighted, retries: 0 }
}

/// Whether two upstreams do the same work, so that one can stand in for the other.
fn are_replicas(one: &Upstream, other: &Upstream) -> bool {
    one.deployment.is_some() && one.deployment == other.deployment && one.pool == other.pool
}

/// One of those that did not refuse a connection a moment ago, or if there is none, one of all.
fn choose<'a, 'b>(targets: &[&'b Candidate<'a>], balance: Balance, seed: u64) -> Option<&'b Candidate<'a>> {
    if targets.iter().all(|target| !target.look.doubtful) {
        return choose_among(targets, balance, seed);
    }
    let trusted: Vec<&'b Candidate<'a>> = targets.iter().copied().filter(|target| !target.look.doubtful).collect();
    choose_among(&trusted, balance, seed).or_else(|| choose_among(targets, balance, seed))
}

fn choose_among<'a, 'b>(targets: &[&'b Candidate<'a>], balance: Balance, seed: u64) -> Option<&'b Candidate<'a>> {
    let total: u64 = targets.iter().map(|target| u64::from(target.weight)).sum();
    if total == 0 {
        return targets.first().copied();
    }
    match balance {
        Balance::Weighted => by_weight(targets, seed % total),
        Balance::LeastOutstanding => least_outstanding(targets, seed),
    }
}

fn by_weight<'a, 'b>(targets: &[&'b Candidate<'a>], point: u64) -> Option<&'b Candidate<'a>> {
    let mut point = point;
    targets.iter().copied().find(|target| match point.checked_sub(u64::from(target.weight)) {
        Some(rest) => {
            point = rest;
            false
        }
        None => true,
    })
}

/// The one that has the least to do for its weight with one request more; chance decides among equals.
fn least_outstanding<'a, 'b>(targets: &[&'b Candidate<'a>], seed: u64) -> Option<&'b Candidate<'a>> {
    let filling = |one: &Candidate<'_>, other: &Candidate<'_>| {
        let with_one_more = |target: &Candidate<'_>| u64::from(target.look.in_flight) + 1;
        let (one_fill, other_fill) =
            (with_one_more(one) * u64::from(other.weight), with_one_more(other) * u64::from(one.weight));
        one_fill.cmp(&other_fill)
    };
    let weighty = || targets.iter().copied().filter(|target| target.weight > 0);
    let least = weighty().min_by(|one, other| filling(one, other))?;
    let equals = || weighty().filter(|target| filling(target, least) == Ordering::Equal);
    let count = u64::try_from(equals().count()).unwrap_or(u64::MAX).max(1);
    equals().nth(usize::try_from(seed % count).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Kind;
    use crate::surface;

    fn upstream(name: &str, kind: Kind, deployment: Option<&str>) -> Arc<Upstream> {
        let mut upstream = Upstream::new(name, kind, "http://127.0.0.1:1".parse().unwrap());
        upstream.deployment = deployment.map(Label::from);
        Arc::new(upstream)
    }

    fn target(upstream: &str, model: Option<&str>, weight: u32) -> RouteTarget {
        RouteTarget { upstream: upstream.into(), model: model.map(Into::into), weight }
    }

    fn asking(path: &str, model: &str) -> Inspected {
        let body = format!(r#"{{"model":"{model}","messages":[]}}"#);
        surface::inspect(&http::Method::POST, path, Some("application/json"), body.as_bytes())
    }

    fn settings(routes: Vec<ModelRoute>) -> Settings {
        let upstreams = vec![
            upstream("a", Kind::OpenAi, None),
            upstream("b", Kind::Vllm, None),
            upstream("c", Kind::OpenAi, None),
            upstream("d", Kind::Anthropic, None),
        ];
        Settings { upstreams, routes, ..Settings::default() }
    }

    /// Names of the targets; `(wait NAME)` or nothing otherwise.
    fn seen(
        settings: &Settings,
        request: &Inspected,
        key: Option<&KeyRecord>,
        seed: u64,
        look: impl Fn(&str) -> Look,
    ) -> Vec<String> {
        let name = |target: &Target| match &target.model {
            Some(model) => format!("{}/{model}", target.upstream.name),
            None => target.upstream.name.to_string(),
        };
        match plan(Ask { settings, request, key, seed }, |upstream| look(&upstream.name)) {
            Plan::Try { targets, .. } => targets.iter().map(name).collect(),
            Plan::Wait(wanted) => vec![format!("(wait {})", wanted.name)],
            Plan::Nowhere => Vec::new(),
        }
    }

    fn names(settings: &Settings, request: &Inspected, key: Option<&KeyRecord>, seed: u64) -> Vec<String> {
        seen(settings, request, key, seed, |_| Look::default())
    }

    /// Everything serves but these.
    fn without(away: &'static [&'static str]) -> impl Fn(&str) -> Look {
        move |name| {
            let availability = if away.contains(&name) { Availability::Away } else { Availability::Serving };
            Look { availability, ..Look::default() }
        }
    }

    #[test]
    fn without_routes_the_first_upstream_that_speaks_the_surface_serves() {
        let settings = settings(Vec::new());
        assert_eq!(names(&settings, &asking("/v1/chat/completions", "x"), None, 0), ["a"]);
        assert_eq!(names(&settings, &asking("/v1/messages", "x"), None, 0).len(), 1);
    }

    #[test]
    fn retries_come_before_fallbacks_and_all_is_bounded() {
        let route = ModelRoute {
            model: "smart".into(),
            targets: vec![target("a", Some("gpt-4o"), 1)],
            fallbacks: vec![target("c", Some("claude"), 1), target("b", None, 1)],
            retries: 2,
            ..ModelRoute::default()
        };
        let mut settings = settings(vec![route]);
        let smart = asking("/v1/chat/completions", "smart");
        assert_eq!(names(&settings, &smart, None, 0), ["a/gpt-4o", "a/gpt-4o", "a/gpt-4o", "c/claude", "b"]);
        assert_eq!(seen(&settings, &smart, None, 0, without(&["a"])), ["c/claude", "b"]);
        assert_eq!(seen(&settings, &smart, None, 0, without(&["c", "a"])), ["b"]);
        assert_eq!(seen(&settings, &smart, None, 0, without(&["a", "b", "c"])), ["(wait a)"]);
        settings.limits.attempts_max = 2;
        assert_eq!(names(&settings, &smart, None, 0).len(), 2);
        assert!(names(&settings, &asking("/v1/chat/completions", "other"), None, 0).is_empty());
    }

    #[test]
    fn chance_decides_among_the_targets_that_speak_the_surface() {
        let targets = vec![target("a", None, 1), target("d", None, 9)];
        let settings = settings(vec![ModelRoute { model: "*".into(), targets, ..ModelRoute::default() }]);
        for seed in 0..10 {
            assert_eq!(names(&settings, &asking("/v1/chat/completions", "x"), None, seed), ["a"]);
            assert_eq!(names(&settings, &asking("/v1/messages", "x"), None, seed), ["d"]);
        }
    }

    #[test]
    fn weights_share_the_requests_exactly_among_those_that_serve() {
        let targets = vec![target("a", None, 3), target("b", None, 1), target("c", None, 0)];
        let settings = settings(vec![ModelRoute { model: "*".into(), targets, ..ModelRoute::default() }]);
        let chat = asking("/v1/chat/completions", "x");
        let count = |name: &str, away: &'static [&'static str]| {
            (0..400).filter(|&seed| seen(&settings, &chat, None, seed, without(away)) == [name]).count()
        };
        assert_eq!((count("a", &[]), count("b", &[]), count("c", &[])), (300, 100, 0));
        assert_eq!((count("a", &["b"]), count("b", &["a"]), count("c", &["a", "b"])), (400, 400, 400));
        // What is away is wanted all the same: whoever scales it must hear of it.
        let wanted = |seed| match plan(Ask { settings: &settings, request: &chat, key: None, seed }, |upstream| {
            without(&["a"])(&upstream.name)
        }) {
            Plan::Try { targets, wanted } => (targets[0].upstream.name.to_string(), wanted.name.to_string()),
            other => panic!("{other:?}"),
        };
        let wanting_a = (0..400).filter(|&seed| wanted(seed) == ("b".to_owned(), "a".to_owned())).count();
        assert_eq!(wanting_a, 300);
    }

    #[test]
    fn the_longest_pattern_wins_and_keys_narrow_the_choice() {
        let route = |model: &str, upstream| ModelRoute {
            model: model.into(),
            targets: vec![target(upstream, None, 1)],
            ..ModelRoute::default()
        };
        let settings = settings(vec![route("*", "a"), route("gpt-*", "b"), route("gpt-4", "c")]);
        let to = |model| names(&settings, &asking("/v1/chat/completions", model), None, 0);
        assert_eq!(
            (to("x"), to("gpt-5"), to("gpt-4")),
            (vec!["a".to_owned()], vec!["b".to_owned()], vec!["c".to_owned()])
        );
        let hash = crate::keys::mint([1; 32], &[0; 32]).1;
        let mut key = KeyRecord::new(ledger::KeyId::new(ledger::Timestamp::from_micros(0), [1; 10]), hash);
        key.upstreams = vec!["b".into()];
        assert!(names(&settings, &asking("/v1/chat/completions", "x"), Some(&key), 0).is_empty());
    }

    fn replicas() -> Settings {
        let upstreams = vec![
            upstream("r1", Kind::Vllm, Some("chat")),
            upstream("r2", Kind::Vllm, Some("chat")),
            upstream("other", Kind::Vllm, Some("code")),
            upstream("r3", Kind::Vllm, Some("chat")),
        ];
        Settings { upstreams, ..Settings::default() }
    }

    #[test]
    fn the_replica_with_the_least_to_do_is_chosen_and_chance_decides_among_equals() {
        let mut settings = replicas();
        let targets = vec![target("r1", None, 1), target("r2", None, 1), target("r3", None, 2)];
        let balance = Balance::LeastOutstanding;
        settings.routes = vec![ModelRoute { model: "*".into(), targets, balance, ..ModelRoute::default() }];
        let chat = asking("/v1/chat/completions", "x");
        let chosen = |loads: [u32; 3], seed: u64| {
            let look = |name: &str| {
                let in_flight = match name {
                    "r1" => loads[0],
                    "r2" => loads[1],
                    _ => loads[2],
                };
                Look { in_flight, ..Look::default() }
            };
            seen(&settings, &chat, None, seed, look).remove(0)
        };
        assert_eq!(chosen([5, 4, 20], 7), "r2");
        assert_eq!(chosen([5, 5, 9], 7), "r3", "half of its weight is filled");
        let ties: Vec<String> = (0..4).map(|seed| chosen([2, 2, 7], seed)).collect();
        assert_eq!(ties, ["r1", "r2", "r1", "r2"]);
        let refusing = |name: &str| Look { doubtful: name != "r2", in_flight: 3, ..Look::default() };
        assert_eq!(seen(&settings, &chat, None, 7, refusing), ["r2"], "fewest are where nobody is");
        let all = |_: &str| Look { doubtful: true, ..Look::default() };
        assert_eq!(seen(&settings, &chat, None, 7, all), ["r3"], "but somebody has to try");
        // A request at a time goes around; what comes together spreads.
        let mut loads = [0; 3];
        for seed in 0..40 {
            match chosen(loads, seed).as_str() {
                "r1" => loads[0] += 1,
                "r2" => loads[1] += 1,
                _ => loads[2] += 1,
            }
        }
        assert_eq!(loads, [10, 10, 20]);
    }

    #[test]
    fn without_a_route_another_replica_stands_in_and_nobody_else() {
        let settings = replicas();
        let chat = asking("/v1/chat/completions", "x");
        assert_eq!(seen(&settings, &chat, None, 3, without(&[])), ["r1"]);
        assert_eq!(seen(&settings, &chat, None, 3, without(&["r1"])), ["r2"]);
        assert_eq!(seen(&settings, &chat, None, 3, without(&["r1", "r2", "r3"])), ["(wait r1)"]);
    }

    #[test]
    fn a_sibling_is_another_replica_that_asks_for_the_same() {
        let mut settings = replicas();
        let targets =
            vec![target("r1", None, 1), target("other", None, 1), target("r3", Some("y"), 1), target("r2", None, 1)];
        settings.routes = vec![ModelRoute { model: "*".into(), targets, ..ModelRoute::default() }];
        let chat = asking("/v1/chat/completions", "x");
        let ask = Ask { settings: &settings, request: &chat, key: None, seed: 0 };
        let failed = Target { upstream: Arc::clone(&settings.upstreams[0]), model: None };
        let mut tried = vec![Arc::clone(&failed.upstream)];
        let found = |tried: &[Arc<Upstream>], away: &'static [&'static str]| {
            let found = sibling(ask, &failed, tried, |upstream| without(away)(&upstream.name));
            found.map(|target| target.upstream.name.to_string())
        };
        assert_eq!(found(&tried, &[]).as_deref(), Some("r2"));
        assert_eq!(found(&tried, &["r2"]), None);
        tried.push(Arc::clone(&settings.upstreams[1]));
        assert_eq!(found(&tried, &[]), None);
    }
}
