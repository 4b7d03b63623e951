//! The functions of time that all requests share, and their running integrals.

use super::super::share::memory_bound_fraction;
use super::groups::Groups;
use super::{PHASE_S_MIN, Phase, STRETCH_S, Segment, Slot, Sweep};

/// Running integrals of the functions that all requests share.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Integrals {
    pub(super) heads: f64,
    pub(super) memory: f64,
    pub(super) memory_t: f64,
    pub(super) decode: f64,
    pub(super) decode_t: f64,
    pub(super) prefill: f64,
    pub(super) prefill_t: f64,
    pub(super) expert_steps: f64,
    pub(super) expert_tokens: f64,
}

/// Sums over the active requests that give `W(t)`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Totals {
    pub(super) decoding: f64,
    pub(super) prefilling: f64,
    decode_rate: f64,
    /// Sum of the compute of a new token, adapters included.
    decode_alpha: f64,
    pub(super) decode_a: f64,
    pub(super) decode_b: f64,
    prefill_a: f64,
    prefill_b: f64,
    /// Sum of r, of r times the compute of a new token, and of r k(t).
    prefill_rate: f64,
    prefill_alpha: f64,
    prefill_ra: f64,
    prefill_rb: f64,
    /// Sum of 1 / length of prefill: steps a second when nobody decodes.
    prefill_turns: f64,
    /// Tokens that prefilling requests hold in the cache from the start.
    pub(super) reserved: f64,
    /// Seconds of reading every adapter in use once.
    pub(super) adapters_s: f64,
}

impl Sweep {
    /// Moves the integrals to `until_us`.
    pub(super) fn integrate(&mut self, until_us: i64) {
        let until_s = until_us as f64 * 1e-6;
        if self.totals.decoding + self.totals.prefilling > 0.5 || self.segments.is_some() {
            while self.now_s < until_s {
                let stop = until_s.min(self.now_s + STRETCH_S);
                self.stretch(self.now_s, stop);
                self.now_s = stop;
            }
        }
        if until_us > self.now_us {
            self.now_us = until_us;
            self.now_s = until_s;
        }
    }

    /// One stretch, taken at its middle. Contexts grow linearly, so the shares' own integrals are exact there.
    fn stretch(&mut self, from_s: f64, until_s: f64) {
        let (dt, t) = (until_s - from_s, 0.5 * (from_s + until_s));
        let totals = &self.totals;
        let heads = totals.decoding + totals.prefilling;
        let decode_context = (totals.decode_a + totals.decode_b * t).max(0.0);
        let prefill_context = (totals.prefill_a + totals.prefill_b * t).max(0.0);
        let prefill_compute = totals.prefill_alpha + self.beta * (totals.prefill_ra + totals.prefill_rb * t).max(0.0);
        let steps_per_s = if totals.prefilling > 0.5 {
            (totals.prefill_rate / self.limits.step_tokens_max).max(totals.prefill_turns / totals.prefilling)
        } else if totals.decoding > 0.5 {
            totals.decode_rate / totals.decoding / self.delivered
        } else {
            0.0
        };
        if let Some(segments) = &mut self.segments {
            segments.push(Segment {
                from_s,
                until_s,
                decoding: totals.decoding,
                prefilling: totals.prefilling,
                preempted: self.preempted.len() as f64,
                kv_tokens: totals.decode_a
                    + totals.decode_b * t
                    + totals.reserved
                    + heads * self.limits.block_tokens / 2.0,
                decode_context,
                prefill_tokens_per_s: totals.prefill_rate,
                prefill_compute,
                steps_per_s,
            });
        }
        if heads < 0.5 {
            return;
        }
        self.busy_s += dt;
        let mut fixed = self.fixed;
        let mut tokens_per_step = 1.0;
        if let Some((experts, all_s)) = self.experts {
            tokens_per_step =
                self.computed * totals.decoding + totals.prefill_rate / steps_per_s.max(f64::MIN_POSITIVE);
            fixed.experts_s = all_s * experts.touched(tokens_per_step);
        }
        let drafts = self.beta * totals.decoding * (self.computed - 1.0) / 2.0;
        let decode_compute = self.computed * (totals.decode_alpha + drafts + self.beta * decode_context);
        let compute = steps_per_s * decode_compute + prefill_compute;
        let own_memory = self.gamma * (decode_context + prefill_context) + totals.adapters_s.max(0.0);
        let memory = steps_per_s * own_memory;
        let read_once = steps_per_s * fixed.read_once_s();
        let tau = fixed.overlap * memory_bound_fraction(read_once, memory, compute);
        let (of_memory, of_compute) = (1.0 - fixed.overlap + tau, 1.0 - tau);
        let all = steps_per_s * fixed.overhead_s + read_once + of_memory * memory + of_compute * compute;
        self.predicted_s += all * dt;
        let scale = dt / all.max(f64::MIN_POSITIVE);
        let parties = self.tenants.as_ref().map_or(heads, Groups::active);
        let integrals = &mut self.integrals;
        integrals.heads += steps_per_s / parties * scale;
        integrals.memory += of_memory * steps_per_s * scale;
        integrals.memory_t += of_memory * steps_per_s * scale * t;
        integrals.decode += of_compute * steps_per_s * scale;
        integrals.decode_t += of_compute * steps_per_s * scale * t;
        integrals.prefill += of_compute * scale;
        integrals.prefill_t += of_compute * scale * t;
        if fixed.experts_s > 0.0 {
            let a_token = fixed.experts_s / tokens_per_step * scale;
            integrals.expert_steps += a_token * steps_per_s;
            integrals.expert_tokens += a_token;
        }
    }
}

impl Totals {
    /// Nobody yet, and the adapters that are in use all the same.
    pub(super) fn of_adapters(adapters_s: f64) -> Totals {
        Totals { adapters_s, ..Totals::default() }
    }

    /// Adds (`sign` 1) or takes away (`sign` -1) what one request brings to the batch in its present phase.
    pub(super) fn add(&mut self, slot: &Slot, sign: f64) {
        match slot.phase {
            Phase::Decode => {
                self.decoding += sign;
                self.decode_rate += sign * slot.rate;
                self.decode_alpha += sign * slot.alpha;
                self.decode_a += sign * slot.a;
                self.decode_b += sign * slot.b;
            }
            Phase::Prefill | Phase::Recompute => {
                self.prefilling += sign;
                self.prefill_a += sign * slot.a;
                self.prefill_b += sign * slot.b;
                self.prefill_rate += sign * slot.rate;
                self.prefill_alpha += sign * slot.rate * slot.alpha;
                self.prefill_ra += sign * slot.rate * slot.a;
                self.prefill_rb += sign * slot.rate * slot.b;
                self.prefill_turns += sign / slot.computing_s.max(PHASE_S_MIN);
                let held = if slot.phase == Phase::Prefill { f64::from(slot.timeline.input_tokens) } else { slot.held };
                self.reserved += sign * held;
            }
            Phase::Preempted => {}
        }
    }
}
