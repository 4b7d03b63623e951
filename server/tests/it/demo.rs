//! The demo, short and without a page.

use ledger::Money;
use serde_json::Value;

use crate::support::Books;

fn usd(value: &Value) -> Money {
    value.as_str().unwrap_or_else(|| panic!("{value} is no amount")).parse().unwrap()
}

#[test]
fn a_short_demo_loses_nothing_and_its_pools_are_allocated_to_the_last_unit() {
    let books = Books::new();
    let result = books.json(&["demo", "--seconds", "6", "--headless", "--seed", "3"]);
    for name in ["requests", "attempts", "input_tokens", "output_tokens"] {
        assert!(result[name].as_u64().unwrap() > 0, "{name}: {result}");
    }
    assert!(usd(&result["charged_usd"]) > Money::ZERO && usd(&result["pool_cost_usd"]) > Money::ZERO, "{result}");
    assert_eq!(
        (&result["allocated"], &result["unallocated_pool_cost_usd"]),
        (&true.into(), &"0.00".into()),
        "{result}"
    );
    let share: f64 = result["unattributed_share"].as_str().unwrap().parse().unwrap();
    assert!((0.0..=1.0).contains(&share), "{result}");
    assert_eq!(
        (&result["duplicates"], &result["lost"], &result["balanced"]),
        (&0.into(), &0.into(), &true.into()),
        "{result}"
    );
    assert_eq!(result["clients"]["tokens_differ"], 0, "{result}");

    let pools = result["pools"].as_array().unwrap();
    assert_eq!(pools.len(), 3);
    for pool in pools {
        let lines: Money = pool["lines"].as_object().unwrap().values().map(usd).sum();
        assert_eq!((lines, &pool["balanced"]), (usd(&pool["cost"]), &true.into()), "{pool}");
        for line in ["request", "cold_start"] {
            assert!(usd(&pool["lines"][line]) > Money::ZERO, "{line}: {pool}");
        }
    }
    let [dedicated, elastic, shared] = [&pools[0], &pools[1], &pools[2]];
    let names = [dedicated, elastic, shared].map(|pool| pool["pool"].as_str().unwrap());
    assert_eq!(names, ["dedicated", "elastic", "shared"]);
    // The script calls an engine of the shared pool directly, the job runs on the dedicated one.
    assert!(result["bypassed"]["calls"].as_u64().unwrap() > 0, "{result}");
    // How much of it can be told apart from metered requests whose tokens are not exactly known depends on the run.
    assert!(usd(&shared["lines"]["unobserved"]) < usd(&shared["lines"]["request"]), "{shared}");
    assert_eq!(usd(&dedicated["lines"]["unobserved"]), Money::ZERO, "{dedicated}");
    assert!(
        usd(&dedicated["lines"]["job"]) > Money::ZERO && usd(&dedicated["lines"]["warm"]) > Money::ZERO,
        "{dedicated}"
    );
    // What is kept for the peak and what lies above it; on a short run the requests themselves may reach the peak.
    assert!(usd(&shared["lines"]["headroom"]) + usd(&shared["lines"]["idle_reserved"]) > Money::ZERO, "{shared}");

    // The scaler: nobody's request failed, and what the static plan costs is what ran and what was given back.
    let scaled = &result["scaling"];
    assert_eq!((&scaled["failed"], &scaled["acting"]), (&0.into(), &true.into()), "{scaled}");
    assert!(scaled["calls"].as_u64().unwrap() > 0 && scaled["decisions"].as_u64().unwrap() > 5, "{scaled}");
    assert_eq!(usd(&scaled["static_usd"]), usd(&scaled["actual_usd"]) + usd(&scaled["given_back_usd"]), "{scaled}");
    assert!(usd(&scaled["given_back_usd"]) > Money::ZERO, "it began with one replica of four: {scaled}");

    let recounted = &scaled["recounted"];
    for sum in ["static_usd", "actual_usd"] {
        let off = usd(&scaled[sum]) - usd(&recounted[sum]);
        assert!(off.pico().abs() <= 1_000, "{sum} from decisions and facts, and counted again: {scaled}");
    }

    // What the demo said is what the ledger says.
    let report = books.json(&["report", "--by", "pool"]);
    assert_eq!(report["total"]["requests"], result["requests"]);
    assert_eq!(report["request_cost"], result["charged_usd"]);
    assert_eq!(report["gpus_given_back"], scaled["given_back"]);
    assert_eq!(books.json(&["verify"])["clean"], true);
    let settled = books.json(&["settle"]);
    assert_eq!((&settled["postings"], &settled["balanced"]), (&0.into(), &true.into()), "{settled}");
    assert_eq!(settled["pools"], result["pools"], "without the demo's configuration its pools stay as they are");
    books.run(&["demo", "--seconds", "1", "--headless"]).fails_with("holds a ledger already");
}
