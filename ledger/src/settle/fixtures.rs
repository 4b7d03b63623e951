//! Facts for the tests of settlement.

use crate::allocate::replica::Replica;
use crate::allocate::timeline::Limits;
use crate::attempt::{Attempt, Operation, Outcome, Route, Running, Source, Timeline};
use crate::capacity::{CapacityFact, PurchaseOption};
use crate::charge::{Charge, UnpricedReason};
use crate::context::{Context, Label};
use crate::id::{AttemptId, RequestId};
use crate::step::{GpuSheet, ModelShape};
use crate::telemetry::{CallSpan, EngineFact, EngineReading, EngineSetup};
use crate::time::{Period, Timestamp};
use crate::usage::{TokenUsage, UsageQuality};

/// Seconds after a whole minute of 2026.
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
pub fn at(seconds: f64) -> Timestamp {
    Timestamp::from_micros(1_780_000_020_000_000 + (seconds * 1e6).round() as i64)
}

pub fn between(from: f64, until: f64) -> Period {
    Period { start: at(from), end: at(until) }
}

fn us(seconds: f64) -> u64 {
    at(seconds).micros_since(at(0.0))
}

pub fn llama() -> Replica {
    Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)
}

pub fn capacity(pool: &str, replica: &str, from: f64, until: f64) -> CapacityFact {
    CapacityFact {
        pool: pool.into(),
        replica: replica.into(),
        deployment: None,
        owner: Some("owner".into()),
        gpu: "H100".into(),
        gpus: 1,
        rate: "3.60".parse().unwrap(),
        purchase: PurchaseOption::OnDemand,
        period: between(from, until),
        observed_at: at(until),
    }
}

pub fn engine(pool: &str, name: &str, replica: &str, from: f64, until: f64) -> EngineFact {
    EngineFact {
        engine: name.into(),
        pool: pool.into(),
        replica: replica.into(),
        model: Some("llama".into()),
        setup: EngineSetup { constants: Some(llama()), limits: Limits::default(), ..EngineSetup::default() },
        period: between(from, until),
        observed_at: at(until),
        ..EngineFact::default()
    }
}

pub fn id(number: u64) -> AttemptId {
    let mut random = [0; 10];
    random[2..].copy_from_slice(&number.to_be_bytes());
    AttemptId { request: RequestId::new(at(0.0), random), number: 0 }
}

pub fn usage(input: u64, output: u64) -> TokenUsage {
    TokenUsage { input, output, ..TokenUsage::default() }
}

/// A streamed answer of a pool's engine: received when it was sent, its first and last tokens at these seconds.
pub fn attempt(number: u64, pool: &str, engine: &str, times: (f64, f64, f64), tokens: (u64, u64)) -> Attempt {
    let (sent, first, last) = times;
    Attempt {
        id: id(number),
        source: Source::Gateway,
        context: Context {
            team: Some(if number.is_multiple_of(2) { "even" } else { "odd" }.into()),
            trace_id: Some(format!("trace-{number}").into()),
            span_id: Some(format!("caller-{number}").into()),
            ..Context::default()
        },
        route: Route {
            operation: Operation::Chat,
            provider: "self_hosted".into(),
            upstream: engine.into(),
            pool: Some(pool.into()),
            request_model: Some("llama".into()),
            response_id: Some(format!("answer-{number}").into()),
            streamed: true,
            ..Route::default()
        },
        timeline: Timeline {
            received_at: at(sent),
            sent_us: Some(0),
            first_token_us: Some(us(first - sent)),
            last_token_us: Some(us(last - sent)),
            finished_us: us(last - sent),
            ..Timeline::default()
        },
        outcome: Outcome::Completed,
        status: Some(200),
        usage: usage(tokens.0, tokens.1),
        usage_quality: UsageQuality::Reported,
        charge: Charge::Unpriced { reason: UnpricedReason::SelfHosted },
    }
}

/// The same attempt as it looked at `now`, having delivered `output` tokens.
pub fn running(of: &Attempt, now: f64, output: u64) -> Running {
    let finished_us = at(now).micros_since(of.timeline.received_at);
    let first_token_us = of.timeline.first_token_us.filter(|us| *us <= finished_us);
    Running {
        id: of.id,
        context: of.context.clone(),
        route: of.route.clone(),
        timeline: Timeline {
            first_token_us,
            last_token_us: first_token_us.map(|_| finished_us),
            finished_us,
            ..of.timeline
        },
        usage: usage(of.usage.input, output),
    }
}

/// What an engine tells of an attempt.
pub fn span_of(attempt: &Attempt, queue: f64, prefill: f64) -> CallSpan {
    let label = |text: &str| Some(Label::from(text));
    CallSpan {
        trace_id: attempt.context.trace_id.clone(),
        span_id: label(&format!("engine-of-{}", attempt.id)),
        parent_span_id: attempt.context.span_id.clone(),
        service: label("vllm"),
        engine: Some(attempt.route.upstream.clone()),
        operation: Operation::Chat,
        response_model: attempt.route.request_model.clone(),
        response_id: attempt.route.response_id.clone(),
        period: Period { start: attempt.timeline.received_at, end: attempt.timeline.finished_at() },
        usage: attempt.usage,
        usage_quality: UsageQuality::Reported,
        queue_us: Some(us(queue)),
        first_token_us: Some(us(queue + prefill)),
        prefill_us: Some(us(prefill)),
        observed_at: attempt.timeline.finished_at(),
        ..CallSpan::default()
    }
}

pub fn reading(pool: &str, engine: &str, seconds: f64, prompt: u64, generated: u64) -> EngineReading {
    EngineReading {
        engine: engine.into(),
        pool: pool.into(),
        at: at(seconds),
        running: Some(1),
        prompt_tokens: Some(prompt),
        generation_tokens: Some(generated),
        ..EngineReading::default()
    }
}

/// Numbers that a seed gives again.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % sides
    }

    pub fn seconds(&mut self, below: u64) -> f64 {
        self.roll(below * 1_000_000) as f64 * 1e-6
    }

    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for place in (1..all.len()).rev() {
            let other = usize::try_from(self.roll(place as u64 + 1)).unwrap();
            all.swap(place, other);
        }
    }
}
