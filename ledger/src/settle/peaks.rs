//! A pool's peak and who makes it, from what its own requests used minute by minute.

use std::collections::BTreeMap;

use super::Known;
use super::gather::{MinuteFacts, PoolFacts, gather};
use super::minutes::{INTERVAL_US, interval_of};
use crate::allocate::idle;
use crate::allocate::pool::Demand;
use crate::context::{Context, Label};
use crate::time::{Period, Timestamp};

/// The largest demand of `pool` in any minute of `horizon`, and what each consumer owes for keeping GPUs free for it: the
/// airport game over the horizon's minutes. A horizon that repeats itself, such as a day or a week, is a fair one; given to
/// [`settle`](super::settle) as [`Known::demand`] it makes a minute's headroom the same however it is settled.
#[must_use]
pub fn demand_of(known: &Known<'_>, pool: &Label, horizon: Period) -> Demand {
    let pools = gather(&Known { posted: &[], ..*known }, horizon);
    pools.get(pool).map_or_else(Demand::default, |facts| demand(facts, facts.minutes.keys().copied()))
}

/// The same over minutes that are gathered already.
pub(super) fn demand(facts: &PoolFacts<'_>, minutes: impl Iterator<Item = Timestamp>) -> Demand {
    let uses: Vec<BTreeMap<Who, f64>> = minutes
        .filter_map(|start| facts.minutes.get(&start).map(|minute| used(facts, minute, interval_of(start))))
        .collect();
    let peak = uses.iter().map(|slot| slot.values().sum::<f64>()).fold(0.0, f64::max);
    let headroom = idle::headroom(&uses).into_iter().map(|(who, owed)| (who.context(), owed)).collect();
    Demand { peak_gpus: (peak > 0.0).then_some(peak), headroom }
}

/// Who pays, as the rows of an allocation tell consumers apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Who([Option<Label>; 6]);

impl Who {
    fn of(context: &Context) -> Who {
        let Context { consumer, application, team, cost_centre, customer, feature, .. } = context;
        Who([consumer, application, team, cost_centre, customer, feature].map(Clone::clone))
    }

    fn context(self) -> Context {
        let [consumer, application, team, cost_centre, customer, feature] = self.0;
        Context { consumer, application, team, cost_centre, customer, feature, ..Context::default() }
    }
}

/// GPUs in use on average over one minute, by consumer: a replica is busy while any of its engines is, and its requests
/// share that by how long each ran.
fn used(facts: &PoolFacts<'_>, minute: &MinuteFacts<'_>, period: Period) -> BTreeMap<Who, f64> {
    let mut gpus: BTreeMap<&Label, f64> = BTreeMap::new();
    for fact in &minute.capacity {
        let there = fact.period.intersect(period).map_or(0, Period::micros) as f64;
        *gpus.entry(&fact.replica).or_default() += f64::from(fact.gpus) * there / INTERVAL_US as f64;
    }
    let mut ran: BTreeMap<&Label, Vec<(Period, Who)>> = BTreeMap::new();
    for one in minute.served.iter().map(|&place| &facts.served[place]) {
        let whole = Period { start: one.timeline.scheduled, end: one.timeline.last_token };
        let fact = facts.in_force(&one.engine, period, true);
        let only = gpus.keys().next().copied().filter(|_| gpus.len() == 1);
        let replica = only.or_else(|| fact.map(|fact| &fact.replica)).unwrap_or(&one.engine);
        if let (Some(within), Some((replica, _))) = (whole.intersect(period), gpus.get_key_value(replica)) {
            ran.entry(replica).or_default().push((within, Who::of(&one.context)));
        }
    }
    let mut used = BTreeMap::new();
    for (replica, mut runs) in ran {
        runs.sort_by_key(|(within, _)| within.start);
        let (mut busy_us, mut upto) = (0, period.start);
        for (within, _) in &runs {
            busy_us += within.end.micros_since(within.start.max(upto));
            upto = upto.max(within.end);
        }
        let all_us: u64 = runs.iter().map(|(within, _)| within.micros()).sum();
        let busy_gpus = gpus[replica] * busy_us as f64 / INTERVAL_US as f64;
        for (within, who) in runs {
            *used.entry(who).or_default() += busy_gpus * within.micros() as f64 / all_us.max(1) as f64;
        }
    }
    used
}

#[cfg(test)]
#[path = "peaks_tests.rs"]
mod tests;
