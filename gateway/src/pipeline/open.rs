//! An attempt between its opened and its finished record. It is booked exactly once, whatever happens to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::StatusCode;
use ledger::price::PriceQuery;
use ledger::{
    Attempt, AttemptId, Charge, Fact, Label, Money, Opened, Operation, Outcome, Route, ServiceClass, Source, Timeline,
    TokenUsage, UsageQuality,
};

use crate::aside;
use crate::availability::Seat;
use crate::journal::{Durability, JournalError, WhenLogFails};
use crate::meter::{AnswerMeter, Metered, count};
use crate::pipeline::retained::{Kept, RequestBody};
use crate::pipeline::{Asked, Core};
use crate::plan::Target;
use crate::refusal::Refusal;
use crate::running::Ticket;
use crate::settings::Settings;

/// Waits until a record survives what it must survive.
pub(crate) type Synced = BoxFuture<'static, Result<(), JournalError>>;

/// What became of a finished record.
pub(crate) enum Sealed {
    /// The end of the answer may be released now.
    Released,
    /// It may be released when this resolves.
    When(Synced),
    /// It must not be released.
    Refused,
}

/// What the input is counted from when the upstream does not report it.
enum Input {
    Text(Arc<Kept>),
    /// The text is not at hand any more; this is what its length said.
    Estimate(Option<u64>),
}

/// An attempt whose opened record is written.
pub(crate) struct Open {
    core: Arc<Core>,
    settings: Arc<Settings>,
    attempt: Option<Box<Attempt>>,
    /// Its place among the running attempts.
    running: Option<Ticket>,
    /// Its place at its upstream, which is not stopped as long as somebody has one.
    seat: Option<Seat>,
    /// Whether its first token was counted.
    began: bool,
    gone: Arc<AtomicBool>,
    anchor_us: u64,
    /// The model that the upstream was asked for.
    model: Option<Label>,
    class_requested: Option<ServiceClass>,
    input: Input,
    cost: Option<Money>,
}

