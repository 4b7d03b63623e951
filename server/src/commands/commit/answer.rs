//! What is said about the levels: which to take, what changes with the future, how to layer products, what spot would do.

use ledger::commit::layers::{self, Plan};
use ledger::commit::regret::{Regret, Scenario, least_regret, regrets};
use ledger::commit::spot::{self, Interruptions, Saving};
use ledger::commit::{Demand, Product, Rates, best_level};
use ledger::{GpuHourRate, Money};
use serde_json::{Value, json};

use super::horizon::Chosen;
use super::levels::{Candidate, Levels};
use crate::cli::Commit as Options;
use crate::commands::simulate::prepare::Played;
use crate::render::picture::Curve;

const HOUR_US: f64 = 3_600e6;

/// Everything that was found.
#[derive(Debug)]
pub struct Answer {
    /// What was played.
    pub trace: String,
    /// What a reader has to know of it.
    pub notes: Vec<String>,
    /// Where the price on demand is from.
    pub source: String,
    /// GPUs of one replica.
    pub gpus: u32,
    /// Every level.
    pub levels: Levels,
    /// The level by the rule, as its place in the candidates.
    pub by_rule: usize,
    /// The level that cost least when played.
    pub by_play: usize,
    /// The futures, each with the cost of every candidate.
    pub regrets: Vec<Regret>,
    /// The candidate whose worst regret is the smallest, and that regret.
    pub hedged: Option<(usize, Money)>,
    /// The products there are, where there are several ways to commit, at what an hour of the need costs.
    pub products: Vec<Product>,
    /// How they lie in layers.
    pub layers: Plan,
    /// What the commitment of the levels is.
    pub chosen: Chosen,
    /// What interruptible GPUs would do, where they have a price.
    pub spot: Option<SpotAnswer>,
}

/// What interruptible GPUs save and break.
#[derive(Debug, Clone, Copy)]
pub struct SpotAnswer {
    /// One of them for an hour.
    pub rate: GpuHourRate,
    /// How they are interrupted.
    pub interruptions: Interruptions,
    /// Whether the work can be repeated.
    pub interruptible: bool,
    /// For work that can be repeated.
    pub saving: Saving,
    /// For requests that people wait for; `None` where no policy was played.
    pub waiting: Option<Waiting>,
}

/// What interruptible GPUs would do to requests that people wait for.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    /// Part of all requests that are cut.
    pub cut: f64,
    /// Part of all requests in overloaded minutes without interruptions.
    pub overloaded_without: f64,
    /// The same with every replica interruptible.
    pub overloaded_all: f64,
    /// The same with only the replicas above the committed level interruptible.
    pub overloaded_above: f64,
    /// Part of all requests that may miss the objective.
    pub allowed: f64,
    /// What is paid if only what is above the committed level is interruptible.
    pub cost_above: Money,
}

impl Waiting {
    /// Whether so many requests are hit that the objective cannot be kept, with everything interruptible.
    #[must_use]
    pub fn breaks(&self) -> bool {
        self.cut + self.overloaded_all > self.allowed
    }
}

/// Draws the conclusions.
#[must_use]
pub fn of(played: &Played, options: &Options, chosen: Chosen, levels: Levels) -> Answer {
    let gpus = played.plan.gpus;
    let place = |level: u32| levels.candidates.iter().rposition(|candidate| candidate.bill.level <= level).unwrap_or(0);
    // Whole replicas: a GPU of a replica that does not run is of no use.
    let by_rule = place(best_level(&levels.demand, levels.rates));
    // Of levels that cost the same the larger one, as by the rule.
    let by_play = levels.candidates.iter().enumerate().rev().min_by_key(|(_, candidate)| candidate.played);
    let by_play = by_play.map_or(0, |(place, _)| place);
    let candidates: Vec<u32> = levels.candidates.iter().map(|candidate| candidate.bill.level).collect();
    let regrets =
        if options.scenarios { regrets(&levels.demand, levels.rates, &candidates, &Scenario::ALL) } else { Vec::new() };
    let products = match &played.price.products[..] {
        [] => vec![Product {
            name: "committed".to_owned(),
            committed: levels.rates.committed,
            used: GpuHourRate::default(),
            term_months: chosen.term_months,
        }],
        listed => listed.to_vec(),
    };
    // The horizon is in the prices already.
    let layers = layers::cheapest(&levels.demand, levels.rates.on_demand, &products, None);
    let spot = options.spot_usd.or(played.price.spot).map(|rate| spot_answer(played, options, &levels, by_play, rate));
    Answer {
        trace: played.demand.name.clone(),
        notes: played.demand.notes.iter().chain(&played.notes).cloned().collect(),
        source: played.price.source.clone(),
        gpus,
        by_rule,
        by_play,
        hedged: least_regret(&regrets),
        regrets,
        products,
        layers,
        chosen,
        spot,
        levels,
    }
}

