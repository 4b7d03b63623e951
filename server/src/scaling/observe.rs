//! One look at a deployment: what the gateway counted, what the engines last said, and what both come to in replicas.
//!
//! What nobody said stays unknown: an engine whose metrics are gone is no engine without work.

use std::collections::{BTreeMap, VecDeque};

use fleet::scale::{Objective, Sample};
use fleet::sim::capacity::Work;
use gateway::Demand;
use ledger::{EngineReading, Label, ScalingInputs, Timestamp};

/// Latencies are those of the last minute: one look alone has too few requests for a percentile.
const LATENCY_US: u64 = 60_000_000;
/// For so long it is remembered that engines did more than the gateway knows of.
const ASIDE_US: u64 = 3_600_000_000;
/// Engines did more when what they did is above what came by so much, in parts of it and in replicas.
const ASIDE_ABOVE: (f64, f64) = (1.5, 0.1);
/// After so many seconds a request counts half for what a usual one is.
const USUAL_HALF_LIFE_S: f64 = 600.0;

/// One engine of a replica that serves, as its metrics last said.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Heard {
    /// Its upstream.
    pub engine: Label,
    /// What it last said, if anything.
    pub reading: Option<EngineReading>,
}

/// Tokens of a usual request, the recent ones counting more.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usual {
    requests: f64,
    input: f64,
    output: f64,
}

impl Usual {
    /// As if so many requests of so many tokens had just been seen.
    #[must_use]
    pub fn of(requests: f64, input: f64, output: f64) -> Usual {
        Usual { requests, input: input * requests, output: output * requests }
    }

    /// Tokens of a usual request: input less what caches had, and output.
    #[must_use]
    pub fn tokens(&self) -> Option<(f64, f64)> {
        (self.requests > 0.0).then(|| (self.input / self.requests, self.output / self.requests))
    }

    /// However an attempt ended: one that was aborted brought its tokens, and counts as one.
    fn see(&mut self, window: &Demand, seconds: f64) {
        let kept = 0.5f64.powf(seconds / USUAL_HALF_LIFE_S);
        self.requests = self.requests * kept + number(window.counted);
        self.input = self.input * kept + number(window.input_tokens);
        self.output = self.output * kept + number(window.output_tokens);
    }
}

/// What is looked at, from look to look.
#[derive(Debug, Clone)]
pub struct Eye {
    /// What a replica can do.
    pub work: Work,
    /// What users were promised.
    pub objective: Objective,
    /// How old a reading may be, microseconds.
    pub fresh_us: u64,
    /// What a usual request is.
    pub usual: Usual,
    looks: VecDeque<(u64, Demand)>,
    counters: BTreeMap<Label, EngineReading>,
    /// When the engines last did more than the gateway knows of.
    aside_us: Option<u64>,
}

/// What one look is made of.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The wall clock.
    pub now: Timestamp,
    /// The clock that never goes backwards, microseconds.
    pub monotonic_us: u64,
    /// Replicas that serve.
    pub ready: u32,
    /// Replicas on their way.
    pub pending: u32,
    /// What the gateway counted since it started.
    pub demand: &'a Demand,
    /// The engines that serve.
    pub engines: &'a [Heard],
    /// Whether one service is in front of all replicas, so that each scrape of it may reach another engine.
    pub behind_one_service: bool,
}

/// A look, and the age of the oldest reading that it uses.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Looked {
    /// The look.
    pub sample: Sample,
    /// Microseconds; `None` when no reading was used.
    pub stale_us: Option<u64>,
}

impl Eye {
    /// One that has seen nothing.
    #[must_use]
    pub fn new(work: Work, objective: Objective, fresh_us: u64, usual: Usual) -> Eye {
        Eye { work, objective, fresh_us, usual, looks: VecDeque::new(), counters: BTreeMap::new(), aside_us: None }
    }

