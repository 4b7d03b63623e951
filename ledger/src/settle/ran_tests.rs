use super::super::fixtures::{at, attempt, llama, running, span_of, usage};
use super::*;

/// Sent at 0, first token at 2, last at 10.
fn streamed() -> Attempt {
    attempt(1, "p", "e", (0.0, 2.0, 10.0), (1_000, 101))
}

/// The same as an answer that came as a whole.
fn whole_answer() -> Attempt {
    let mut attempt = streamed();
    attempt.route.streamed = false;
    (attempt.timeline.first_token_us, attempt.timeline.last_token_us) = (None, None);
    attempt
}

fn seconds(ran: Option<Ran>) -> [f64; 4] {
    let timeline = ran.expect("it ran").timeline;
    [timeline.arrived, timeline.scheduled, timeline.first_token, timeline.last_token]
        .map(|moment| (moment.micros() - at(0.0).micros()) as f64 * 1e-6)
}

#[test]
fn a_streamed_answer_has_its_tokens_times_and_a_guessed_start() {
    let ran = timeline_of(&streamed(), None, Some(&llama())).unwrap();
    let [arrived, scheduled, first, last] = seconds(Some(ran));
    assert_eq!((arrived, first, last), (0.0, 2.0, 10.0));
    assert!(1.9 < scheduled && scheduled < 2.0, "an H100 needs a few hundredths for 1,000 tokens: {scheduled}");
    assert!(ran.estimated && ran.known == Known::Timeline);
    assert_eq!((ran.timeline.input_tokens, ran.timeline.output_tokens), (1_000, 101));
    let [_, scheduled, ..] = seconds(timeline_of(&streamed(), None, None));
    assert_eq!(scheduled, 0.0, "without a model nothing says that it waited");
}

#[test]
fn what_the_engine_says_wins_over_the_guess() {
    let mut said = streamed();
    said.timeline.queued_us = Some(500_000);
    let ran = timeline_of(&said, None, Some(&llama())).unwrap();
    assert_eq!(seconds(Some(ran)), [0.0, 0.5, 2.0, 10.0]);
    assert!(!ran.estimated);
    let span = span_of(&streamed(), 0.75, 1.0);
    let ran = timeline_of(&streamed(), Some(&span), Some(&llama())).unwrap();
    assert_eq!(seconds(Some(ran)), [0.0, 0.75, 2.0, 10.0]);
    assert!(!ran.estimated);
    let prefill_only = CallSpan { queue_us: None, first_token_us: None, ..span };
    assert_eq!(seconds(timeline_of(&streamed(), Some(&prefill_only), None)), [0.0, 1.0, 2.0, 10.0]);
}

#[test]
fn a_whole_answer_is_cut_by_the_model_or_by_the_span() {
    let [_, scheduled, first, last] = seconds(timeline_of(&whole_answer(), None, Some(&llama())));
    assert_eq!((scheduled, last), (0.0, 10.0));
    assert!(0.0 < first && first < 0.1, "{first}");
    let span = span_of(&whole_answer(), 0.5, 1.5);
    let ran = timeline_of(&whole_answer(), Some(&span), None).unwrap();
    assert_eq!(seconds(Some(ran)), [0.0, 0.5, 2.0, 10.0]);
    let [_, _, first, _] = seconds(timeline_of(&whole_answer(), None, None));
    assert!((first - 10.0 * 1_000.0 / (1_000.0 + 32.0 * 101.0)).abs() < 1e-5);
}

#[test]
fn an_embedding_is_all_prefill_and_ends_with_it() {
    let mut embedding = whole_answer();
    embedding.usage = usage(1_000, 0);
    let [_, scheduled, first, last] = seconds(timeline_of(&embedding, None, Some(&llama())));
    assert!(scheduled > 9.9 && first == 10.0 && last == 10.0);
}

#[test]
fn what_never_reached_the_engine_is_no_work() {
    let with = |change: fn(&mut Attempt)| {
        let mut attempt = whole_answer();
        attempt.usage = TokenUsage::default();
        change(&mut attempt);
        timeline_of(&attempt, None, Some(&llama()))
    };
    assert_eq!(with(|attempt| attempt.outcome = Outcome::UpstreamUnreachable), None);
    assert_eq!(with(|attempt| attempt.outcome = Outcome::UpstreamError), None);
    assert_eq!(with(|attempt| (attempt.outcome, attempt.timeline.sent_us) = (Outcome::ClientAborted, None)), None);
    assert_eq!(with(|attempt| attempt.route.operation = Operation::Models), None);
    assert!(with(|attempt| attempt.outcome = Outcome::TimedOut).is_some());
    let mut cut = streamed();
    (cut.outcome, cut.usage_quality) = (Outcome::UpstreamError, UsageQuality::Estimated);
    assert!(timeline_of(&cut, None, None).is_some_and(|ran| ran.estimated), "an error after tokens was work");
}

