//! Who works on the GPUs of one capacity fact, how long each had them, and what that comes to in the books.

use std::collections::BTreeMap;

use super::books::{Amount, Books, Found, Key, weight};
use super::colocated::{MIG_ALPHA, MigSlice, Party, mig, shared};
use super::engine_time::{EngineTime, engine_time};
use super::policy::{Policy, SharingRule, WasteRule};
use super::pool::{Engine, Served};
use super::share::Share;
use crate::capacity::{CapacityFact, PurchaseOption};
use crate::context::{Context, Label};
use crate::money::MoneyError;
use crate::posting::{Line, Tier};
use crate::telemetry::{JobFact, JobSource};
use crate::time::{Period, Timestamp};

/// Everybody that a pool knows, for looking up who was where.
pub(super) struct Cast<'a> {
    /// By replica, in the order of their names.
    engines: BTreeMap<&'a str, Vec<&'a Engine>>,
    /// What each engine served, with its place among all that were served.
    served: BTreeMap<&'a str, Vec<(usize, &'a Served)>>,
    jobs: &'a [&'a JobFact],
    /// How long each replica had GPUs in the interval, in microseconds.
    present_us: BTreeMap<&'a str, u64>,
    /// The interval.
    period: Period,
    /// Who pays for what is nobody else's.
    owner: &'a Context,
}

impl<'a> Cast<'a> {
    pub(super) fn of(
        engines: &'a [Engine],
        served: &[&'a Served],
        jobs: &'a [&'a JobFact],
        owner: &'a Context,
        (capacity, period): (&[&'a CapacityFact], Period),
    ) -> Cast<'a> {
        let present_us = present_us(capacity, period);
        let mut cast = Cast { engines: BTreeMap::new(), served: BTreeMap::new(), jobs, present_us, period, owner };
        for engine in engines {
            cast.engines.entry(&engine.replica).or_default().push(engine);
        }
        for own in cast.engines.values_mut() {
            own.sort_by(|a, b| a.name.cmp(&b.name));
            own.dedup_by(|a, b| a.name == b.name);
        }
        for (at, one) in served.iter().enumerate() {
            cast.served.entry(&one.engine).or_default().push((at, one));
        }
        cast
    }

    fn served_by(&self, engine: &Engine) -> &[(usize, &'a Served)] {
        self.served.get(&*engine.name).map_or(&[], Vec::as_slice)
    }
}

/// How long each replica had GPUs within `period`, moments with several facts counted once.
fn present_us<'a>(capacity: &[&'a CapacityFact], period: Period) -> BTreeMap<&'a str, u64> {
    let mut spans: Vec<(&CapacityFact, Period)> =
        capacity.iter().filter_map(|fact| Some((*fact, fact.period.intersect(period)?))).collect();
    spans.sort_by_key(|(_, span)| span.start);
    let mut present: BTreeMap<&str, (u64, Timestamp)> = BTreeMap::new();
    for (fact, span) in spans {
        let (length, upto) = present.entry(&fact.replica).or_insert((0, span.start));
        *length += span.end.micros_since(span.start.max(*upto));
        *upto = span.end.max(*upto);
    }
    present.into_iter().map(|(replica, (length, _))| (replica, length)).collect()
}

/// Why time that nobody used was there.
#[derive(Debug, Clone)]
pub(super) enum Standing {
    /// Reserved GPUs on which no engine is known.
    WithoutEngine,
    /// Somebody's objective keeps it.
    Warm(Box<Context>),
    /// No slice has it.
    Stranded,
    /// Anything else: headroom, or above the peak.
    Open,
}

/// Those that share the time of a GPU or of a slice of it.
pub(super) struct Together<'a> {
    engines: Vec<&'a Engine>,
    jobs: Vec<&'a JobFact>,
    /// Their part of the GPU.
    pub(super) size: f64,
    pub(super) standing: Standing,
}

