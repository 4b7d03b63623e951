//! Made-up requests of a month, the same from the same seed, one engine at a time and never held at once.
//!
//! Arrivals are Poisson with a daily cycle; lengths are log-normal with the moments of the hour of conversations that
//! Microsoft published in 2023 (Azure LLM inference trace; `exp` of the mean logarithm 760 and 151 tokens, its deviation
//! 0.985 and 0.859). A request decodes for some ten seconds, so that about thirty run at once on an engine.

use ledger::Timestamp;
use ledger::allocate::timeline::EngineTimeline;

/// Engines that share the requests.
pub const ENGINES: u32 = 12;
/// Requests an engine gets in a second, on the mean of a day: 100 million in thirty days on twelve engines.
pub const RATE_PER_S: f64 = 100e6 / 12.0 / (30.0 * 86_400.0);
/// How far the rate swings around its mean in a day.
const SWING: f64 = 0.6;
const DAY_S: f64 = 86_400.0;

/// One request and its number, which is unique over all engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Its number.
    pub tag: u64,
    /// When it ran.
    pub timeline: EngineTimeline,
}

/// The requests of one engine in the order of their schedule.
#[derive(Debug, Clone)]
pub struct Engine {
    dice: Dice,
    number: u32,
    given: u64,
    wanted: u64,
    now_s: f64,
    scheduled_us: i64,
}

impl Engine {
    /// The requests of engine `number`, its part of `requests` on all [`ENGINES`] together.
    #[must_use]
    pub fn new(seed: u64, number: u32, requests: u64) -> Engine {
        let (engines, own) = (u64::from(ENGINES), u64::from(number));
        let wanted = requests / engines + u64::from(own < requests % engines);
        let mut dice = Dice(seed ^ own.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        dice.next();
        Engine { dice, number, given: 0, wanted, now_s: 0.0, scheduled_us: 0 }
    }

    /// Replaces what is in `block` by the next requests, up to its capacity; an empty block is the end.
    pub fn refill(&mut self, block: &mut Vec<Request>) {
        let room = block.capacity();
        block.clear();
        block.extend(self.take(room));
    }
}

impl Iterator for Engine {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        if self.given == self.wanted {
            return None;
        }
        let tag = self.given * u64::from(ENGINES) + u64::from(self.number);
        self.given += 1;
        let rate = RATE_PER_S * (1.0 + SWING * (std::f64::consts::TAU * self.now_s / DAY_S).sin());
        self.now_s += self.dice.exponential() / rate;
        let (for_input, for_output) = self.dice.normals();
        let input_tokens = whole((760.0 * (0.985 * for_input).exp()).clamp(1.0, 14_000.0));
        let output_tokens = whole((151.0 * (0.859 * for_output).exp()).clamp(1.0, 1_500.0));
        // A third of the prompts begin with something that the engine still has.
        let hit = (self.dice.unit() * 3.0 - 2.0).max(0.0);
        let cached_tokens = whole(f64::from(input_tokens) * 0.9 * hit);
        let prefill_s = 0.015 + 70e-6 * f64::from(input_tokens - cached_tokens) * (0.7 + self.dice.unit());
        let decode_s = f64::from(output_tokens - 1) * (0.03 + 0.03 * self.dice.unit());

        let arrived = Timestamp::from_micros(micros(self.now_s));
        let scheduled = arrived.plus_micros(micros(0.002 * self.dice.unit()));
        // First come, first served: nobody overtakes.
        let scheduled = scheduled.max(Timestamp::from_micros(self.scheduled_us));
        self.scheduled_us = scheduled.micros();
        let first_token = scheduled.plus_micros(micros(prefill_s));
        let last_token = first_token.plus_micros(micros(decode_s));
        let timeline =
            EngineTimeline { arrived, scheduled, first_token, last_token, input_tokens, cached_tokens, output_tokens };
        Some(Request { tag, timeline })
    }
}

/// SplitMix64, which is fast and good enough for arrivals.
#[derive(Debug, Clone)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Above 0, at most 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn exponential(&mut self) -> f64 {
        -self.unit().ln()
    }

    /// Two standard normal numbers (Box and Muller).
    fn normals(&mut self) -> (f64, f64) {
        let (radius, angle) = ((2.0 * self.exponential()).sqrt(), std::f64::consts::TAU * self.unit());
        (radius * angle.cos(), radius * angle.sin())
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to what fits by its callers")]
fn whole(value: f64) -> u32 {
    value as u32
}

#[expect(clippy::cast_possible_truncation, reason = "a month has 2.6e12 microseconds")]
fn micros(seconds: f64) -> i64 {
    (seconds * 1e6) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_month_is_the_same_each_time_and_in_order() {
        let count = 60_000;
        let all: Vec<Request> = Engine::new(7, 3, count * u64::from(ENGINES)).collect();
        assert_eq!(all.len() as u64, count);
        assert!(all.windows(2).all(|pair| pair[0].timeline.scheduled <= pair[1].timeline.scheduled));
        assert!(all.iter().all(|request| request.timeline == request.timeline.ordered()));
        assert!(all.iter().all(|request| request.timeline.first_token > request.timeline.scheduled));
        let mut again = Engine::new(7, 3, count * u64::from(ENGINES));
        let mut block = Vec::with_capacity(1_000);
        again.refill(&mut block);
        assert_eq!(block[..], all[..1_000]);
        // Little's law: what runs at once is the rate times how long a request stays.
        let stay_us: u64 =
            all.iter().map(|request| request.timeline.last_token.micros_since(request.timeline.scheduled)).sum();
        let batch = RATE_PER_S * stay_us as f64 * 1e-6 / count as f64;
        assert!((20.0..45.0).contains(&batch), "{batch}");
    }

    #[test]
    fn engines_share_the_requests_and_their_numbers_never_meet() {
        let mut tags: Vec<u64> =
            (0..ENGINES).flat_map(|engine| Engine::new(1, engine, 1_003).map(|request| request.tag)).collect();
        tags.sort_unstable();
        assert_eq!(tags.len(), 1_003);
        tags.dedup();
        assert_eq!(tags.len(), 1_003);
    }
}
