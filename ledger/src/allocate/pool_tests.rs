//! One minute of a pool by hand: each line, rule and tier.

use super::*;
use crate::allocate::policy::HeadroomRule;
use crate::allocate::policy::{FixedRule, Method, SharingRule, WasteRule};
use crate::capacity::PurchaseOption;
use crate::closure::imbalances;
use crate::id::{PostingId, RequestId};
use crate::money::Money;
use crate::posting::{Origin, Tier};
use crate::step::{GpuSheet, ModelShape};
use crate::telemetry::JobSource;

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
        constants: Some(Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)),
        limits: Limits::default(),
        slice: None,
        speculation: None,
        ready_at: None,
        kept_warm_for: None,
        unobserved: None,
        samples: Vec::new(),
        steps: Vec::new(),
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
        known: Known::Timeline,
        adapter: None,
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
    jobs: Vec<JobFact>,
    demand: Demand,
}

impl Case {
    fn run(&self, policy: &Policy) -> Vec<Posting> {
        let Case { capacity, engines, served, jobs, demand } = self;
        let facts = Facts { capacity, engines, served, jobs, demand };
        allocate(&pool(), minute(), facts, policy, at(200.0)).unwrap()
    }

    fn cost(&self) -> Money {
        latest(&self.capacity).into_iter().map(|fact| fact.cost_within(minute())).sum()
    }

    /// The GPU time of the interval in microseconds.
    fn gpu_us(&self) -> i64 {
        let micros = |fact: &CapacityFact| fact.period.intersect(minute()).map_or(0, |both| both.micros());
        let facts = latest(&self.capacity);
        facts.into_iter().map(|fact| i64::try_from(micros(fact) * u64::from(fact.gpus)).unwrap()).sum()
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
        jobs: Vec::new(),
        demand: Demand::default(),
    }
}

fn job(name: &str, replica: &str, share: u32, from: f64, until: f64) -> JobFact {
    JobFact {
        job: name.into(),
        pool: pool(),
        replica: replica.into(),
        context: team("research"),
        share,
        period: Period { start: at(from), end: at(until) },
        observed_at: at(until),
        ..JobFact::default()
    }
}

/// GPU-microseconds behind the postings.
fn gpu_us(postings: &[Posting]) -> i64 {
    postings.iter().filter_map(|posting| posting.basis).map(|basis| basis.gpu_us).sum()
}