#[test]
fn who_hangs_up_pays_what_ran() {
    let mut gone = streamed();
    (gone.outcome, gone.usage_quality, gone.usage) =
        (Outcome::ClientAborted, UsageQuality::Estimated, usage(1_000, 40));
    gone.timeline.gaps.count = 49;
    let ran = timeline_of(&gone, None, Some(&llama())).unwrap();
    assert_eq!((ran.timeline.output_tokens, ran.estimated), (50, true), "fifty chunks had at least fifty tokens");

    // Before the first token: at most the prefill, and only as much of it as there was time for.
    let mut early = gone.clone();
    (early.timeline.first_token_us, early.timeline.last_token_us) = (None, None);
    early.usage = usage(100_000, 0);
    early.timeline.finished_us = 1_000_000;
    let ran = timeline_of(&early, None, Some(&llama())).unwrap();
    assert_eq!(seconds(Some(ran)), [0.0, 0.0, 1.0, 1.0]);
    assert!((1..100_000).contains(&ran.timeline.input_tokens) && ran.timeline.output_tokens == 0);

    // A whole answer was being generated all the while.
    early.route.streamed = false;
    early.usage = usage(1_000, 0);
    let ran = timeline_of(&early, None, Some(&llama())).unwrap();
    assert!(ran.timeline.output_tokens > 50 && ran.timeline.input_tokens == 1_000, "{:?}", ran.timeline);
}

#[test]
fn an_import_without_times_has_counts_only_and_so_has_a_crash() {
    let mut imported = streamed();
    imported.timeline = Timeline { received_at: at(3.0), ..Timeline::default() };
    imported.source = Source::Import("azure".into());
    let ran = timeline_of(&imported, None, Some(&llama())).unwrap();
    assert_eq!((ran.known, ran.timeline.arrived, ran.estimated), (Known::Counts, at(3.0), false));
    imported.usage = TokenUsage::default();
    assert_eq!(timeline_of(&imported, None, None), None);
    let mut crashed = streamed();
    crashed.timeline = Timeline { received_at: at(3.0), ..Timeline::default() };
    (crashed.outcome, crashed.usage_quality) = (Outcome::Crashed, UsageQuality::Estimated);
    assert!(timeline_of(&crashed, None, None).is_some_and(|ran| ran.known == Known::Counts && ran.estimated));
    let span = span_of(&streamed(), 0.5, 1.5);
    let told = timeline_of(&crashed, Some(&span), None).unwrap();
    assert_eq!((told.known, seconds(Some(told))), (Known::Timeline, [0.0, 0.5, 2.0, 10.0]));
}

#[test]
fn a_running_request_has_its_progress_so_far() {
    let ran = timeline_of_running(&running(&streamed(), 5.0, 30), None, Some(&llama())).unwrap();
    let [arrived, _, first, last] = seconds(Some(ran));
    assert_eq!((arrived, first, last, ran.timeline.output_tokens), (0.0, 2.0, 5.0, 30));
    assert!(ran.estimated);
    let waiting = timeline_of_running(&running(&streamed(), 1.0, 0), None, Some(&llama())).unwrap();
    assert_eq!(waiting.timeline.output_tokens, 0);
    assert!(seconds(Some(waiting))[1] > 0.9, "it waits, or its prefill has just run");
}

#[test]
fn no_timeline_is_out_of_order() {
    for finished_us in [0, 1, 1_000, 5_000_000] {
        for queued_us in [None, Some(0), Some(3_000_000)] {
            for streamed in [false, true] {
                for outcome in Outcome::ALL {
                    let mut odd = whole_answer();
                    (odd.outcome, odd.route.streamed) = (outcome, streamed);
                    (odd.timeline.finished_us, odd.timeline.queued_us) = (finished_us, queued_us);
                    let Some(ran) = timeline_of(&odd, None, Some(&llama())) else { continue };
                    assert_eq!(ran.timeline, ran.timeline.ordered());
                }
            }
        }
    }
}
