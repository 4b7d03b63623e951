//! The streaming form closes minute by minute and says what the pool's allocation says.

use proptest::prelude::*;

use super::*;
use crate::allocate::policy::Policy;
use crate::allocate::pool::{Demand, Engine, Facts, Known, Served, allocate};
use crate::allocate::timeline::whole_micros;
use crate::capacity::{CapacityFact, PurchaseOption};
use crate::context::Context;
use crate::id::{AttemptId, RequestId};
use crate::posting::Line;
use crate::step::{GpuSheet, ModelShape};
use std::collections::BTreeMap;

fn at(seconds: f64) -> Timestamp {
    Timestamp::from_micros(whole_micros(seconds))
}

fn replica() -> Replica {
    Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)
}

fn rate() -> GpuHourRate {
    "2.4999".parse().unwrap()
}

fn any_timelines() -> impl Strategy<Value = Vec<EngineTimeline>> {
    let one = (30.0f64..400.0, 0.0f64..3.0, 0.0f64..90.0, 1u32..8_000, 2u32..900).prop_map(
        |(scheduled, prefill, decode, input_tokens, output_tokens)| EngineTimeline {
            arrived: at(scheduled),
            scheduled: at(scheduled),
            first_token: at(scheduled + prefill),
            last_token: at(scheduled + prefill + decode),
            input_tokens,
            cached_tokens: 0,
            output_tokens,
        },
    );
    prop::collection::vec(one, 0..30).prop_map(|mut timelines| {
        timelines.sort_by_key(|timeline| timeline.scheduled);
        timelines
    })
}

fn streamed(timelines: &[EngineTimeline], limits: Limits, start: f64, until: f64) -> (Vec<Owed>, Totals) {
    let mut owed = Vec::new();
    let mut stream = Stream::new(replica(), limits, 2, rate(), at(start));
    for (tag, timeline) in timelines.iter().enumerate() {
        stream.push(tag as u64, timeline, &mut |one| owed.push(one)).unwrap();
    }
    let totals = stream.finish(at(until), &mut |one| owed.push(one)).unwrap();
    (owed, totals)
}

/// The same minute by the pool's allocation: what each request pays.
fn by_pool(timelines: &[EngineTimeline], limits: Limits, minute: Period) -> BTreeMap<Whose, Money> {
    let served: Vec<Served> = (0u16..)
        .zip(timelines)
        .map(|(number, timeline)| Served {
            attempt: AttemptId { request: RequestId::new(at(0.0), [0; 10]), number },
            context: Context::default(),
            engine: "e".into(),
            timeline: *timeline,
            known: Known::Timeline,
            adapter: None,
            estimated: false,
            observed_at: timeline.last_token,
        })
        .collect();
    let engine = Engine {
        name: "e".into(),
        replica: "r".into(),
        model: None,
        constants: Some(replica()),
        limits,
        slice: None,
        speculation: None,
        ready_at: None,
        kept_warm_for: None,
        unobserved: None,
        samples: Vec::new(),
        steps: Vec::new(),
    };
    let capacity = CapacityFact {
        pool: "p".into(),
        replica: "r".into(),
        deployment: None,
        owner: None,
        gpu: "H100".into(),
        gpus: 2,
        rate: rate(),
        purchase: PurchaseOption::OnDemand,
        period: minute,
        observed_at: minute.end,
    };
    let facts =
        Facts { capacity: &[capacity], engines: &[engine], served: &served, jobs: &[], demand: &Demand::default() };
    let postings = allocate(&"p".into(), minute, facts, &Policy::default(), minute.end).unwrap();
    let whose = |line: Line, attempt: Option<AttemptId>| match (line, attempt) {
        (Line::Request, Some(attempt)) => Whose::Request(u64::from(attempt.number)),
        (Line::Waste, _) => Whose::Waste,
        _ => Whose::Idle,
    };
    let mut paid = BTreeMap::new();
    for posting in postings {
        *paid.entry(whose(posting.line, posting.attempt)).or_insert(Money::ZERO) += posting.costs.effective_cost;
    }
    paid
}

#[test]
fn idle_minutes_come_out_too_and_a_started_one_is_paid_as_far_as_it_goes() {
    let (owed, totals) = streamed(&[], Limits::default(), 90.0, 250.0);
    let seconds: Vec<(f64, Whose)> = owed.iter().map(|one| (one.seconds, one.whose)).collect();
    assert_eq!(seconds, [(30.0, Whose::Idle), (60.0, Whose::Idle), (60.0, Whose::Idle), (10.0, Whose::Idle)]);
    assert_eq!(owed.iter().map(|one| one.minute).collect::<Vec<_>>(), [at(90.0), at(120.0), at(180.0), at(240.0)]);
    assert_eq!((totals.minutes, totals.busy_s), (4, 0.0));
    assert_eq!(totals.cost, owed.iter().map(|one| one.amount).sum());
}

proptest! {
    #[test]
    fn minutes_close_and_say_what_the_pool_says(
        timelines in any_timelines(), kv_tokens in prop::option::of(3_000.0f64..40_000.0),
    ) {
        let limits = Limits { kv_tokens, ..Limits::default() };
        let (owed, totals) = streamed(&timelines, limits, 0.0, 540.0);
        let mut minutes: BTreeMap<Timestamp, BTreeMap<Whose, Money>> = BTreeMap::new();
        for one in &owed {
            let before = minutes.entry(one.minute).or_default().insert(one.whose, one.amount);
            prop_assert_eq!(before, None, "one amount for each in a minute");
            prop_assert!(one.amount >= Money::ZERO && one.seconds >= -1e-9);
        }
        prop_assert_eq!(minutes.len(), 9);
        for (start, amounts) in &minutes {
            let minute = Period { start: *start, end: start.plus_micros(60_000_000) };
            prop_assert_eq!(amounts.values().copied().sum::<Money>(), rate().over(2, 60_000_000));
            // Who was preempted follows from all requests so far, of which the pool knows only those that still run.
            if totals.preemptions > 0 {
                continue;
            }
            let pool = by_pool(&timelines, limits, minute);
            for whose in amounts.keys().chain(pool.keys()) {
                let [a, b] = [amounts, &pool].map(|all| all.get(whose).map_or(0, |money| money.pico()));
                // The pool scales to the moments in which a request was there, the stream adds up what it swept.
                prop_assert!((a - b).abs() <= 2_000_000 + b / 1_000, "{whose:?} {start}: {a} {b}");
            }
        }
        prop_assert_eq!(totals.cost, owed.iter().map(|one| one.amount).sum());
    }
}
