//! The process ends at any point, and the next one finds everything that was acknowledged.

use std::fs;
use std::path::{Path, PathBuf};

use ledger::{Fact, Outcome};
use store::{Options, Store, StoreError};

use crate::sample::*;

fn segments(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join("log")).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "log")).collect();
    paths.sort();
    paths
}

#[tokio::test]
async fn a_crash_between_files_and_commit_loses_and_doubles_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::default();
    let faults = options.faults.clone();
    let (store, _) = open_with(dir.path(), options).await;
    let facts: Vec<_> = (0..50).map(finished).collect();
    store.append_all(&facts).unwrap();
    faults.fail_later_commits(true);
    assert!(store.flush(at(1)).await.is_err());
    drop(store);

    let (store, _) = open(dir.path()).await;
    assert_eq!(books(&store).await, expected_books(&facts));
    store.flush(at(2)).await.unwrap();
    assert_eq!(books(&store).await, expected_books(&facts));
    assert_clean(&store).await;
}

#[tokio::test]
async fn opened_attempts_that_never_finished_are_booked_once_as_estimates() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.append_all(&[opened(2), opened(3), finished(3), finished(4), opened(7)]).unwrap();
    drop(store);

    let (store, recovery) = open(dir.path()).await;
    let crashed: Vec<_> = recovery.crashed.iter().map(|attempt| attempt.id).collect();
    assert_eq!(crashed, [id(2), id(7)]);
    assert!(
        recovery.crashed.iter().all(|attempt| attempt.outcome == Outcome::Crashed && attempt.charge.costs().is_some())
    );
    assert_eq!(count(&store, "SELECT count(*) FROM attempts").await, 4);
    drop(store);
    let (store, recovery) = open(dir.path()).await;
    assert!(recovery.crashed.is_empty(), "booking them again would book them twice");
    store.flush(at(1)).await.unwrap();
    assert_eq!(count(&store, "SELECT count(*) FROM attempts").await, 4);
    assert_clean(&store).await;
}

#[tokio::test]
async fn a_tail_torn_at_every_byte_of_the_last_record_costs_that_record_only() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.append(&finished(1)).unwrap();
    let path = segments(dir.path()).pop().unwrap();
    let whole = fs::read(&path).unwrap().len();
    store.append(&finished(2)).unwrap();
    drop(store);
    let bytes = fs::read(&path).unwrap();
    for cut in (whole..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
        for extra in segments(dir.path()).into_iter().filter(|extra| *extra != path) {
            fs::remove_file(extra).unwrap();
        }
        fs::write(&path, &bytes[..cut]).unwrap();
        let (store, recovery) = open(dir.path()).await;
        assert_eq!((recovery.records, recovery.torn_bytes), (1, u64::try_from(cut - whole).unwrap()), "cut at {cut}");
        assert!(recovery.damaged.is_empty(), "cut at {cut}");
        store.append(&finished(3)).unwrap();
        let expected = expected_books(&[finished(1), finished(3)]);
        assert_eq!(books(&store).await, expected, "cut at {cut}");
    }
}

#[tokio::test]
async fn a_damaged_byte_in_the_middle_is_skipped_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    for number in 1..=4 {
        store.append(&finished(number)).unwrap();
    }
    drop(store);
    let path = segments(dir.path()).pop().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() * 3 / 8;
    bytes[middle] ^= 0x40;
    fs::write(&path, bytes).unwrap();

    let (store, recovery) = open(dir.path()).await;
    assert_eq!((recovery.records, recovery.damaged.len(), recovery.damaged[0].records_lost), (3, 1, 1));
    let found = store.verify(&|_| {}).await.unwrap();
    assert_eq!((found.balanced, found.is_clean(), found.damaged_frames, found.lost), (true, false, 1, 1));
    let kept: Vec<Fact> = [1, 3, 4].into_iter().map(finished).collect();
    assert_eq!(books(&store).await, expected_books(&kept));
    store.flush(at(1)).await.unwrap();
    assert_eq!(books(&store).await, expected_books(&kept));
}

#[tokio::test]
async fn a_record_that_vanished_from_the_log_does_not_hide_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.append_all(&(0..10).map(finished).collect::<Vec<_>>()).unwrap();
    store.flush(at(1)).await.unwrap();
    drop(store);
    for path in segments(dir.path()) {
        fs::remove_file(path).unwrap();
    }
    let (store, _) = open(dir.path()).await;
    assert_eq!(store.append(&finished(10)).unwrap().0, 11, "a position that a table has passed is never given again");
    store.flush(at(2)).await.unwrap();
    assert_eq!(count(&store, "SELECT count(*) FROM attempts").await, 11);
}

#[tokio::test]
async fn the_second_writer_is_refused_with_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let second = Store::open(dir.path(), Options::default(), at(0), &price).await;
    let Err(error @ StoreError::Locked { .. }) = second else { panic!("{second:?}") };
    let line = error.to_string();
    assert!(line.contains(&format!("process {}", std::process::id())) && !line.contains('\n'), "{line}");
    drop(store);
    open(dir.path()).await;
}

#[tokio::test]
async fn a_log_of_100_mb_is_replayed_quickly() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let facts: Vec<Fact> = (0..20_000).flat_map(|number| [opened(number), finished(number)]).collect();
    let mut bytes = 0;
    while bytes < 100_000_000 {
        store.append_all(&facts).unwrap();
        bytes = segments(dir.path()).iter().map(|path| fs::metadata(path).unwrap().len()).sum::<u64>();
    }
    drop(store);
    #[expect(clippy::disallowed_methods, reason = "measures how long a start takes")]
    let begin = std::time::Instant::now();
    let (_store, recovery) = open(dir.path()).await;
    let took = begin.elapsed();
    println!("replayed {} records, {} MB, in {took:?}", recovery.records, bytes / 1_000_000);
    assert!(took.as_secs_f64() < 2.0, "{took:?}");
}
