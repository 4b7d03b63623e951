//! The books balance on random pools, whatever order, repetition, lateness or absence of facts.

use proptest::prelude::*;

use super::*;
use crate::allocate::policy::HeadroomRule;
use crate::closure::imbalances;
use crate::id::{PostingId, RequestId};
use crate::posting::{Origin, Tier};
use crate::step::{GpuSheet, ModelShape};

fn at(seconds: f64) -> Timestamp {
    Timestamp::from_micros(crate::allocate::timeline::whole_micros(seconds))
}

fn minute() -> Period {
    Period { start: at(60.0), end: at(120.0) }
}

fn pool() -> Label {
    "shared".into()
}

fn team(name: &str) -> Context {
    Context { team: Some(name.into()), ..Context::default() }
}

fn capacity(replica: &str, gpus: u32, from: f64, until: f64) -> CapacityFact {
    CapacityFact {
        pool: pool(),
        replica: replica.into(),
        deployment: None,
        owner: Some("platform".into()),
        gpu: "H100".into(),
        gpus,
        rate: "2.4999".parse().unwrap(),
        purchase: PurchaseOption::OnDemand,
        period: Period { start: at(from), end: at(until) },
        observed_at: at(until),
    }
}

fn engine(name: &str, replica: &str) -> Engine {
    Engine {
        name: name.into(),
        replica: replica.into(),
        model: Some("llama".into()),
        constants: Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1),
        limits: Limits::default(),
        slice: None,
        ready_at: None,
        kept_warm_for: None,
        unobserved_s: None,
    }
}

fn served(number: u16, engine: &str, from: f64, prefill: f64, decode: f64, tokens: (u32, u32)) -> Served {
    let request = RequestId::new(at(from), [u8::try_from(number % 251).unwrap(); 10]);
    Served {
        attempt: AttemptId { request, number },
        context: team(if number.is_multiple_of(2) { "search" } else { "support" }),
        engine: engine.into(),
        timeline: EngineTimeline {
            arrived: at(from),
            scheduled: at(from),
            first_token: at(from + prefill),
            last_token: at(from + prefill + decode),
            input_tokens: tokens.0,
            cached_tokens: 0,
            output_tokens: tokens.1,
        },
        estimated: false,
        observed_at: at(from + prefill + decode),
    }
}

/// Everything that an allocation reads, owned.
#[derive(Debug, Clone)]
struct Case {
    capacity: Vec<CapacityFact>,
    engines: Vec<Engine>,
    served: Vec<Served>,
    demand: Demand,
}

impl Case {
    fn run(&self, policy: &Policy) -> Vec<Posting> {
        let facts =
            Facts { capacity: &self.capacity, engines: &self.engines, served: &self.served, demand: &self.demand };
        allocate(&pool(), minute(), facts, policy, at(200.0)).unwrap()
    }

    fn cost(&self) -> Money {
        latest(&self.capacity).into_iter().map(|fact| fact.cost_within(minute())).sum()
    }

    fn origin(&self) -> (Origin, Money) {
        (Origin::Pool { pool: pool(), start: minute().start }, self.cost())
    }
}

fn two_requests() -> Case {
    Case {
        capacity: vec![capacity("r0", 2, 0.0, 300.0)],
        engines: vec![engine("e0", "r0")],
        served: vec![served(0, "e0", 70.0, 1.0, 9.0, (1_000, 300)), served(1, "e0", 75.0, 0.5, 14.5, (4_000, 500))],
        demand: Demand::default(),
    }
}

fn by_line(postings: &[Posting], line: Line) -> Money {
    postings.iter().filter(|posting| posting.line == line).map(|posting| posting.costs.effective_cost).sum()
}

#[test]
fn a_minute_by_hand() {
    let case = two_requests();
    let postings = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    // Busy from 70 to 90 s of a minute: a third. The rest is above an unknown peak and the owner's.
    let third = case.cost().pico() / 3;
    assert!((by_line(&postings, Line::Request).pico() - third).abs() <= 1);
    assert!((by_line(&postings, Line::IdleReserved).pico() - 2 * third).abs() <= 2);
    let idle = postings.iter().find(|posting| posting.line == Line::IdleReserved).unwrap();
    assert_eq!(idle.context, team("platform"));
    assert!(
        postings
            .iter()
            .all(|posting| &*posting.policy == "roofline/1 headroom=line waste=line" && posting.tier == Some(Tier::B))
    );
}

