//! Tenants, adapters and drafts in the sweep, against a slow reading of the same formulas with a loop over the batch.

use proptest::prelude::*;

use crate::allocate::replica::Replica;
use crate::allocate::share::memory_bound_fraction;
use crate::allocate::sweep::{Belongs, Part, Sweep};
use crate::allocate::timeline::{EngineTimeline, Limits, whole_micros};
use crate::step::{GpuSheet, ModelShape, Work};
use crate::telemetry::Speculation;
use crate::time::Timestamp;

/// Bytes and FLOP for a token of two adapters, large enough to matter.
const ADAPTERS: [(f64, f64); 2] = [(2e9, 4e9), (6e9, 1e9)];

fn replica() -> Replica {
    Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)
}

fn at(seconds: f64) -> Timestamp {
    Timestamp::from_micros(whole_micros(seconds))
}

fn request(scheduled: f64, prefill: f64, decode: f64, tokens: (u32, u32)) -> EngineTimeline {
    EngineTimeline {
        arrived: at(scheduled),
        scheduled: at(scheduled),
        first_token: at(scheduled + prefill),
        last_token: at(scheduled + prefill + decode),
        input_tokens: tokens.0,
        cached_tokens: 0,
        output_tokens: tokens.1,
    }
}

fn belongs(tenant: u32, adapter: Option<u32>) -> Belongs {
    Belongs { tenant, adapter }
}

/// Sweeps requests that come in the order of their schedule; the seconds of each.
fn swept(sweep: Sweep, requests: &[(EngineTimeline, Belongs)], cuts: &[f64]) -> (Vec<Part>, Sweep) {
    let mut sweep = sweep;
    let adapters = ADAPTERS.map(|(bytes, flop)| sweep.adapter(bytes, flop));
    let mut parts = vec![Part::default(); requests.len()];
    let mut emit = |part: Part| {
        let sum = &mut parts[usize::try_from(part.tag).unwrap()];
        sum.share += part.share;
        sum.waste_s += part.waste_s;
    };
    let mut cuts = cuts.iter().map(|&cut| at(cut)).peekable();
    for (tag, (timeline, of)) in requests.iter().enumerate() {
        while let Some(cut) = cuts.next_if(|&cut| cut <= timeline.scheduled) {
            sweep.cut(cut, &mut emit);
        }
        let adapter = of.adapter.map(|number| adapters[number as usize]);
        sweep.push_of(tag as u64, timeline, Belongs { adapter, ..*of }, &mut emit);
    }
    cuts.for_each(|cut| sweep.cut(cut, &mut emit));
    sweep.finish(&mut emit);
    (parts, sweep)
}

