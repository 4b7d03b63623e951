//! Steps joined with timelines, on an engine simulated step by step, whose true shares are known.

use std::collections::BTreeSet;

use super::*;
use crate::allocate::policy::Method;
use crate::allocate::pool::{Demand, Engine, Facts, Known, Served, allocate};
use crate::allocate::steps::{Step, charge};
use crate::allocate::tiers_tests::{jobs, misallocation, simulate};
use crate::allocate::timeline::{EngineTimeline, Limits, whole_micros};
use crate::capacity::{CapacityFact, PurchaseOption};
use crate::context::Context;
use crate::id::{AttemptId, RequestId};
use crate::posting::{Line, Posting, Tier};
use crate::step::{GpuSheet, ModelShape};

fn replica() -> Replica {
    Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)
}

fn at(seconds: f64) -> Timestamp {
    Timestamp::from_micros(whole_micros(seconds))
}

/// What an engine would report of its steps.
fn reported(steps: &[Step]) -> Vec<EngineStep> {
    let report = |step: &Step| {
        let is_decode = |work: &Work| work.new_tokens == 1;
        let of =
            |decodes: bool| step.batch.iter().map(|entry| entry.work).filter(move |work| is_decode(work) == decodes);
        let tokens = |works: Vec<u32>| works.into_iter().map(u64::from).sum::<u64>();
        EngineStep {
            engine: "e".into(),
            rank: 0,
            sequence: step.sequence,
            at: at(step.start_s),
            wall_us: u64::try_from(whole_micros(step.seconds)).unwrap(),
            prefill_requests: u32::try_from(of(false).count()).unwrap(),
            prefill_tokens: tokens(of(false).map(|work| work.new_tokens).collect()),
            prefill_kv_tokens: tokens(of(false).map(|work| work.cached_tokens).collect()),
            decode_requests: u32::try_from(of(true).count()).unwrap(),
            decode_kv_tokens: tokens(of(true).map(|work| work.cached_tokens).collect()),
        }
    };
    steps.iter().map(report).collect()
}

fn served(timelines: &[EngineTimeline]) -> Vec<Served> {
    (0u16..)
        .zip(timelines)
        .map(|(number, timeline)| Served {
            attempt: AttemptId { request: RequestId::new(at(0.0), [0; 10]), number },
            context: Context { consumer: Some(format!("c{}", number % 4).into()), ..Context::default() },
            engine: "e".into(),
            timeline: *timeline,
            known: Known::Timeline,
            adapter: None,
            estimated: false,
            observed_at: timeline.last_token,
        })
        .collect()
}

fn allocated(timelines: &[EngineTimeline], steps: Vec<EngineStep>, span: Period, policy: &Policy) -> Vec<Posting> {
    let engine = Engine {
        name: "e".into(),
        replica: "r".into(),
        model: None,
        constants: Some(replica()),
        limits: Limits::default(),
        slice: None,
        speculation: None,
        ready_at: None,
        kept_warm_for: None,
        unobserved: None,
        samples: Vec::new(),
        steps,
    };
    let capacity = CapacityFact {
        pool: "p".into(),
        replica: "r".into(),
        deployment: None,
        owner: None,
        gpu: "H100".into(),
        gpus: 1,
        rate: "3.60".parse().unwrap(),
        purchase: PurchaseOption::OnDemand,
        period: span,
        observed_at: span.end,
    };
    let served = served(timelines);
    let facts =
        Facts { capacity: &[capacity], engines: &[engine], served: &served, jobs: &[], demand: &Demand::default() };
    allocate(&"p".into(), span, facts, policy, span.end).unwrap()
}

/// What each of `count` requests pays, in dollars.
fn paid(postings: &[Posting], count: usize) -> Vec<f64> {
    let mut paid = vec![0.0; count];
    for posting in postings.iter().filter(|posting| posting.line == Line::Request) {
        paid[usize::from(posting.attempt.unwrap().number)] += posting.costs.effective_cost.pico() as f64;
    }
    paid
}

fn tiers(postings: &[Posting]) -> BTreeSet<Option<Tier>> {
    postings.iter().filter(|posting| posting.line == Line::Request).map(|posting| posting.tier).collect()
}

fn quality(postings: &[Posting]) -> u32 {
    let requests = postings.iter().filter(|posting| posting.line == Line::Request);
    requests.filter_map(|posting| posting.basis?.quality).min().unwrap()
}

