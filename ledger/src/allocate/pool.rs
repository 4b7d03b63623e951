//! One interval of one pool: capacity and requests in, postings out that add up to the interval's cost exactly.
//!
//! A pure function of its facts. They may come late, twice, in any order or not at all; the same facts always give the
//! same postings, ids included, and facts that come later give [`corrections`], never changed rows.

use std::collections::BTreeMap;

pub use super::books::corrections;
use super::books::{Books, Key, split_or_last, weight};
use super::colocated::{MIG_ALPHA, MigSlice, mig, time_sliced};
use super::idle::Idle;
use super::policy::{Method, Policy, WasteRule};
use super::replica::Replica;
use super::terms::{in_order, parts_within, tokens_within};
use super::timeline::{EngineTimeline, Limits};
use crate::capacity::{CapacityFact, PurchaseOption, latest};
use crate::context::{Context, Label};
use crate::id::AttemptId;
use crate::money::{Money, MoneyError};
use crate::posting::{Line, Posting};
use crate::time::{Period, Timestamp};

/// One request that an engine of the pool served.
#[derive(Debug, Clone, PartialEq)]
pub struct Served {
    /// The attempt. A later observation of the same attempt replaces an earlier one.
    pub attempt: AttemptId,
    /// Who caused it.
    pub context: Context,
    /// The engine that served it, as in [`Engine::name`].
    pub engine: Label,
    /// When it ran; of one that still runs, its progress so far.
    pub timeline: EngineTimeline,
    /// Whether any part of the timeline is a guess.
    pub estimated: bool,
    /// When this was observed; the latest observation wins.
    pub observed_at: Timestamp,
}

/// One engine process: what it runs, and on whose GPUs.
#[derive(Debug, Clone, PartialEq)]
pub struct Engine {
    /// Its name.
    pub name: Label,
    /// The replica of the capacity facts whose GPUs it uses. Engines on the same replica are time-sliced.
    pub replica: Label,
    /// The model it serves.
    pub model: Option<Label>,
    /// The step-time model with its constants.
    pub constants: Replica,
    /// What it can hold.
    pub limits: Limits,
    /// The slice of each GPU that it has to itself; engines without one share the whole GPU by time.
    pub slice: Option<MigSlice>,
    /// When it could serve; what its GPUs cost before is cold start. Unknown: it always could.
    pub ready_at: Option<Timestamp>,
    /// Whose objective keeps it running whatever the demand; its idle time is warm.
    pub kept_warm_for: Option<Context>,
    /// Seconds of the engine that served what bypassed the gateway, from its counters less what was metered.
    pub unobserved_s: Option<f64>,
}

/// What is known of a pool beside its capacity and its requests.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Demand {
    /// The peak that the pool is kept for, in GPUs.
    pub peak_gpus: Option<f64>,
    /// What each consumer owes of the headroom, by the airport game over the pool's horizon (in any unit).
    pub headroom: Vec<(Context, f64)>,
}

/// All facts that an allocation reads. Those of other pools and other times change nothing.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The GPUs and what they cost.
    pub capacity: &'a [CapacityFact],
    /// The engines on them.
    pub engines: &'a [Engine],
    /// What the engines served.
    pub served: &'a [Served],
    /// The pool's peak and who makes it.
    pub demand: &'a Demand,
}

