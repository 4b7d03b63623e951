//! What guards and policies are tried on.

use super::{Guards, guarded};
use crate::scale::{Bounds, Decision, ManualChange, Objective, Observation, Past, Pending, Sample};
use ledger::Timestamp;

/// Microseconds of a second.
pub(crate) const SECOND: i64 = 1_000_000;
const LOOK_S: f64 = 10.0;

/// An hour of looks and decisions ten seconds apart, and whatever a test changes of it.
#[derive(Debug, Clone)]
pub(crate) struct Scene {
    pub now: Timestamp,
    pub samples: Vec<Sample>,
    pub ready: u32,
    pub pending: Vec<Pending>,
    pub decisions: Vec<Past>,
    pub manual: Option<ManualChange>,
    pub bounds: Bounds,
    pub guards: Guards,
}

impl Scene {
    /// So many replicas serve this load all the time, and nobody wants another number.
    pub fn steady(ready: u32, load: f64) -> Scene {
        let now = Timestamp::from_micros(1_715_000_000 * SECOND);
        let mut scene = Scene {
            now,
            samples: Vec::new(),
            ready,
            pending: Vec::new(),
            decisions: Vec::new(),
            manual: None,
            bounds: bounds(),
            guards: Guards::default(),
        };
        for back in (0..360_u16).rev() {
            let at = scene.ago(f64::from(back) * LOOK_S);
            scene.samples.push(look(at, ready, load));
            if back > 0 {
                scene.decisions.push(Past { at, wanted: 0, desired: ready });
            }
        }
        scene
    }

    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// The newest look.
    pub fn last(&mut self) -> &mut Sample {
        self.samples.last_mut().expect("there are looks")
    }

    /// So many replicas were asked for a while ago.
    pub fn wait_for(&mut self, count: usize, seconds: f64, scheduled: Option<bool>) {
        self.pending = vec![Pending { since: self.ago(seconds), scheduled }; count];
    }

    /// So many seconds before now.
    pub fn ago(&self, seconds: f64) -> Timestamp {
        crate::scale::earlier(self.now, seconds)
    }

    pub fn provisioned(&self) -> u32 {
        self.observation().provisioned()
    }

    /// The load of the last `seconds`.
    pub fn set_load(&mut self, load: f64, seconds: f64) {
        let since = self.ago(seconds);
        for sample in self.samples.iter_mut().filter(|sample| sample.at >= since) {
            *sample = Sample { pending: sample.pending, ..look(sample.at, sample.ready, load) };
        }
    }

    /// Time goes on: a look with the load of the last one and the replicas of now, and nothing older than an hour.
    pub fn pass(&mut self, micros: i64) {
        let load = self.samples.last().and_then(|sample| sample.load).unwrap_or(0.0);
        let pending = u32::try_from(self.pending.len()).unwrap();
        let mut left = micros;
        while left > 0 {
            let step = left.min(10 * SECOND);
            self.now = self.now.plus_micros(step);
            self.samples.push(Sample { pending, ..look(self.now, self.ready, load) });
            left -= step;
        }
        let since = self.ago(3600.0);
        self.samples.retain(|sample| sample.at >= since);
        self.decisions.retain(|past| past.at >= since);
    }

    pub fn observation(&self) -> Observation<'_> {
        Observation {
            samples: &self.samples,
            history: &[],
            history_start: Timestamp::from_micros(0),
            future: &[],
            ready: self.ready,
            pending: &self.pending,
            draining: 0,
            decisions: &self.decisions,
            manual: self.manual,
            objective: Objective::default(),
            bounds: self.bounds,
        }
    }

    /// What the guards leave of a policy's wish.
    pub fn guard(&self, wanted: u32) -> Decision {
        guarded(wish(wanted), &self.observation(), &self.guards, self.now)
    }
}

pub(crate) fn wish(wanted: u32) -> Decision {
    Decision { replicas: wanted, ..Decision::default() }
}

fn bounds() -> Bounds {
    Bounds {
        floor: 1,
        ceiling: 40,
        committed: 0,
        static_replicas: 10,
        cold_start_s: 300.0,
        batch_at_capacity: 16.0,
        requests_per_s_at_capacity: 10.0,
        input_tokens_per_s_at_capacity: 10_000.0,
        output_tokens_per_s_at_capacity: 2_000.0,
    }
}

fn look(at: Timestamp, ready: u32, load: f64) -> Sample {
    let each = if ready == 0 { 0.0 } else { (load / f64::from(ready)).min(1.0) };
    Sample {
        at,
        ready,
        pending: 0,
        running: Some(16.0 * load.min(f64::from(ready))),
        waiting: Some(0.0),
        kv_used: Some(0.5 * each),
        utilisation: Some(each),
        arrivals_per_s: Some(10.0 * load),
        input_tokens_per_s: None,
        output_tokens_per_s: None,
        load: Some(load),
        prefill_load: Some(load / 4.0),
        ttft_s: Some(0.3),
        tpot_s: Some(0.03),
    }
}