    /// Looks once. The first look knows no rates.
    pub fn look(&mut self, seen: &Seen<'_>) -> Looked {
        let mut sample = Sample { at: seen.now, ready: seen.ready, pending: seen.pending, ..Sample::default() };
        self.traffic(seen, &mut sample);
        let stale_us = self.engines(seen, &mut sample);
        self.looks.push_back((seen.monotonic_us, seen.demand.clone()));
        while self.looks.len() > 2 && self.looks[1].0 + LATENCY_US <= seen.monotonic_us {
            self.looks.pop_front();
        }
        Looked { sample, stale_us }
    }

    /// What came in at the gateway since the look before.
    fn traffic(&mut self, seen: &Seen<'_>, sample: &mut Sample) {
        let Some((before_us, before)) = self.looks.back() else { return };
        let seconds = number(seen.monotonic_us.saturating_sub(*before_us)) * 1e-6;
        if seconds <= 0.0 {
            return;
        }
        let window = seen.demand.since(before);
        self.usual.see(&window, seconds);
        let arrivals = number(window.arrived) / seconds;
        sample.arrivals_per_s = Some(arrivals);
        if let Some((input, output)) = self.usual.tokens() {
            sample.input_tokens_per_s = Some(arrivals * input);
            sample.load = Some(arrivals * (self.work.per_input_token * input + self.work.per_output_token * output));
            sample.prefill_load = Some(arrivals * self.work.per_input_token * input);
        } else if window.arrived == 0 {
            (sample.load, sample.prefill_load, sample.input_tokens_per_s) = (Some(0.0), Some(0.0), Some(0.0));
        }
        sample.output_tokens_per_s = Some(number(window.output_tokens) / seconds);
        if let Some((_, earlier)) = self.looks.front() {
            let minute = seen.demand.since(earlier);
            sample.ttft_s = minute.ttft.percentile_s(self.objective.percentile);
            sample.tpot_s = minute.tpot.percentile_s(self.objective.percentile);
        }
    }

    /// What the engines say. As long as most of them do, the others are taken to be like them.
    fn engines(&mut self, seen: &Seen<'_>, sample: &mut Sample) -> Option<u64> {
        let held = f64::from(seen.demand.held);
        if seen.ready == 0 {
            // Nothing runs where nothing serves; what waits is known.
            (sample.running, sample.waiting) = (Some(0.0), Some(held));
            return None;
        }
        let in_flight = f64::from(seen.demand.in_flight);
        if seen.behind_one_service {
            // One of many engines says nothing of the others, and its counters and another one's have no difference. What came
            // through the gateway is known there.
            sample.running = Some(in_flight);
            sample.waiting = (held > 0.0).then_some(held);
            return None;
        }
        let fresh: Vec<&EngineReading> = seen
            .engines
            .iter()
            .filter_map(|engine| engine.reading.as_ref())
            .filter(|reading| seen.now.micros_since(reading.at) <= self.fresh_us)
            .collect();
        let stale_us = fresh.iter().map(|reading| seen.now.micros_since(reading.at)).max();
        if fresh.is_empty() || fresh.len() * 2 < seen.engines.len() {
            if self.aside_us.is_some_and(|at| seen.monotonic_us.saturating_sub(at) < ASIDE_US) {
                // Some of the work comes past the gateway, and nobody sees it now: what came through it is not all there is.
                (sample.load, sample.prefill_load, sample.arrivals_per_s) = (None, None, None);
                (sample.input_tokens_per_s, sample.output_tokens_per_s) = (None, None);
            }
            // What the gateway holds is known whatever the engines say, and somebody has to serve it.
            sample.waiting = (held > 0.0).then_some(held);
            return stale_us;
        }
        let all = count(seen.engines.len()) / count(fresh.len());
        let sum = |of: &dyn Fn(&EngineReading) -> Option<f64>| -> Option<f64> {
            fresh.iter().map(|reading| of(reading)).sum::<Option<f64>>()
        };
        let waiting = sum(&|one| one.waiting.map(f64::from)).map(|sum| sum * all);
        // What is in flight at the gateway and does not wait at an engine runs, whatever the last reading said.
        let sent = (in_flight - waiting.unwrap_or(0.0)).max(0.0);
        sample.running = sum(&|one| one.running.map(f64::from)).map(|sum| (sum * all).max(sent));
        sample.waiting = waiting.map(|waiting| waiting + held);
        sample.kv_used =
            sum(&|one| one.kv_used.map(|millionths| f64::from(millionths) * 1e-6)).map(|sum| sum / count(fresh.len()));
        self.rates(&fresh, all, seen.monotonic_us, sample);
        stale_us
    }

