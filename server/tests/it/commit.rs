//! `farthing commit`: the level is the optimum, measured weeks come out as known, and spot is refused where it breaks things.

use ledger::Money;
use serde_json::Value;

use crate::simulate::{bins, measured};
use crate::support::Books;

fn usd(value: &Value) -> Money {
    value.as_str().unwrap_or_else(|| panic!("{value} is no amount")).parse().unwrap()
}

/// The share of on-demand that every level of `GPUs an hour` costs, hour by hour.
fn brute_force(hours: &[u32], r_over_p: f64) -> Vec<f64> {
    let all: u32 = hours.iter().sum();
    let cost = |level: u32| {
        let above: u32 = hours.iter().map(|gpus| gpus.saturating_sub(level)).sum();
        (f64::from(level) * hours.len() as f64 * r_over_p + f64::from(above)) / f64::from(all)
    };
    (0..=hours.iter().copied().max().unwrap()).map(cost).collect()
}

/// Requests of each ten seconds, whole hours of them.
fn counts(text: &str) -> Vec<f64> {
    let counts: Vec<f64> = text.lines().skip(1).map(|line| line.split_once(',').unwrap().1.parse().unwrap()).collect();
    counts[..counts.len() / 360 * 360].to_vec()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some forty replicas")]
fn whole(replicas: f64) -> u32 {
    replicas.ceil() as u32
}

fn sums(counts: &[f64], length: usize) -> Vec<f64> {
    counts.chunks(length).map(|bins| bins.iter().sum()).collect()
}

#[test]
fn the_level_is_the_brute_force_optimum_of_the_demand() {
    let books = Books::new();
    let text = bins(3);
    let counted = counts(&text);
    let busiest = sums(&counted, 6).into_iter().fold(0.0, f64::max);
    let hours: Vec<u32> = sums(&counted, 360).iter().map(|sum| whole(sum / 60.0 / (busiest / 20.0))).collect();
    let trace = books.write("bins.csv", text);
    for committed in ["0.5", "1", "1.5", "1.99", "2", "3"] {
        let found = books.json(&[
            "commit",
            "--trace",
            &trace,
            "--policy",
            "none",
            "--replicas-at-peak",
            "20",
            "--committed-usd",
            committed,
            "--on-demand-usd",
            "2",
        ]);
        let expected = brute_force(&hours, committed.parse::<f64>().unwrap() / 2.0);
        let levels = found["levels"].as_array().unwrap();
        assert_eq!(levels.len(), expected.len());
        for (level, expected) in levels.iter().zip(&expected) {
            let share = level["of_on_demand"].as_f64().unwrap();
            assert!((share - expected).abs() < 1e-9, "{level} {expected}");
        }
        let least = expected.iter().copied().fold(f64::INFINITY, f64::min);
        let best = usize::try_from(found["commit_gpus"].as_u64().unwrap()).unwrap();
        assert!((expected[best] - least).abs() < 1e-12, "{committed}: {best}");
        assert_eq!(found["best_by_rule"]["gpus"], found["commit_gpus"], "{committed}");
    }
}

#[test]
fn the_measured_week_commits_what_it_is_known_to() {
    for (name, level, share) in [("code", 6, 0.860), ("conv", 21, 0.718)] {
        let Some(trace) = measured(&format!("traces/azure_llm_2024_{name}_10s.csv")) else { return };
        // Forty replicas do the work of the busiest minute but one in a thousand.
        let mut minutes = sums(&counts(&std::fs::read_to_string(&trace).unwrap()), 6);
        minutes.sort_by(f64::total_cmp);
        let busiest = minutes[minutes.len() - 1] / minutes[minutes.len() * 999 / 1_000] * 40.0;
        let found = Books::new().json(&[
            "commit",
            "--trace",
            &trace,
            "--policy",
            "none",
            "--replicas-at-peak",
            &busiest.to_string(),
            "--committed-usd",
            "3",
            "--on-demand-usd",
            "5",
            "--to",
            if name == "code" { "2024-05-17" } else { "2024-05-19" },
        ]);
        let best = &found["best_played"];
        assert_eq!(best["gpus"], level, "{name}");
        assert!((best["of_on_demand"].as_f64().unwrap() - share).abs() < 0.000_6, "{name}: {best}");
    }
}

#[test]
fn every_level_is_played_with_the_policy_and_the_cheapest_taken() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(1));
    let picture = books.path("commit.svg");
    let args = [
        "commit",
        "--trace",
        &trace,
        "--policy",
        "token-rate",
        "--replicas-at-peak",
        "6",
        "--committed-usd",
        "1.20",
        "--on-demand-usd",
        "2",
        "--gpus",
        "4",
        "--scenarios",
        "--picture",
        picture.to_str().unwrap(),
    ];
    let found = books.json(&args);
    let levels = found["levels"].as_array().unwrap();
    let cheapest = levels.iter().map(|level| usd(&level["usd"])).min().unwrap();
    let best = &found["best_played"];
    assert_eq!(usd(&best["usd"]), cheapest);
    assert!(best["gpus"].as_u64().is_some_and(|gpus| gpus > 0 && gpus.is_multiple_of(4)), "{best}");
    // Without a commitment what is played is what the curve says.
    let (played, curve) = (usd(&levels[0]["usd"]), usd(&levels[0]["by_curve"]["usd"]));
    assert!((played - curve).pico().abs() < played.pico() / 1_000, "{played} {curve}");
    // More committed replicas that are kept running never leave more requests in overload.
    let overloaded: Vec<f64> = levels.iter().map(|level| level["overloaded_share"].as_f64().unwrap()).collect();
    assert!(overloaded.last() <= overloaded.first(), "{overloaded:?}");
    let scenarios = found["scenarios"].as_array().unwrap();
    assert_eq!(scenarios.len(), 7);
    for scenario in scenarios {
        let regrets = scenario["levels"].as_array().unwrap().iter().map(|level| usd(&level["regret_usd"]));
        assert!(regrets.clone().all(|regret| regret >= Money::ZERO), "{scenario}");
    }
    let svg = std::fs::read_to_string(&picture).unwrap();
    assert!(svg.contains("r/p = 0.6") && svg.contains(&format!("committed: {}", best["gpus"])), "{svg:.200}");

    let text = books.run(&args).out;
    for part in ["commit to", "utilisation", "demand +60 %", "on-demand price -40 %", "Least regret", "of on demand"] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
}

