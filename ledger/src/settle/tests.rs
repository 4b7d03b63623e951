use proptest::prelude::*;

use super::fixtures::{Dice, at, attempt, between, capacity, engine, llama, reading, running, span_of};
use super::*;
use crate::allocate::policy::{FixedRule, HeadroomRule, Method, SharingRule, WasteRule};
use crate::context::Context;
use crate::id::AttemptId;
use crate::posting::Terms;
use crate::telemetry::JobSource;
use crate::usage::UsageQuality;

/// Facts of every kind, as they have come so far.
#[derive(Debug, Clone, Default)]
struct World {
    capacity: Vec<CapacityFact>,
    engines: Vec<EngineFact>,
    attempts: Vec<Attempt>,
    running: Vec<Running>,
    spans: Vec<CallSpan>,
    readings: Vec<EngineReading>,
    steps: Vec<EngineStep>,
    jobs: Vec<JobFact>,
    posted: Vec<Posting>,
    policies: BTreeMap<Label, PoolPolicy>,
    demand: BTreeMap<Label, Demand>,
}

impl World {
    fn known(&self) -> Known<'_> {
        Known {
            capacity: &self.capacity,
            engines: &self.engines,
            attempts: &self.attempts,
            running: &self.running,
            spans: &self.spans,
            readings: &self.readings,
            steps: &self.steps,
            jobs: &self.jobs,
            posted: &self.posted,
            policies: &self.policies,
            demand: &self.demand,
        }
    }

    /// Settles and books.
    fn settle(&mut self, window: Period) -> Settlement {
        let settlement = settle(&self.known(), window, at(1_000.0)).unwrap();
        self.posted.extend(settlement.postings.iter().cloned());
        settlement
    }

    /// One replica, one engine on it for ten minutes.
    fn plain() -> World {
        World {
            capacity: vec![capacity("p", "r", 0.0, 600.0)],
            engines: vec![engine("p", "e", "r", 0.0, 600.0)],
            ..World::default()
        }
    }

    fn sum(&self, line: Line) -> Money {
        self.posted.iter().filter(|posting| posting.line == line).map(|posting| posting.costs.effective_cost).sum()
    }

    fn of_attempt(&self, attempt: &Attempt) -> Money {
        let own = self.posted.iter().filter(|posting| posting.attempt == Some(attempt.id));
        own.map(|posting| posting.costs.effective_cost).sum()
    }
}

const MINUTE_USD: &str = "0.06";

#[test]
fn a_minute_closes_and_settling_again_books_nothing() {
    let mut world = World { attempts: vec![attempt(1, "p", "e", (10.0, 11.0, 40.0), (500, 900))], ..World::plain() };
    let settlement = world.settle(between(0.0, 60.0));
    assert_eq!(settlement.minutes.len(), 1);
    let minute = &settlement.minutes[0];
    assert_eq!((minute.cost.to_string().as_str(), minute.requests, minute.tier), (MINUTE_USD, 1, Some(Tier::B)));
    assert!(!minute.corrected && !minute.unobserved);
    let all: Money = settlement.postings.iter().map(|posting| posting.costs.effective_cost).sum();
    assert_eq!(all, minute.cost);
    assert!(world.of_attempt(&world.attempts[0]) > Money::ZERO);
    assert_eq!(settle(&world.known(), between(0.0, 60.0), at(2_000.0)).unwrap().postings, []);
}

#[test]
fn a_running_request_pays_its_progress_and_its_end_corrects_it() {
    let whole = attempt(1, "p", "e", (10.0, 12.0, 100.0), (500, 2_000));
    let mut world = World { running: vec![running(&whole, 70.0, 1_300)], ..World::plain() };
    world.settle(between(0.0, 60.0));
    let so_far = world.of_attempt(&whole);
    assert!(so_far > Money::ZERO);
    world.attempts.push(whole.clone());
    let settlement = world.settle(between(0.0, 120.0));
    assert_eq!(settlement.minutes.iter().map(|minute| minute.requests).collect::<Vec<_>>(), [1, 1]);
    let mut once = World { attempts: vec![whole.clone()], ..World::plain() };
    once.settle(between(0.0, 120.0));
    assert_eq!(world.of_attempt(&whole), once.of_attempt(&whole));
    assert!(world.of_attempt(&whole) > so_far);
}