fn spot_answer(played: &Played, options: &Options, levels: &Levels, level: usize, rate: GpuHourRate) -> SpotAnswer {
    let interruptions = Interruptions {
        per_hour: options.interruptions_per_hour,
        notice_s: options.notice_s,
        restart_s: played.plan.startup.usual_s(),
    };
    // A notice as long as a checkpoint takes is enough to write one down; that it is, only its owner knows.
    let saving = interruptions.interruptible(rate, levels.rates.on_demand, options.checkpoint_s, false);
    let bill = &levels.candidates[level].bill;
    let committed = f64::from(bill.level) / f64::from(played.plan.gpus);
    let minutes = |fixed: f64| {
        levels.minutes.iter().map(move |minute| spot::Minute {
            requests: f64::from(minute.requests),
            load: f64::from(minute.load),
            // Committed replicas run in any case.
            ready: f64::from(minute.ready).max(fixed),
            spot: (f64::from(minute.ready) - fixed).max(0.0),
        })
    };
    let waiting = (!levels.minutes.is_empty()).then(|| {
        let (overloaded_without, overloaded_all) = spot::overloaded(interruptions, minutes(0.0));
        let (_, overloaded_above) = spot::overloaded(interruptions, minutes(committed));
        Waiting {
            cut: interruptions.requests_cut(options.request_s),
            overloaded_without,
            overloaded_all,
            overloaded_above,
            allowed: 1.0 - played.plan.objective.percentile,
            cost_above: bill.committed + rate.over(1, bill.demand_gpu_us - bill.used_gpu_us),
        }
    });
    SpotAnswer { rate, interruptions, interruptible: options.interruptible, saving, waiting }
}

impl Answer {
    /// What a level costs of what no commitment costs, when played. `None` where that is nothing.
    #[must_use]
    pub fn of_on_demand(&self, candidate: &Candidate) -> Option<f64> {
        let without = self.levels.candidates.first()?.played.pico();
        (without > 0).then(|| candidate.played.pico() as f64 / without as f64)
    }

    /// Months of a term after which the need may end without a loss, and the months of the term, where it is known.
    #[must_use]
    pub fn break_even_months(&self) -> Option<(f64, u32)> {
        let term = self.chosen.term_months?;
        let of_term = Rates { committed: self.chosen.listed, ..self.levels.rates };
        Some((of_term.break_even_months(term)?, term))
    }

    /// The load-duration curve with the level to take.
    #[must_use]
    pub fn curve(&self) -> Curve {
        let demand = &self.levels.demand;
        let duration = demand.duration_us().max(1) as f64;
        let steps = demand.steps().into_iter().rev().map(|(gpus, at_least_us)| (gpus, at_least_us as f64 / duration));
        let level = &self.levels.candidates[self.by_play];
        let rates = self.levels.rates;
        Curve {
            title: format!("{}: commit to {} of {} GPUs", self.trace, level.bill.level, demand.peak()),
            subtitle: format!(
                "{}; {} USD committed, {} USD on demand for a GPU-hour",
                self.policy(),
                rates.committed,
                rates.on_demand
            ),
            steps: steps.collect(),
            level: level.bill.level,
            break_even: rates.break_even().unwrap_or(f64::INFINITY),
            costs: self.costs(),
        }
    }

    /// Who scales, in words.
    #[must_use]
    pub fn policy(&self) -> String {
        self.levels.policy.clone().unwrap_or_else(|| "the demand of each hour in whole replicas".to_owned())
    }

    /// Dollars of every number of GPUs; between two numbers of whole replicas those of the smaller.
    fn costs(&self) -> Vec<f64> {
        let each = self.levels.candidates.iter().map(|candidate| candidate.played.pico() as f64 / 1e12);
        each.flat_map(|usd| std::iter::repeat_n(usd, self.gpus as usize)).collect()
    }