    /// What the engines' own counters moved by: traffic that went past the gateway is work as well.
    fn rates(&mut self, fresh: &[&EngineReading], all: f64, now_us: u64, sample: &mut Sample) {
        let mut sums = Some((0.0, 0.0));
        let mut busy = Some(0.0);
        let mut moved = false;
        for reading in fresh {
            let before = self.counters.get(&reading.engine);
            if before.is_some_and(|before| before.at == reading.at) {
                continue;
            }
            let rates = before.and_then(|before| rates(before, reading));
            if before.is_some() {
                moved = true;
                sums = sums
                    .zip(rates.map(|rates| (rates.input, rates.output)))
                    .map(|(sum, one)| (sum.0 + one.0, sum.1 + one.1));
                busy = busy.zip(rates.and_then(|rates| rates.busy)).map(|(sum, one)| sum + one);
            } else {
                (sums, busy) = (None, None);
            }
            self.counters.insert(reading.engine.clone(), (*reading).clone());
        }
        if !moved {
            return;
        }
        if let Some((input, output)) = sums {
            let done = (self.work.per_input_token * input + self.work.per_output_token * output) * all;
            if sample.load.is_some_and(|load| done > load * ASIDE_ABOVE.0 + ASIDE_ABOVE.1) {
                self.aside_us = Some(now_us);
            }
            sample.load = sample.load.map(|load| load.max(done));
        }
        sample.utilisation = busy.map(|busy| (busy / count(fresh.len())).clamp(0.0, 1.0));
    }
}

/// What moved from one reading to the next, a second.
#[derive(Debug, Clone, Copy)]
struct Rates {
    input: f64,
    output: f64,
    busy: Option<f64>,
}

fn rates(before: &EngineReading, after: &EngineReading) -> Option<Rates> {
    let seconds = number(after.at.micros_since(before.at)) * 1e-6;
    let grown = |of: fn(&EngineReading) -> Option<u64>| Some(number(of(after)?.checked_sub(of(before)?)?) / seconds);
    if seconds <= 0.0 {
        return None;
    }
    let cached = grown(|one| one.cached_tokens).unwrap_or(0.0);
    Some(Rates {
        input: (grown(|one| one.prompt_tokens)? - cached).max(0.0),
        output: grown(|one| one.generation_tokens)?,
        busy: grown(|one| one.busy_us).map(|micros| micros * 1e-6),
    })
}

/// A look as the ledger keeps it.
#[must_use]
pub fn inputs(looked: &Looked, forecast: Option<f64>) -> ScalingInputs {
    let sample = &looked.sample;
    let small = |value: Option<f64>| value.and_then(whole).map(|count| u32::try_from(count).unwrap_or(u32::MAX));
    let scaled = |value: Option<f64>, by: f64| value.and_then(|value| whole(value * by));
    ScalingInputs {
        running: small(sample.running),
        waiting: small(sample.waiting),
        kv_used: small(sample.kv_used.map(|part| part * 1e6)),
        load_milli: scaled(sample.load, 1e3),
        forecast_milli: scaled(forecast, 1e3),
        arrivals_milli: scaled(sample.arrivals_per_s, 1e3),
        input_tokens_per_s: scaled(sample.input_tokens_per_s, 1.0),
        output_tokens_per_s: scaled(sample.output_tokens_per_s, 1.0),
        ttft_us: scaled(sample.ttft_s, 1e6),
        tpot_us: scaled(sample.tpot_s, 1e6),
        stale_us: looked.stale_us,
    }
}