#[test]
fn a_minute_that_the_window_cuts_is_settled_as_far_as_capacity_reaches() {
    let mut world = World { capacity: vec![capacity("p", "r", 0.0, 30.0)], ..World::plain() };
    let settlement = world.settle(between(0.0, 30.0));
    assert_eq!(settlement.minutes[0].cost.to_string(), "0.03");
    world.capacity.push(capacity("p", "r", 0.0, 90.0));
    let settlement = world.settle(between(0.0, 60.0));
    assert!(settlement.minutes[0].corrected);
    assert_eq!(world.posted.iter().map(|posting| posting.costs.effective_cost).sum::<Money>().to_string(), MINUTE_USD);
}

#[test]
fn of_a_pool_that_nobody_knows_the_cost_is_a_line() {
    let mut world = World { capacity: vec![capacity("p", "r", 0.0, 60.0)], ..World::default() };
    let reserved = CapacityFact { purchase: PurchaseOption::Reserved, ..capacity("p", "kept", 0.0, 60.0) };
    world.capacity.push(reserved);
    world.settle(between(0.0, 60.0));
    assert_eq!(world.sum(Line::Unallocated).to_string(), MINUTE_USD);
    assert_eq!(world.sum(Line::IdleReserved).to_string(), MINUTE_USD);
    let open = world.capacity[0].cost_within(between(0.0, 60.0));
    let line = world.posted.iter().find(|posting| posting.line == Line::Unallocated).unwrap();
    assert_eq!(line.costs, crate::charge::Costs::flat(open));
    // As soon as its engine is known the line gives way.
    world.engines.push(engine("p", "e", "r", 0.0, 60.0));
    world.settle(between(0.0, 60.0));
    assert_eq!(world.sum(Line::Unallocated), Money::ZERO);
}

#[test]
fn without_engine_facts_one_replica_is_shared_by_tokens() {
    let mut world = World::plain();
    world.engines.clear();
    world.attempts = vec![
        attempt(1, "p", "e", (10.0, 11.0, 40.0), (500, 900)),
        attempt(2, "p", "e", (10.0, 11.0, 40.0), (500, 100)),
    ];
    let settlement = world.settle(between(0.0, 60.0));
    assert!(world.of_attempt(&world.attempts[0]) > world.of_attempt(&world.attempts[1]));
    assert!(world.of_attempt(&world.attempts[1]) > Money::ZERO);
    assert_eq!(settlement.minutes[0].requests, 2);
    world.capacity.push(capacity("p", "another", 0.0, 60.0));
    world.posted.clear();
    world.settle(between(0.0, 60.0));
    assert_eq!(world.sum(Line::Unallocated).to_string(), "0.12", "which of two replicas it ran on is a guess");
}

#[test]
fn an_attempt_of_no_engine_falls_to_the_one_of_its_model() {
    let other = EngineFact { model: Some("qwen".into()), ..engine("p", "f", "s", 0.0, 600.0) };
    let mut world = World::plain();
    world.capacity.push(capacity("p", "s", 0.0, 600.0));
    world.engines.push(other);
    let mut imported = attempt(1, "p", "vllm-timeline", (10.0, 11.0, 40.0), (500, 900));
    imported.route.request_model = Some("qwen".into());
    world.attempts = vec![imported.clone()];
    world.settle(between(0.0, 60.0));
    assert!(world.of_attempt(&imported) > Money::ZERO);
    assert!(world.posted.iter().any(|posting| posting.attempt.is_some() && posting.estimated));
    imported.route.request_model = Some("nobody serves this".into());
    let mut lost = World { attempts: vec![imported.clone()], posted: Vec::new(), ..world };
    lost.settle(between(0.0, 60.0));
    assert_eq!(lost.of_attempt(&imported), Money::ZERO);
}

#[test]
fn engine_counters_less_metered_tokens_are_unobserved() {
    let metered = attempt(1, "p", "e", (10.0, 11.0, 40.0), (500, 900));
    let mut world = World { attempts: vec![metered.clone()], ..World::plain() };
    world.readings = vec![reading("p", "e", 5.0, 0, 0), reading("p", "e", 55.0, 500, 900)];
    assert!(!world.settle(between(0.0, 60.0)).minutes[0].unobserved);
    let before = world.of_attempt(&metered);
    world.readings[1] = reading("p", "e", 55.0, 1_500, 1_800);
    let settlement = world.settle(between(0.0, 60.0));
    assert!(settlement.minutes[0].unobserved && settlement.minutes[0].corrected);
    let (bypassed, after) = (world.sum(Line::Unobserved), world.of_attempt(&metered));
    assert!(bypassed > Money::ZERO && after <= before, "{bypassed} {after} {before}");
}

