//! Which replicas of a deployment are there: what the ledger is told of their GPUs, what the engines and the actuator say, and
//! which of them the gateway may send to.

use std::collections::BTreeSet;

use fleet::actuate::Actual;
use fleet::scale::Pending;
use gateway::{Availability, Gateway};
use ledger::{CapacityFact, EngineFact, Label, Timestamp};

use super::plan::{Plan, Replica};
use crate::capacity::Described;
use crate::declared::{Declared, ReplicaEvent};
use crate::facts::Facts;

/// The replicas at one moment, in the order in which they start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roster {
    /// Whether each has its GPUs.
    pub running: Vec<bool>,
    /// Whether each serves. Behind one service only how many do is known, and the first are taken.
    pub ready: Vec<bool>,
    /// Those that have GPUs and do not serve, oldest first.
    pub pending: Vec<Pending>,
}

impl Roster {
    /// Takes out replicas whose metrics have gone silent while others' have not: their process is gone or hangs. When all are
    /// silent it is the reading that fails, and nobody is taken out.
    pub fn without_silent(&mut self, since: impl Fn(usize) -> Option<Timestamp>) {
        let serving = (0..self.ready.len()).filter(|&index| self.ready[index]);
        let silent: Vec<(usize, Timestamp)> =
            serving.clone().filter_map(|index| Some((index, since(index)?))).collect();
        if silent.len() == serving.count() {
            return;
        }
        for (index, since) in silent {
            self.ready[index] = false;
            self.pending.push(Pending { since, scheduled: None });
        }
        self.pending.sort_by_key(|pending| pending.since);
    }

    /// Takes out replicas that finish what they have.
    pub fn without(&mut self, draining: &BTreeSet<usize>) {
        for &index in draining {
            if let Some(ready) = self.ready.get_mut(index) {
                *ready = false;
            }
        }
    }

    /// How many serve.
    #[must_use]
    pub fn ready(&self) -> u32 {
        tally(&self.ready)
    }
}

fn tally(flags: &[bool]) -> u32 {
    u32::try_from(flags.iter().filter(|&&flag| flag).count()).unwrap_or(u32::MAX)
}

/// The replicas as declared pools and engines have them, and as the actuator last said.
#[must_use]
pub fn roster(plan: &Plan, declared: &Declared, actual: Option<&Actual>, now: Timestamp) -> Roster {
    of(plan, &declared.replicas(), &declared.engines(), actual, now)
}

fn of(
    plan: &Plan,
    gpus: &[CapacityFact],
    engines: &[(EngineFact, bool)],
    actual: Option<&Actual>,
    now: Timestamp,
) -> Roster {
    let fact = |name: &Label| gpus.iter().find(|fact| fact.pool == plan.id.pool && fact.replica == *name);
    let mut roster = Roster::default();
    let told_ready = actual.and_then(|actual| actual.ready).map(|ready| usize::try_from(ready).unwrap_or(usize::MAX));
    let mut waiting = Vec::new();
    for (index, replica) in plan.replicas.iter().enumerate() {
        let engine = engine_of(replica, engines);
        // Committed GPUs stay when nothing runs on them: then the engine, or who was asked for how many, knows.
        let parked = match &replica.upstream {
            Some(_) => engine.is_some_and(|(_, runs)| !runs),
            None => actual.is_some_and(|actual| index >= usize::try_from(actual.replicas).unwrap_or(usize::MAX)),
        };
        let running = fact(&replica.name).filter(|_| !parked);
        let ready = running.is_some()
            && match &replica.upstream {
                Some(_) if actual.is_some_and(|actual| index < actual.serving.len()) => {
                    actual.is_some_and(|actual| actual.serving[index])
                }
                Some(_) => {
                    let heard = engine.is_some_and(|(fact, runs)| *runs && fact.ready_at.is_none_or(|at| at <= now));
                    // Where no metrics can tell and no actuator does, whatever runs is taken to serve.
                    let blind = !replica.metrics && told_ready.is_none();
                    heard || blind || (!replica.metrics && told_ready.is_some_and(|ready| index < ready))
                }
                None => match told_ready {
                    Some(ready) => index < ready,
                    // Nobody says: it serves after the time that a start usually takes.
                    None => running.is_some_and(|fact| {
                        fact.period.start <= plan.since || now >= fact.period.start.plus_micros(plan.cold_start_us())
                    }),
                },
            };
        roster.running.push(running.is_some());
        roster.ready.push(ready);
        if let Some(fact) = running
            && !ready
        {
            let since = engine.map_or(fact.period.start, |(engine, _)| engine.period.start.max(fact.period.start));
            waiting.push(Pending { since, scheduled: None });
        }
    }
    // Of replicas on their way the actuator knows more: whether they have a place.
    roster.pending = match actual {
        Some(actual) if actual.pending.len() >= waiting.len() => {
            actual.pending.iter().map(|one| Pending { since: one.since, scheduled: one.scheduled }).collect()
        }
        _ => waiting,
    };
    roster.pending.sort_by_key(|pending| pending.since);
    roster
}

