use super::super::fixtures::{at, engine, llama};
use super::*;
use crate::step::Work;

/// One request after the other on an engine with these constants, each alone in its steps.
fn one_by_one(truth: &Replica, requests: u32) -> Vec<EngineTimeline> {
    let mut now = at(0.0);
    (0..requests)
        .map(|number| {
            let (input, output) = (200 + 97 * (number % 40), 50 + 13 * (number % 17));
            let prefill_s = truth.step_s(&[Work { new_tokens: input, cached_tokens: 0 }]);
            let decode_s: f64 =
                (1..output).map(|step| truth.step_s(&[Work { new_tokens: 1, cached_tokens: input + step }])).sum();
            let first_token = now.plus_micros(micros(prefill_s));
            let last_token = first_token.plus_micros(micros(decode_s));
            let timeline = EngineTimeline {
                arrived: now,
                scheduled: now,
                first_token,
                last_token,
                input_tokens: input,
                cached_tokens: 0,
                output_tokens: output,
            };
            now = last_token.plus_micros(1_000);
            timeline
        })
        .collect()
}

#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
fn micros(seconds: f64) -> i64 {
    (seconds * 1e6).round() as i64
}

fn slow() -> Replica {
    Replica { efficiencies: Efficiencies { compute: 0.4, bandwidth: 0.5, overhead_s: 0.004 }, ..llama() }
}

#[test]
fn constants_that_were_wrong_are_made_right_from_the_next_minute_on() {
    let before = engine("p", "e", "r", 0.0, 90.0);
    let after = recalibrated(&before, &one_by_one(&slow(), 200), &[], at(95.0)).expect("they are far off");
    assert_eq!(after.period.start, at(120.0));
    assert!(after.period.end >= after.period.start);
    assert_eq!((&after.engine, &after.replica, after.observed_at), (&before.engine, &before.replica, at(95.0)));
    let constants = after.setup.constants.unwrap();
    let predicted = constants.step_s(&[Work { new_tokens: 1, cached_tokens: 1_000 }]);
    let truth = slow().step_s(&[Work { new_tokens: 1, cached_tokens: 1_000 }]);
    assert!((predicted / truth - 1.0).abs() < 0.02, "{predicted} {truth}");
    assert!(after.setup.error.is_some_and(|error| error.median < 0.02));
    let text = serde_json::to_string(&after.setup).unwrap();
    assert_eq!(serde_json::from_str::<EngineSetup>(&text).unwrap(), after.setup);
    // Right constants stay.
    assert_eq!(recalibrated(&after, &one_by_one(&slow(), 200), &[], at(200.0)), None);
}

#[test]
fn little_is_no_reason_to_change() {
    let before = engine("p", "e", "r", 0.0, 90.0);
    assert_eq!(recalibrated(&before, &one_by_one(&slow(), 20), &[], at(95.0)), None);
    let unknown = EngineFact { setup: EngineSetup::default(), ..before };
    assert_eq!(recalibrated(&unknown, &one_by_one(&slow(), 200), &[], at(95.0)), None);
}

#[test]
fn nine_digits_are_kept() {
    assert_eq!(nine_digits(0.123_456_789_123), 0.123_456_789);
    assert_eq!(nine_digits(0.0), 0.0);
    assert_eq!(nine_digits(1.0), 1.0);
}