#[test]
fn a_span_call_gives_way_to_the_gateways_record() {
    let metered = attempt(1, "p", "e", (10.0, 11.0, 40.0), (500, 900));
    let told =
        Told { spans: &[span_of(&metered, 0.1, 0.9)], attempts: &[], running: &[], engines: &World::plain().engines };
    let calls = calls_of_spans(&told, at(100.0), |_| panic!("a pool's call is not priced"));
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0].route.pool.as_deref(), Some("p"));
    let mut world = World { attempts: calls.clone(), ..World::plain() };
    world.settle(between(0.0, 60.0));
    let as_told = world.of_attempt(&calls[0]);
    assert!(as_told > Money::ZERO);
    world.attempts.push(metered.clone());
    world.settle(between(0.0, 60.0));
    assert_eq!((world.of_attempt(&calls[0]), world.of_attempt(&metered) > Money::ZERO), (Money::ZERO, true));
}

#[test]
fn an_amount_that_goes_and_comes_back_has_ids_of_its_own() {
    let one = attempt(1, "p", "e", (10.0, 11.0, 40.0), (500, 900));
    let mut world = World { attempts: vec![one.clone()], ..World::plain() };
    for round in 0..5 {
        world.attempts = if round % 2 == 0 { vec![one.clone()] } else { Vec::new() };
        world.settle(between(0.0, 60.0));
    }
    let ids: BTreeSet<PostingId> = world.posted.iter().map(|posting| posting.id).collect();
    assert_eq!(ids.len(), world.posted.len());
    assert!(world.of_attempt(&one) > Money::ZERO);
    // What is told twice counts once.
    let twice: Vec<Posting> = world.posted.iter().chain(&world.posted).cloned().collect();
    let settlement = settle(&Known { posted: &twice, ..world.known() }, between(0.0, 60.0), at(1_000.0)).unwrap();
    assert_eq!(settlement.postings, []);
}

#[test]
fn a_true_up_is_not_undone() {
    let mut world = World { attempts: vec![attempt(1, "p", "e", (10.0, 11.0, 40.0), (500, 900))], ..World::plain() };
    world.settle(between(0.0, 60.0));
    let adjusted = Posting { line: Line::TrueUp, id: PostingId::new(at(0.0), [9; 10]), ..world.posted[0].clone() };
    world.posted.push(adjusted);
    assert_eq!(world.settle(between(0.0, 60.0)).postings, []);
}

/// A pool with this many short requests in a day, on four engines with their readings.
fn a_day(requests: u64) -> World {
    const DAY_S: f64 = 86_400.0;
    let mut dice = Dice(7);
    let mut world = World::default();
    for number in 0..4 {
        let (replica, name) = (format!("r{number}"), format!("e{number}"));
        world.capacity.push(capacity("p", &replica, 0.0, DAY_S));
        world.engines.push(engine("p", &name, &replica, 0.0, DAY_S));
        world.readings.extend((0..17_280).map(|scrape| reading("p", &name, f64::from(scrape) * 5.0, 0, 0)));
    }
    world.attempts = (0..requests)
        .map(|number| {
            let sent = dice.seconds(86_000);
            attempt(number, "p", &format!("e{}", number % 4), (sent, sent + 0.2, sent + 4.0), (400, 150))
        })
        .collect();
    world.spans = world.attempts.iter().step_by(3).map(|attempt| span_of(attempt, 0.05, 0.1)).collect();
    world
}