#[test]
fn a_term_longer_than_the_need_is_in_every_answer() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(1));
    for policy in ["none", "token-rate"] {
        let args = ["commit", "--trace", &trace, "--policy", policy, "--replicas-at-peak", "6", "--scenarios"];
        let prices = ["--committed-usd", "3", "--on-demand-usd", "5", "--term-months", "36", "--horizon-months"];
        let found = |months: &str| books.json(&[&args[..], &prices, &[months]].concat());
        let whole = found("36");
        assert!(whole["commit_gpus"].as_u64().unwrap() > 0, "{policy}: {}", whole["best_played"]);
        assert_eq!(whole["prices"]["committed_usd_over_need"], "3.00");
        // Three times 3 is more than 5, for a GPU that is always in use too.
        let third = found("12");
        assert_eq!((&third["commit_gpus"], &third["best_by_rule"]["gpus"]), (&0.into(), &0.into()), "{policy}");
        assert_eq!(
            (&third["prices"]["committed_usd"], &third["prices"]["committed_usd_over_need"]),
            (&"3.00".into(), &"9.00".into())
        );
        assert_eq!(third["least_regret"]["gpus"], 0, "{policy}");
        assert!(third["scenarios"].as_array().unwrap().iter().all(|one| one["best_gpus"] == 0), "{policy}");
        let layers = third["layers"].as_array().unwrap();
        assert!(layers.iter().all(|layer| layer["product"] == "on demand"), "{policy}");
        // A committed GPU costs 9 for each hour.
        let level = &third["levels"][1];
        let hours = third["demand"]["hours"].as_f64().unwrap();
        let committed: f64 = level["by_curve"]["committed_usd"].as_str().unwrap().parse().unwrap();
        let gpus = level["gpus"].as_f64().unwrap();
        assert!((committed - 9.0 * gpus * hours).abs() < 1e-6, "{policy}: {level}");
        assert_eq!(whole["prices"]["break_even_months"], third["prices"]["break_even_months"], "21.6 of 36");
    }
}

