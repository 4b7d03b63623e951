//! SQL sees what was appended a moment ago, beside a writer as well, and only reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ledger::{Charge, Fact, Money};
use store::{Options, Store, StoreError};

use crate::sample::*;

#[tokio::test]
async fn a_row_is_seen_at_once_and_only_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    for number in 0..5 {
        store.append(&finished(number)).unwrap();
        assert_eq!(count(&store, "SELECT count(*) FROM attempts").await, i64::from(number) + 1);
        if number == 2 {
            store.flush(at(1)).await.unwrap();
        }
    }
    store.append(&finished(1)).unwrap();
    assert_eq!(count(&store, "SELECT count(*) FROM attempts").await, 5);
    let plain: Money =
        (0..5).filter_map(|number| attempt(number).charge.costs()).map(|costs| costs.effective_cost).sum();
    assert_eq!(amount(&store, "SELECT sum(effective_cost) FROM postings").await, plain);
    assert_eq!(count(&store, "SELECT sum(input_tokens) FROM attempts").await, 100 + 101 + 102 + 103 + 104);
}

#[tokio::test]
async fn one_request_is_found_in_table_and_log() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.append_all(&(0..500).map(finished).collect::<Vec<_>>()).unwrap();
    store.append(&finished(502)).unwrap();
    store.flush(at(1)).await.unwrap();
    store.append(&finished(503)).unwrap();
    let found = store.find_request(id(502).request).await.unwrap();
    assert_eq!(found.attempts, [attempt(502), attempt(503)]);
    assert_eq!(found.postings.len(), 2);
    let trace = format!("SELECT count(*) FROM attempts WHERE trace_id = '{:032x}'", 17);
    assert_eq!(count(&store, &trace).await, 1);
    let nobody = "SELECT count(*) FROM attempts WHERE trace_id = 'ffffffffffffffffffffffffffffffff'";
    assert_eq!(count(&store, nobody).await, 0);
}

#[tokio::test]
async fn queries_only_read() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.append_all(&facts(5)).unwrap();
    store.flush(at(1)).await.unwrap();
    for query in [
        "DELETE FROM attempts",
        "INSERT INTO gaps SELECT * FROM gaps",
        "CREATE TABLE t AS SELECT 1",
        "DROP TABLE attempts",
        "COPY attempts TO 'x.csv'",
        "SET datafusion.execution.batch_size = 1",
        "SELECT nothing FROM attempts",
        "SELEC",
        "",
    ] {
        let refused = store.sql(query).await;
        assert!(matches!(refused, Err(StoreError::Sql(_))), "{query}: {refused:?}");
    }
    assert_eq!(count(&store, "SELECT count(*) FROM attempts").await, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_beside_a_writer_sees_a_consistent_growing_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) =
        open_with(dir.path(), Options { segment_bytes_max: 4_000, compact_every: 7, ..Options::default() }).await;
    store.append(&finished(0)).unwrap();
    store.flush(at(1)).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let reader = tokio::spawn({
        let (dir, done) = (dir.path().to_owned(), Arc::clone(&done));
        async move {
            let reader = Store::open_read_only(&dir, Options::default()).await.unwrap();
            assert!(matches!(reader.append(&finished(1)), Err(StoreError::ReadOnly)));
            let (mut seen, mut looks) = (0, 0);
            while !done.load(Ordering::SeqCst) {
                let now = count(&reader, "SELECT count(*) FROM attempts").await;
                let distinct = count(
                    &reader,
                    "SELECT count(DISTINCT concat(request_id, arrow_cast(attempt, 'Utf8'))) FROM attempts",
                )
                .await;
                assert!(now >= seen && distinct >= now, "{seen} {now} {distinct}");
                (seen, looks) = (now, looks + 1);
            }
            let last = count(&reader, "SELECT count(*) FROM attempts").await;
            (last, looks, books(&reader).await)
        }
    });
    for number in 1..200 {
        store.append(&finished(number)).unwrap();
        if number % 5 == 0 {
            store.flush(at(2)).await.unwrap();
        }
    }
    done.store(true, Ordering::SeqCst);
    let (last, looks, rows) = reader.await.unwrap();
    assert!(looks > 0);
    assert_eq!(last, 200);
    assert_eq!(rows, books(&store).await);
}

#[tokio::test]
async fn verify_finds_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let mut wrong = attempt(2);
    if let Charge::Priced { costs, .. } = &mut wrong.charge {
        costs.effective_cost += Money::from_pico(1);
    }
    let mut orphan = ledger::Posting::of_charge(&attempt(3)).unwrap();
    orphan.id = ledger::PostingId::from_uuid(id(40).request.uuid());
    store.append_all(&[Fact::Attempt(Box::new(wrong)), finished(4), Fact::Posting(Box::new(orphan))]).unwrap();
    store.flush(at(1)).await.unwrap();
    let found = store.verify(&|_| {}).await.unwrap();
    assert_eq!((found.balanced, found.mispriced, found.imbalances, found.duplicates), (false, 1, 1, 0), "{found:#?}");

    let mut day = std::fs::read_dir(dir.path().join("attempts")).unwrap().map(|entry| entry.unwrap().path());
    let day = day.find(|path| path.to_string_lossy().contains("day=")).unwrap();
    let file = std::fs::read_dir(day).unwrap().next().unwrap().unwrap().path();
    std::fs::rename(&file, dir.path().join("taken.parquet")).unwrap();
    let found = store.verify(&|_| {}).await.unwrap();
    assert_eq!((found.balanced, found.missing_files), (false, 1), "{found:#?}");
}
