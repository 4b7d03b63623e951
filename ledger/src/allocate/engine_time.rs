//! What one engine's requests used of it within a span, by the best that is known of each.
//!
//! Where its steps are known they decide (tier A, [`joined`](super::joined)), elsewhere its requests' timelines (tier B,
//! [`reconstruct`](super::reconstruct)); requests of which only tokens are known and traffic that nobody metered come
//! beside or between them (tier C, [`counted`](super::counted)). The reconstruction is compared with the engine's own
//! samples and with the batches of its own steps, and the score stands on each posting.

use super::counted::{Beside, Metered, counted, counted_of, own_word, place, scaled};
use super::counters::Counted;
use super::joined::{Joined, join};
use super::policy::{Method, Policy, SharingRule};
use super::pool::{Engine, Known, Served};
use super::quality::{EngineSample, compare};
use super::reconstruct::{Ran, Reconstructed, in_order, reconstruct};
use super::share::Share;
use super::terms::tokens_within;
use crate::posting::Tier;
use crate::time::{Period, Timestamp};

/// The part of a request's seconds that must come from steps for its posting to say so.
const MOSTLY: f64 = 0.99;

/// What one request weighs in its engine's time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weighed {
    /// Its place among all that were served.
    pub(super) at: usize,
    /// Seconds of the replica, or tokens where the method counts them.
    pub(super) weight: f64,
    pub(super) waste_s: f64,
    /// Where the method has terms.
    pub(super) share: Option<Share>,
    pub(super) tier: Tier,
    /// Whether any part of its timeline is a guess.
    pub(super) estimated: bool,
}

/// One engine in one span.
#[derive(Debug, Clone)]
pub(super) struct EngineTime {
    pub(super) requests: Vec<Weighed>,
    /// The requests of which only tokens are known, by their place among all that were served.
    pub(super) counts: Vec<usize>,
    /// What those and, last, the unobserved traffic weigh.
    pub(super) beside: Beside,
    /// When it worked, in seconds from the span's start.
    pub(super) busy: Vec<(f64, f64)>,
    /// What it demands of the replica when it works, by the model; 1 where that is unknown.
    pub(super) demand: f64,
    /// How well the reconstruction follows the engine, in millionths.
    pub(super) quality: Option<u32>,
    /// The method in force, when it is not the policy's.
    pub(super) instead: Option<Method>,
    /// The worst that is known of anything in it.
    pub(super) tier: Tier,
}