/// The nearest whole number, if it is one that can be counted to.
pub(super) fn whole(value: f64) -> Option<u64> {
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    let rounded = value.round();
    if !(0.0..=EXACT_MAX).contains(&rounded) {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above to be a count")]
    let count = rounded as u64;
    Some(count)
}

/// A count in arithmetic; beyond 2^53 its last digits do not matter.
#[expect(clippy::cast_precision_loss, reason = "beyond 2^53 the last digits do not matter")]
pub(super) fn number(count: u64) -> f64 {
    count as f64
}

fn count(count: usize) -> f64 {
    number(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Work = Work { per_input_token: 0.0001, per_output_token: 0.001 };

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn eye() -> Eye {
        Eye::new(WORK, Objective::default(), 15_000_000, Usual::default())
    }

    fn engine(name: &str, second: i64, running: u32) -> Heard {
        let reading = EngineReading {
            engine: name.into(),
            at: at(second),
            running: Some(running),
            waiting: Some(1),
            kv_used: Some(500_000),
            prompt_tokens: Some(u64::try_from(second).unwrap() * 1_000),
            generation_tokens: Some(u64::try_from(second).unwrap() * 500),
            ..EngineReading::default()
        };
        Heard { engine: name.into(), reading: Some(reading) }
    }

    fn seen<'a>(second: i64, demand: &'a Demand, engines: &'a [Heard]) -> Seen<'a> {
        Seen {
            now: at(second),
            monotonic_us: u64::try_from(second).unwrap() * 1_000_000,
            ready: u32::try_from(engines.len()).unwrap(),
            pending: 0,
            demand,
            engines,
            behind_one_service: false,
        }
    }

    #[test]
    fn arriving_work_is_counted_in_replicas() {
        let mut eye = eye();
        let nothing = Demand::default();
        assert_eq!(eye.look(&seen(0, &nothing, &[])).sample.load, None, "a first look knows no rate");
        let some = Demand {
            arrived: 20,
            finished: 10,
            counted: 10,
            input_tokens: 10_000,
            output_tokens: 2_000,
            held: 3,
            ..nothing
        };
        let sample = eye.look(&seen(10, &some, &[])).sample;
        // 2 requests a second of 1000 tokens in and 200 out: 2 x (0.1 + 0.2).
        assert!((sample.load.unwrap() - 0.6).abs() < 1e-9, "{sample:?}");
        assert!((sample.prefill_load.unwrap() - 0.2).abs() < 1e-9);
        assert_eq!((sample.running, sample.waiting), (Some(0.0), Some(3.0)), "nothing serves, three wait");
        let sample = eye.look(&seen(20, &some, &[])).sample;
        assert_eq!(sample.load, Some(0.0), "nothing came");
    }

    #[test]
    fn aborted_requests_do_not_make_the_usual_one_longer() {
        let ended = |finished: u64, aborted: u64| Demand {
            arrived: finished + aborted,
            finished,
            aborted,
            counted: finished + aborted,
            input_tokens: (finished + aborted) * 1_000,
            output_tokens: (finished + aborted) * 200,
            ..Demand::default()
        };
        for (finished, aborted) in [(1, 0), (1, 1), (0, 1)] {
            let mut eye = eye();
            eye.look(&seen(0, &Demand::default(), &[]));
            // For an hour; a client that always aborts is no other than one that never does.
            for minute in 1u32..=60 {
                let looks = u64::from(minute);
                let demand = ended(finished * looks, aborted * looks);
                eye.look(&seen(i64::from(minute) * 60, &demand, &[]));
                let (input, output) = eye.usual.tokens().unwrap();
                assert!((input - 1_000.0).abs() < 1e-6 && (output - 200.0).abs() < 1e-6, "{input} {output}");
            }
        }
        let mut eye = eye();
        eye.look(&seen(0, &Demand::default(), &[]));
        eye.look(&seen(60, &Demand { arrived: 5, failed: 5, ..Demand::default() }, &[]));
        assert_eq!(eye.usual.tokens(), None, "nobody said how long those were that failed");
    }

    #[test]
    fn behind_one_service_no_counter_is_taken_from_another_engines() {
        let mut eye = eye();
        let demand = Demand { in_flight: 7, held: 2, ..Demand::default() };
        let mut last = Looked::default();
        // The scrapes reach one engine that worked for long and one that is new, in turn.
        for (second, counter) in [(100, 1_000), (110, 90_000_000), (120, 1_500), (130, 90_100_000)] {
            let mut service = engine("chat", second, 40);
            let reading = service.reading.as_mut().unwrap();
            (reading.prompt_tokens, reading.generation_tokens) = (Some(counter), Some(counter));
            let engines = [service];
            last = eye.look(&Seen { ready: 4, behind_one_service: true, ..seen(second, &demand, &engines) });
            assert!(last.sample.load.is_none_or(|load| load <= 0.0), "nothing came: {last:?}");
            assert_eq!((last.sample.running, last.sample.waiting), (Some(7.0), Some(2.0)), "known at the gateway");
        }
        assert_eq!((last.sample.load, last.sample.kv_used, last.sample.utilisation), (Some(0.0), None, None));
        assert_eq!((last.stale_us, eye.aside_us), (None, None), "no reading was used");
        let nobody = Demand::default();
        let engines = [engine("chat", 140, 40)];
        let looked = eye.look(&Seen { ready: 4, behind_one_service: true, ..seen(140, &nobody, &engines) });
        assert_eq!(
            (looked.sample.running, looked.sample.waiting),
            (Some(0.0), None),
            "whether engines have queues is unknown"
        );
    }

    #[test]
    fn what_is_in_flight_runs_or_waits() {
        let mut eye = eye();
        let look = |eye: &mut Eye, in_flight| {
            eye.look(&seen(101, &Demand { in_flight, ..Demand::default() }, &[engine("a", 100, 4)])).sample
        };
        // One waits at the engine: of twenty sent, nineteen run.
        assert_eq!((look(&mut eye, 20).running, look(&mut eye, 20).waiting), (Some(19.0), Some(1.0)));
        assert_eq!(look(&mut eye, 3).running, Some(4.0), "the engine has work of others");
    }

    #[test]
    fn an_outage_of_metrics_is_unknown_and_not_zero() {
        let mut eye = eye();
        let demand = Demand::default();
        let three = [engine("a", 100, 4), engine("b", 100, 2), Heard { engine: "c".into(), reading: None }];
        let looked = eye.look(&seen(101, &demand, &three));
        assert_eq!(
            (looked.sample.running, looked.stale_us),
            (Some(9.0), Some(1_000_000)),
            "the third is like the others"
        );
        let looked = eye.look(&seen(150, &demand, &three));
        assert_eq!((looked.sample.running, looked.sample.waiting, looked.sample.kv_used), (None, None, None));
        let one = [engine("a", 160, 4), three[1].clone(), three[2].clone()];
        assert_eq!(eye.look(&seen(161, &demand, &one)).sample.running, None, "one of three says too little");
        assert_eq!(inputs(&Looked::default(), None), ScalingInputs::default());
    }

    #[test]
    fn work_that_went_past_the_gateway_is_work() {
        let mut eye = eye();
        let demand = Demand::default();
        eye.look(&seen(100, &demand, &[engine("a", 100, 1)]));
        let sample = eye.look(&seen(110, &demand, &[engine("a", 110, 1)])).sample;
        // 1000 tokens in and 500 out a second, of which the gateway saw none.
        assert!((sample.load.unwrap() - 0.6).abs() < 1e-9, "{sample:?}");
        let outage = eye.clone().look(&seen(200, &demand, &[engine("a", 110, 1)])).sample;
        assert_eq!((outage.load, outage.arrivals_per_s), (None, None), "nobody sees now what goes past the gateway");
        let restarted = [engine("a", 3, 1)];
        let mut late = restarted.clone();
        late[0].reading.as_mut().unwrap().at = at(120);
        assert_eq!(eye.look(&seen(120, &demand, &late)).sample.load, Some(0.0), "a counter that fell says nothing");
    }
}
