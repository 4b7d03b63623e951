use std::collections::BTreeMap;

use super::super::fixtures::{at, attempt, between, capacity, engine, reading, usage};
use super::super::settle;
use super::*;

/// Whether traffic is booked as unobserved when the engine counted 1,000 prompt and 500 generated tokens and this is all that
/// the gateway sent to it.
fn something_bypassed(seen: Attempt) -> bool {
    let known = Known {
        capacity: &[capacity("p", "r", 0.0, 60.0)],
        engines: &[engine("p", "e", "r", 0.0, 60.0)],
        attempts: &[seen],
        running: &[],
        spans: &[],
        readings: &[reading("p", "e", 0.0, 0, 0), reading("p", "e", 59.0, 1_000, 500)],
        steps: &[],
        jobs: &[],
        posted: &[],
        policies: &BTreeMap::new(),
        demand: &BTreeMap::new(),
    };
    let settlement = settle(&known, between(0.0, 60.0), at(100.0)).unwrap();
    settlement.postings.iter().any(|posting| posting.line == Line::Unobserved)
}

/// Sent at 10 seconds, ended at 40, nothing seen of its answer.
fn unseen(outcome: Outcome) -> Attempt {
    let mut attempt = attempt(1, "p", "e", (10.0, 11.0, 40.0), (1_000, 0));
    attempt.route.streamed = false;
    (attempt.timeline.first_token_us, attempt.timeline.last_token_us) = (None, None);
    Attempt { outcome, usage: usage(1_000, 0), usage_quality: UsageQuality::Estimated, status: None, ..attempt }
}

#[test]
fn a_whole_answer_that_nobody_waited_for_is_no_bypass() {
    for outcome in [Outcome::ClientAborted, Outcome::TimedOut, Outcome::UpstreamCut] {
        assert!(!something_bypassed(unseen(outcome)), "{outcome:?}");
    }
    assert!(something_bypassed(Attempt { usage_quality: UsageQuality::Reported, ..unseen(Outcome::ClientAborted) }));
}

#[test]
fn what_a_failed_engine_counted_is_no_bypass_and_a_refusal_counts_nothing() {
    let failed = |status| Attempt {
        status,
        usage: usage(0, 0),
        usage_quality: UsageQuality::Missing,
        ..unseen(Outcome::UpstreamError)
    };
    for (status, bypassed) in
        [(Some(500), false), (None, false), (Some(429), true), (Some(503), true), (Some(400), true)]
    {
        assert_eq!(something_bypassed(failed(status)), bypassed, "{status:?}");
    }
    assert!(something_bypassed(unseen(Outcome::UpstreamUnreachable)));
}

#[test]
fn more_chunks_than_estimated_tokens_were_generated_all_the_same() {
    let mut streamed = attempt(1, "p", "e", (10.0, 11.0, 40.0), (1_000, 20));
    streamed.timeline.gaps.count = 499;
    streamed.usage_quality = UsageQuality::Estimated;
    assert!(!something_bypassed(streamed));
}