/// What the terms of a posting add up to.
fn explained(posting: &Posting) -> Option<Money> {
    let terms = posting.basis?.terms?;
    Some(terms.overhead + terms.weights + terms.kv + terms.compute)
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
    // 40 of the 120 GPU-seconds, and every request's amount by term.
    assert_eq!(gpu_us(&postings), 120_000_000);
    let requests: Vec<&Posting> = postings.iter().filter(|posting| posting.line == Line::Request).collect();
    let busy_us: i64 = requests.iter().map(|posting| posting.basis.unwrap().gpu_us).sum();
    assert!((busy_us - 40_000_000).abs() <= 1);
    assert!(requests.iter().all(|posting| explained(posting) == Some(posting.costs.effective_cost)));
    let idle = postings.iter().find(|posting| posting.line == Line::IdleReserved).unwrap();
    assert_eq!(idle.basis.unwrap().terms, None);
    assert_eq!(idle.context, team("platform"));
    assert!(
        postings
            .iter()
            .all(|posting| &*posting.policy == "roofline/1 headroom=line waste=line sharing=time-sliced fixed=request"
                && posting.tier == Some(Tier::B))
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
    let mut another = case.clone();
    another.engines.push(engine("always there", "new"));
    assert_eq!(by_line(&another.run(&Policy::default()), Line::ColdStart), Money::ZERO, "one could always serve");
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
    let metered = Counted { prompt_tokens: 5_000.0, generation_tokens: 800.0, ..Counted::default() };
    let unseen = |engine: &Counted| super::super::counters::unobserved(engine, &metered);

    // Counters that say what was metered: not a picodollar.
    case.engines[0].unobserved = Some(unseen(&metered));
    assert_eq!(by_line(&case.run(&Policy::default()), Line::Unobserved), Money::ZERO);

    // The same again past the gateway, at the same time by the engine's own word: half of the busy third is nobody's.
    let twice = Counted { prompt_tokens: 10_000.0, generation_tokens: 1_600.0, ..Counted::default() };
    case.engines[0].unobserved = Some(unseen(&twice));
    let busy = |second: u32| (70..90).contains(&(60 + second));
    let sample = |second: u32| EngineSample {
        at_s: f64::from(second) + 0.5,
        running: Some(if busy(second) { 2.0 } else { 0.0 }),
        ..EngineSample::default()
    };
    case.engines[0].samples = (0..60).map(sample).collect();
    let postings = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    let (seen, unseen_cost) = (by_line(&postings, Line::Request).pico(), by_line(&postings, Line::Unobserved).pico());
    assert!((seen - unseen_cost).abs() <= 2, "as much unseen as seen");
    let row = postings.iter().find(|posting| posting.line == Line::Unobserved).unwrap();
    assert_eq!((row.tier, row.estimated), (Some(Tier::C), true));

    // At another time by the engine's own word, which was seen at work for ten seconds beside ours: as long as these tokens
    // take a request alone, some five seconds, and nothing of what ours paid alone.
    let ours = by_line(&two_requests().run(&Policy::default()), Line::Request);
    for sample in &mut case.engines[0].samples {
        sample.running = Some(if (10.0..40.0).contains(&sample.at_s) { 1.0 } else { 0.0 });
    }
    let postings = case.run(&Policy::default());
    let second = case.cost().pico() / 60;
    let unseen_cost = by_line(&postings, Line::Unobserved).pico();
    assert!((4 * second..10 * second).contains(&unseen_cost), "{unseen_cost} of {second} a second");
    assert!((by_line(&postings, Line::Request).pico() - ours.pico()).abs() <= 2);

    // Nothing metered at all: what the tokens come to, and nothing without tokens.
    case.served.clear();
    case.engines[0].samples.clear();
    let alone = case.run(&Policy::default());
    assert!(by_line(&alone, Line::Unobserved) > Money::ZERO && by_line(&alone, Line::Request) == Money::ZERO);
    let more = Counted { generation_tokens: 2_400.0, ..twice };
    case.engines[0].unobserved = Some(unseen(&more));
    assert!(by_line(&case.run(&Policy::default()), Line::Unobserved) > by_line(&alone, Line::Unobserved));
}

#[test]
fn a_restart_in_mid_minute_does_not_count_the_unobserved_twice() {
    let mut case = two_requests();
    case.served.clear();
    case.engines[0].unobserved = Some(Counted { generation_tokens: 1_000.0, ..Counted::default() });
    let once = by_line(&case.run(&Policy::default()), Line::Unobserved);
    case.capacity = vec![capacity("r0", 2, 0.0, 80.0), capacity("r0", 2, 80.0, 300.0)];
    let postings = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    let twice = by_line(&postings, Line::Unobserved);
    assert!(once > Money::ZERO && (once.pico() - twice.pico()).abs() <= once.pico() / 1_000, "{once} {twice}");
}

#[test]
fn an_adapter_and_drafts_are_paid_by_who_has_them() {
    let mut case = two_requests();
    case.served = vec![served(0, "e0", 70.0, 0.2, 10.0, (400, 500)), served(1, "e0", 70.0, 0.2, 10.0, (400, 500))];
    let terms = |case: &Case| -> Vec<[f64; 2]> {
        let postings = case.run(&Policy::default());
        assert_eq!(imbalances([case.origin()], &postings), Vec::new());
        let terms = postings.iter().filter_map(|posting| posting.basis?.terms);
        terms.map(|terms| [terms.kv.pico() as f64, terms.compute.pico() as f64]).collect()
    };
    let plain = terms(&case);
    assert!((plain[0][0] / plain[1][0] - 1.0).abs() < 1e-9, "the same work");
    case.served[0].adapter = Some(Adapter { model: "lora".into(), bytes: 1_000_000_000, flop_per_token: 1_000_000 });
    let adapted = terms(&case);
    assert!(adapted[0][0] > 5.0 * adapted[1][0], "its weights are read for it alone: {adapted:?}");
    case.served[0].adapter = None;
    // Where compute and memory do not hide one another, drafts show: four tokens computed for each one delivered.
    let constants = case.engines[0].constants.unwrap();
    case.engines[0].constants = Some(Replica { overlap: 0.0, ..constants });
    let steady = terms(&case);
    case.engines[0].speculation = Some(Speculation { drafted: 3.0, accepted: 0.0 });
    assert!(terms(&case)[0][1] > 2.0 * steady[0][1]);
}

#[test]
fn requests_of_which_only_tokens_are_known_are_tier_c() {
    let mut case = two_requests();
    case.served[0].known = Known::Counts;
    case.served[1].known = Known::Counts;
    let postings = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    let paid: Vec<&Posting> = postings.iter().filter(|posting| posting.line == Line::Request).collect();
    assert!(paid.len() == 2 && paid.iter().all(|posting| posting.tier == Some(Tier::C) && posting.estimated));
    assert!(paid.iter().all(|posting| explained(posting).is_none()));
    assert!(paid[1].costs.effective_cost > paid[0].costs.effective_cost && paid[0].costs.effective_cost > Money::ZERO);
    assert!(by_line(&postings, Line::IdleReserved) > Money::ZERO, "800 tokens do not fill a minute");
    // All of it in the interval of the arrival, and nothing elsewhere.
    case.served[0].timeline.arrived = at(130.0);
    let postings = case.run(&Policy::default());
    assert_eq!(postings.iter().filter(|posting| posting.line == Line::Request).count(), 1);
}

#[test]
fn without_a_model_tokens_divide_and_the_postings_say_so() {
    let mut case = two_requests();
    case.engines[0].constants = None;
    let postings = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    let paid: Vec<&Posting> = postings.iter().filter(|posting| posting.line == Line::Request).collect();
    assert!(paid.iter().all(|posting| posting.policy.starts_with("weighted-tokens/1 ")));
    let ratio = paid[0].costs.effective_cost.pico() as f64 / paid[1].costs.effective_cost.pico() as f64;
    assert!((ratio - 1_600.0 / 5_000.0).abs() < 1e-6);
    assert!(
        (by_line(&postings, Line::Request).pico() - case.cost().pico() / 3).abs() <= 1,
        "the busy third all the same"
    );
}

#[test]
fn jobs_share_the_gpus_up_to_their_part() {
    let mut case = two_requests();
    // A quarter at most for 40 s: the first 10 alone, then 20 beside the engine, then 10 alone.
    case.jobs = vec![job("tune", "r0", 250_000, 60.0, 100.0)];
    let postings = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &postings), Vec::new());
    let sixth = case.cost().pico() / 6;
    assert!(
        (by_line(&postings, Line::Job).pico() - sixth).abs() <= 2,
        "10 of 60 seconds: {} {sixth}",
        by_line(&postings, Line::Job)
    );
    assert!((by_line(&postings, Line::Request).pico() - case.cost().pico() / 4).abs() <= 2, "15 of 60 seconds");
    let row = postings.iter().find(|posting| posting.line == Line::Job).unwrap();
    assert_eq!(row.context.team.as_deref(), Some("research"));
    assert_eq!(row.context.application.as_deref(), Some("tune"));
    // Twice told is one job; a job of another pool or replica is none here.
    case.jobs.push(job("tune", "r0", 250_000, 60.0, 100.0));
    case.jobs.push(JobFact { pool: "other".into(), ..job("x", "r0", 1_000_000, 60.0, 100.0) });
    case.jobs.push(job("y", "r9", 1_000_000, 60.0, 100.0));
    assert_eq!(case.run(&Policy::default()), postings);
    // Seen once more as a process it is still one job.
    let pods = JobFact { source: JobSource::PodLabels, ..case.jobs[0].clone() };
    let process = JobFact { job: "python3".into(), source: JobSource::GpuProcesses, ..pods.clone() };
    case.jobs = vec![pods.clone()];
    let once = case.run(&Policy::default());
    case.jobs = vec![process, pods];
    assert_eq!(case.run(&Policy::default()), once);
    // Under MPS an engine that demands all of the GPU gets more beside a job that demands a quarter than by turns.
    case.jobs = vec![job("tune", "r0", 900_000, 60.0, 120.0)];
    let turns = by_line(&case.run(&Policy::default()), Line::Job);
    case.jobs[0].share = 500_000;
    let mps = Policy { sharing: SharingRule::Mps, ..Policy::default() };
    let side_by_side = case.run(&mps);
    assert_eq!(imbalances([case.origin()], &side_by_side), Vec::new());
    assert!(by_line(&side_by_side, Line::Job) < turns);
    // On a sliced GPU a job can only have run where no slice is.
    case.engines[0].slice = MigSlice::of_profile("3g.40gb", 10);
    let sliced = case.run(&Policy::default());
    assert_eq!(imbalances([case.origin()], &sliced), Vec::new());
    let left = 1.0 - 0.5 * (3.0 / 7.0 + 0.5);
    let part = by_line(&sliced, Line::Job).pico() as f64 / case.cost().pico() as f64;
    assert!((part - 0.5).abs() < 1e-9 && left > 0.5, "{part}");
}