/// The formulas of the sweep's documentation, moment by moment.
fn slowly(
    replica: &Replica,
    requests: &[(EngineTimeline, Belongs)],
    speculation: Speculation,
    by_tenant: bool,
) -> Vec<f64> {
    let dt = 1e-3;
    let s = |at: Timestamp| at.micros() as f64 * 1e-6;
    let end = requests.iter().map(|(timeline, _)| s(timeline.last_token)).fold(0.0, f64::max);
    let one = replica.demand(Work { new_tokens: 1, cached_tokens: 0 });
    let two = replica.demand(Work { new_tokens: 1, cached_tokens: 1 });
    let beta = two.compute_s - one.compute_s;
    let (alpha, gamma) = (one.compute_s - beta / 2.0, two.memory_s);
    let flop_per_s = replica.gpu.flop_per_s * replica.efficiencies.compute;
    let bytes_per_s = replica.gpu.bytes_per_s * replica.efficiencies.bandwidth;
    let (p, delivered) = (1.0 + speculation.drafted, 1.0 + speculation.accepted);
    let fixed = replica.fixed(1.0);
    let mut charges = vec![0.0; requests.len()];
    let mut t = dt / 2.0;
    while t < end {
        let active: Vec<usize> = (0..requests.len())
            .filter(|&i| s(requests[i].0.scheduled) <= t && t < s(requests[i].0.last_token))
            .collect();
        let prefills = |i: usize| t < s(requests[i].0.first_token);
        let length = |i: usize| s(requests[i].0.first_token) - s(requests[i].0.scheduled);
        let feed = |i: usize| f64::from(requests[i].0.input_tokens) / length(i);
        let rate = |i: usize| {
            let one = &requests[i].0;
            f64::from(one.output_tokens - 1) / (s(one.last_token) - s(one.first_token))
        };
        let prefilling: Vec<usize> = active.iter().copied().filter(|&i| prefills(i)).collect();
        let steps = if prefilling.is_empty() {
            active.iter().map(|&i| rate(i)).sum::<f64>() / active.len().max(1) as f64 / delivered
        } else {
            let turns = prefilling.iter().map(|&i| 1.0 / length(i)).sum::<f64>() / prefilling.len() as f64;
            (prefilling.iter().map(|&i| feed(i)).sum::<f64>() / 2_048.0).max(turns)
        };
        let own = |i: usize| {
            let (one, of) = &requests[i];
            let (token_s, read_s) = of.adapter.map_or((0.0, 0.0), |number| {
                let users = active.iter().filter(|&&j| requests[j].1.adapter == of.adapter).count() as f64;
                let (bytes, flop) = ADAPTERS[number as usize];
                (flop / flop_per_s, bytes / bytes_per_s / users)
            });
            if prefills(i) {
                let k = feed(i) * (t - s(one.scheduled));
                (feed(i) * (alpha + token_s + beta * k), steps * (gamma * k + read_s))
            } else {
                let k = f64::from(one.input_tokens) + rate(i) * (t - s(one.first_token));
                let compute = p * (alpha + token_s + beta * (k + (p - 1.0) / 2.0));
                (steps * compute, steps * (gamma * k + read_s))
            }
        };
        let owns: Vec<(f64, f64)> = active.iter().map(|&i| own(i)).collect();
        let (c, m) = owns.iter().fold((0.0, 0.0), |sum, own| (sum.0 + own.0, sum.1 + own.1));
        let tau = fixed.overlap * memory_bound_fraction(steps * fixed.weights_s, m, c);
        let tenants: std::collections::BTreeSet<u32> = active.iter().map(|&i| requests[i].1.tenant).collect();
        let head = |i: usize| {
            let siblings = active.iter().filter(|&&j| requests[j].1.tenant == requests[i].1.tenant).count() as f64;
            if by_tenant { 1.0 / (tenants.len() as f64 * siblings) } else { 1.0 / active.len() as f64 }
        };
        let terms: Vec<f64> = active
            .iter()
            .zip(&owns)
            .map(|(&i, own)| {
                steps * (fixed.overhead_s + fixed.weights_s) * head(i)
                    + (1.0 - fixed.overlap + tau) * own.1
                    + (1.0 - tau) * own.0
            })
            .collect();
        let all: f64 = terms.iter().sum();
        for (&i, term) in active.iter().zip(&terms) {
            charges[i] += term / all * dt;
        }
        t += dt;
    }
    charges
}

#[test]
fn tenants_adapters_and_drafts_are_the_slow_reading_of_the_formulas() {
    let requests = [
        (request(0.0, 0.5, 6.0, (3_000, 400)), belongs(0, Some(0))),
        (request(0.2, 0.6, 3.0, (500, 200)), belongs(1, None)),
        (request(1.0, 0.05, 4.0, (40, 300)), belongs(1, Some(0))),
        (request(1.5, 1.5, 1.0, (12_000, 50)), belongs(2, Some(1))),
        (request(3.1, 0.1, 2.0, (700, 90)), belongs(0, None)),
    ];
    let speculation = Speculation { drafted: 3.0, accepted: 1.5 };
    for (speculation, by_tenant, overlap) in [
        (Speculation::default(), false, 1.0),
        (Speculation::default(), true, 1.0),
        (speculation, false, 1.0),
        (speculation, true, 0.4),
    ] {
        let replica = Replica { overlap, ..replica() };
        let mut sweep = Sweep::new(replica, Limits::default(), at(0.0)).speculating(Some(speculation));
        if by_tenant {
            sweep = sweep.by_tenant();
        }
        let slow = slowly(&replica, &requests, speculation, by_tenant);
        for cuts in [&[][..], &[0.7, 2.0, 2.5, 4.0]] {
            let (parts, _) = swept(sweep.clone(), &requests, cuts);
            for (index, (part, slow)) in parts.iter().zip(&slow).enumerate() {
                let fast = part.share.total_s();
                assert!(
                    (fast - slow).abs() < 0.004 + 0.006 * slow,
                    "{index} {speculation:?} {by_tenant}: {fast} {slow}"
                );
            }
        }
    }
}

