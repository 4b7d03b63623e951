//! The demo, short and without a page.

use crate::support::Books;

#[test]
fn a_short_demo_loses_nothing_and_balances() {
    let books = Books::new();
    let result = books.json(&["demo", "--seconds", "5", "--headless", "--seed", "3"]);
    for name in ["requests", "attempts", "input_tokens", "output_tokens"] {
        assert!(result[name].as_u64().unwrap() > 0, "{name}: {result}");
    }
    let money = |name: &str| result[name].as_str().unwrap().parse::<ledger::Money>().unwrap();
    assert!(money("charged_usd") > ledger::Money::ZERO && money("pool_cost_usd") > ledger::Money::ZERO, "{result}");
    assert_eq!(money("pool_cost_usd"), money("unallocated_pool_cost_usd"), "{result}");
    let share: f64 = result["unattributed_share"].as_str().unwrap().parse().unwrap();
    assert!((0.0..=1.0).contains(&share), "{result}");
    assert_eq!(
        (&result["duplicates"], &result["lost"], &result["balanced"]),
        (&0.into(), &0.into(), &true.into()),
        "{result}"
    );
    assert_eq!(result["clients"]["tokens_differ"], 0, "{result}");

    // What the demo said is what the ledger says.
    let report = books.json(&["report", "--by", "pool"]);
    assert_eq!(report["total"]["requests"], result["requests"]);
    assert_eq!(report["request_cost"], result["charged_usd"]);
    assert_eq!(books.json(&["verify"])["clean"], true);
    books.run(&["demo", "--seconds", "1", "--headless"]).fails_with("holds a ledger already");
}
