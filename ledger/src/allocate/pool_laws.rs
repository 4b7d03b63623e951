//! The books balance on random pools, whatever order, repetition, lateness or absence of facts.

use proptest::prelude::*;

use super::*;

/// Steps of `e0` for part of the minute, some of them lost, some overlapping, some with strangers in them.
fn any_steps() -> impl Strategy<Value = Vec<EngineStep>> {
    let one = (1_000i64..900_000, 500u64..1_200_000, 0u32..3, 0u64..4_000, 0u32..6, 0u64..9_000, 1u64..3);
    (55.0f64..100.0, prop::collection::vec(one, 0..25)).prop_map(|(from, steps)| {
        let (mut now, mut sequence) = (at(from), 10);
        let step = |(gap, wall_us, prefill_requests, prefill_tokens, decode_requests, decode_kv_tokens, next)| {
            now = now.plus_micros(gap);
            sequence += next;
            EngineStep {
                engine: "e0".into(),
                rank: 0,
                sequence,
                at: now,
                wall_us,
                prefill_requests,
                prefill_tokens,
                prefill_kv_tokens: 0,
                decode_requests,
                decode_kv_tokens,
            }
        };
        steps.into_iter().map(step).collect()
    })
}

/// Everything at once: slices, jobs, steps, samples, speculation, adapters, requests without times and engines without a
/// model.
fn any_case() -> impl Strategy<Value = Case> {
    let span = (0.0f64..100.0, 1.0f64..160.0);
    let capacities = prop::collection::vec((0usize..3, 1u32..9, span.clone(), 0u8..3), 1..5);
    let one = (0usize..4, 30.0f64..125.0, 0.0f64..5.0, 0.0f64..40.0, (1u32..9_000, 0u32..900), 0u8..12);
    let extra = (
        prop::option::of(60.0f64..130.0),
        any::<bool>(),
        prop::option::of((0.0f64..30_000.0, 0.0f64..4_000.0)),
        prop::option::of(0.0f64..30.0),
        prop::option::of(2_000.0f64..50_000.0),
    );
    let told = (
        any_steps(),
        prop::collection::vec((0.0f64..60.0, 0.0f64..6.0), 0..6),
        prop::option::of((0.0f64..6.0, 0.0f64..6.0)),
        prop::collection::vec((0usize..3, 0u32..1_100_000, span), 0..3),
        0u8..4,
    );
    (capacities, prop::collection::vec(one, 0..14), extra, told).prop_map(|(capacities, requests, extra, told)| {
        let (ready_at, warm, bypassing, peak_gpus, kv_tokens) = extra;
        let (steps, samples, speculation, jobs, unknown) = told;
        let capacity = capacities
            .into_iter()
            .map(|(replica, gpus, (from, length), purchase)| CapacityFact {
                purchase: [PurchaseOption::OnDemand, PurchaseOption::Reserved, PurchaseOption::Spot]
                    [usize::from(purchase)],
                ..capacity(["r0", "r1", "r2"][replica], gpus, from, from + length)
            })
            .collect();
        let unobserved = bypassing.map(|(prompt_tokens, generation_tokens)| Counted {
            prompt_tokens,
            generation_tokens,
            ..Counted::default()
        });
        let samples = samples
            .into_iter()
            .map(|(at_s, running)| EngineSample { at_s, running: Some(running.floor()), ..EngineSample::default() })
            .collect();
        // Engines 0 and 1 share a replica, 2 has one of its own, and nothing is known of the third replica.
        let mut engines = vec![
            Engine {
                ready_at: ready_at.map(at),
                limits: Limits { kv_tokens, ..Limits::default() },
                speculation: speculation.map(|(drafted, accepted)| Speculation { drafted, accepted }),
                steps,
                ..engine("e0", "r0")
            },
            Engine { unobserved, slice: warm.then_some(MigSlice { compute: 2, memory: 3 }), ..engine("e1", "r0") },
            Engine { kept_warm_for: warm.then(|| team("objective")), samples, unobserved, ..engine("e2", "r1") },
        ];
        if let Some(engine) = engines.get_mut(usize::from(unknown)) {
            engine.constants = None;
        }
        let served = requests
            .into_iter()
            .enumerate()
            .map(|(number, (engine, from, prefill, decode, tokens, kind))| {
                let number = u16::try_from(number).unwrap();
                let plain = served(number, ["e0", "e1", "e2", "gone"][engine], from, prefill, decode, tokens);
                let adapter =
                    Adapter { model: format!("lora-{}", kind % 2).into(), bytes: 200_000_000, flop_per_token: 1 };
                Served {
                    known: if kind < 2 { Known::Counts } else { Known::Timeline },
                    adapter: (2..5).contains(&kind).then_some(adapter),
                    context: Context { consumer: Some(format!("c{}", number % 3).into()), ..plain.context },
                    ..plain
                }
            })
            .collect();
        let jobs = jobs
            .into_iter()
            .map(|(replica, share, (from, length))| {
                job(&format!("job-{replica}"), ["r0", "r1", "r2"][replica], share, from, from + length)
            })
            .collect();
        let demand = Demand { peak_gpus, headroom: vec![(team("search"), 2.0), (team("support"), 0.5)] };
        Case { capacity, engines, served, jobs, demand }
    })
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (0usize..4, 0usize..3, 0usize..2, 0usize..2, 0usize..2).prop_map(|(method, headroom, waste, sharing, fixed)| {
        Policy {
            method: Method::ALL[method],
            headroom: HeadroomRule::ALL[headroom],
            waste: WasteRule::ALL[waste],
            sharing: SharingRule::ALL[sharing],
            fixed: FixedRule::ALL[fixed],
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]

    #[test]
    fn random_pools_close_and_facts_may_come_late_twice_and_in_any_order(
        case in any_case(), policy in any_policy(), turn in any::<prop::sample::Index>(), late in 0usize..6,
    ) {
        let postings = case.run(&policy);
        prop_assert_eq!(imbalances([case.origin()], &postings), Vec::new());
        prop_assert!(postings.iter().all(|posting| posting.costs.effective_cost >= Money::ZERO));
        prop_assert_eq!(gpu_us(&postings), case.gpu_us());
        prop_assert!(postings.iter().all(|posting| posting.basis.is_some_and(|basis| basis.gpu_us >= 0)));
        for posting in &postings {
            prop_assert!(explained(posting).is_none_or(|sum| sum == posting.costs.effective_cost), "{posting:?}");
            prop_assert!(posting.tier.is_some());
        }
        let ids: std::collections::BTreeSet<PostingId> = postings.iter().map(|posting| posting.id).collect();
        prop_assert_eq!(ids.len(), postings.len());
        for posting in postings.iter().filter(|posting| posting.line == Line::Request) {
            let worked = case.served.iter().any(|one| {
                Some(one.attempt) == posting.attempt
                    && match one.known {
                        Known::Counts => minute().contains(one.timeline.arrived),
                        Known::Timeline => {
                            one.timeline.scheduled < minute().end && one.timeline.last_token > minute().start
                        }
                    }
            });
            prop_assert!(worked, "a request that did no work in the interval has no posting");
        }

        // Twice and in another order: the same postings.
        let mut again = case.clone();
        again.served.extend(case.served.iter().take(3).cloned());
        if !again.served.is_empty() {
            let by = turn.index(again.served.len());
            again.served.rotate_left(by);
        }
        again.capacity.extend(case.capacity.iter().take(1).cloned());
        again.capacity.reverse();
        again.engines.reverse();
        again.jobs.reverse();
        again.jobs.extend(case.jobs.iter().take(1).cloned());
        for engine in &mut again.engines {
            engine.steps.reverse();
            engine.steps.extend(engine.steps.first().cloned());
        }
        prop_assert_eq!(&again.run(&policy), &postings);

        // Late: booked without some facts, then corrected. The sum closes and the rows come out as if all had been there.
        let mut early = case.clone();
        early.served.truncate(case.served.len().saturating_sub(late));
        let before = early.run(&policy);
        prop_assert_eq!(imbalances([early.origin()], &before), Vec::new());
        let corrected = corrections(&before, &postings);
        let mut all = before.clone();
        all.extend(corrected.iter().cloned());
        prop_assert_eq!(imbalances([case.origin()], &all), Vec::new());
        prop_assert_eq!(gpu_us(&all), case.gpu_us());
        prop_assert_eq!(corrections(&all, &postings), Vec::new());
        prop_assert_eq!(corrections(&before, &before), Vec::new());
    }

    #[test]
    fn late_capacity_changes_the_origin_and_closes_too(case in any_case(), policy in any_policy()) {
        let mut early = case.clone();
        early.capacity.pop();
        let before = early.run(&policy);
        let after = case.run(&policy);
        let mut all = before.clone();
        all.extend(corrections(&before, &after));
        prop_assert_eq!(imbalances([case.origin()], &all), Vec::new());
    }
}