/// Tells the ledger that the first `replicas` have GPUs and the others do not. What it knows already changes nothing.
pub fn declare(plan: &Plan, declared: &Declared, facts: &Facts, replicas: u32, now: Timestamp) {
    if !tell(plan, declared, replicas, now) {
        return;
    }
    // Written at once: after a crash nobody would know any more when a replica ended.
    let observed = declared.observe(now);
    if let Err(error) = facts.append(&observed) {
        tracing::error!("replicas could not be written: {error}");
        declared.put_back(observed);
    }
}

/// Whether anything was new. Committed GPUs stay in the books when nothing runs on them, because they are paid for.
fn tell(plan: &Plan, declared: &Declared, replicas: u32, now: Timestamp) -> bool {
    let running = declared.replicas();
    let engines = declared.engines();
    let mut changed = false;
    for (index, replica) in (0u32..).zip(&plan.replicas) {
        let has_gpus = running.iter().any(|fact| fact.pool == plan.id.pool && fact.replica == replica.name);
        let runs = has_gpus && engine_of(replica, &engines).is_none_or(|(_, runs)| *runs);
        let event = match (index < replicas, has_gpus) {
            // The price is the pool's as it is now.
            (true, false) => ReplicaEvent::Started(Described {
                gpus: Some(plan.gpus),
                deployment: Some(plan.id.name.clone()),
                ..Described::default()
            }),
            (true, true) if !runs => ReplicaEvent::Resumed,
            (false, true) if index >= plan.bounds.committed => ReplicaEvent::Stopped,
            (false, true) if runs && replica.upstream.is_some() => ReplicaEvent::Parked,
            _ => continue,
        };
        match declared.replica((&plan.id.pool, &replica.name), &event, None, now) {
            Ok(_) => changed = true,
            Err(error) => {
                let (deployment, replica) = (&plan.id.name, &replica.name);
                tracing::error!(%deployment, %replica, "the ledger was not told of a replica: {error}");
            }
        }
    }
    changed
}

/// The engine that a replica's upstream leads to, and whether it runs.
fn engine_of<'a>(replica: &Replica, engines: &'a [(EngineFact, bool)]) -> Option<&'a (EngineFact, bool)> {
    let upstream = replica.upstream.as_ref()?;
    engines.iter().find(|(fact, _)| fact.engine == *upstream)
}

/// Tells the ledger which replicas serve, where their own metrics cannot.
pub fn declare_ready(plan: &Plan, declared: &Declared, roster: &Roster, now: Timestamp) {
    let engines = declared.engines();
    for (replica, _) in plan.replicas.iter().zip(&roster.ready).filter(|(_, ready)| **ready) {
        let Some(upstream) = &replica.upstream else { continue };
        let late = |(fact, runs): &(EngineFact, bool)| {
            fact.engine == *upstream && *runs && fact.ready_at.is_some_and(|at| at > now)
        };
        if engines.iter().any(late)
            && let Err(error) = declared.replica((&plan.id.pool, &replica.name), &ReplicaEvent::Ready, None, now)
        {
            tracing::error!(replica = %replica.name, "the ledger was not told of a replica: {error}");
        }
    }
}