const PRICES: &str = r#"
[[price]]
gpu = "H100"
provider = "own"
product = "rack"
gpus = 8
on_demand_usd = "40"
spot_usd = "16"
read_on = "2026-11-01"
source = "contract 17"
commitment = [
    { name = "1 year", usd = "24", term_months = 12 },
    { name = "3 years", usd = "16", term_months = 36 },
    { name = "1 year, partial", usd = "4", used_usd = "20", term_months = 12 },
]
"#;

#[test]
fn products_of_a_price_file_lie_in_layers() {
    let books = Books::new();
    let (trace, prices) = (books.write("bins.csv", bins(1)), books.write("prices.toml", PRICES));
    let args = ["commit", "--trace", &trace, "--policy", "none", "--gpu", "H100", "--prices", &prices];
    let layers = |more: &[&str]| -> Vec<String> {
        let found = books.json(&[&args[..], more].concat());
        let layers = found["layers"].as_array().unwrap().clone();
        layers.iter().map(|layer| layer["product"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(layers(&[]), ["own 3 years", "own 1 year, partial", "on demand"]);
    // Three years for a need of one cost more than on demand, so that the year is what the level is of.
    let short = books.json(&[&args[..], &["--horizon-months", "12"]].concat())["prices"].clone();
    assert_eq!((&short["committed_usd"], &short["term_months"]), (&"3.00".into(), &12.into()));
    assert!(!layers(&["--horizon-months", "12"]).contains(&"own 3 years".to_owned()));
    let found = books.json(&args);
    assert_eq!(found["prices"]["on_demand_usd"], "5.00");
    assert!(found["prices"]["source"].as_str().unwrap().contains("contract 17"));
}

#[test]
fn spot_is_refused_for_those_who_wait_and_judged_for_the_rest() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(1));
    let args = [
        "commit",
        "--trace",
        &trace,
        "--policy",
        "hpa",
        "--replicas-at-peak",
        "30",
        "--committed-usd",
        "1.20",
        "--on-demand-usd",
        "2",
        "--spot-usd",
        "0.80",
    ];
    let often = [&args[..], &["--interruptions-per-hour", "6", "--notice-s", "0"]].concat();
    assert!(books.run(&often).out.contains("REFUSED for inference"));
    let spot = books.json(&often)["spot"].clone();
    let waiting = &spot["requests_people_wait_for"];
    assert_eq!((&waiting["breaks_objective"], &spot["taken"]), (&Value::Bool(true), &Value::Bool(false)));
    let share = |name: &str| waiting[name].as_f64().unwrap();
    assert!(share("overloaded_share_all_spot") > share("overloaded_share_above_commitment"));
    assert!(share("overloaded_share_above_commitment") >= share("overloaded_share_without"));
    let seldom = [&args[..], &["--interruptions-per-hour", "0.01"]].concat();
    assert!(books.run(&seldom).out.contains("NOT TAKEN for inference"));
    let batch = books.json(&[&args[..], &["--interruptible", "--checkpoint-s", "600"]].concat());
    let saving = batch["spot"]["interruptible_work"]["saving"].as_f64().unwrap();
    assert!((0.55..0.60).contains(&saving), "{saving}");
}

#[test]
fn mistakes_are_one_line() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(1));
    let wrong = books.write("wrong.toml", PRICES.replace("spot_usd", "spot_us"));
    let undated = books.write("undated.toml", PRICES.replace("2026-11-01", "soon"));
    let cases: [(&[&str], &str); 6] = [
        (&["--gpu-hour-usd", "2"], "say what a committed GPU costs"),
        (&["--committed-usd", "2", "--gpu-hour-usd", "-2"], "-2"),
        (&["--prices", &wrong, "--gpu", "H100"], "wrong.toml:8: unknown key `spot_us`; did you mean `spot_usd`?"),
        (&["--prices", &undated, "--gpu", "H100"], "write a day like"),
        (&["--prices", &wrong.replace("wrong", "absent"), "--gpu", "H100"], "cannot read"),
        (&["--committed-usd", "1", "--gpu-hour-usd", "2", "--picture", "a.pdf"], "pictures are SVG"),
    ];
    for (args, part) in cases {
        books.run(&[&["commit", "--trace", &trace], args].concat()).fails_with(part);
    }
}