/// Who shares whose time on the GPUs of `fact`, and what each part of them cost: engines with slices have each their own,
/// all others and the jobs the whole GPU. What no slice has is stranded, and where jobs must have run.
pub(super) fn together<'a>(
    cast: &Cast<'a>,
    fact: &CapacityFact,
    whole: Amount,
) -> Result<Vec<(Together<'a>, Amount)>, MoneyError> {
    let engines = cast.engines.get(&*fact.replica).cloned().unwrap_or_default();
    let mut jobs: Vec<&JobFact> = cast.jobs.iter().copied().filter(|job| job.replica == fact.replica).collect();
    // A pod's job is the job of its processes: who looks at the same GPUs in both ways has seen it twice.
    if jobs.iter().any(|job| job.source == JobSource::PodLabels) {
        jobs.retain(|job| job.source != JobSource::GpuProcesses);
    }
    let slices: Vec<MigSlice> = engines.iter().filter_map(|engine| engine.slice).collect();
    if slices.is_empty() {
        let standing = standing(fact, &engines);
        return Ok(vec![(Together { engines, jobs, size: 1.0, standing }, whole)]);
    }
    let (mut sizes, stranded) = mig(&slices, MIG_ALPHA);
    sizes.push(stranded);
    let amounts = whole.split_or_last(&sizes.iter().map(|&size| weight(size)).collect::<Vec<_>>())?;
    // An engine without a slice on a sliced GPU cannot have run; its requests stay unallocated.
    let sliced = engines.into_iter().filter(|engine| engine.slice.is_some());
    let mut parts: Vec<Together<'_>> = sliced
        .zip(&sizes)
        .map(|(engine, &size)| {
            let engines = vec![engine];
            Together { standing: standing(fact, &engines), engines, jobs: Vec::new(), size }
        })
        .collect();
    parts.push(Together { engines: Vec::new(), jobs, size: stranded, standing: Standing::Stranded });
    Ok(parts.into_iter().zip(amounts).collect())
}

fn standing(fact: &CapacityFact, engines: &[&Engine]) -> Standing {
    if let Some(context) = engines.iter().find_map(|engine| engine.kept_warm_for.clone()) {
        return Standing::Warm(Box::new(context));
    }
    let reserved = matches!(fact.purchase, PurchaseOption::Reserved | PurchaseOption::Owned);
    if engines.is_empty() && reserved { Standing::WithoutEngine } else { Standing::Open }
}

/// How the time of one part was used, in seconds.
pub(super) struct Used<'a> {
    requests: Vec<Paid<'a>>,
    lines: Vec<(Key, f64, Found)>,
    cold_s: f64,
    pub(super) busy_s: f64,
    pub(super) idle_s: f64,
    tier: Tier,
}

/// What one request pays.
struct Paid<'a> {
    at: usize,
    seconds: f64,
    share: Option<Share>,
    found: Found,
    model: Option<&'a Label>,
}

impl<'a> Together<'a> {
    /// Divides `span`, the part of the interval in which the GPUs of `fact` were there.
    pub(super) fn used(&self, cast: &Cast<'a>, fact: &CapacityFact, span: Period, policy: &Policy) -> Used<'a> {
        let span_s = span.micros() as f64 * 1e-6;
        // What an engine counted over the interval lies evenly in the time in which it had GPUs.
        let present_us = cast.present_us.get(&*fact.replica).copied().unwrap_or(0);
        let part = span.micros() as f64 / present_us.max(1) as f64;
        let times: Vec<EngineTime> = self
            .engines
            .iter()
            .map(|engine| engine_time(engine, cast.served_by(engine), cast.period.start, (span, part), policy))
            .collect();
        let granted = self.granted(&times, span, policy.sharing);
        let busy_s = granted.iter().sum::<f64>().min(span_s);
        let cold_s = self.loading_s(fact, span).min(span_s - busy_s);
        let mut used = Used {
            requests: Vec::new(),
            lines: Vec::new(),
            cold_s,
            busy_s,
            idle_s: (span_s - busy_s - cold_s).max(0.0),
            tier: times.iter().map(|time| time.tier).max().unwrap_or(Tier::C),
        };
        let (of_engines, of_jobs) = granted.split_at(times.len());
        for ((engine, time), granted_s) in self.engines.iter().zip(times).zip(of_engines) {
            used.engine(engine, time, *granted_s, cast, policy);
        }
        for (job, granted_s) in self.jobs.iter().zip(of_jobs) {
            // A job that names no application is one.
            let application = job.context.application.clone().or_else(|| Some(job.job.clone()));
            let context = Context { application, ..job.context.clone() };
            let found = Found { tier: Some(Tier::B), ..Found::default() };
            used.lines.push((Key::line(Line::Job, &context), *granted_s, found));
        }
        used
    }

    /// Each engine's and then each job's part of the moments in which several worked.
    fn granted(&self, times: &[EngineTime], span: Period, sharing: SharingRule) -> Vec<f64> {
        let engines = times.iter().map(|time| Party { busy: time.busy.clone(), demand: time.demand, cap: 1.0 });
        let seconds = |at: Timestamp| at.micros_since(span.start) as f64 * 1e-6;
        let jobs = self.jobs.iter().map(|job| {
            let ran = job.period.intersect(span).map(|ran| (seconds(ran.start), seconds(ran.end)));
            let share = f64::from(job.share) * 1e-6;
            let cap = if self.size > 0.0 { (share / self.size).min(1.0) } else { 0.0 };
            Party { busy: ran.into_iter().collect(), demand: share, cap }
        });
        let mut parties: Vec<Party> = engines.chain(jobs).collect();
        if sharing == SharingRule::TimeSliced {
            parties.iter_mut().for_each(|party| party.demand = 1.0);
        }
        shared(&parties)
    }

    /// From the GPUs' start to the first engine that could serve; one of which that is unknown always could.
    fn loading_s(&self, fact: &CapacityFact, span: Period) -> f64 {
        let all: Option<Vec<Timestamp>> = self.engines.iter().map(|engine| engine.ready_at).collect();
        let ready = all.and_then(|all| all.into_iter().min());
        let started = fact.period.start.max(span.start);
        ready.map_or(0.0, |ready| ready.min(span.end).micros_since(started) as f64 * 1e-6)
    }
}

impl<'a> Used<'a> {
    /// What is said of the time that nobody used.
    pub(super) fn found(&self) -> Found {
        Found { tier: Some(self.tier), ..Found::default() }
    }

