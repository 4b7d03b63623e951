//! The answer for people.

use ledger::Money;

use super::answer::{Answer, SpotAnswer, in_use};
use super::levels::Candidate;
use crate::cli::Commit as Options;
use crate::commands::simulate::prepare::{self, Played};
use crate::render::{self, Align, Table};

/// Everything that was found, as text.
#[must_use]
pub fn text(played: &Played, options: &Options, answer: &Answer) -> String {
    let mut parts = vec![head(played, answer), levels(answer), advice(answer)];
    if answer.layers.layers.iter().filter(|layer| layer.product.is_some()).count() > 1
        || options.horizon_months.is_some()
    {
        parts.push(layers(answer));
    }
    if !answer.regrets.is_empty() {
        parts.push(regrets(answer));
    }
    if let Some(spot) = &answer.spot {
        parts.push(spot_words(spot));
    }
    if let Some(file) = &options.picture {
        parts.push(format!("picture in {}\n", file.display()));
    }
    parts.join("\n")
}

fn head(played: &Played, answer: &Answer) -> String {
    let rates = answer.levels.rates;
    let demand = &answer.levels.demand;
    let hours = demand.duration_us() as f64 / 3_600e6;
    let used = demand.gpu_us() as f64 / 3_600e6;
    let break_even = match rates.break_even() {
        None => "free on demand".to_owned(),
        Some(part) if part > 1.0 => "pays for no GPU, however much it is in use".to_owned(),
        Some(part) => format!("pays for a GPU in use {} % of the time or more", number(part * 100.0)),
    };
    let mut months = answer.break_even_months().map_or(String::new(), |(months, term)| {
        format!("\n  of a term of {term} months the need has to last {months:.1}")
    });
    if answer.chosen.listed != rates.committed {
        months += &format!("\n  {} USD for an hour of the term, paid to its end", answer.chosen.listed);
    }
    format!(
        "{}scaled by {}: {} GPU-hours in {} h, {} GPUs at the peak, {} in use half the time\n\
         {} USD committed against {} on demand: {break_even}{months}\n",
        prepare::words(played),
        answer.policy(),
        render::count(rounded(used)),
        number(hours),
        demand.peak(),
        median(answer),
        rates.committed,
        rates.on_demand,
    )
}

fn median(answer: &Answer) -> u32 {
    let demand = &answer.levels.demand;
    let half = |gpus: &u32| in_use(demand, *gpus) >= 0.5;
    demand.steps().into_iter().map(|(gpus, _)| gpus).rev().find(half).unwrap_or(0)
}

/// The levels worth showing, each with why.
fn shown(answer: &Answer) -> Vec<(usize, &'static str)> {
    let last = answer.levels.candidates.len().saturating_sub(1);
    let mut shown = vec![(0, "nothing"), (answer.by_play, "cheapest, played")];
    if answer.by_rule != answer.by_play {
        shown.push((answer.by_rule, "by the rule"));
    }
    if let Some((place, _)) =
        answer.hedged.filter(|(place, _)| ![0, answer.by_play, answer.by_rule, last].contains(place))
    {
        shown.push((place, "least regret"));
    }
    shown.push((answer.by_play / 2, "half of it"));
    shown.push((last, "the peak"));
    shown.sort_by_key(|(place, _)| *place);
    // A place that is shown for two reasons keeps its first one, but the chosen one is always said.
    shown.dedup_by(|later, first| {
        let same = later.0 == first.0;
        if same && later.0 == answer.by_play {
            first.1 = "cheapest, played";
        }
        same
    });
    shown
}

fn levels(answer: &Answer) -> String {
    let mut table = Table::new([
        ("commit to", Align::Left),
        ("GPUs", Align::Right),
        ("committed USD", Align::Right),
        ("on demand USD", Align::Right),
        ("all USD", Align::Right),
        ("of on demand", Align::Right),
        ("coverage", Align::Right),
        ("utilisation", Align::Right),
        ("in overload", Align::Right),
    ]);
    for (place, why) in shown(answer) {
        let candidate = &answer.levels.candidates[place];
        table.row(cells(answer, candidate, why));
    }
    table.to_string()
}

fn cells(answer: &Answer, candidate: &Candidate, why: &str) -> Vec<String> {
    let bill = &candidate.bill;
    let part = |part: Option<f64>| part.map_or("–".to_owned(), |part| format!("{:.1} %", part * 100.0));
    vec![
        why.to_owned(),
        bill.level.to_string(),
        render::dollars_to(bill.committed, 2),
        // What was played beside the commitment: the rest of the bill.
        render::dollars_to(candidate.played - bill.committed, 2),
        render::dollars_to(candidate.played, 2),
        answer.of_on_demand(candidate).map_or("–".to_owned(), |part| format!("{part:.3}")),
        part(bill.coverage()),
        part(bill.utilisation()),
        candidate.overloaded.map_or("–".to_owned(), |part| format!("{:.3} %", part * 100.0)),
    ]
}