#[test]
fn by_demand_the_engine_that_needs_more_gets_more() {
    let mut case = two_requests();
    case.engines.push(engine("e1", "r0"));
    // The same time on both: one decodes as fast as the model says, the other a tenth of that.
    let fast = served(0, "e0", 70.0, 0.5, 10.0, (1_000, 1_500));
    case.served = vec![fast, served(1, "e1", 70.0, 0.5, 10.0, (1_000, 150))];
    let paid = |policy: &Policy| -> Vec<f64> {
        let postings = case.run(policy);
        assert_eq!(imbalances([case.origin()], &postings), Vec::new());
        let requests = postings.iter().filter(|posting| posting.line == Line::Request);
        requests.map(|posting| posting.costs.effective_cost.pico() as f64).collect()
    };
    let turns = paid(&Policy::default());
    assert!((turns[0] / turns[1] - 1.0).abs() < 1e-6);
    let mps = paid(&Policy { sharing: SharingRule::Mps, ..Policy::default() });
    assert!((5.0..15.0).contains(&(mps[0] / mps[1])), "{mps:?}");
}

#[test]
fn splitting_a_request_in_two_does_not_raise_a_tenants_part_of_what_is_shared_by_tenants() {
    let consumer = |name: &str| Context { consumer: Some(name.into()), ..Context::default() };
    let of = |number: u16, name: &str, tokens: (u32, u32)| Served {
        context: consumer(name),
        ..served(number, "e0", 70.0, 0.2, 10.0, tokens)
    };
    let mut case = two_requests();
    let fixed_of = |case: &Case, fixed: FixedRule| -> f64 {
        let postings = case.run(&Policy { fixed, ..Policy::default() });
        assert_eq!(imbalances([case.origin()], &postings), Vec::new());
        let own = postings.iter().filter(|posting| posting.context.consumer.as_deref() == Some("a"));
        let terms = own.filter_map(|posting| posting.basis?.terms);
        terms.map(|terms| (terms.overhead + terms.weights).pico() as f64).sum::<f64>() / case.cost().pico() as f64
    };
    case.served = vec![of(0, "a", (400, 500)), of(1, "b", (400, 500))];
    let [by_request, by_tenant] = FixedRule::ALL.map(|fixed| fixed_of(&case, fixed));
    assert!((by_request - by_tenant).abs() < 1e-9, "one request each: the same");
    case.served = vec![of(0, "a", (200, 250)), of(2, "a", (200, 250)), of(1, "b", (400, 500))];
    let [split_by_request, split_by_tenant] = FixedRule::ALL.map(|fixed| fixed_of(&case, fixed));
    assert!(split_by_request > 1.2 * by_request, "two thirds of the heads");
    assert!((split_by_tenant / by_tenant - 1.0).abs() < 0.02, "{split_by_tenant} {by_tenant}");
}

#[test]
fn an_engines_own_series_gives_the_quality() {
    let mut case = two_requests();
    let quality = |case: &Case| {
        let postings = case.run(&Policy::default());
        postings.iter().find(|posting| posting.line == Line::Request).unwrap().basis.unwrap().quality
    };
    assert_eq!(quality(&case), None, "never compared");
    let running = |second: u32| match second {
        10..15 | 20..30 => 1.0,
        15..20 => 2.0,
        _ => 0.0,
    };
    let sample = |second: u32, running: f64| EngineSample {
        at_s: f64::from(second) + 0.5,
        running: Some(running),
        ..EngineSample::default()
    };
    case.engines[0].samples = (0..60).map(|second| sample(second, running(second))).collect();
    // The second request ends at 90: 75 + 15. From 80 on it is alone.
    assert_eq!(quality(&case), Some(1_000_000));
    case.engines[0].samples = (0..60).map(|second| sample(second, 4.0)).collect();
    assert!(quality(&case).unwrap() < 200_000);
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

#[path = "pool_laws.rs"]
mod laws;
