//! What guards and policies are tried on.

use ledger::Timestamp;

use super::{Guards, guarded};
use crate::scale::observe::{Bounds, Decision, ManualChange, Objective, Observation, Past, Pending, Sample};

/// Ten minutes of looks, one every ten seconds, and whatever a test changes of it.
#[derive(Debug, Clone)]
pub(crate) struct Scene {
    pub now_s: f64,
    pub samples: Vec<Sample>,
    pub ready: u32,
    pub pending: Vec<Pending>,
    pub decisions: Vec<Past>,
    pub manual: Option<ManualChange>,
    pub bounds: Bounds,
    pub guards: Guards,
}

impl Scene {
    /// So many replicas that serve this load, 16 requests at once each.
    pub fn steady(ready: u32, load: f64) -> Scene {
        let mut scene = Scene {
            now_s: 100_000.0,
            samples: Vec::new(),
            ready,
            pending: Vec::new(),
            decisions: Vec::new(),
            manual: None,
            bounds: bounds(),
            guards: Guards::default(),
        };
        for back in (0..60_u8).rev() {
            let at = scene.at(scene.now_s - 10.0 * f64::from(back));
            scene.samples.push(look(at, ready, load));
        }
        scene
    }

    pub fn at(&self, seconds: f64) -> Timestamp {
        #[expect(clippy::cast_possible_truncation, reason = "a test's seconds")]
        Timestamp::from_micros((seconds * 1e6) as i64)
    }

    pub fn now(&self) -> Timestamp {
        self.at(self.now_s)
    }

    pub fn last(&mut self) -> &mut Sample {
        self.samples.last_mut().expect("there are looks")
    }

    /// One more look, now, as the last one was.
    pub fn look_again(&mut self) {
        let again = Sample { at: self.now(), ..*self.last() };
        self.samples.push(again);
    }

    /// So many were wanted and decided ten seconds ago.
    pub fn past(&mut self, replicas: u32) {
        self.decisions.push(Past { at: self.at(self.now_s - 10.0), wanted: replicas, desired: replicas });
    }

    /// So many replicas were asked for a while ago.
    pub fn wait_for(&mut self, count: usize, seconds: f64, scheduled: Option<bool>) {
        self.pending = vec![Pending { since: self.at(self.now_s - seconds), scheduled }; count];
    }

    /// As many changes of direction within the hour, the last one up.
    pub fn zigzag(&mut self, changes: u8) {
        for step in 0..=changes + 1 {
            let desired = if (changes + 1 - step).is_multiple_of(2) { 6 } else { 5 };
            let at = self.at(self.now_s - 300.0 - 60.0 * f64::from(changes + 1 - step));
            self.decisions.push(Past { at, wanted: desired, desired });
        }
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

    /// What is left of a policy's wish.
    pub fn guarded(&self, wanted: u32) -> Decision {
        let wish = Decision { replicas: wanted, ..Decision::default() };
        guarded(wish, &self.observation(), &self.guards, self.now())
    }
}

pub(crate) fn bounds() -> Bounds {
    Bounds {
        floor: 0,
        ceiling: 1_000,
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
        input_tokens_per_s: Some(1e4 * load),
        output_tokens_per_s: Some(2e3 * load),
        load: Some(load),
        prefill_load: Some(load / 4.0),
        ttft_s: Some(0.3),
        tpot_s: Some(0.03),
    }
}