impl Open {
    /// Writes the opened record.
    ///
    /// # Errors
    /// A refusal in the policy `fail_closed`, when the record cannot be written: nothing may run unrecorded.
    pub fn new(asked: &Asked, target: &Target, seat: Seat, number: u16) -> Result<Open, Refusal> {
        let (core, settings) = (Arc::clone(&asked.core), Arc::clone(&asked.settings));
        let id = AttemptId { request: asked.arrival.id, number };
        let route = route(asked, target);
        let (context, received_at) = (asked.context.clone(), asked.arrival.received_at);
        let body = asked.body.bytes();
        let estimate = aside::reading(body.len(), || at_stake(route.operation, body));
        let input = match &asked.body {
            RequestBody::Kept(kept) => Input::Text(Arc::clone(kept)),
            RequestBody::Once(_) => Input::Estimate(Some(estimate.input).filter(|&tokens| tokens > 0)),
        };
        let opened = Opened { id, received_at, context: context.clone(), route: route.clone(), estimate };
        let fact = Fact::Opened(Box::new(opened));
        if let Err(error) = core.journal.append(&fact) {
            if settings.when_log_fails == WhenLogFails::FailClosed {
                tracing::error!(request = %id.request, %error, "refused: no opened record");
                let message = "the request was not sent: its record cannot be written, and the policy is fail_closed";
                return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, message));
            }
            lose(&core, id, &error);
        }
        let Fact::Opened(opened) = fact else { unreachable!("it was made here") };
        let running = core.running.enter(opened, asked.arrival.anchor_us, asked.admitted.at_us);
        core.metrics.attempts.up();
        core.metrics.in_flight.up();
        if number > 0 {
            core.metrics.retries.up();
        }
        let attempt = Attempt {
            id,
            source: Source::Gateway,
            context,
            route,
            timeline: Timeline { received_at, admitted_us: Some(asked.admitted.at_us), ..Timeline::default() },
            outcome: Outcome::ClientAborted,
            status: None,
            usage: TokenUsage::default(),
            usage_quality: UsageQuality::Missing,
            charge: Charge::Unpriced { reason: ledger::UnpricedReason::NoUsage },
        };
        Ok(Open {
            core,
            settings,
            attempt: Some(Box::new(attempt)),
            running: Some(running),
            seat: Some(seat),
            began: false,
            gone: Arc::clone(&asked.gone),
            anchor_us: asked.arrival.anchor_us,
            model: target.model.clone().or_else(|| asked.inspected.model.as_deref().map(Label::from)),
            class_requested: asked.inspected.service_class_requested,
            input,
            cost: None,
        })
    }

    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    pub fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    /// Whether the client hung up before the answer began.
    pub fn client_is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Whether the finished record is still to be written.
    pub fn is_running(&self) -> bool {
        self.attempt.is_some()
    }

    /// What the attempt was charged, once it is booked and if that is known.
    pub fn cost(&self) -> Option<Money> {
        self.cost
    }

    /// Microseconds since the request was received.
    pub fn now_us(&self) -> u64 {
        self.core.clock.monotonic_us().saturating_sub(self.anchor_us)
    }

    pub fn sent(&mut self) {
        let now = self.now_us();
        if let Some(attempt) = &mut self.attempt {
            attempt.timeline.sent_us = Some(now);
        }
        if let Some(running) = &self.running {
            running.sent(now);
        }
    }

    pub fn answered(&mut self, status: StatusCode, streamed: bool) {
        let now = self.now_us();
        if let Some(attempt) = &mut self.attempt {
            attempt.timeline.first_byte_us = Some(now);
            attempt.status = Some(status.as_u16());
            attempt.route.streamed = streamed;
        }
        if let Some(running) = &self.running {
            running.answered(now, streamed);
        }
    }

    /// Shows how far the answer got to those who settle before it ends.
    pub fn progressed(&mut self, meter: &AnswerMeter) {
        let Some(running) = &self.running else { return };
        let so_far = meter.so_far();
        running.progressed(so_far);
        if let (false, Some(first_us), Some(seat)) = (self.began, so_far.first_token_us, &self.seat) {
            self.began = true;
            seat.first_token(first_us);
        }
    }

    /// Books an attempt that got no answer. What was never sent used nothing; what was sent is counted.
    pub fn unanswered(&mut self, outcome: Outcome) -> Sealed {
        let nothing = || (TokenUsage::default(), UsageQuality::Estimated);
        let (usage, quality) = match outcome {
            Outcome::UpstreamUnreachable => nothing(),
            _ => match self.counted_input() {
                Some(input) => (TokenUsage { input, ..TokenUsage::default() }, UsageQuality::Estimated),
                None => (TokenUsage::default(), UsageQuality::Missing),
            },
        };
        let Some(mut attempt) = self.attempt.take() else { return Sealed::Released };
        (attempt.usage, attempt.usage_quality) = (usage, quality);
        self.book(attempt, outcome)
    }

    /// Books an attempt that was answered, by what its meter read. `outcome` decides from what was metered.
    pub fn finish(
        &mut self,
        meter: &mut AnswerMeter,
        outcome: impl FnOnce(&Metered) -> Outcome,
    ) -> (Sealed, Vec<Bytes>) {
        let now = self.now_us();
        let is_error = self.attempt.as_ref().and_then(|attempt| attempt.status).is_some_and(|status| status >= 400);
        // An error used nothing unless the upstream says so.
        let metered = meter.finish(now, || if is_error { None } else { self.counted_input() });
        let Some(mut attempt) = self.attempt.take() else { return (Sealed::Released, metered.trailing) };
        let outcome = match outcome(&metered) {
            _ if is_error => Outcome::UpstreamError,
            _ if self.client_is_gone() => Outcome::ClientAborted,
            outcome => outcome,
        };
        if let Some(broken) = &metered.broken {
            tracing::warn!(attempt = %attempt.id, upstream = %attempt.route.upstream, reason = %broken, "answer not metered to its end");
        }
        (attempt.usage, attempt.usage_quality) = (metered.usage, metered.quality);
        let timeline = &mut attempt.timeline;
        (timeline.first_token_us, timeline.last_token_us) = (metered.first_token_us, metered.last_token_us);
        (timeline.gaps, timeline.queued_us) = (metered.gaps, metered.queued_us);
        let route = &mut attempt.route;
        if let Some(model) = metered.response_model {
            route.response_model = Some(model.into());
        }
        route.response_id = metered.response_id.map(Label::from);
        // What the upstream says was served is what it bills, whatever was asked for.
        route.service_class = metered.service_class.or(self.class_requested).unwrap_or_default();
        (self.book(attempt, outcome), metered.trailing)
    }

    fn book(&mut self, mut attempt: Box<Attempt>, outcome: Outcome) -> Sealed {
        attempt.outcome = outcome;
        attempt.timeline.finished_us = self.now_us();
        attempt.charge = self.core.prices.load().charge(&PriceQuery {
            provider: &attempt.route.provider,
            model: attempt.route.model().map(|model| &**model),
            operation: attempt.route.operation,
            service_class: attempt.route.service_class,
            usage: &attempt.usage,
            quality: attempt.usage_quality,
            at: attempt.timeline.received_at,
        });
        self.cost = attempt.charge.costs().map(|costs| costs.effective_cost);
        self.core.metrics.in_flight.down();
        // Nothing is counted any more, so the text need not be kept.
        self.input = Input::Estimate(None);
        if outcome == Outcome::ClientAborted {
            self.core.metrics.aborted.up();
        }
        let id = attempt.id;
        if let Some(seat) = &self.seat {
            seat.ended(&attempt);
        }
        let fact = Fact::Attempt(attempt);
        let written = self.core.journal.append(&fact);
        // Only now: whoever settles must find the attempt here or in the journal.
        (self.running, self.seat) = (None, None);
        match written {
            Ok(_) if self.settings.durability == Durability::Process => Sealed::Released,
            Ok(position) => Sealed::When(self.core.journal.synced(position)),
            Err(error) => self.unwritten(id, &fact, &error),
        }
    }

    /// Keeps a finished record that could not be written, or counts it as lost, and says what that means for the end of the answer.
    fn unwritten(&self, id: AttemptId, fact: &Fact, error: &JournalError) -> Sealed {
        if self.core.journal.keep(fact) {
            tracing::error!(attempt = %id, %error, "a record waits in memory");
        } else {
            lose(&self.core, id, error);
        }
        match self.settings.when_log_fails {
            WhenLogFails::FailOpen => Sealed::Released,
            WhenLogFails::FailClosed => Sealed::Refused,
        }
    }

    /// A finished record was written, but it is not known to survive the machine.
    pub fn unsynced(&self, error: &JournalError) -> Sealed {
        tracing::error!(%error, "a record was written and not synced");
        match self.settings.when_log_fails {
            WhenLogFails::FailOpen => {
                self.core.metrics.lost_records.up();
                self.core.journal.lost(error);
                Sealed::Released
            }
            WhenLogFails::FailClosed => Sealed::Refused,
        }
    }

    fn counted_input(&self) -> Option<u64> {
        let operation = self.attempt.as_ref().map(|attempt| attempt.route.operation)?;
        match &self.input {
            Input::Text(kept) => {
                let body = kept.bytes();
                aside::counting(body.len(), || count::input(operation, self.model.as_deref(), body))
            }
            Input::Estimate(tokens) => *tokens,
        }
    }
}