/// Lets the gateway send to what serves and is to stay, and to nothing else.
pub fn offer(plan: &Plan, gateway: &Gateway, roster: &Roster, draining: &BTreeSet<usize>) {
    if let Some(service) = &plan.service {
        let availability = match (roster.ready() > 0, draining.contains(&0)) {
            (true, false) => Availability::Serving,
            (true, true) => Availability::Draining,
            (false, _) => Availability::Away,
        };
        gateway.set_available(service, availability);
        return;
    }
    for (index, replica) in plan.replicas.iter().enumerate() {
        let Some(upstream) = &replica.upstream else { continue };
        let availability = match (roster.ready.get(index), draining.contains(&index)) {
            (Some(true), false) => Availability::Serving,
            (Some(true), true) => Availability::Draining,
            _ => Availability::Away,
        };
        gateway.set_available(upstream, availability);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Loaded};
    use crate::scaling::plan::plans;
    use ledger::Period;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn loaded(upstreams: u32, engine: &str, ceiling: u32) -> Loaded {
        let mut text = "[[pool]]\nname = \"shared\"\ngpu = \"H100\"\ngpus = 2\nusd_per_gpu_hour = \"3\"\nreplicas = [{ name = \"r0\", gpus \
                        = 1 }, { name = \"r1\", gpus = 1 }]\n"
            .to_owned();
        for number in 0..upstreams {
            text += &format!(
                "[[upstream]]\nname = \"chat-{number}\"\nkind = \"vllm\"\nbase_url = \"http://h\"\npool = \"shared\"\ndeployment = \
                 \"chat\"\nengine = {{ replica = \"r{number}\"{engine} }}\n"
            );
        }
        text += &format!(
            "[[scale]]\ndeployment = \"chat\"\npool = \"shared\"\nceiling = {ceiling}\ncapacity = {{ requests_per_s = 1, input_tokens = \
             1, output_tokens = 1 }}\n"
        );
        Loaded { config: config::parse(&text).unwrap(), file: None }
    }

    fn gpus(replica: &str, start: i64) -> CapacityFact {
        CapacityFact {
            pool: "shared".into(),
            replica: replica.into(),
            period: Period { start: at(start), end: at(start) },
            ..CapacityFact::default()
        }
    }

    fn engine(name: &str, ready_at: Option<i64>) -> (EngineFact, bool) {
        (EngineFact { engine: name.into(), ready_at: ready_at.map(at), ..EngineFact::default() }, true)
    }

    #[test]
    fn a_replica_serves_when_its_engine_was_heard() {
        let plan = plans(&loaded(2, "", 2), at(0)).unwrap().swap_remove(0);
        let engines = [engine("chat-0", Some(5)), engine("chat-1", Some(500))];
        let roster = of(&plan, &[gpus("r1", 7), gpus("r0", 1)], &engines, None, at(10));
        assert_eq!((roster.ready, roster.running), (vec![true, false], vec![true, true]));
        assert_eq!(roster.pending, [Pending { since: at(7), scheduled: None }]);
        let roster = of(&plan, &[gpus("r1", 7)], &engines, None, at(10));
        assert_eq!((roster.ready, roster.running), (vec![false, false], vec![false, true]), "no GPUs, no service");
    }

    #[test]
    fn a_replica_gone_silent_does_not_serve_unless_all_have() {
        let both = Roster { running: vec![true; 2], ready: vec![true; 2], pending: Vec::new() };
        let mut one = both.clone();
        one.without_silent(|index| (index == 0).then_some(at(3)));
        assert_eq!((one.ready, one.pending), (vec![false, true], vec![Pending { since: at(3), scheduled: None }]));
        let mut all = both.clone();
        all.without_silent(|_| Some(at(3)));
        assert_eq!(all, both, "then it is the reading that fails");
        let mut draining = both;
        draining.without(&BTreeSet::from([1, 7]));
        assert_eq!(draining.ready(), 1);
    }

    #[test]
    fn where_no_metrics_can_tell_the_actuator_does() {
        let plan = plans(&loaded(2, ", metrics = \"none\"", 2), at(0)).unwrap().swap_remove(0);
        let both = [gpus("r0", 1), gpus("r1", 7)];
        assert_eq!(of(&plan, &both, &[], None, at(10)).ready(), 2, "whatever runs is taken to serve");
        let actual = Actual { replicas: 2, ready: Some(1), ..Actual::default() };
        let roster = of(&plan, &both, &[], Some(&actual), at(10));
        assert_eq!((roster.ready(), roster.pending.len()), (1, 1));
    }

    #[test]
    fn behind_one_service_the_actuator_counts() {
        let plan = plans(&loaded(1, "", 3), at(0)).unwrap().swap_remove(0);
        let three = [gpus("r0", 1), gpus("r1", 7), gpus("chat-2", 8)];
        let actual = Actual { replicas: 3, ready: Some(2), ..Actual::default() };
        let roster = of(&plan, &three, &[], Some(&actual), at(10));
        assert_eq!((roster.ready(), roster.running, roster.pending[0].since), (2, vec![true; 3], at(8)));
        let blind = |second| of(&plan, &[gpus("r0", 0), gpus("r1", 7)], &[], None, at(second)).ready();
        assert_eq!(
            (blind(10), blind(7 + 300)),
            (1, 2),
            "one ran before us, the other takes as long as it usually does"
        );
    }

    #[test]
    fn the_ledger_hears_of_what_starts_and_stops_once() {
        let data = tempfile::tempdir().unwrap();
        let loaded = loaded(2, "", 2);
        let declared = Declared::open(data.path(), &loaded, at(0)).unwrap();
        let plan = plans(&loaded, at(0)).unwrap().swap_remove(0);
        let told = |replicas, now| {
            let changed = tell(&plan, &declared, replicas, at(now));
            (changed, declared.replicas().iter().map(|fact| fact.replica.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(told(1, 10), (true, vec!["r0".to_owned()]));
        assert_eq!(told(1, 11), (false, vec!["r0".to_owned()]));
        assert_eq!(told(2, 20), (true, vec!["r0".to_owned(), "r1".to_owned()]));
        let fresh = declared.replicas().into_iter().find(|fact| &*fact.replica == "r1").unwrap();
        assert_eq!((fresh.period.start, fresh.deployment.as_deref(), fresh.gpus), (at(20), Some("chat"), 1));
        assert_eq!(roster(&plan, &declared, None, at(21)).pending.len(), 1, "its engine was not heard yet");
    }
}
