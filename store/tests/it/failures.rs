//! The disk refuses: errors are told, nothing half-written stays, and what was lost is an entry in the books.

use store::{Options, Position, Store, StoreError};

use crate::sample::*;

#[tokio::test]
async fn a_full_disk_is_an_error_then_a_gap_and_never_garbage() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::default();
    let faults = options.faults.clone();
    let (store, _) = open_with(dir.path(), options).await;
    store.append(&finished(1)).unwrap();
    for room in [0, 1, 15, 16, 17, 100] {
        faults.fill_log_after(room);
        let refused = store.append(&finished(2));
        assert!(matches!(refused, Err(StoreError::Io { .. })), "{refused:?}");
        store.record_lost(at(5), "No space left on device");
    }
    assert_eq!(store.lost(), 6);
    faults.free_log();
    store.append(&finished(3)).unwrap();
    let expected = expected_books(&[finished(1), finished(3)]);
    let rows = books(&store).await;
    // The last refusal came after the first five had been written down, in the little room there was.
    assert_eq!(rows.len(), expected.len() + 2);
    assert_eq!(count(&store, "SELECT sum(records_lost) FROM gaps WHERE cause LIKE 'No space%'").await, 6);
    store.flush(at(9)).await.unwrap();
    drop(store);
    let (store, recovery) = open(dir.path()).await;
    assert!(recovery.damaged.is_empty() && recovery.torn_bytes == 0, "{recovery:?}");
    assert_eq!(books(&store).await, rows);
    let found = store.verify(&|_| {}).await.unwrap();
    assert_eq!((found.is_clean(), found.gaps, found.lost), (true, 2, 6));
}

#[tokio::test]
async fn attempts_that_a_full_disk_refused_are_kept_and_written_later() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::default();
    let faults = options.faults.clone();
    let (store, _) = open_with(dir.path(), options).await;
    store.append(&opened(1)).unwrap();
    faults.fill_log_after(0);
    for number in [1, 2] {
        assert!(store.append(&finished(number)).is_err());
        assert!(store.keep(&finished(number)));
    }
    assert!(!store.keep(&opened(3)), "an opened record alone is worth nothing");
    assert!(store.flush(at(5)).await.is_ok(), "a flush does without them");
    faults.free_log();
    store.flush(at(9)).await.unwrap();
    let rows = expected_books(&[finished(1), finished(2)]);
    assert_eq!(books(&store).await, rows);
    assert_eq!(count(&store, "SELECT count(*) FROM gaps").await, 0);
    drop(store);
    let (store, recovery) = open(dir.path()).await;
    assert!(recovery.crashed.is_empty(), "{recovery:?}");
    assert_eq!(books(&store).await, rows);
}

#[tokio::test]
async fn a_flush_closes_the_gap_when_nothing_else_is_appended() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.record_lost(at(5), "it was full");
    store.flush(at(50)).await.unwrap();
    store.flush(at(60)).await.unwrap();
    assert_eq!(count(&store, "SELECT count(*) FROM gaps").await, 1);
    assert_eq!(count(&store, "SELECT arrow_cast(period_end - period_start, 'Int64') FROM gaps").await, 45);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_log_folder_that_went_away_is_an_error_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let (log, aside) = (dir.path().join("log"), dir.path().join("aside"));
    std::fs::rename(&log, &aside).unwrap();
    std::fs::write(&log, "not a folder").unwrap();
    assert!(matches!(store.append(&finished(1)), Err(StoreError::Io { .. })));
    std::fs::remove_file(&log).unwrap();
    std::fs::rename(&aside, &log).unwrap();
    assert_eq!(store.append(&finished(1)).unwrap(), Position(1));
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Store::open(&file.join("data"), Options::default(), at(0), &price).await.unwrap_err();
    assert!(error.to_string().contains("file"), "{error}");
    let error = Store::open_read_only(dir.path(), Options::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::NoLedger { .. }), "{error}");
}

#[tokio::test]
async fn waiting_for_the_medium_ends_and_a_failed_sync_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::default();
    let faults = options.faults.clone();
    let (store, _) = open_with(dir.path(), options).await;
    let position = store.append(&finished(1)).unwrap();
    store.synced(position).await.unwrap();
    faults.fail_sync(true);
    let lost = store.append(&finished(2)).unwrap();
    assert!(store.synced(lost).await.is_err());
    faults.fail_sync(false);
    let kept = store.append(&finished(3)).unwrap();
    store.synced(kept).await.unwrap();
    store.synced(position).await.unwrap();
    assert!(store.synced(lost).await.is_err(), "a later sync says nothing about the pages of a failed one");
}

#[tokio::test]
async fn a_record_that_is_too_large_is_refused_and_the_next_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open_with(dir.path(), Options { record_bytes_max: 2_000, ..Options::default() }).await;
    let mut large = attempt(1);
    large.context.consumer = Some("x".repeat(5_000).into());
    let refused = store.append_all(&[finished(2), ledger::Fact::Attempt(Box::new(large))]);
    assert!(matches!(refused, Err(StoreError::TooLarge { .. })), "{refused:?}");
    store.append(&finished(3)).unwrap();
    assert_eq!(books(&store).await, expected_books(&[finished(3)]));
}