#[test]
#[ignore = "measures time: run it alone"]
#[expect(clippy::disallowed_methods, reason = "it measures how long settling takes")]
fn a_day_takes_time_in_proportion_to_its_requests() {
    let seconds = |requests| {
        let world = a_day(requests);
        let began = std::time::Instant::now();
        let settlement = settle(&world.known(), between(0.0, 86_400.0), at(90_000.0)).unwrap();
        assert_eq!(settlement.minutes.len(), 1_440);
        let took = began.elapsed().as_secs_f64();
        let calls = calls_of_spans(
            &Told { spans: &world.spans, attempts: &world.attempts, running: &[], engines: &world.engines },
            at(90_000.0),
            |_| panic!("all of them are metered"),
        );
        assert_eq!(calls, []);
        (took, began.elapsed().as_secs_f64() - took)
    };
    let times = [50_000, 200_000].map(seconds);
    assert!(times[1].0 < 7.0 * times[0].0 && times[1].1 < 7.0 * times[0].1, "{times:?}");
    // Shown with `--nocapture`.
    std::io::Write::write_all(&mut std::io::stderr(), format!("50,000 and 200,000 requests: {times:?}\n").as_bytes())
        .unwrap();
}

/// One fact on its way.
#[derive(Debug, Clone)]
enum Fact {
    Capacity(CapacityFact),
    Engine(Box<EngineFact>),
    Attempt(Box<Attempt>),
    Running(Box<Running>),
    Span(Box<CallSpan>),
    Reading(EngineReading),
    Step(EngineStep),
    Job(JobFact),
}

impl World {
    fn learn(&mut self, fact: Fact) {
        match fact {
            Fact::Capacity(fact) => self.capacity.push(fact),
            Fact::Engine(fact) => self.engines.push(*fact),
            Fact::Attempt(fact) => self.attempts.push(*fact),
            Fact::Running(fact) => self.running.push(*fact),
            Fact::Span(fact) => self.spans.push(*fact),
            Fact::Reading(fact) => self.readings.push(fact),
            Fact::Step(fact) => self.steps.push(fact),
            Fact::Job(fact) => self.jobs.push(fact),
        }
    }
}

const POOLS: u64 = 40;
const WINDOW_S: f64 = 180.0;

fn whole(pick: u64) -> usize {
    usize::try_from(pick).unwrap()
}

fn any_policy(dice: &mut Dice) -> PoolPolicy {
    let policy = Policy {
        method: Method::ALL[whole(dice.roll(4))],
        headroom: HeadroomRule::ALL[whole(dice.roll(3))],
        waste: WasteRule::ALL[whole(dice.roll(2))],
        sharing: SharingRule::ALL[whole(dice.roll(2))],
        fixed: FixedRule::ALL[whole(dice.roll(2))],
    };
    PoolPolicy { policy, peak_gpus: [None, Some(0.5), Some(3.0)][whole(dice.roll(3))] }
}

