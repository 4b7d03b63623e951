use proptest::prelude::*;

use super::super::fixtures::{Dice, at, attempt, between, engine, running, span_of, usage};
use super::*;

fn label(text: impl AsRef<str>) -> Option<Label> {
    Some(text.as_ref().into())
}

/// An application's own span of a call to a provider.
fn told_by_application(number: u64, from: f64, until: f64) -> CallSpan {
    CallSpan {
        trace_id: label(format!("trace-{number}")),
        span_id: label(format!("caller-{number}")),
        service: label("shop"),
        operation: Operation::Chat,
        provider: label("openai"),
        request_model: label("llama"),
        response_id: label(format!("answer-{number}")),
        period: between(from, until),
        usage: usage(100 + number, 50),
        usage_quality: UsageQuality::Reported,
        context: Context { team: label("shop"), ..Context::default() },
        observed_at: at(until + 1.0),
        ..CallSpan::default()
    }
}

fn calls_of(spans: &[CallSpan], attempts: &[Attempt], running: &[Running]) -> Vec<Attempt> {
    let engines = [engine("p", "e", "r", 0.0, 600.0)];
    let priced = |attempt: &Attempt| {
        assert_eq!(attempt.route.pool, None);
        Charge::Unpriced { reason: UnpricedReason::UnknownModel }
    };
    calls_of_spans(&Told { spans, attempts, running, engines: &engines }, at(200.0), priced)
}

#[test]
fn a_call_that_nobody_metered_is_an_attempt() {
    let calls = calls_of(&[told_by_application(1, 10.0, 20.0)], &[], &[]);
    let call = &calls[0];
    assert_eq!((calls.len(), &call.source), (1, &Source::Span("shop".into())));
    assert_eq!((&*call.route.provider, call.route.pool.as_ref()), ("openai", None));
    assert_eq!(call.charge, Charge::Unpriced { reason: UnpricedReason::UnknownModel });
    assert_eq!((call.timeline.received_at, call.timeline.finished_us), (at(10.0), 10_000_000));
    assert_eq!((call.usage, call.usage_quality), (usage(101, 50), UsageQuality::Reported));
    assert_eq!(call.context.team.as_deref(), Some("shop"));
}

#[test]
fn application_and_engine_tell_of_one_call() {
    let metered = attempt(1, "p", "e", (10.0, 12.0, 20.0), (101, 50));
    let (application, engine) = (told_by_application(1, 9.5, 20.5), span_of(&metered, 0.5, 1.5));
    let calls = calls_of(&[engine.clone(), application.clone()], &[], &[]);
    assert_eq!(calls.len(), 1);
    let call = &calls[0];
    assert_eq!((call.route.pool.as_deref(), &*call.route.upstream), (Some("p"), "e"));
    assert_eq!(call.charge, Charge::Unpriced { reason: UnpricedReason::SelfHosted });
    assert_eq!(call.context.team.as_deref(), Some("shop"), "who called is what the application says");
    assert_eq!((call.timeline.received_at, call.timeline.first_token_us), (at(10.0), Some(2_000_000)));
    // Without an answer's id the engine's parent is the application's span.
    let nameless =
        [CallSpan { response_id: None, ..application.clone() }, CallSpan { response_id: None, ..engine.clone() }];
    assert_eq!(calls_of(&nameless, &[], &[]).len(), 1);
    // Whichever is told later finds the other booked.
    for (first, second) in [(&application, &engine), (&engine, &application)] {
        let booked = calls_of(std::slice::from_ref(first), &[], &[]);
        assert_eq!(calls_of(std::slice::from_ref(second), &booked, &[]), []);
    }
    for (first, second) in [(0, 1), (1, 0)] {
        let booked = calls_of(&nameless[first..=first], &[], &[]);
        assert_eq!(calls_of(&nameless[second..=second], &booked, &[]), []);
    }
}