#[test]
fn methods_divide_the_same_busy_time_in_their_own_ways() {
    let case = two_requests();
    let paid: Vec<Vec<i128>> = Method::ALL
        .iter()
        .map(|&method| {
            let postings = case.run(&Policy { method, ..Policy::default() });
            assert_eq!(imbalances([case.origin()], &postings), Vec::new());
            let requests = postings.iter().filter(|posting| posting.line == Line::Request);
            requests.map(|posting| posting.costs.effective_cost.pico()).collect()
        })
        .collect();
    let ratio = |row: usize| paid[row][0] as f64 / paid[row][1] as f64;
    assert!((ratio(1) - 1_300.0 / 4_500.0).abs() < 1e-6, "tokens");
    assert!((ratio(2) - 1_600.0 / 5_000.0).abs() < 1e-6, "weighted tokens");
    assert!((ratio(3) - 7.5 / 12.5).abs() < 1e-6, "equal time: 70-75 alone, 75-80 shared, 80-90 the other");
    assert!(ratio(0) > ratio(1), "the roofline sees time that tokens do not");
}

#[test]
fn idle_has_its_reasons() {
    let mut case = two_requests();
    case.capacity.push(CapacityFact { purchase: PurchaseOption::Reserved, ..capacity("spare", 1, 0.0, 300.0) });
    case.capacity.push(capacity("warm", 1, 0.0, 300.0));
    case.capacity.push(capacity("new", 1, 90.0, 300.0));
    case.engines.push(Engine { kept_warm_for: Some(team("objective")), ..engine("w", "warm") });
    case.engines.push(Engine { ready_at: Some(at(105.0)), ..engine("n", "new") });
    case.demand.peak_gpus = Some(2.5);
    case.demand.headroom = vec![(team("search"), 1.0), (team("support"), 3.0)];
    let postings = case.run(&Policy { headroom: HeadroomRule::Airport, ..Policy::default() });
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    let minute_of_one = capacity("x", 1, 60.0, 120.0).cost_within(minute()).pico();
    assert!((by_line(&postings, Line::Warm).pico() - minute_of_one).abs() <= 1);
    assert!((by_line(&postings, Line::ColdStart).pico() - minute_of_one / 4).abs() <= 1);
    // Peak 150 GPU-seconds, 40 busy and 60 warm: 50 of headroom, a quarter of it the first team's.
    let headroom: Vec<i128> = postings
        .iter()
        .filter(|posting| posting.line == Line::Headroom)
        .map(|posting| posting.costs.effective_cost.pico())
        .collect();
    assert!((headroom.iter().sum::<i128>() - minute_of_one * 50 / 60).abs() <= 3);
    assert!((headroom[0] * 3 - headroom[1]).abs() <= 3, "{headroom:?}");
}

#[test]
fn co_located_engines_share_the_moments_in_which_both_are_busy() {
    let mut case = two_requests();
    case.engines.push(engine("e1", "r0"));
    case.served[1].engine = "e1".into();
    let postings = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    let paid: Vec<f64> = postings
        .iter()
        .filter(|posting| posting.line == Line::Request)
        .map(|posting| posting.costs.effective_cost.pico() as f64)
        .collect();
    // 70-75 one alone, 75-80 both, 80-90 the other alone.
    assert!((paid[0] / paid[1] - 7.5 / 12.5).abs() < 1e-6);
}

#[test]
fn slices_have_their_own_cost_and_the_rest_is_stranded() {
    let mut case = two_requests();
    case.engines[0].slice = MigSlice::of_profile("3g.40gb", 10);
    case.engines.push(Engine { slice: MigSlice::of_profile("2g.20gb", 10), ..engine("e1", "r0") });
    let postings = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    let cost = case.cost().pico() as f64;
    let part = |line| by_line(&postings, line).pico() as f64 / cost;
    assert!((part(Line::Stranded) - (1.0 - 0.5 * (5.0 / 7.0 + 6.0 / 8.0))).abs() < 1e-9);
    // A third of the minute on three sevenths of the compute and half of the memory.
    assert!((part(Line::Request) - 0.5 * (3.0 / 7.0 + 0.5) / 3.0).abs() < 1e-9);
}