/// Everything about one random pool, some of it wrong before it is right.
fn any_pool(dice: &mut Dice, pool: &str, number: u64) -> Vec<Fact> {
    let mut facts = Vec::new();
    let replicas: Vec<String> = (0..=dice.roll(2)).map(|replica| format!("{pool}-{replica}")).collect();
    for replica in &replicas {
        let from = dice.seconds(60);
        let mut fact = capacity(pool, replica, from, from + 1.0 + dice.seconds(200));
        fact.gpus = 1 + u32::try_from(dice.roll(4)).unwrap();
        fact.purchase = [PurchaseOption::OnDemand, PurchaseOption::Reserved][whole(dice.roll(2))];
        let short = between(from, from + dice.seconds(60));
        facts.push(Fact::Capacity(CapacityFact {
            period: short,
            observed_at: short.end.plus_micros(-1),
            ..fact.clone()
        }));
        facts.push(Fact::Capacity(fact));
    }
    let engines: Vec<String> = (0..dice.roll(4)).map(|engine| format!("{pool}-e{engine}")).collect();
    for name in &engines {
        let replica = &replicas[whole(dice.roll(replicas.len() as u64))];
        let mut fact = engine(pool, name, replica, 0.0, 60.0);
        facts.push(Fact::Engine(Box::new(fact.clone())));
        fact.setup.constants = (dice.roll(4) > 0).then(llama);
        fact.setup.limits.kv_tokens = (dice.roll(3) == 0).then_some(1_500.0);
        fact.ready_at = (dice.roll(3) == 0).then(|| at(dice.seconds(40)));
        fact.warm_for = (dice.roll(4) == 0).then(|| Context { team: Some("objective".into()), ..Context::default() });
        fact.period = between(0.0, 240.0);
        fact.observed_at = at(240.0);
        facts.push(Fact::Engine(Box::new(fact)));
        let (mut prompt, mut generated) = (dice.roll(1_000), dice.roll(1_000));
        for scrape in 0..8 {
            (prompt, generated) = (prompt + dice.roll(3_000), generated + dice.roll(2_000));
            if dice.roll(10) == 0 {
                (prompt, generated) = (0, 0);
            }
            facts.push(Fact::Reading(reading(pool, name, f64::from(scrape) * 29.0, prompt, generated)));
        }
    }
    for of_pool in 0..dice.roll(8) {
        let engine = match engines.len() as u64 {
            0 => format!("{pool}-0"),
            count => engines[whole(dice.roll(count))].clone(),
        };
        let sent = dice.seconds(170);
        let first = sent + dice.seconds(3);
        let last = first + dice.seconds(70);
        let tokens = (1 + dice.roll(2_000), 1 + dice.roll(800));
        let mut one = attempt(number * 100 + of_pool, pool, &engine, (sent, first, last), tokens);
        if dice.roll(5) == 0 {
            (one.timeline.first_token_us, one.timeline.last_token_us, one.route.streamed) = (None, None, false);
        }
        if dice.roll(6) == 0 {
            (one.outcome, one.usage_quality) = (crate::attempt::Outcome::ClientAborted, UsageQuality::Estimated);
        }
        if dice.roll(3) == 0 {
            facts.push(Fact::Running(Box::new(running(&one, (sent + last) / 2.0, tokens.1 / 2))));
        }
        if dice.roll(4) == 0 {
            facts.push(Fact::Span(Box::new(span_of(&one, dice.seconds(1), dice.seconds(1)))));
        }
        facts.push(Fact::Attempt(Box::new(one)));
    }
    if dice.roll(3) == 0 {
        let from = dice.seconds(100);
        let job = JobFact {
            job: "train".into(),
            pool: pool.into(),
            replica: replicas[0].as_str().into(),
            context: Context { team: Some("research".into()), ..Context::default() },
            share: 500_000,
            period: between(from, from + 10.0),
            source: JobSource::Api,
            observed_at: at(from + 10.0),
        };
        let grown = JobFact { period: between(from, from + 50.0), observed_at: at(from + 50.0), ..job.clone() };
        facts.extend([Fact::Job(job), Fact::Job(grown)]);
    }
    if let (Some(name), 0) = (engines.first(), dice.roll(4)) {
        for sequence in 0..20 {
            let step = EngineStep {
                engine: name.as_str().into(),
                sequence,
                at: at(60.0 + sequence as f64),
                wall_us: 900_000,
                decode_requests: 1,
                decode_kv_tokens: 700,
                ..EngineStep::default()
            };
            facts.push(Fact::Step(step));
        }
    }
    facts
}

fn any_pools(dice: &mut Dice) -> (Vec<Fact>, BTreeMap<Label, PoolPolicy>) {
    let (mut facts, mut policies) = (Vec::new(), BTreeMap::new());
    for number in 0..POOLS {
        let pool = format!("pool-{number}");
        facts.extend(any_pool(dice, &pool, number));
        policies.insert(Label::from(pool), any_policy(dice));
    }
    (facts, policies)
}

#[test]
fn random_pools_have_every_line_and_every_tier() {
    let mut dice = Dice(11);
    let (mut lines, mut tiers) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..10 {
        let (facts, policies) = any_pools(&mut dice);
        let mut world = World { policies, ..World::default() };
        facts.into_iter().for_each(|fact| world.learn(fact));
        world.settle(between(0.0, WINDOW_S));
        lines.extend(world.posted.iter().map(|posting| posting.line));
        tiers.extend(world.posted.iter().filter_map(|posting| posting.tier));
    }
    // Slices are settled as they are allocated, and true-ups come from invoices.
    let expected = Line::ALL.into_iter().filter(|line| !matches!(line, Line::Stranded | Line::TrueUp));
    assert_eq!(
        lines.into_iter().collect::<Vec<_>>(),
        expected.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
    );
    assert_eq!(tiers.into_iter().collect::<Vec<_>>(), [Tier::A, Tier::B, Tier::C]);
}

type Row = (Origin, Line, Option<AttemptId>, Option<Label>, [Option<Label>; 6]);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Net {
    amount: Money,
    gpu_us: i64,
    /// `None` once a row of it had none.
    terms: Option<Terms>,
}