/// Looks at `engine` within `span`, which is part of an interval that begins at `start`. `own` are the requests that it
/// served, each with its place among all that were; of what it counted over the whole interval, `part` belongs to the span.
pub(super) fn engine_time(
    engine: &Engine,
    own: &[(usize, &Served)],
    start: Timestamp,
    (span, part): (Period, f64),
    policy: &Policy,
) -> EngineTime {
    let known = engine.constants.is_some() || policy.method != Method::Roofline;
    let instead = (!known).then_some(Method::WeightedTokens);
    let policy = Policy { method: instead.unwrap_or(policy.method), ..*policy };
    let order = in_order(own, span);
    let joined = match (policy.method, &engine.constants) {
        (Method::Roofline, Some(constants)) => join(engine, constants, &order, span, &policy),
        _ => None,
    };
    let whole = [span];
    let windows = joined.as_ref().map_or(&whole[..], |joined| &joined.holes);
    let compared = !engine.samples.is_empty() || joined.is_some();
    let swept = reconstruct(engine, &order, windows, &policy, compared.then_some(span.end));
    let busy = busy(&order, joined.as_ref(), windows, span);
    let busy_s: f64 = busy.iter().map(|(from, until)| until - from).sum();
    let requests = weighed(&order, joined.as_ref(), &swept, span, policy.method);

    let counts: Vec<(usize, Counted)> = own
        .iter()
        .filter(|(_, served)| served.known == Known::Counts && span.contains(served.timeline.arrived))
        .map(|(at, served)| (*at, counted(&served.timeline)))
        .collect();
    let unobserved = scaled(engine.unobserved.unwrap_or_default(), part);
    let (sampled_s, running) = own_word(engine, start, span);
    let metered = Metered {
        counted: counted_of(&order, span),
        busy_s,
        // Steps say when the engine worked for nobody we know; samples only how often it was seen at work.
        worked_s: joined
            .as_ref()
            .filter(|joined| joined.holes.is_empty())
            .map(|joined| busy_s + joined.strangers_s)
            .or(sampled_s),
        running,
        span_s: span.micros() as f64 * 1e-6,
        all_ours: engine.unobserved.is_none_or(|unobserved| unobserved == Counted::default()),
    };
    let items: Vec<Counted> = counts.iter().map(|(_, counted)| *counted).chain([unobserved]).collect();
    let beside = place(engine, &items, &metered, policy.method);
    let predicted_s = predicted_s(engine, &order, joined.as_ref(), &swept, windows, &policy);
    let only_counted = requests.is_empty() && beside.weights.iter().any(|weight| *weight > 0.0);
    EngineTime {
        demand: predicted_s.filter(|_| busy_s > 0.0).map_or(1.0, |predicted_s| predicted_s / busy_s),
        quality: compared
            .then(|| quality(engine, own, joined.as_ref(), &swept, start, span))
            .flatten()
            .filter(|_| !only_counted),
        tier: if only_counted { Tier::C } else { requests.iter().map(|one| one.tier).max().unwrap_or(Tier::B) },
        counts: counts.into_iter().map(|(at, _)| at).collect(),
        requests,
        beside,
        busy,
        instead,
    }
}