impl Drop for Open {
    /// The last resort: whoever held the attempt is gone, so its client is too.
    fn drop(&mut self) {
        let Some(attempt) = &mut self.attempt else { return };
        if attempt.status.is_some_and(|status| status >= 400) {
            // An error used nothing that anybody knows of, also when nobody waited for its end.
            let attempt = self.attempt.take();
            attempt.map(|attempt| self.book(attempt, Outcome::UpstreamError));
            return;
        }
        self.unanswered(Outcome::ClientAborted);
    }
}

fn lose(core: &Core, id: AttemptId, error: &JournalError) {
    tracing::error!(attempt = %id, %error, "a record was lost");
    core.metrics.lost_records.up();
    core.journal.lost(error);
}

fn route(asked: &Asked, target: &Target) -> Route {
    let (inspected, upstream) = (&asked.inspected, &target.upstream);
    Route {
        operation: inspected.operation,
        provider: upstream.provider.clone(),
        upstream: upstream.name.clone(),
        pool: upstream.pool.clone(),
        deployment: upstream.deployment.clone(),
        request_model: inspected.model.as_deref().and_then(crate::attribute::label),
        // Until the upstream names its model, the one it is asked for is the best that is known.
        response_model: target.model.clone(),
        response_id: None,
        service_class: inspected.service_class_requested.unwrap_or_default(),
        streamed: inspected.streamed,
    }
}

/// Tokens that the request brings, by the length of its text: the model's own tokenizer would take longer than the
/// rest of the gateway's work. Only a crash makes this number count.
fn at_stake(operation: Operation, body: &[u8]) -> TokenUsage {
    TokenUsage { input: count::input(operation, None, body).unwrap_or(0), ..TokenUsage::default() }
}
