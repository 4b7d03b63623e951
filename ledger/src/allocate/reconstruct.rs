//! Tier B of a pool's interval: one engine's requests, swept, and what of it lies within given windows.

use std::collections::BTreeMap;

use super::policy::{FixedRule, Method, Policy};
use super::pool::{Engine, Known, Served};
use super::sweep::{Belongs, Part, Segment, Sweep};
use super::timeline::EngineTimeline;
use crate::context::Label;
use crate::time::{Period, Timestamp};

/// A request of an engine that ran within a span: its timeline in order, and whose it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ran<'a> {
    pub(super) timeline: EngineTimeline,
    pub(super) served: &'a Served,
    /// Its place among all that were served.
    pub(super) at: usize,
    /// Its tenant's number among those of the engine.
    pub(super) tenant: u32,
    /// Its adapter's number among those of the engine.
    pub(super) adapter: Option<u32>,
}

/// The requests with a timeline that ran within `span`, in the order in which they were scheduled. Whoever names no consumer
/// is the same tenant as all others that name none.
pub(super) fn in_order<'a>(own: &[(usize, &'a Served)], span: Period) -> Vec<Ran<'a>> {
    let mut order: Vec<Ran<'a>> = own
        .iter()
        .filter(|(_, served)| served.known == Known::Timeline)
        .map(|&(at, served)| Ran { timeline: served.timeline.ordered(), served, at, tenant: 0, adapter: None })
        .filter(|ran| ran.timeline.scheduled < span.end && span.start < ran.timeline.last_token)
        .collect();
    order.sort_by_key(|ran| (ran.timeline.scheduled, ran.served.attempt));
    let mut tenants: BTreeMap<Option<&Label>, u32> = BTreeMap::new();
    let mut adapters: BTreeMap<&Label, u32> = BTreeMap::new();
    for ran in &mut order {
        let next = u32::try_from(tenants.len()).unwrap_or(u32::MAX);
        ran.tenant = *tenants.entry(ran.served.context.consumer.as_ref()).or_insert(next);
        ran.adapter = ran.served.adapter.as_ref().map(|adapter| {
            let next = u32::try_from(adapters.len()).unwrap_or(u32::MAX);
            *adapters.entry(&adapter.model).or_insert(next)
        });
    }
    order
}

/// What a sweep says of the windows.
#[derive(Debug, Default)]
pub(super) struct Reconstructed {
    /// What each request used within the windows, in the order of the requests.
    pub(super) parts: Vec<Part>,
    /// Seconds of the replica that the model predicts for the windows.
    pub(super) predicted_s: f64,
    /// The recorded batch over time, if asked for, in seconds from `base`.
    pub(super) segments: Vec<Segment>,
    pub(super) base: Timestamp,
}

/// Sweeps the requests of `order` and keeps what happens within `windows`, which are ordered and do not overlap. What
/// happened before belongs to an interval before; the state at a window's start does not. Nothing without constants, unless
/// the method needs none. The batch over time is recorded up to `record_until`.
pub(super) fn reconstruct(
    engine: &Engine,
    order: &[Ran<'_>],
    windows: &[Period],
    policy: &Policy,
    record_until: Option<Timestamp>,
) -> Reconstructed {
    let mut found = Reconstructed { parts: vec![Part::default(); order.len()], ..Reconstructed::default() };
    let Some(base) = order.first().map(|ran| ran.timeline.scheduled) else { return found };
    found.base = base;
    let mut sweep = match (policy.method, engine.constants) {
        (Method::EqualTime, _) => Sweep::equal_time(engine.limits, base),
        (_, Some(constants)) => Sweep::new(constants, engine.limits, base).speculating(engine.speculation),
        (_, None) => return found,
    };
    if policy.fixed == FixedRule::Tenant {
        sweep = sweep.by_tenant();
    }
    if record_until.is_some() {
        sweep = sweep.recording();
    }
    let mut adapters: Vec<u32> = Vec::new();
    let mut cuts = windows.iter().flat_map(|window| [(window.start, true), (window.end, false)]).peekable();
    let (mut inside, mut before_s) = (false, 0.0);
    let mut cut = |sweep: &mut Sweep, found: &mut Reconstructed, (at, enters): (Timestamp, bool), inside: &mut bool| {
        sweep.cut(at, &mut |part| found.keep(part, *inside));
        if enters {
            before_s = sweep.predicted_s();
        } else {
            found.predicted_s += sweep.predicted_s() - before_s;
        }
        *inside = enters;
    };
    for (tag, ran) in order.iter().enumerate() {
        while let Some(next) = cuts.next_if(|(at, _)| *at <= ran.timeline.scheduled) {
            cut(&mut sweep, &mut found, next, &mut inside);
        }
        let adapter = ran.adapter.zip(ran.served.adapter.as_ref()).map(|(number, adapter)| {
            // Numbers are given in the order in which they first appear, so at most one is new.
            if adapters.len() <= number as usize {
                adapters.push(sweep.adapter(adapter.bytes as f64, adapter.flop_per_token as f64));
            }
            adapters[number as usize]
        });
        let belongs = Belongs { tenant: ran.tenant, adapter };
        sweep.push_of(tag as u64, &ran.timeline, belongs, &mut |part| found.keep(part, inside));
    }
    for next in cuts {
        cut(&mut sweep, &mut found, next, &mut inside);
    }
    if let Some(until) = record_until {
        sweep.advance(until, &mut |_| ());
        found.segments = sweep.segments().to_vec();
    }
    found
}

impl Reconstructed {
    fn keep(&mut self, part: Part, inside: bool) {
        let sum = usize::try_from(part.tag).ok().and_then(|tag| self.parts.get_mut(tag)).filter(|_| inside);
        if let Some(sum) = sum {
            sum.share += part.share;
            sum.waste_s += part.waste_s;
            sum.preempted_s += part.preempted_s;
        }
    }
}