fn advice(answer: &Answer) -> String {
    let candidates = &answer.levels.candidates;
    let (played, rule) = (&candidates[answer.by_play], &candidates[answer.by_rule]);
    let saved = candidates[0].played - played.played;
    let mut text = match played.bill.level {
        0 => "Commit to nothing: no GPU is in use long enough.\n".to_owned(),
        level => format!(
            "Commit to {level}: saves {} USD over this time against paying all on demand, in hindsight.\n",
            render::dollars(saved)
        ),
    };
    if answer.by_rule != answer.by_play {
        text += &format!(
            "The rule alone says {}, {} USD more: committed replicas that are kept running change what the policy asks for.\n",
            rule.bill.level,
            render::dollars(rule.played - played.played)
        );
    }
    if let Some((place, worst)) = answer.hedged {
        text += &format!(
            "Least regret over the futures below: {} GPUs, at the worst {} USD above the best level.\n",
            candidates[place].bill.level,
            render::dollars(worst)
        );
    }
    text
}

fn layers(answer: &Answer) -> String {
    let mut table = Table::new([
        ("layer", Align::Left),
        ("GPUs", Align::Right),
        ("from", Align::Right),
        ("to", Align::Right),
        ("USD", Align::Right),
    ]);
    for layer in &answer.layers.layers {
        table.row([
            layer.product.map_or("on demand".to_owned(), |index| answer.products[index].name.clone()),
            layer.gpus.to_string(),
            (layer.below + 1).to_string(),
            (layer.below + layer.gpus).to_string(),
            render::dollars_to(layer.cost, 2),
        ]);
    }
    table.total([
        "all".to_owned(),
        answer.levels.demand.peak().to_string(),
        String::new(),
        String::new(),
        render::dollars_to(answer.layers.total(), 2),
    ]);
    table.to_string()
}

fn regrets(answer: &Answer) -> String {
    let shown: Vec<usize> = shown(answer).into_iter().map(|(place, _)| place).collect();
    let headings: Vec<String> =
        shown.iter().map(|&place| format!("commit {}", answer.levels.candidates[place].bill.level)).collect();
    let fixed = [("if", Align::Left), ("best", Align::Right), ("costs USD", Align::Right)];
    let own = headings.iter().map(|heading| (heading.as_str(), Align::Right));
    let mut table = Table::new(fixed.into_iter().chain(own));
    let mut worst = vec![Money::ZERO; shown.len()];
    for regret in &answer.regrets {
        let each: Vec<Money> = regret.regrets().collect();
        let cells = shown.iter().zip(&mut worst).map(|(&place, worst)| {
            *worst = (*worst).max(each[place]);
            format!("+{}", render::dollars_to(each[place], 2))
        });
        let named =
            [regret.scenario.name.to_owned(), regret.best_level.to_string(), render::dollars_to(regret.best, 2)];
        table.row(named.into_iter().chain(cells.collect::<Vec<_>>()));
    }
    let worst = worst.into_iter().map(|worst| format!("+{}", render::dollars_to(worst, 2)));
    table.total(["worst".to_owned(), String::new(), String::new()].into_iter().chain(worst));
    format!("What each level costs more than the best one, by how long how many GPUs were in use\n{table}")
}

fn spot_words(spot: &SpotAnswer) -> String {
    let percent = |part: f64| format!("{:.3} %", part * 100.0);
    let SpotAnswer { interruptions, saving, .. } = spot;
    let mut text = format!(
        "Interruptible GPUs at {} USD, interrupted {} times an hour with {} s notice, {} s to start another:\n",
        spot.rate,
        number(interruptions.per_hour),
        number(interruptions.notice_s),
        number(interruptions.restart_s)
    );
    text += &match (saving.effective, saving.saving) {
        (Some(price), Some(part)) => format!(
            "  work that can be repeated: {} % of the time does work that is kept, {} USD for an hour of it, {}\n",
            number(saving.useful * 100.0),
            render::dollars_to(price.over(1, 3_600_000_000), 4),
            if part > 0.0 {
                format!("{:.1} % saved", part * 100.0)
            } else {
                format!("{:.1} % dearer than on demand", -part * 100.0)
            }
        ),
        _ => "  work that can be repeated: none is ever kept, it is interrupted too often\n".to_owned(),
    };
    let Some(waiting) = spot.waiting else { return text };
    text += &format!(
        "  requests that people wait for: {} cut; in overloaded minutes {} without, {} if all are interruptible, {} if only \
         those above the commitment are\n",
        percent(waiting.cut),
        percent(waiting.overloaded_without),
        percent(waiting.overloaded_all),
        percent(waiting.overloaded_above)
    );
    text += &match (waiting.breaks(), spot.interruptible) {
        (true, _) => format!(
            "  REFUSED for inference: the objective allows {} of all requests to miss it\n",
            percent(waiting.allowed)
        ),
        (false, false) => "  NOT TAKEN for inference: a whole region can be taken at once, which no average shows; \
                           --interruptible says that the work can be repeated\n"
            .to_owned(),
        (false, true) => format!(
            "  with only those above the commitment interruptible: {} USD in all\n",
            render::dollars(waiting.cost_above)
        ),
    };
    text
}

fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float saturates at the integer's ends")]
fn rounded(value: f64) -> u64 {
    value.round() as u64
}