/// Allocates what `pool` cost within `period`.
///
/// # Errors
/// [`MoneyError`] when the amounts leave the range of the ledger.
pub fn allocate(
    pool: &Label,
    period: Period,
    facts: Facts<'_>,
    policy: &Policy,
    booked_at: Timestamp,
) -> Result<Vec<Posting>, MoneyError> {
    let Facts { capacity, engines, served, demand } = facts;
    let mut books = Books::default();
    let served = latest_served(served);
    let mut facts = latest(capacity);
    facts.retain(|fact| fact.pool == *pool && fact.period.intersect(period).is_some());
    let owner = facts.iter().find_map(|fact| fact.owner.clone());
    let mut idle = Idle::default();
    let mut left_idle: Vec<(IdleKind, Money)> = Vec::new();

    // Capacity facts of one replica (it grew, or was restarted) are handled one after the other.
    for fact in &facts {
        let Some(span) = fact.period.intersect(period) else { continue };
        let mut own: Vec<&Engine> = engines.iter().filter(|engine| engine.replica == fact.replica).collect();
        own.sort_by(|a, b| a.name.cmp(&b.name));
        own.dedup_by(|a, b| a.name == b.name);
        for Together { engines: together, part, amount } in
            by_slice(&own, fact.cost_within(period), owner.as_ref(), &mut books)?
        {
            let used = Used::of(fact, span, &together, &served, policy);
            let gpus = f64::from(fact.gpus) * part;
            idle.busy += gpus * used.busy_s;
            let kind = IdleKind::of(fact, &together);
            match &kind {
                IdleKind::WithoutEngine => idle.without_engine_reserved += gpus * used.idle_s,
                IdleKind::Warm(_) => idle.standby += gpus * used.idle_s,
                IdleKind::Other => idle.other += gpus * used.idle_s,
            }
            left_idle.push((kind, used.book(amount, &mut books, &together, owner.as_ref())?));
        }
    }

    idle.peak = demand.peak_gpus.map(|gpus| gpus * period.micros() as f64 * 1e-6);
    let waterfall = idle.waterfall();
    for (kind, amount) in left_idle {
        let owned = || Context { team: owner.clone(), ..Context::default() };
        match kind {
            IdleKind::WithoutEngine => books.add(Key::line(Line::IdleReserved, owned()), amount, false),
            IdleKind::Warm(context) => books.add(Key::line(Line::Warm, *context), amount, false),
            IdleKind::Other => {
                let weights = [waterfall.headroom, waterfall.above_peak].map(weight);
                let parts = split_or_last(amount, &weights)?;
                books.add(Key::line(Line::IdleReserved, owned()), parts[1], false);
                books.headroom(parts[0], demand, policy.headroom, &owned())?;
            }
        }
    }
    Ok(books.postings(pool, period, policy, booked_at))
}

/// The latest observation of each attempt, in the order of attempts.
fn latest_served(served: &[Served]) -> Vec<&Served> {
    let mut kept: BTreeMap<AttemptId, &Served> = BTreeMap::new();
    for one in served {
        let rank = |one: &Served| (one.observed_at, one.timeline.last_token, one.timeline.output_tokens);
        let newest = kept.entry(one.attempt).or_insert(one);
        if rank(one) > rank(newest) {
            *newest = one;
        }
    }
    kept.into_values().collect()
}

/// Engines that share the time of a GPU or of a slice of it.
struct Together<'a> {
    engines: Vec<&'a Engine>,
    /// Their part of the GPU.
    part: f64,
    /// What that part cost.
    amount: Money,
}

/// Who shares whose time: engines with slices have each their own, all others the whole GPU. What no slice has is booked
/// as stranded.
fn by_slice<'a>(
    engines: &[&'a Engine],
    amount: Money,
    owner: Option<&Label>,
    books: &mut Books,
) -> Result<Vec<Together<'a>>, MoneyError> {
    let slices: Vec<MigSlice> = engines.iter().filter_map(|engine| engine.slice).collect();
    if slices.is_empty() {
        return Ok(vec![Together { engines: engines.to_vec(), part: 1.0, amount }]);
    }
    let (mut parts, stranded) = mig(&slices, MIG_ALPHA);
    parts.push(stranded);
    let mut amounts = split_or_last(amount, &parts.iter().map(|&part| weight(part)).collect::<Vec<_>>())?;
    let left = amounts.pop().unwrap_or(Money::ZERO);
    books.add(Key::line(Line::Stranded, Context { team: owner.cloned(), ..Context::default() }), left, false);
    // An engine without a slice on a sliced GPU cannot have run; its requests stay unallocated.
    let sliced = engines.iter().copied().filter(|engine| engine.slice.is_some());
    Ok(sliced
        .zip(parts)
        .zip(amounts)
        .map(|((engine, part), amount)| Together { engines: vec![engine], part, amount })
        .collect())
}