/// What the books come to, row by row; rows that came to nothing are none.
fn net(posted: &[Posting]) -> BTreeMap<Row, Net> {
    let mut rows: BTreeMap<Row, Net> = BTreeMap::new();
    for posting in posted {
        let Context { consumer, application, team, cost_centre, customer, feature, .. } = posting.context.clone();
        let who = [consumer, application, team, cost_centre, customer, feature];
        let key = (posting.origin.clone(), posting.line, posting.attempt, posting.model.clone(), who);
        let row = rows.entry(key).or_insert(Net { terms: Some(Terms::default()), ..Net::default() });
        let basis = posting.basis.unwrap_or_default();
        row.amount += posting.costs.effective_cost;
        row.gpu_us += basis.gpu_us;
        row.terms = row.terms.zip(basis.terms).map(|(a, b)| Terms {
            overhead: a.overhead + b.overhead,
            weights: a.weights + b.weights,
            kv: a.kv + b.kv,
            compute: a.compute + b.compute,
        });
    }
    rows.retain(|_, row| row.amount != Money::ZERO || row.gpu_us != 0);
    rows
}

/// Every minute's cost by the capacity known so far, against what is posted of it.
fn check_closure(world: &World, window: Period) -> Result<(), TestCaseError> {
    let mut posted: BTreeMap<Origin, Money> = BTreeMap::new();
    for posting in &world.posted {
        *posted.entry(posting.origin.clone()).or_default() += posting.costs.effective_cost;
    }
    let facts = crate::capacity::latest(&world.capacity);
    let mut origins: BTreeSet<Origin> = posted.keys().cloned().collect();
    for fact in &facts {
        let mut minute = interval_of(fact.period.start);
        while minute.start < fact.period.end.min(window.end) {
            origins.insert(Origin::Pool { pool: fact.pool.clone(), start: minute.start });
            minute = interval_of(minute.end);
        }
    }
    for origin in origins {
        let Origin::Pool { pool, start } = &origin else { panic!("a pool") };
        let cost = pool_cost(&facts, pool, interval_of(*start));
        prop_assert_eq!(posted.get(&origin).copied().unwrap_or_default(), cost, "{:?}", origin);
    }
    for (row, net) in net(&world.posted) {
        prop_assert!(net.amount >= Money::ZERO, "{:?} {:?}", row, net);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    /// 250 times 40 pools.
    #[test]
    fn late_duplicate_missing_and_reordered_facts_end_in_the_same_books(seed: u64) {
        let mut dice = Dice(seed);
        let window = between(0.0, WINDOW_S);
        let (mut facts, policies) = any_pools(&mut dice);
        // Some facts never come, and some come twice.
        facts.retain(|_| dice.roll(20) > 0);
        let twice: Vec<Fact> = facts.iter().filter(|_| dice.roll(5) == 0).cloned().collect();
        facts.extend(twice);
        dice.shuffle(&mut facts);

        let mut world = World { policies: policies.clone(), ..World::default() };
        let mut left = facts.clone();
        for rounds_left in [3, 2, 1] {
            let coming = left.len() / rounds_left;
            left.drain(..coming).for_each(|fact| world.learn(fact));
            // A window may end in mid-minute.
            let until = if rounds_left == 2 { 150.0 } else { WINDOW_S };
            world.settle(between(0.0, until));
            check_closure(&world, between(0.0, until))?;
        }
        let ids: BTreeSet<PostingId> = world.posted.iter().map(|posting| posting.id).collect();
        prop_assert_eq!(ids.len(), world.posted.len());
        prop_assert_eq!(&world.settle(window).postings, &[]);

        dice.shuffle(&mut facts);
        let mut once = World { policies, ..World::default() };
        facts.into_iter().for_each(|fact| once.learn(fact));
        once.settle(window);
        let (many, one) = (net(&world.posted), net(&once.posted));
        prop_assert_eq!(many.keys().collect::<Vec<_>>(), one.keys().collect::<Vec<_>>());
        for (row, net) in many {
            let expected = one[&row];
            prop_assert_eq!((net.amount, net.gpu_us), (expected.amount, expected.gpu_us), "{:?}", row);
            if net.terms.is_some() && expected.terms.is_some() {
                prop_assert_eq!(net.terms, expected.terms, "{:?}", row);
            }
        }
    }
}
