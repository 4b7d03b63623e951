//! Forward-pass metrics: what an engine did in each step, as it publishes it (MessagePack over ZeroMQ PUB/SUB).
//!
//! A message has three frames: an empty topic, a sequence number of eight bytes, most significant first, and a map of
//! what was scheduled. [`decode`] reads the map, [`Numbering`] finds what was lost, [`follow`] stays subscribed. A message
//! carries no time of day, so a step ended when its message arrived and began `wall_time` before. What `wall_time` spans
//! differs by source, and steps may overlap: who adds them up takes the union of their intervals.

mod follow;

use std::collections::BTreeMap;

use ledger::{EngineStep, Label, Timestamp};
use serde::Deserialize;

pub use follow::{StepSource, follow};

/// Longest message that is read; a real one has a few hundred bytes.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Longest step that is believed, in seconds.
const STEP_S_MAX: f64 = 3_600.0;

/// Why a step is unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The endpoint can never work; correct it.
    #[error("`{endpoint}` is no endpoint of forward-pass metrics; write tcp://host:port")]
    Endpoint {
        /// What was given.
        endpoint: String,
    },
    /// The message is none of forward-pass metrics: another publisher listens there, or a newer version of one.
    #[error("not a message of forward-pass metrics: {0}")]
    Message(String),
}

/// What is heard of an engine's steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A step.
    Step(EngineStep),
    /// The engine is alive and idle.
    Heartbeat,
    /// Messages were lost before the one that follows.
    Lost {
        /// The rank that published them.
        rank: u32,
        /// How many.
        messages: u64,
    },
    /// The rank counts from the start again: its process was restarted.
    Restarted {
        /// The rank.
        rank: u32,
    },
    /// A message could not be read.
    Unreadable(StepError),
    /// The connection is there.
    Connected,
    /// The connection broke or could not be made, for this reason; it is tried again.
    Disconnected(String),
}

/// One message as published. Everything that says how much was done must be there.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Message {
    /// Version of the format; the first one had no number.
    #[serde(default)]
    pub version: Option<u32>,
    /// Data-parallel rank.
    #[serde(default)]
    pub dp_rank: u32,
    /// The publisher's own number of the message, where it is part of the map.
    #[serde(default)]
    pub counter_id: Option<u64>,
    /// What `wall_time` spans, where the publisher says so.
    #[serde(default)]
    pub timing_scope: Option<String>,
    /// Seconds that the step took; 0 in a heartbeat.
    pub wall_time: f64,
    /// What ran.
    pub scheduled_requests: Scheduled,
}

/// What ran in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Scheduled {
    /// Requests in prefill.
    pub num_prefill_requests: u32,
    /// Their new tokens.
    pub sum_prefill_tokens: u64,
    /// Tokens already cached that they read.
    pub sum_prefill_kv_tokens: u64,
    /// Requests that decoded.
    pub num_decode_requests: u32,
    /// Tokens in their caches.
    pub sum_decode_kv_tokens: u64,
}

/// Reads the map of a message.
///
/// # Errors
/// When the bytes are no such map, lack a quantity, or have a time that none can have.
pub fn decode(payload: &[u8]) -> Result<Message, StepError> {
    if payload.len() > MESSAGE_BYTES_MAX {
        return Err(StepError::Message(format!("it has {} bytes", payload.len())));
    }
    let message: Message = rmp_serde::from_slice(payload).map_err(|error| StepError::Message(error.to_string()))?;
    if !(0.0..=STEP_S_MAX).contains(&message.wall_time) {
        return Err(StepError::Message(format!("a step of {} seconds", message.wall_time)));
    }
    Ok(message)
}

impl Message {
    /// Whether nothing ran: the publisher says that it lives.
    #[must_use]
    pub fn is_heartbeat(&self) -> bool {
        let Scheduled { num_prefill_requests, num_decode_requests, .. } = self.scheduled_requests;
        self.wall_time == 0.0 && num_prefill_requests == 0 && num_decode_requests == 0
    }

