//! Books that do not balance are said to, loudly.

use std::sync::Arc;

use ledger::{Costs, Fact, Line, Origin, Period, Posting, PostingId, Timestamp};
use store::{Options, Store};

use crate::support::Books;

fn posting(at: Timestamp) -> Posting {
    Posting {
        id: PostingId::new(at, [7; 10]),
        origin: Origin::Pool { pool: Arc::from("shared"), start: at },
        line: Line::Unallocated,
        period: Period { start: at, end: at.plus_micros(60_000_000) },
        attempt: None,
        context: ledger::Context::default(),
        provider: "self_hosted".into(),
        model: None,
        pool: Some("shared".into()),
        costs: Costs::flat("1.25".parse().unwrap()),
        estimated: false,
        tier: None,
        basis: None,
        policy: "tampered".into(),
        booked_at: at,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_posting_without_its_origin_is_found_and_named() {
    let books = Books::new();
    let at: Timestamp = "2026-11-02".parse().unwrap();
    let price: store::PriceOpened<'_> =
        &|_, _| ledger::Charge::Unpriced { reason: ledger::UnpricedReason::UnknownModel };
    let (store, _) = Store::open(&books.data(), Options::default(), at, price).await.unwrap();
    store.append(&Fact::Posting(Box::new(posting(at)))).unwrap();
    store.flush(at).await.unwrap();
    drop(store);
    let ran = books.run(&["verify"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.out.contains("balanced        NO") && ran.out.contains("shared"), "{ran:?}");
    ran.fails_with("THE BOOKS DO NOT BALANCE");
    let json = books.run(&["verify", "--json"]);
    let document: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((json.code, &document["clean"], &document["imbalances"]), (1, &false.into(), &1.into()));
}

#[test]
fn a_changed_control_log_is_found() {
    let books = Books::new();
    books.json(&["key", "create", "--consumer", "a", "--team", "b"]);
    let folder = books.data().join("control");
    let entry = std::fs::read_dir(&folder).unwrap().flatten().next().unwrap().path();
    let text = std::fs::read_to_string(&entry).unwrap();
    std::fs::write(&entry, text.replace("\"team\":\"b\"", "\"team\":\"c\"")).unwrap();
    let ran = books.run(&["verify"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.out.contains("BROKEN"), "{ran:?}");
    books.run(&["key", "list"]).fails_with("control log is broken");
}