enum IdleKind {
    /// Reserved GPUs on which no engine is known.
    WithoutEngine,
    Warm(Box<Context>),
    Other,
}

impl IdleKind {
    fn of(fact: &CapacityFact, engines: &[&Engine]) -> IdleKind {
        if let Some(context) = engines.iter().find_map(|engine| engine.kept_warm_for.clone()) {
            return IdleKind::Warm(Box::new(context));
        }
        let reserved = matches!(fact.purchase, PurchaseOption::Reserved | PurchaseOption::Owned);
        if engines.is_empty() && reserved { IdleKind::WithoutEngine } else { IdleKind::Other }
    }
}

/// How one capacity fact's time was used, in seconds.
struct Used<'a> {
    /// What each request pays, with its place in `engines`.
    requests: Vec<(&'a Served, usize, f64)>,
    /// By engine: recomputed after preemptions; traffic that bypassed the gateway.
    waste_s: Vec<f64>,
    unobserved_s: Vec<f64>,
    cold_s: f64,
    busy_s: f64,
    idle_s: f64,
}

impl<'a> Used<'a> {
    fn of(fact: &CapacityFact, span: Period, engines: &[&Engine], served: &[&'a Served], policy: &Policy) -> Used<'a> {
        let span_s = span.micros() as f64 * 1e-6;
        let mut used = Used {
            requests: Vec::new(),
            waste_s: vec![0.0; engines.len()],
            unobserved_s: vec![0.0; engines.len()],
            cold_s: 0.0,
            busy_s: 0.0,
            idle_s: 0.0,
        };
        let mut stretches = Vec::with_capacity(engines.len());
        let mut swept = Vec::with_capacity(engines.len());
        for engine in engines {
            let own: Vec<&Served> = served.iter().copied().filter(|one| one.engine == engine.name).collect();
            let Swept { parts, busy } = sweep(engine, &own, span, policy.method);
            stretches.push(busy);
            swept.push(parts);
        }
        // Each engine's part of the moments in which several were busy.
        let granted = time_sliced(&stretches);
        for (place, parts) in swept.into_iter().enumerate() {
            let all: f64 = parts.iter().map(|(_, seconds, waste)| seconds + waste).sum();
            let scale = if all > 0.0 { granted[place] / all } else { 0.0 };
            let waste: f64 = parts.iter().map(|(_, _, waste)| waste * scale).sum();
            let useful = all * scale - waste;
            let spread = if policy.waste == WasteRule::Spread && useful > 0.0 { 1.0 + waste / useful } else { 1.0 };
            for (one, seconds, _) in parts {
                used.requests.push((one, place, seconds * scale * spread));
            }
            if spread == 1.0 {
                used.waste_s[place] = waste;
            }
        }
        used.busy_s = granted.iter().sum::<f64>().min(span_s);
        let ready = engines.iter().filter_map(|engine| engine.ready_at).min();
        let started = fact.period.start.max(span.start);
        let loading_s = ready.map_or(0.0, |ready| ready.min(span.end).micros_since(started) as f64 * 1e-6);
        used.cold_s = loading_s.min(span_s - used.busy_s);
        used.idle_s = (span_s - used.busy_s - used.cold_s).max(0.0);
        used.take_unobserved(engines, &granted);
        used
    }

    /// Traffic that bypassed the gateway ran beside the metered requests where there were any, and otherwise in what
    /// looked idle.
    fn take_unobserved(&mut self, engines: &[&Engine], granted: &[f64]) {
        for (place, engine) in engines.iter().enumerate() {
            let wanted = engine.unobserved_s.filter(|seconds| *seconds > 0.0).unwrap_or(0.0);
            if wanted == 0.0 {
                continue;
            }
            if granted[place] > 0.0 {
                let kept = granted[place] / (granted[place] + wanted);
                for (_, _, seconds) in self.requests.iter_mut().filter(|(_, at, _)| *at == place) {
                    *seconds *= kept;
                }
                self.waste_s[place] *= kept;
                self.unobserved_s[place] = granted[place] * (1.0 - kept);
            } else {
                let taken = wanted.min(self.idle_s);
                self.unobserved_s[place] = taken;
                self.idle_s -= taken;
                self.busy_s += taken;
            }
        }
    }

    /// Books all but the idle time and returns what that cost.
    fn book(
        self,
        amount: Money,
        books: &mut Books,
        engines: &[&Engine],
        owner: Option<&Label>,
    ) -> Result<Money, MoneyError> {
        let owned = || Context { team: owner.cloned(), ..Context::default() };
        let mut keys = Vec::with_capacity(self.requests.len() + 2 * engines.len() + 1);
        let mut weights = Vec::with_capacity(keys.capacity() + 1);
        for (one, place, seconds) in &self.requests {
            books.contexts.insert(one.attempt, one.context.clone());
            keys.push((Key::request(one.attempt, &one.context, engines[*place].model.clone()), one.estimated));
            weights.push(weight(*seconds));
        }
        for (place, engine) in engines.iter().enumerate() {
            for (line, seconds) in [(Line::Waste, self.waste_s[place]), (Line::Unobserved, self.unobserved_s[place])] {
                keys.push((Key::line(line, owned()).of_model(engine.model.clone()), false));
                weights.push(weight(seconds));
            }
        }
        keys.push((Key::line(Line::ColdStart, owned()), false));
        weights.push(weight(self.cold_s));
        weights.push(weight(self.idle_s));
        let mut parts = split_or_last(amount, &weights)?;
        let idle = parts.pop().unwrap_or(Money::ZERO);
        for ((key, estimated), part) in keys.into_iter().zip(parts) {
            books.add(key, part, estimated);
        }
        Ok(idle)
    }
}

/// What one engine did within a span.
#[derive(Default)]
struct Swept<'a> {
    /// Each request with its seconds (or what its method counts) and its wasted seconds.
    parts: Vec<(&'a Served, f64, f64)>,
    /// The engine's busy stretches in seconds from the span's start.
    busy: Vec<(f64, f64)>,
}

/// Runs one engine's requests through the sweep and keeps what falls within `span`.
fn sweep<'a>(engine: &Engine, served: &[&'a Served], span: Period, method: Method) -> Swept<'a> {
    let order = in_order(served, span);
    let swept = parts_within(engine, &order, span, method);
    let clipped: Vec<Period> = order
        .iter()
        .filter_map(|(timeline, _)| Period { start: timeline.scheduled, end: timeline.last_token }.intersect(span))
        .collect();
    let busy = union(&clipped, span.start);
    let parts = order
        .iter()
        .zip(swept)
        .map(|((timeline, one), part)| match method {
            Method::Roofline | Method::EqualTime => (*one, part.share.total_s(), part.waste_s),
            Method::Tokens | Method::WeightedTokens => {
                let [input, output] = tokens_within(timeline, span);
                (*one, input + method.output_weight() * output, 0.0)
            }
        })
        .collect();
    Swept { parts, busy }
}

/// The union of periods that come in the order of their starts, in seconds from `base`.
fn union(periods: &[Period], base: Timestamp) -> Vec<(f64, f64)> {
    let mut stretches: Vec<Period> = Vec::new();
    for &period in periods {
        match stretches.last_mut() {
            Some(last) if period.start <= last.end => last.end = last.end.max(period.end),
            _ => stretches.push(period),
        }
    }
    let seconds = |at: Timestamp| at.micros_since(base) as f64 * 1e-6;
    stretches.iter().map(|period| (seconds(period.start), seconds(period.end))).collect()
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