fn weighed(
    order: &[Ran<'_>],
    joined: Option<&Joined>,
    swept: &Reconstructed,
    span: Period,
    method: Method,
) -> Vec<Weighed> {
    let rows = order.iter().zip(&swept.parts).enumerate();
    rows.map(|(index, (ran, part))| {
        let stepped = joined.map(|joined| joined.shares[index]).unwrap_or_default();
        let mut share = part.share;
        share += stepped;
        let by_steps = joined.is_some() && stepped.total_s() >= MOSTLY * (share.total_s() + part.waste_s);
        let (weight, waste_s) = match method {
            Method::Roofline | Method::EqualTime => (share.total_s(), part.waste_s),
            Method::Tokens | Method::WeightedTokens => {
                let [input, output] = tokens_within(&ran.timeline, span);
                (input + method.output_weight() * output, 0.0)
            }
        };
        Weighed {
            at: ran.at,
            weight,
            waste_s,
            share: (method == Method::Roofline).then_some(share),
            tier: if by_steps { Tier::A } else { Tier::B },
            estimated: ran.served.estimated,
        }
    })
    .collect()
}

/// When the engine worked: in its steps, and where none are known as long as a request was there.
fn busy(order: &[Ran<'_>], joined: Option<&Joined>, windows: &[Period], span: Period) -> Vec<(f64, f64)> {
    let mut periods: Vec<Period> = joined.map(|joined| joined.busy.clone()).unwrap_or_default();
    let ran = order.iter().map(|ran| Period { start: ran.timeline.scheduled, end: ran.timeline.last_token });
    let mut presence = union(ran.filter_map(|period| period.intersect(span))).into_iter().peekable();
    for window in windows {
        while let Some(present) = presence.peek() {
            periods.extend(present.intersect(*window));
            if present.end > window.end {
                break;
            }
            presence.next();
        }
    }
    periods.sort_by_key(|period| period.start);
    let seconds = |at: Timestamp| at.micros_since(span.start) as f64 * 1e-6;
    union(periods.into_iter()).iter().map(|period| (seconds(period.start), seconds(period.end))).collect()
}

/// The union of periods that come in the order of their starts.
fn union(periods: impl Iterator<Item = Period>) -> Vec<Period> {
    let mut stretches: Vec<Period> = Vec::new();
    for period in periods {
        match stretches.last_mut() {
            Some(last) if period.start <= last.end => last.end = last.end.max(period.end),
            _ => stretches.push(period),
        }
    }
    stretches
}

/// Seconds of the replica that the model predicts for what ran; needed only where engines share by demand.
fn predicted_s(
    engine: &Engine,
    order: &[Ran<'_>],
    joined: Option<&Joined>,
    swept: &Reconstructed,
    windows: &[Period],
    policy: &Policy,
) -> Option<f64> {
    engine.constants?;
    match policy.sharing {
        SharingRule::TimeSliced => None,
        SharingRule::Mps if policy.method == Method::EqualTime => {
            let by_model = Policy { method: Method::Roofline, ..*policy };
            Some(reconstruct(engine, order, windows, &by_model, None).predicted_s)
        }
        SharingRule::Mps => Some(swept.predicted_s + joined.map_or(0.0, |joined| joined.predicted_s)),
    }
}

/// The score of the reconstruction within the span, less where steps are missing. `None` when nothing was to compare with.
fn quality(
    engine: &Engine,
    own: &[(usize, &Served)],
    joined: Option<&Joined>,
    swept: &Reconstructed,
    start: Timestamp,
    span: Period,
) -> Option<u32> {
    let seconds = |at: Timestamp| (at.micros() - swept.base.micros()) as f64 * 1e-6;
    let (from_s, until_s) = (seconds(span.start), seconds(span.end));
    let offset_s = seconds(start);
    let reported = engine.samples.iter().map(|sample| EngineSample { at_s: offset_s + sample.at_s, ..*sample });
    let stepped = joined.iter().flat_map(|joined| &joined.running);
    let stepped = stepped.map(|&(at, running)| EngineSample {
        at_s: seconds(at),
        running: Some(running),
        ..EngineSample::default()
    });
    let samples: Vec<EngineSample> =
        reported.chain(stepped).filter(|sample| from_s <= sample.at_s && sample.at_s < until_s).collect();
    if samples.iter().all(|sample| sample.running.is_none() && sample.waiting.is_none() && sample.kv_used.is_none()) {
        return None;
    }
    let inside = |at_s: f64| at_s.clamp(from_s, until_s);
    let segments: Vec<_> = swept
        .segments
        .iter()
        .map(|segment| super::sweep::Segment {
            from_s: inside(segment.from_s),
            until_s: inside(segment.until_s),
            ..*segment
        })
        .filter(|segment| segment.from_s < segment.until_s)
        .collect();
    let times = |of: fn(&Served) -> Timestamp| {
        let mut times: Vec<f64> = own.iter().map(|(_, served)| seconds(of(served))).collect();
        times.sort_by(f64::total_cmp);
        times
    };
    let arrived = times(|served| served.timeline.ordered().arrived);
    let scheduled = times(|served| served.timeline.ordered().scheduled);
    let upto = |times: &[f64], t: f64| times.partition_point(|&at| at <= t) as f64;
    let waiting = |t: f64| upto(&arrived, t) - upto(&scheduled, t);
    let score = compare(&segments, waiting, &samples, engine.limits.kv_tokens).score * covered(joined, swept);
    Some(millionths(score))
}

/// The part of the seconds that comes from steps, where the engine reports them at all.
fn covered(joined: Option<&Joined>, swept: &Reconstructed) -> f64 {
    let Some(joined) = joined else { return 1.0 };
    let stepped: f64 = joined.shares.iter().map(Share::total_s).sum();
    let guessed: f64 = swept.parts.iter().map(|part| part.share.total_s() + part.waste_s).sum();
    if stepped + guessed > 0.0 { stepped / (stepped + guessed) } else { 1.0 }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a range that fits")]
fn millionths(score: f64) -> u32 {
    (score.clamp(0.0, 1.0) * 1e6).round() as u32
}