#[test]
fn what_the_gateway_metered_is_not_booked_again() {
    let metered = attempt(1, "p", "e", (10.0, 12.0, 20.0), (101, 50));
    let application = told_by_application(1, 9.5, 20.5);
    let by_answer = CallSpan { trace_id: None, span_id: None, ..application.clone() };
    let by_caller = CallSpan { response_id: None, ..application.clone() };
    let engine = CallSpan { response_id: None, ..span_of(&metered, 0.5, 1.5) };
    // A client that made a span of its own for the HTTP request.
    let by_tokens = CallSpan { span_id: label("around"), ..by_caller.clone() };
    for span in [by_answer, by_caller, engine, by_tokens.clone()] {
        assert_eq!(calls_of(std::slice::from_ref(&span), std::slice::from_ref(&metered), &[]), [], "{span:?}");
    }
    // Another call of the same trace: other tokens, another time, or another answer.
    let others = [
        CallSpan { usage: usage(7, 7), ..by_tokens.clone() },
        CallSpan { period: between(60.0, 70.0), ..by_tokens.clone() },
        CallSpan { response_id: label("another"), ..by_tokens.clone() },
        CallSpan { parent_span_id: label("caller-1"), request_model: label("another"), ..by_tokens },
    ];
    for span in others {
        assert_eq!(calls_of(std::slice::from_ref(&span), std::slice::from_ref(&metered), &[]).len(), 1, "{span:?}");
    }
}

#[test]
fn behind_the_span_of_an_http_library_a_call_is_still_not_booked_again() {
    let through_http = |number: u64| CallSpan {
        span_id: label("around"),
        response_id: None,
        ..told_by_application(number, 9.5, 20.5)
    };
    // An embedding has no id and generates nothing.
    let embedding = Attempt {
        usage: usage(500, 0),
        route: Route { response_id: None, ..attempt(1, "p", "e", (10.0, 12.0, 20.0), (500, 0)).route },
        ..attempt(1, "p", "e", (10.0, 12.0, 20.0), (500, 0))
    };
    let told = CallSpan { usage: usage(500, 0), ..through_http(1) };
    assert_eq!(calls_of(&[told], &[embedding], &[]), []);
    // A stream without usage: the gateway counts by the text, the application's library by its own tokenizer, or not at all.
    let guessed =
        Attempt { usage_quality: UsageQuality::Estimated, ..attempt(1, "p", "e", (10.0, 12.0, 20.0), (90, 44)) };
    let silent = CallSpan { usage: TokenUsage::default(), usage_quality: UsageQuality::Missing, ..through_http(1) };
    for told in [through_http(1), silent] {
        assert_eq!(calls_of(std::slice::from_ref(&told), std::slice::from_ref(&guessed), &[]), [], "{told:?}");
    }
}

#[test]
fn a_call_waits_for_its_trace_and_for_the_watermark() {
    let span = told_by_application(1, 10.0, 20.0);
    let other = attempt(1, "p", "e", (15.0, 16.0, 300.0), (1, 1));
    assert_eq!(calls_of(std::slice::from_ref(&span), &[], &[running(&other, 100.0, 3)]), []);
    assert_eq!(calls_of(&[CallSpan { observed_at: at(200.0), ..span.clone() }], &[], &[]), []);
    assert_eq!(calls_of(&[CallSpan { period: between(10.0, 200.0), ..span }], &[], &[]), []);
}

#[test]
fn what_is_around_several_calls_is_none() {
    let turn = CallSpan { span_id: label("turn"), response_id: None, ..told_by_application(1, 5.0, 60.0) };
    let inner = |name: &str, from: f64| CallSpan {
        span_id: label(name),
        parent_span_id: label("turn"),
        response_id: label(name),
        ..told_by_application(1, from, from + 5.0)
    };
    let calls = calls_of(&[turn.clone(), inner("a", 10.0), inner("b", 20.0)], &[], &[]);
    let answers: Vec<Option<&str>> = calls.iter().map(|call| call.route.response_id.as_deref()).collect();
    assert_eq!(answers, [Some("a"), Some("b")]);
    // A framework's span around one call is the same call.
    let one = calls_of(&[turn, inner("a", 10.0)], &[], &[]);
    assert_eq!(one.len(), 1);
    assert_eq!(one[0].route.response_id.as_deref(), Some("a"));
}

