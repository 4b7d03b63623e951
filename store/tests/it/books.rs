//! The books are the facts, whatever way they took.

use proptest::prelude::*;
use store::{Options, Store};

use crate::sample::*;

#[tokio::test]
async fn replay_equals_tables() {
    let dir = tempfile::tempdir().unwrap();
    let facts = facts(200);
    let (store, _) = open(dir.path()).await;
    store.append_all(&facts).unwrap();
    let in_log = books(&store).await;
    assert_eq!(in_log, expected_books(&facts));

    let flushed = store.flush(at(1)).await.unwrap();
    assert_eq!((flushed.attempts, flushed.postings, flushed.capacity, flushed.gaps), (200, 168, 3, 1));
    assert_eq!(flushed.telemetry, 28);
    assert_eq!(books(&store).await, in_log);
    assert_clean(&store).await;
    drop(store);

    let (store, recovery) = open(dir.path()).await;
    assert!(recovery.damaged.is_empty() && recovery.crashed.is_empty(), "{recovery:?}");
    assert_eq!(books(&store).await, in_log);
    assert_clean(&store).await;
}

#[tokio::test]
async fn flushing_twice_is_flushing_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.append_all(&facts(20)).unwrap();
    store.flush(at(1)).await.unwrap();
    let second = store.flush(at(2)).await.unwrap();
    assert_eq!((second.attempts, second.postings, second.capacity, second.telemetry), (0, 0, 0, 0));
    assert_eq!(books(&store).await, expected_books(&facts(20)));
}

#[tokio::test]
async fn several_hundred_commits_then_compaction_keep_every_row() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { compact_every: 60, log_retention: std::time::Duration::ZERO, ..Options::default() };
    let (store, _) = open_with(dir.path(), options).await;
    let facts: Vec<_> = (0..300).map(finished).collect();
    for fact in &facts {
        store.append(fact).unwrap();
        store.flush(at(1)).await.unwrap();
    }
    store.compact(at(2)).await.unwrap();
    assert_eq!(books(&store).await, expected_books(&facts));
    assert_clean(&store).await;
    let files = std::fs::read_dir(dir.path().join("attempts")).unwrap().count();
    assert!(files < 20, "{files} entries are left of 300 commits");
    drop(store);
    let (store, _) = open(dir.path()).await;
    assert_eq!(books(&store).await, expected_books(&facts));
}

#[tokio::test]
async fn case_22_flush_keeps_everything_past_100_entries_and_when_a_commit_fails() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { segment_bytes_max: 20_000, ..Options::default() };
    let faults = options.faults.clone();
    let (store, _) = open_with(dir.path(), options).await;
    let facts: Vec<_> = (0..1_234).map(finished).collect();
    store.append_all(&facts[..500]).unwrap();
    faults.fail_commit(true);
    assert!(store.flush(at(1)).await.is_err());
    assert_eq!(books(&store).await, expected_books(&facts[..500]), "what could not be committed is still visible");
    faults.fail_commit(false);
    faults.fail_later_commits(true);
    assert!(store.flush(at(1)).await.is_err());
    assert_eq!(books(&store).await, expected_books(&facts[..500]), "one table ahead of the others changes nothing");
    for chunk in facts[500..].chunks(100) {
        store.append_all(chunk).unwrap();
    }
    faults.fail_later_commits(false);
    store.flush(at(2)).await.unwrap();
    assert_eq!(books(&store).await, expected_books(&facts));
    assert_eq!(count(&store, "SELECT count(*) FROM attempts").await, 1_234);
    assert_clean(&store).await;
}

#[tokio::test]
async fn segments_go_when_they_are_in_the_tables_and_nothing_in_them_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open_with(dir.path(), Options { segment_bytes_max: 10_000, ..Options::default() }).await;
    store.append(&opened(9_999)).unwrap();
    for number in 0..400 {
        store.append(&finished(number)).unwrap();
    }
    let segments = || {
        std::fs::read_dir(dir.path().join("log"))
            .unwrap()
            .filter(|f| f.as_ref().unwrap().path().extension().is_some_and(|e| e == "log"))
            .count()
    };
    assert!(segments() > 5);
    store.flush(at(1)).await.unwrap();
    assert_eq!(segments(), 2, "the one with the running attempt and the one being written");
    drop(store);

    let (store, recovery) = open(dir.path()).await;
    assert!(recovery.damaged.is_empty(), "deleted segments are not damage: {recovery:?}");
    assert_eq!(recovery.crashed.len(), 1);
    assert_eq!(count(&store, "SELECT count(*) FROM attempts").await, 401);
    store.flush(at(2)).await.unwrap();
    assert_eq!(
        count(&store, "SELECT count(*) FROM attempts WHERE outcome = 'crashed' AND charge_reason = 'crash'").await,
        1
    );
    assert_clean(&store).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn order_and_duplication_of_facts_change_nothing(
        order in Just((0..40u32).chain(0..40).collect::<Vec<_>>()).prop_shuffle(),
        flushes in proptest::collection::vec(0usize..80, 0..5),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let (store, _) = open(dir.path()).await;
            let mut all = Vec::new();
            for (index, &number) in order.iter().enumerate() {
                if flushes.contains(&index) {
                    store.flush(at(1)).await.unwrap();
                }
                let fact = match number { 0 => gap(0), 1..=3 => capacity(number), _ => finished(number) };
                store.append(&fact).unwrap();
                all.push(fact);
            }
            let expected = expected_books(&all);
            assert_eq!(books(&store).await, expected);
            store.flush(at(2)).await.unwrap();
            assert_eq!(books(&store).await, expected);
            drop(store);
            let (store, _): (Store, _) = open(dir.path()).await;
            store.append_all(&all).unwrap();
            assert_eq!(books(&store).await, expected);
            store.flush(at(3)).await.unwrap();
            assert_eq!(books(&store).await, expected);
        });
    }
}