    /// Everything as JSON, amounts as decimal strings.
    #[must_use]
    pub fn document(&self) -> Value {
        let Answer { levels, .. } = self;
        let hours = |gpu_us: u64| gpu_us as f64 / HOUR_US;
        let candidate = |candidate: &Candidate| {
            let bill = &candidate.bill;
            json!({
                "gpus": bill.level,
                "usd": candidate.played,
                "of_on_demand": self.of_on_demand(candidate),
                "overloaded_share": candidate.overloaded,
                "by_curve": {
                    "usd": bill.total(),
                    "committed_usd": bill.committed,
                    "on_demand_usd": bill.on_demand,
                },
                "coverage": bill.coverage(),
                "utilisation": bill.utilisation(),
            })
        };
        let chosen = |place: usize| candidate(&levels.candidates[place]);
        json!({
            "trace": self.trace,
            "notes": self.notes,
            "policy": self.policy(),
            "prices": {
                "committed_usd": self.chosen.listed,
                "committed_usd_over_need": levels.rates.committed,
                "on_demand_usd": levels.rates.on_demand,
                "break_even": levels.rates.break_even(),
                "term_months": self.chosen.term_months,
                "break_even_months": self.break_even_months().map(|(months, _)| months),
                "source": self.source,
            },
            "demand": {
                "hours": levels.demand.duration_us() as f64 / HOUR_US,
                "gpu_hours": hours(levels.demand.gpu_us()),
                "peak_gpus": levels.demand.peak(),
            },
            "commit_gpus": levels.candidates[self.by_play].bill.level,
            "best_played": chosen(self.by_play),
            "best_by_rule": chosen(self.by_rule),
            "levels": levels.candidates.iter().map(candidate).collect::<Vec<_>>(),
            "layers": self.layers.layers.iter().map(|layer| json!({
                "product": layer.product.map_or("on demand", |index| self.products[index].name.as_str()),
                "from_gpu": layer.below + 1,
                "gpus": layer.gpus,
                "usd": layer.cost,
            })).collect::<Vec<_>>(),
            "layers_usd": self.layers.total(),
            "scenarios": self.regrets.iter().map(|regret| self.scenario(regret)).collect::<Vec<_>>(),
            "least_regret": self.hedged.map(|(place, worst)| json!({
                "gpus": levels.candidates[place].bill.level,
                "worst_regret_usd": worst,
            })),
            "spot": self.spot.as_ref().map(SpotAnswer::document),
        })
    }

    fn scenario(&self, regret: &Regret) -> Value {
        let each = self.levels.candidates.iter().zip(&regret.costs).zip(regret.regrets());
        json!({
            "name": regret.scenario.name,
            "demand_percent": regret.scenario.demand_percent,
            "on_demand_percent": regret.scenario.on_demand_percent,
            "best_gpus": regret.best_level,
            "best_usd": regret.best,
            "levels": each.map(|((candidate, cost), regret)| json!({
                "gpus": candidate.bill.level,
                "usd": cost,
                "regret_usd": regret,
            })).collect::<Vec<_>>(),
        })
    }
}

impl SpotAnswer {
    fn document(&self) -> Value {
        let SpotAnswer { rate, interruptions, interruptible, saving, waiting } = self;
        json!({
            "spot_usd": rate,
            "interruptions_per_hour": interruptions.per_hour,
            "notice_s": interruptions.notice_s,
            "restart_s": interruptions.restart_s,
            "taken": interruptible,
            "interruptible_work": {
                "useful_share": saving.useful,
                "lost_s_per_interruption": saving.lost_s,
                "usd_per_useful_hour": saving.effective,
                "saving": saving.saving,
            },
            "requests_people_wait_for": waiting.map(|waiting| json!({
                "cut_share": waiting.cut,
                "overloaded_share_without": waiting.overloaded_without,
                "overloaded_share_all_spot": waiting.overloaded_all,
                "overloaded_share_above_commitment": waiting.overloaded_above,
                "allowed_share": waiting.allowed,
                "breaks_objective": waiting.breaks(),
                "usd_above_commitment": waiting.cost_above,
            })),
        })
    }
}

/// The part of the time in which at least so many GPUs were in use.
#[must_use]
pub fn in_use(demand: &Demand, gpus: u32) -> f64 {
    demand.at_least_us(gpus) as f64 / demand.duration_us().max(1) as f64
}
