//! Imports happen once and whole.

use ledger::Fact;
use store::{Begun, Import, ImportId, Options, Store};

use crate::sample::*;

async fn begin(store: &Store, content: &str) -> Import {
    match store.begin_import(ImportId::of(content.as_bytes()), "requests:test", at(1)).await.unwrap() {
        Begun::Import(import) => import,
        Begun::AlreadyDone(summary) => panic!("{summary:?}"),
    }
}

fn rows(range: std::ops::Range<u32>) -> Vec<Fact> {
    range.map(finished).collect()
}

#[tokio::test]
async fn the_same_content_twice_is_imported_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let mut import = begin(&store, "content").await;
    import.push(rows(0..300)).await.unwrap();
    import.push(vec![capacity(1)]).await.unwrap();
    assert_eq!(count(&store, "SELECT count(*) FROM attempts").await, 0, "nothing is visible before the commit");
    let summary = import.commit(at(2)).await.unwrap();
    assert_eq!((summary.attempts, summary.postings, summary.capacity, summary.skipped), (300, 240, 1, 0));
    let before = books(&store).await;
    let again = store.begin_import(ImportId::of(b"content"), "requests:test", at(3)).await.unwrap();
    assert!(matches!(again, Begun::AlreadyDone(done) if done == summary));
    assert_eq!(books(&store).await, before);
    assert_clean(&store).await;
}

#[tokio::test]
async fn rows_that_are_in_the_ledger_are_skipped_wherever_they_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.append_all(&rows(0..10)).unwrap();
    let mut import = begin(&store, "one").await;
    import.push(rows(5..20)).await.unwrap();
    import.push(rows(15..25)).await.unwrap();
    let summary = import.commit(at(2)).await.unwrap();
    assert_eq!((summary.attempts, summary.skipped), (15, 10));
    // The log brings rows that an import already brought.
    store.append_all(&rows(20..30)).unwrap();
    assert_eq!(books(&store).await, expected_books(&rows(0..30)));
    store.flush(at(3)).await.unwrap();
    assert_eq!(books(&store).await, expected_books(&rows(0..30)));
    assert_clean(&store).await;
}

#[tokio::test]
async fn an_import_killed_before_its_commit_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let mut import = begin(&store, "content").await;
    import.push(rows(0..100_500)).await.unwrap();
    drop(import);
    drop(store);
    let (store, recovery) = open(dir.path()).await;
    assert_eq!((recovery.imports_finished, count(&store, "SELECT count(*) FROM attempts").await), (0, 0));
    let mut import = begin(&store, "content").await;
    import.push(rows(0..50)).await.unwrap();
    import.commit(at(2)).await.unwrap();
    assert_eq!(books(&store).await, expected_books(&rows(0..50)));
}

#[tokio::test]
async fn an_import_killed_between_the_commits_of_two_tables_is_completed() {
    for reopen in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let options = Options::default();
        let faults = options.faults.clone();
        let (mut store, _) = open_with(dir.path(), options).await;
        let mut import = begin(&store, "content").await;
        import.push(rows(0..50)).await.unwrap();
        faults.fail_later_commits(true);
        assert!(import.commit(at(2)).await.is_err());
        faults.fail_later_commits(false);
        if reopen {
            drop(store);
            let (opened, recovery) = open(dir.path()).await;
            assert_eq!(recovery.imports_finished, 1);
            store = opened;
        } else {
            store.flush(at(3)).await.unwrap();
        }
        assert_eq!(books(&store).await, expected_books(&rows(0..50)));
        let again = store.begin_import(ImportId::of(b"content"), "requests:test", at(3)).await.unwrap();
        assert!(matches!(again, Begun::AlreadyDone(_)));
        assert_clean(&store).await;
    }
}
