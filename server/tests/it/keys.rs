//! A key's life: made once in clear, listed without its secret, replaced with overlap, withdrawn.

use crate::support::Books;

#[test]
fn a_key_is_shown_once_replaced_and_withdrawn() {
    let books = Books::new();
    let made = books.json(&[
        "key",
        "create",
        "--consumer",
        "desk",
        "--team",
        "support",
        "--may-set",
        "task,session",
        "--models",
        "gpt-4o,claude-*",
        "--expires",
        "90d",
        "--networks",
        "10.0.0.0/8",
    ]);
    let key = made["key"].as_str().unwrap();
    assert!(key.starts_with("fk-") && made["state"] == "valid", "{made}");
    let id = made["id"].as_str().unwrap();

    let listed = books.run(&["key", "list", "--json"]).out;
    assert!(listed.contains(id) && !listed.contains(key) && !listed.contains("hash"), "{listed}");
    assert_nowhere(&books, key);

    let new = books.json(&["key", "rotate", id, "--overlap", "24h"]);
    assert_ne!(new["key"], made["key"]);
    let keys = books.json(&["key", "list"]);
    let states =
        |of: &serde_json::Value| keys.as_array().unwrap().iter().find(|key| key["id"] == *of).cloned().unwrap();
    assert_eq!(states(&made["id"])["state"], "valid", "it works until the overlap has passed");
    assert!(states(&made["id"])["expires_at"].as_str() < states(&new["id"])["expires_at"].as_str());
    assert_eq!(states(&new["id"])["may_set"], serde_json::json!(["task", "session"]));

    assert_eq!(books.json(&["key", "revoke", id])["state"], "revoked");
    books.run(&["key", "revoke", id]).fails_with("revoked already");
    books.run(&["key", "rotate", id]).fails_with("not valid now");
    books.run(&["key", "revoke", "ffffffff"]).fails_with("there is no key");
    assert_eq!(books.json(&["verify"])["control_log"]["entries"], 4);
}

#[test]
fn mistakes_make_no_key() {
    let books = Books::new();
    let base = ["key", "create", "--consumer", "a", "--team", "b"];
    for (option, value, part) in [
        ("--may-set", "tsak", "did you mean `task`?"),
        ("--networks", "10.0.0.0/99", "is not a network"),
        ("--expires", "2001-01-01", "has passed already"),
    ] {
        books.run(&[&base[..], &[option, value]].concat()).fails_with(part);
    }
    assert!(!books.data().exists());
}

/// No file of the ledger holds the key in clear.
fn assert_nowhere(books: &Books, key: &str) {
    let mut folders = vec![books.data()];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
                continue;
            }
            files += 1;
            let bytes = std::fs::read(entry.path()).unwrap();
            let found = bytes.windows(key.len()).any(|window| window == key.as_bytes());
            assert!(!found, "{}", entry.path().display());
        }
    }
    assert!(files > 0);
}