    /// Divides what one engine got. Traffic of which only tokens are known ran beside the metered requests where there were
    /// any, and otherwise in what looked idle.
    fn engine(&mut self, engine: &'a Engine, time: EngineTime, granted_s: f64, cast: &Cast<'_>, policy: &Policy) {
        let EngineTime { requests, counts, beside, quality, instead, tier, .. } = time;
        let outside_s = beside.outside_s.min(self.idle_s);
        self.idle_s -= outside_s;
        self.busy_s += outside_s;
        let counted_s = outside_s + granted_s * beside.part;
        let metered_s = granted_s * (1.0 - beside.part);

        let all: f64 = requests.iter().map(|one| one.weight + one.waste_s).sum();
        let scale = if all > 0.0 { metered_s / all } else { 0.0 };
        if all <= 0.0 {
            // Whoever was there did nothing that the method counts.
            self.busy_s -= metered_s;
            self.idle_s += metered_s;
        }
        let waste_s: f64 = requests.iter().map(|one| one.waste_s * scale).sum();
        let useful_s: f64 = requests.iter().map(|one| one.weight * scale).sum();
        let spreads = policy.waste == WasteRule::Spread && useful_s > 0.0;
        let spread = if spreads { 1.0 + waste_s / useful_s } else { 1.0 };
        let found = Found { estimated: false, tier: Some(tier), quality, instead };
        let model = engine.model.as_ref();
        for one in requests {
            let found = Found { estimated: one.estimated, tier: Some(one.tier), ..found };
            self.requests.push(Paid {
                at: one.at,
                seconds: one.weight * scale * spread,
                share: one.share,
                found,
                model,
            });
        }
        let key = |line: Line| Key::line(line, cast.owner).of_model(engine.model.clone());
        if !spreads {
            self.lines.push((key(Line::Waste), waste_s, found));
        }
        // How long they took is a guess, whatever is known of their tokens.
        let counted = Found { estimated: true, tier: Some(Tier::C), ..found };
        let all: f64 = beside.weights.iter().sum();
        let seconds = |weight: f64| if all > 0.0 { counted_s * weight / all } else { 0.0 };
        for (at, weight) in counts.iter().zip(&beside.weights) {
            self.requests.push(Paid { at: *at, seconds: seconds(*weight), share: None, found: counted, model });
        }
        let unobserved = beside.weights.last().copied().unwrap_or(0.0);
        self.lines.push((key(Line::Unobserved), seconds(unobserved), counted));
    }

    /// Books all but the idle time and returns what that cost.
    pub(super) fn book(self, cast: &Cast<'_>, amount: Amount, books: &mut Books<'_>) -> Result<Amount, MoneyError> {
        let Used { requests, mut lines, cold_s, idle_s, tier, .. } = self;
        let found = Found { tier: Some(tier), ..Found::default() };
        lines.push((Key::line(Line::ColdStart, cast.owner), cold_s, found));
        let seconds = requests.iter().map(|paid| paid.seconds).chain(lines.iter().map(|(_, seconds, _)| *seconds));
        let weights: Vec<u64> = seconds.chain([idle_s]).map(weight).collect();
        let mut parts = amount.split_or_last(&weights)?.into_iter();
        for (paid, part) in requests.iter().zip(parts.by_ref()) {
            books.request(paid.at, part, paid.share.as_ref(), paid.found, paid.model)?;
        }
        for ((key, _, found), part) in lines.into_iter().zip(parts.by_ref()) {
            books.line(key, part, found);
        }
        Ok(parts.next().unwrap_or_default())
    }
}
