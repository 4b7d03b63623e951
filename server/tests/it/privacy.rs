//! What passes through is metered and not kept: no prompt, answer, key or secret in any file or log line, at any log level.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use crate::support::{Books, Served, ask};

const PROMPT: &str = "zebra-prompt-7261";
const ANSWER: &str = "heron-answer-9914";
const SECRET: &str = "sk-upstream-5530";

/// An upstream that answers every chat with the same words, streamed when asked to.
fn upstream() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream);
            let (mut head, mut length) = (String::new(), 0);
            while reader.read_line(&mut head).unwrap_or(0) > 2 {
                let line = head.lines().last().unwrap_or_default().to_lowercase();
                length = line.strip_prefix("content-length: ").map_or(length, |bytes| bytes.parse().unwrap());
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            assert!(head.contains(SECRET) && !head.contains("fk-"), "the upstream sees its own credential only");
            let (kind, text) = if String::from_utf8_lossy(&body).contains("\"stream\":true") {
                let delta =
                    format!(r#"{{"id":"c2","model":"gpt-4o","choices":[{{"delta":{{"content":"{ANSWER}"}}}}]}}"#);
                let usage = r#"{"id":"c2","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3}}"#;
                ("text/event-stream", format!("data: {delta}\n\ndata: {usage}\n\ndata: [DONE]\n\n"))
            } else {
                let choice = format!(r#"{{"message":{{"role":"assistant","content":"{ANSWER}"}}}}"#);
                let usage = r#"{"prompt_tokens":9,"completion_tokens":3}"#;
                ("application/json", format!(r#"{{"id":"c1","model":"gpt-4o","choices":[{choice}],"usage":{usage}}}"#))
            };
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
                text.len()
            );
            let _ = reader.get_mut().write_all(answer.as_bytes());
        }
    });
    address
}

#[test]
fn nothing_that_was_said_is_kept() {
    let books = Books::new();
    let made = books.json(&["key", "create", "--consumer", "desk", "--team", "support"]);
    let key = made["key"].as_str().unwrap();
    let secret = books.write("upstream.secret", SECRET);
    let more = format!(
        "[[upstream]]\nname = \"u\"\nkind = \"openai\"\nbase_url = \"http://{}\"\napi_key = {{ file = \"{secret}\" }}",
        upstream()
    );
    let served = Served::start(&books, "", &more);
    let headers = format!("authorization: Bearer {key}\r\ncontent-type: application/json\r\n");
    for (stream, path) in [(false, "/v1/chat/completions"), (true, "/v1/chat/completions"), (false, "/v1/nowhere")] {
        let body =
            format!(r#"{{"model":"gpt-4o","stream":{stream},"messages":[{{"role":"user","content":"{PROMPT}"}}]}}"#);
        let (status, _, answer) = ask(served.gateway, "POST", path, &headers, &body);
        assert_eq!(status, 200, "{answer}");
        assert!(answer.contains(ANSWER), "{answer}");
    }
    // Refusals quote nothing of what they refuse either.
    let (status, _, answer) = ask(served.gateway, "POST", "/v1/chat/completions", &headers, &format!("{{{PROMPT}"));
    assert!(status == 400 && !answer.contains(PROMPT), "{answer}");
    let (code, log) = served.stop_and_read();
    assert_eq!(code, 0, "{log}");

    assert_eq!(books.json(&["report"])["total"]["input_tokens"], 27);
    for said in [PROMPT, ANSWER, SECRET, key] {
        assert!(!log.contains(said), "`{said}` is in the log");
        assert_eq!(files_with(&books.data(), said), Vec::<String>::new(), "`{said}` is in a file");
    }
}

fn files_with(folder: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(&path, text));
        } else if std::fs::read(&path).unwrap().windows(text.len()).any(|bytes| bytes == text.as_bytes()) {
            found.push(path.display().to_string());
        }
    }
    found
}