#[test]
fn waste_is_a_line_or_spread_and_never_hidden() {
    let mut case = two_requests();
    case.engines[0].limits.kv_tokens = Some(5_300.0);
    let lines = case.run(&Policy::default());
    let waste = by_line(&lines, Line::Waste);
    assert!(waste > Money::ZERO);
    let spread = case.run(&Policy { waste: WasteRule::Spread, ..Policy::default() });
    assert_eq!(imbalances([case.origin()], &spread), Vec::new());
    assert_eq!(by_line(&spread, Line::Waste), Money::ZERO);
    let moved = by_line(&spread, Line::Request).pico() - by_line(&lines, Line::Request).pico();
    assert!((moved - waste.pico()).abs() <= 2);
}

#[test]
fn traffic_that_bypassed_the_gateway_is_a_line() {
    let mut case = two_requests();
    case.engines[0].unobserved_s = Some(20.0);
    let postings = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    let (seen, unseen) = (by_line(&postings, Line::Request).pico(), by_line(&postings, Line::Unobserved).pico());
    assert!((seen - unseen).abs() <= 2, "as much unseen as seen");
    case.served.clear();
    let alone = case.run(&Policy::default());
    assert!((by_line(&alone, Line::Unobserved).pico() - case.cost().pico() / 3).abs() <= 1);
}

#[test]
fn missing_capacity_allocates_nothing_and_missing_engines_leave_idle() {
    let mut case = two_requests();
    case.engines.clear();
    let postings = case.run(&Policy::default());
    assert_eq!(by_line(&postings, Line::IdleReserved), case.cost());
    case.capacity.clear();
    assert_eq!(case.run(&Policy::default()), Vec::new());
}

fn any_case() -> impl Strategy<Value = Case> {
    let span = (0.0f64..100.0, 1.0f64..160.0);
    let capacities = prop::collection::vec((0usize..3, 1u32..9, span, 0u8..3), 1..5);
    let one = (0usize..4, 30.0f64..125.0, 0.0f64..5.0, 0.0f64..40.0, (1u32..9_000, 0u32..900));
    let extra = (
        prop::option::of(60.0f64..130.0),
        any::<bool>(),
        prop::option::of(0.0f64..30.0),
        prop::option::of(0.0f64..30.0),
        prop::option::of(2_000.0f64..50_000.0),
    );
    (capacities, prop::collection::vec(one, 0..14), extra).prop_map(|(capacities, requests, extra)| {
        let (ready_at, warm, unobserved_s, peak_gpus, kv_tokens) = extra;
        let capacity = capacities
            .into_iter()
            .map(|(replica, gpus, (from, length), purchase)| CapacityFact {
                purchase: [PurchaseOption::OnDemand, PurchaseOption::Reserved, PurchaseOption::Spot]
                    [usize::from(purchase)],
                ..capacity(["r0", "r1", "r2"][replica], gpus, from, from + length)
            })
            .collect();
        // Engines 0 and 1 share a replica, 2 has one of its own, and nothing is known of the third replica.
        let engines = vec![
            Engine {
                ready_at: ready_at.map(at),
                limits: Limits { kv_tokens, ..Limits::default() },
                ..engine("e0", "r0")
            },
            Engine { unobserved_s, slice: warm.then_some(MigSlice { compute: 2, memory: 3 }), ..engine("e1", "r0") },
            Engine { kept_warm_for: warm.then(|| team("objective")), ..engine("e2", "r1") },
        ];
        let served = requests
            .into_iter()
            .enumerate()
            .map(|(number, (engine, from, prefill, decode, tokens))| {
                served(
                    u16::try_from(number).unwrap(),
                    ["e0", "e1", "e2", "gone"][engine],
                    from,
                    prefill,
                    decode,
                    tokens,
                )
            })
            .collect();
        let demand = Demand { peak_gpus, headroom: vec![(team("search"), 2.0), (team("support"), 0.5)] };
        Case { capacity, engines, served, demand }
    })
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (0usize..4, 0usize..3, 0usize..2).prop_map(|(method, headroom, waste)| Policy {
        method: Method::ALL[method],
        headroom: HeadroomRule::ALL[headroom],
        waste: WasteRule::ALL[waste],
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
        let ids: std::collections::BTreeSet<PostingId> = postings.iter().map(|posting| posting.id).collect();
        prop_assert_eq!(ids.len(), postings.len());
        for posting in postings.iter().filter(|posting| posting.line == Line::Request) {
            let worked = case.served.iter().any(|one| {
                Some(one.attempt) == posting.attempt
                    && one.timeline.scheduled < minute().end
                    && one.timeline.last_token > minute().start
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