#[test]
fn drafts_are_charged_whether_they_are_kept_or_not() {
    let requests = [
        (request(0.0, 0.2, 10.0, (500, 400)), belongs(0, None)),
        (request(0.0, 0.2, 10.0, (500, 400)), belongs(1, None)),
    ];
    let compute = |drafted: f64, accepted: f64| {
        let sweep = Sweep::new(Replica { overlap: 0.0, ..replica() }, Limits::default(), at(0.0));
        let (parts, sweep) = swept(sweep.speculating(Some(Speculation { drafted, accepted })), &requests, &[]);
        (parts[0].share.compute_s / parts[0].share.total_s(), sweep.predicted_s())
    };
    let (none, drafts, kept) = (compute(0.0, 0.0), compute(4.0, 0.0), compute(4.0, 3.0));
    assert!(drafts.0 > 2.0 * none.0, "five tokens computed for one: {drafts:?} {none:?}");
    assert!((kept.0 - drafts.0).abs() < 0.02 * drafts.0, "what a step computes does not depend on what is kept");
    assert!(kept.1 < 0.4 * drafts.1, "but the steps are fewer");
}

#[test]
fn an_adapters_weights_are_paid_by_its_users_together() {
    let same = |tenant: u32, adapter: Option<u32>| (request(0.0, 0.1, 10.0, (500, 400)), belongs(tenant, adapter));
    let memory = |requests: &[(EngineTimeline, Belongs)]| -> Vec<f64> {
        let (parts, _) = swept(Sweep::new(replica(), Limits::default(), at(0.0)), requests, &[]);
        let all: f64 = parts.iter().map(|part| part.share.overhead_s).sum();
        parts.iter().map(|part| part.share.memory_s / all).collect()
    };
    let alone = memory(&[same(0, Some(0)), same(1, None), same(2, None)]);
    let both = memory(&[same(0, Some(0)), same(1, Some(0)), same(2, None)]);
    let own = alone[1];
    assert!(((both[0] - own) * 2.0 / (alone[0] - own) - 1.0).abs() < 0.01, "{alone:?} {both:?}");
    assert!((both[2] - own).abs() < 0.01 * own);
}

proptest! {
    #[test]
    fn every_busy_moment_is_paid_once_whatever_is_shared_by_whom(
        requests in prop::collection::vec(
            (0.0f64..30.0, 0.0f64..2.0, 0.0f64..8.0, (1u32..8_000, 1u32..600), 0u32..4, prop::option::of(0u32..2)), 1..40),
        speculation in prop::option::of((-1.0f64..6.0, -1.0f64..8.0)), by_tenant in any::<bool>(),
        capacity in prop::option::of(2_000.0f64..60_000.0), mut cuts in prop::collection::vec(0.0f64..45.0, 0..5),
    ) {
        cuts.sort_by(f64::total_cmp);
        let mut requests: Vec<(EngineTimeline, Belongs)> = requests
            .into_iter()
            .map(|(from, prefill, decode, tokens, tenant, adapter)| (request(from, prefill, decode, tokens), belongs(tenant, adapter)))
            .collect();
        requests.sort_by_key(|(timeline, _)| timeline.scheduled);
        let limits = Limits { kv_tokens: capacity, ..Limits::default() };
        let speculation = speculation.map(|(drafted, accepted)| Speculation { drafted, accepted });
        let mut sweep = Sweep::new(replica(), limits, at(0.0)).speculating(speculation);
        if by_tenant {
            sweep = sweep.by_tenant();
        }
        let (parts, sweep) = swept(sweep, &requests, &cuts);
        let all: f64 = parts.iter().map(|part| part.share.total_s() + part.waste_s).sum();
        prop_assert!((all - sweep.busy_s()).abs() <= 1e-6 * sweep.busy_s().max(1.0), "{all} {}", sweep.busy_s());
        prop_assert!(parts.iter().all(|part| part.share.total_s() >= -1e-9 && part.waste_s >= -1e-9));
        prop_assert_eq!(sweep.active(), 0);
    }
}