#[test]
fn steps_and_timelines_together_give_nearly_the_true_shares() {
    let jobs = jobs(150, 0.12);
    let (steps, timelines) = simulate(&replica(), &jobs);
    let truth = charge(&replica(), &steps);
    let truth: Vec<f64> = (0..jobs.len() as u64).map(|tag| truth.shares[&tag].total_s()).collect();
    let until = steps.last().map(|step| step.start_s + step.seconds).unwrap();
    let span = Period { start: at(0.0), end: at(until + 1.0) };
    let policy = Policy::default();
    let joined = allocated(&timelines, reported(&steps), span, &policy);
    let swept = allocated(&timelines, Vec::new(), span, &policy);
    let [a, b] = [&joined, &swept].map(|postings| misallocation(&truth, &paid(postings, jobs.len())));
    println!("against the true steps: joined {a:.5}, timelines alone {b:.5}, quality {}", quality(&joined));
    assert!(a < 0.003 && a < b, "{a} {b}");
    assert_eq!(tiers(&joined), BTreeSet::from([Some(Tier::A)]));
    assert_eq!(tiers(&swept), BTreeSet::from([Some(Tier::B)]));
    assert!(quality(&joined) > 950_000);
    // Order and repetition of the steps change nothing; other methods do not look at them.
    let mut again = reported(&steps);
    again.reverse();
    again.extend(reported(&steps[3..9]));
    assert_eq!(allocated(&timelines, again, span, &policy), joined);
    let tokens = Policy { method: Method::Tokens, ..policy };
    assert_eq!(tiers(&allocated(&timelines, reported(&steps), span, &tokens)), BTreeSet::from([Some(Tier::B)]));
    // Who is in which rank is not known.
    let mut ranks = reported(&steps);
    ranks[5].rank = 1;
    assert_eq!(tiers(&allocated(&timelines, ranks, span, &policy)), BTreeSet::from([Some(Tier::B)]));
}

#[test]
fn a_hole_falls_back_to_the_timelines_and_lowers_the_quality() {
    let jobs = jobs(60, 0.12);
    let (steps, timelines) = simulate(&replica(), &jobs);
    let until = steps.last().map(|step| step.start_s + step.seconds).unwrap();
    let span = Period { start: at(0.0), end: at(until + 1.0) };
    let whole = allocated(&timelines, reported(&steps), span, &Policy::default());
    let third = steps.len() / 3;
    let mut some = reported(&steps);
    some.drain(third..2 * third);
    let part = allocated(&timelines, some, span, &Policy::default());
    assert_eq!(tiers(&part), BTreeSet::from([Some(Tier::A), Some(Tier::B)]));
    assert!(quality(&part) < quality(&whole));
    // The hole's time is charged all the same.
    let busy = |postings: &[Posting]| paid(postings, jobs.len()).iter().sum::<f64>();
    assert!((busy(&part) / busy(&whole) - 1.0).abs() < 0.01, "{} {}", busy(&part), busy(&whole));
    assert!(misallocation(&paid(&whole, jobs.len()), &paid(&part, jobs.len())) < 0.02);
}

#[test]
fn minutes_of_steps_add_up_to_the_whole() {
    let jobs = jobs(60, 0.12);
    let (steps, timelines) = simulate(&replica(), &jobs);
    let until = steps.last().map(|step| step.start_s + step.seconds).unwrap();
    let whole =
        allocated(&timelines, reported(&steps), Period { start: at(0.0), end: at(until + 1.0) }, &Policy::default());
    let mut sum = vec![0.0; jobs.len()];
    let cuts: Vec<f64> = (0..).map(|cut| f64::from(cut) * 2.5).take_while(|cut| *cut < until + 1.0).collect();
    for from in cuts {
        let span = Period { start: at(from), end: at((from + 2.5).min(until + 1.0)) };
        let touching = reported(&steps).into_iter().filter(|step| lasts(step).intersect(span).is_some()).collect();
        for (sum, part) in
            sum.iter_mut().zip(paid(&allocated(&timelines, touching, span, &Policy::default()), jobs.len()))
        {
            *sum += part;
        }
    }
    assert!(misallocation(&paid(&whole, jobs.len()), &sum) < 0.005);
}

#[test]
fn tenants_share_the_fixed_part_of_each_step() {
    let jobs = jobs(60, 0.12);
    let (steps, timelines) = simulate(&replica(), &jobs);
    let until = steps.last().map(|step| step.start_s + step.seconds).unwrap();
    let span = Period { start: at(0.0), end: at(until + 1.0) };
    let by_tenant = |steps: Vec<EngineStep>| {
        let policy = Policy { fixed: FixedRule::Tenant, ..Policy::default() };
        paid(&allocated(&timelines, steps, span, &policy), jobs.len())
    };
    let (joined, swept) = (by_tenant(reported(&steps)), by_tenant(Vec::new()));
    assert!(misallocation(&joined, &swept) < 0.02, "both tiers read the rule in the same way");
    let by_request = paid(&allocated(&timelines, reported(&steps), span, &Policy::default()), jobs.len());
    assert!(misallocation(&joined, &by_request) > 0.02, "and it matters");
}