#[test]
fn parents_in_a_circle_end() {
    let span = |name: &str, parent: &str| CallSpan {
        span_id: label(name),
        parent_span_id: label(parent),
        response_id: None,
        ..told_by_application(1, 5.0, 10.0)
    };
    assert!(!calls_of(&[span("a", "b"), span("b", "a")], &[], &[]).is_empty());
}

#[test]
fn a_failed_call_is_booked_as_one() {
    let span = CallSpan {
        failed: true,
        usage_quality: UsageQuality::Missing,
        usage: TokenUsage::default(),
        ..told_by_application(1, 5.0, 6.0)
    };
    let calls = calls_of(&[span], &[], &[]);
    assert_eq!((calls[0].outcome, calls[0].usage_quality), (Outcome::UpstreamError, UsageQuality::Missing));
}

/// Calls told by an application, an engine, both, with or without ids; some of them metered.
fn any_calls(dice: &mut Dice) -> (Vec<Vec<CallSpan>>, Vec<Attempt>) {
    let (mut told, mut metered) = (Vec::new(), Vec::new());
    for number in 0..dice.roll(20) {
        let sent = dice.seconds(100);
        let one = attempt(number, "p", "e", (sent, sent + 0.5, sent + 10.0), (100 + number, 50));
        let mut application = told_by_application(number, sent - 0.2, sent + 10.2);
        let mut engine = span_of(&one, 0.1, 0.2);
        match dice.roll(3) {
            0 => (application.response_id, engine.response_id) = (None, None),
            1 => application.response_id = None,
            _ => {}
        }
        if dice.roll(3) == 0 {
            metered.push(one);
        }
        told.push(match dice.roll(3) {
            0 => vec![application],
            1 => vec![engine],
            _ => vec![application, engine],
        });
    }
    (told, metered)
}

proptest! {
    #[test]
    fn order_and_duplicates_change_nothing(seed: u64) {
        let mut dice = Dice(seed);
        let (told, metered) = any_calls(&mut dice);
        let unmetered = told.iter().filter(|spans| {
            !metered.iter().any(|attempt| attempt.context.trace_id == spans[0].trace_id)
        });
        let count = unmetered.count();
        let mut spans: Vec<CallSpan> = told.into_iter().flatten().collect();
        let calls = calls_of(&spans, &metered, &[]);
        prop_assert_eq!(calls.len(), count);
        let twice: Vec<CallSpan> = spans.iter().filter(|_| dice.roll(3) == 0).cloned().collect();
        spans.extend(twice);
        dice.shuffle(&mut spans);
        prop_assert_eq!(calls_of(&spans, &metered, &[]), calls);
    }

    #[test]
    fn batches_of_whole_calls_make_the_same_set(seed: u64) {
        let mut dice = Dice(seed);
        let (mut told, metered) = any_calls(&mut dice);
        let all: Vec<CallSpan> = told.iter().flatten().cloned().collect();
        let expected = calls_of(&all, &metered, &[]);
        dice.shuffle(&mut told);
        let mut booked = metered.clone();
        let mut seen: Vec<CallSpan> = Vec::new();
        for spans in told {
            // Sometimes what was told before is told again with the new.
            if dice.roll(2) == 0 {
                seen.clear();
            }
            seen.extend(spans);
            booked.extend(calls_of(&seen, &booked, &[]));
        }
        let mut made = booked.split_off(metered.len());
        made.sort_by_key(|attempt| attempt.id);
        prop_assert_eq!(made, expected);
    }

    #[test]
    fn a_call_that_is_told_in_pieces_is_one_call(seed: u64) {
        let mut dice = Dice(seed);
        let (told, metered) = any_calls(&mut dice);
        let mut spans: Vec<CallSpan> = told.into_iter().flatten().collect();
        let expected = calls_of(&spans, &metered, &[]).len();
        dice.shuffle(&mut spans);
        let mut booked = metered.clone();
        for span in spans {
            booked.extend(calls_of(&[span], &booked, &[]));
        }
        prop_assert_eq!(booked.len() - metered.len(), expected);
    }
}