    /// The step of an engine, when the message arrived at `received`.
    #[must_use]
    pub fn step(&self, engine: &Label, sequence: u64, received: Timestamp) -> EngineStep {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "decode() bounds it by an hour")]
        let wall_us = (self.wall_time * 1e6).round().clamp(0.0, STEP_S_MAX * 1e6) as u64;
        let Scheduled { num_prefill_requests, sum_prefill_tokens, sum_prefill_kv_tokens, .. } = self.scheduled_requests;
        EngineStep {
            engine: engine.clone(),
            rank: self.dp_rank,
            sequence,
            at: received.plus_micros(i64::try_from(wall_us).map_or(0, |wall| -wall)),
            wall_us,
            prefill_requests: num_prefill_requests,
            prefill_tokens: sum_prefill_tokens,
            prefill_kv_tokens: sum_prefill_kv_tokens,
            decode_requests: self.scheduled_requests.num_decode_requests,
            decode_kv_tokens: self.scheduled_requests.sum_decode_kv_tokens,
        }
    }
}

/// Follows the numbers of each rank's messages and finds what is missing.
///
/// Publishers number heartbeats too. They are taken out of the sequence of an [`EngineStep`], so that a hole in it means
/// lost messages and nothing else; a lost heartbeat counts as a lost step, because nobody can tell them apart.
#[derive(Debug, Clone, Default)]
pub struct Numbering {
    ranks: BTreeMap<u32, Position>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Position {
    /// The number that the next message should have.
    next: u64,
    /// Heartbeats heard so far.
    heartbeats: u64,
}

impl Numbering {
    /// What a message with this number means: first what came before it, then the message itself.
    pub fn hear(&mut self, number: u64, message: &Message, engine: &Label, received: Timestamp) -> Vec<Heard> {
        let rank = message.dp_rank;
        let mut heard = Vec::with_capacity(2);
        let position = self.ranks.entry(rank).or_insert(Position { next: number, heartbeats: 0 });
        if number < position.next {
            *position = Position::default();
            heard.push(Heard::Restarted { rank });
            // What it published before it could be heard is not lost, it was never subscribed to.
        } else if number > position.next {
            heard.push(Heard::Lost { rank, messages: number - position.next });
        }
        position.next = number.saturating_add(1);
        if message.is_heartbeat() {
            position.heartbeats += 1;
            heard.push(Heard::Heartbeat);
        } else {
            heard.push(Heard::Step(message.step(engine, number.saturating_sub(position.heartbeats), received)));
        }
        heard
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Serialize;

    use super::*;

    /// The map as publishers write it, with fields that are not read.
    #[derive(Serialize)]
    struct Written {
        worker_id: &'static str,
        dp_rank: u32,
        wall_time: f64,
        scheduled_requests: WrittenScheduled,
        queued_requests: BTreeMap<&'static str, f64>,
    }

    #[derive(Serialize, Default)]
    struct WrittenScheduled {
        num_prefill_requests: u32,
        sum_prefill_tokens: u64,
        var_prefill_length: f64,
        sum_prefill_kv_tokens: u64,
        num_decode_requests: u32,
        sum_decode_kv_tokens: u64,
        var_decode_kv_tokens: f64,
    }

    fn written(wall_time: f64, decoding: u32) -> Vec<u8> {
        let scheduled_requests = WrittenScheduled {
            num_prefill_requests: u32::from(decoding > 0),
            sum_prefill_tokens: 256,
            var_prefill_length: 1.5,
            sum_prefill_kv_tokens: 1_024,
            num_decode_requests: decoding,
            sum_decode_kv_tokens: 9_000,
            ..WrittenScheduled::default()
        };
        let queued_requests = BTreeMap::from([("num_prefill_requests", 2.0)]);
        let message = Written { worker_id: "w", dp_rank: 1, wall_time, scheduled_requests, queued_requests };
        rmp_serde::to_vec_named(&message).unwrap()
    }

    fn step(sequence: u64) -> Heard {
        Heard::Step(EngineStep {
            engine: "e".into(),
            rank: 1,
            sequence,
            at: Timestamp::from_micros(975_000),
            wall_us: 25_000,
            prefill_requests: 1,
            prefill_tokens: 256,
            prefill_kv_tokens: 1_024,
            decode_requests: 7,
            decode_kv_tokens: 9_000,
        })
    }

    #[test]
    fn a_step_ends_when_it_is_heard() {
        let message = decode(&written(0.025, 7)).unwrap();
        let heard = Numbering::default().hear(40, &message, &"e".into(), Timestamp::from_micros(1_000_000));
        assert_eq!(heard, [step(40)]);
    }

    #[test]
    fn what_is_not_such_a_message_is_refused() {
        let whole = written(0.025, 7);
        let cases: [(&str, Vec<u8>); 6] = [
            ("cut", whole[..whole.len() - 3].to_vec()),
            ("empty", Vec::new()),
            ("another map", rmp_serde::to_vec_named(&BTreeMap::from([("wall_time", 0.1)])).unwrap()),
            ("no time at all", written(f64::NAN, 7)),
            ("a time before", written(-0.1, 7)),
            ("too long", vec![0x90; MESSAGE_BYTES_MAX + 1]),
        ];
        for (name, bytes) in cases {
            assert!(matches!(decode(&bytes), Err(StepError::Message(_))), "{name}");
        }
    }

    #[test]
    fn losses_and_restarts_are_found_and_heartbeats_are_no_steps() {
        let (busy, idle) = (decode(&written(0.025, 7)).unwrap(), decode(&written(0.0, 0)).unwrap());
        let lost = |messages| Heard::Lost { rank: 1, messages };
        let cases: [(u64, &Message, Vec<Heard>); 8] = [
            (10, &busy, vec![step(10)]),
            (11, &idle, vec![Heard::Heartbeat]),
            (12, &idle, vec![Heard::Heartbeat]),
            (13, &busy, vec![step(11)]),
            (14, &busy, vec![step(12)]),
            (17, &busy, vec![lost(2), step(15)]),
            (0, &idle, vec![Heard::Restarted { rank: 1 }, Heard::Heartbeat]),
            (1, &busy, vec![step(0)]),
        ];
        let mut numbering = Numbering::default();
        for (number, message, expected) in cases {
            let heard = numbering.hear(number, message, &"e".into(), Timestamp::from_micros(1_000_000));
            assert_eq!(heard, expected, "message {number}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn a_mangled_message_gives_an_answer(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = written(0.025, 7);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(message) = decode(&bytes) {
                Numbering::default().hear(u64::MAX, &message, &"e".into(), Timestamp::from_micros(0));
            }
        }

        #[test]
        fn steps_heard_and_messages_lost_add_up(kept in prop::collection::vec(any::<bool>(), 1..60)) {
            let busy = decode(&written(0.025, 7)).unwrap();
            let mut numbering = Numbering::default();
            let (mut steps, mut lost) = (0, 0);
            for (number, _) in kept.iter().enumerate().filter(|(_, kept)| **kept) {
                for heard in numbering.hear(number as u64, &busy, &"e".into(), Timestamp::from_micros(0)) {
                    match heard {
                        Heard::Step(_) => steps += 1,
                        Heard::Lost { messages, .. } => lost += messages,
                        other => prop_assert!(false, "{other:?}"),
                    }
                }
            }
            let heard = |position: Option<usize>| position.map_or(0, |at| at as u64);
            let (first, last) = (kept.iter().position(|k| *k), kept.iter().rposition(|k| *k));
            let spanned = if first.is_some() { heard(last) - heard(first) + 1 } else { 0 };
            prop_assert_eq!(steps + lost, spanned);
        }
    }
}
