//! What clients saw, held against what the ledger says.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::driver::{Farthing, find_flag, whole};
use crate::wire::{Connection, Keep, header, post};

/// The response header with the request's id.
pub const REQUEST_ID: &str = "x-farthing-request-id";

/// Longest wait for an answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(20);

/// One request as its client saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The id in the answer's head.
    pub id: String,
    /// Whether the end of the answer arrived.
    pub ended: bool,
    /// The tokens that the upstream used, because the request told it to.
    pub tokens: Tokens,
}

/// Input and output tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tokens {
    /// Input.
    pub input: u64,
    /// Output.
    pub output: u64,
}

/// Everything the clients know.
#[derive(Debug, Default)]
pub struct Notebook {
    seen: Mutex<Vec<Seen>>,
    complaints: Mutex<Vec<String>>,
    sent: std::sync::atomic::AtomicU64,
}

impl Notebook {
    /// Requests that were sent, answered or not.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Answers of which at least the head arrived.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no holder panics").clone()
    }

    /// Answers that were not what they should have been.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        self.complaints.lock().expect("no holder panics").clone()
    }

    fn complain(&self, what: String) {
        self.complaints.lock().expect("no holder panics").push(what);
    }

    fn note(&self, head: &[u8], ended: bool, tokens: Tokens) {
        match header(head, REQUEST_ID) {
            Some(id) => self.seen.lock().expect("no holder panics").push(Seen { id: id.to_owned(), ended, tokens }),
            None => self.complain(format!("an answer without {REQUEST_ID}: {}", String::from_utf8_lossy(head))),
        }
    }
}

/// A client that sends numbered requests, each with its own tokens, and writes down what it saw.
#[derive(Debug)]
pub struct Client<'a> {
    notebook: &'a Notebook,
    headers: String,
    address: SocketAddr,
    connection: Connection,
}

impl<'a> Client<'a> {
    /// A client of `farthing` that writes into `notebook`.
    #[must_use]
    pub fn new(farthing: &Farthing, notebook: &'a Notebook) -> Client<'a> {
        let address = farthing.address();
        Client { notebook, headers: farthing.headers(), address, connection: Connection::new(address, ANSWER_PATIENCE) }
    }

    /// Sends request `number` and returns the status of an answer that arrived whole.
    pub fn ask(&mut self, number: u64) -> Option<u16> {
        let plan = Plan::of(number);
        let request = post("/v1/chat/completions", self.address, &self.headers, &plan.body());
        self.notebook.sent.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        match self.connection.call(&request, Keep::Body) {
            Ok(answer) if answer.status == 200 => {
                self.notebook.note(&answer.head, true, plan.tokens);
                if let Err(what) = plan.check(&answer.body) {
                    self.notebook.complain(format!("request {number}: {what}"));
                }
                Some(200)
            }
            Ok(answer) => Some(answer.status),
            Err(broken) => {
                if let Some(head) = broken.head.filter(|head| head.starts_with(b"HTTP/1.1 200")) {
                    self.notebook.note(&head, false, plan.tokens);
                }
                None
            }
        }
    }
}

/// What request number so-and-so is like: a mixture of streams and plain answers in which hardly two use the same tokens.
struct Plan {
    tokens: Tokens,
    stream: bool,
    usage_chunk: bool,
}

impl Plan {
    fn of(number: u64) -> Plan {
        let tokens = Tokens { input: 1 + number % 4_999, output: 4 + number % 37 };
        Plan { tokens, stream: number % 2 == 1, usage_chunk: number % 4 == 1 }
    }

    fn body(&self) -> String {
        let Plan { tokens: Tokens { input, output }, stream, usage_chunk } = self;
        let options = if *usage_chunk { r#""stream_options":{"include_usage":true},"# } else { "" };
        let pace = if *stream { "3000:1500" } else { "20000:0" };
        format!(
            r#"{{"model":"gpt-4o","stream":{stream},{options}"seed":{input},"max_tokens":{output},"user":"pace:{pace}","messages":[{{"role":"user","content":"Whose cost is it?"}}]}}"#
        )
    }

    /// An answer is whole when every token is in it, and the usage chunk exactly when it was asked for.
    fn check(&self, body: &[u8]) -> Result<(), String> {
        let text = String::from_utf8_lossy(body);
        let Tokens { input, output } = self.tokens;
        let usage = text.contains(&format!(r#""prompt_tokens":{input},"completion_tokens":{output},"#));
        if !self.stream {
            return if usage { Ok(()) } else { Err(format!("usage is not in the answer: {text}")) };
        }
        let tokens = text.matches(r#"{"content":" token"}"#).count();
        let problems = [
            (tokens as u64 != output, "tokens are missing from the stream"),
            (!text.ends_with("data: [DONE]\n\n"), "the stream does not end with [DONE]"),
            (
                usage != self.usage_chunk,
                "the usage chunk is there although it was not asked for, or the other way round",
            ),
            (!self.usage_chunk && text.contains("\"usage\""), "usage is in a stream that did not ask for it"),
        ];
        match problems.iter().find(|(wrong, _)| *wrong) {
            Some((_, what)) => Err(format!("{what}: {text}")),
            None => Ok(()),
        }
    }
}

/// What the comparison found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Rows in `attempts`.
    pub rows: u64,
    /// Rows by outcome.
    pub outcomes: Vec<(String, u64)>,
    /// Requests whose clients saw the end.
    pub ended: u64,
    /// Of these, without a row.
    pub missing: u64,
    /// Requests whose clients saw at least the head, without a row.
    pub head_missing: u64,
    /// Ids with more than one row.
    pub doubled: u64,
    /// Rows of answers that ended whose tokens or outcome are not what the client saw.
    pub wrong: u64,
    /// Whether `farthing verify` succeeded and said that the books balance.
    pub balanced: bool,
    /// A few of the violations in words.
    pub examples: Vec<String>,
}

/// Reads the ledger and compares.
///
/// # Errors
/// When the ledger cannot be read.
pub fn audit(farthing: &Farthing, seen: &[Seen]) -> Result<Findings, String> {
    let rows = farthing.sql("SELECT request_id, outcome, input_tokens, output_tokens FROM attempts")?;
    let mut findings = compare(&rows, seen);
    let counted = farthing.count("SELECT count(*) AS n FROM attempts")?;
    if counted != findings.rows {
        return Err(format!("SELECT gave {} rows and count(*) {counted}", findings.rows));
    }
    match farthing.run(&["verify"]) {
        Ok(document) => findings.balanced = find_flag(&document, "balanced") == Some(true),
        Err(error) => findings.examples.push(error),
    }
    if !findings.balanced {
        findings.examples.push("`farthing verify` does not say that the books balance".to_owned());
    }
    Ok(findings)
}

fn compare(rows: &[Map<String, Value>], seen: &[Seen]) -> Findings {
    let mut by_id: HashMap<&str, Vec<&Map<String, Value>>> = HashMap::new();
    let mut outcomes: HashMap<&str, u64> = HashMap::new();
    for row in rows {
        by_id.entry(row["request_id"].as_str().unwrap_or_default()).or_default().push(row);
        *outcomes.entry(row["outcome"].as_str().unwrap_or_default()).or_default() += 1;
    }
    let mut findings = Findings { rows: rows.len() as u64, ..Findings::default() };
    findings.outcomes = outcomes.into_iter().map(|(outcome, count)| (outcome.to_owned(), count)).collect();
    findings.outcomes.sort();
    for (id, rows) in by_id.iter().filter(|(_, rows)| rows.len() > 1) {
        findings.doubled += 1;
        findings.example(format!("{id} has {} rows", rows.len()));
    }
    for request in seen {
        findings.judge(request, by_id.get(request.id.as_str()).and_then(|rows| rows.first()).copied());
    }
    findings
}

impl Findings {
    /// Violations of the promise that nothing acknowledged is lost and nothing counted twice.
    #[must_use]
    pub fn violations(&self) -> u64 {
        self.missing + self.head_missing + self.doubled + self.wrong + u64::from(!self.balanced)
    }

    fn judge(&mut self, request: &Seen, row: Option<&Map<String, Value>>) {
        self.ended += u64::from(request.ended);
        let Some(row) = row else {
            *if request.ended { &mut self.missing } else { &mut self.head_missing } += 1;
            self.example(format!("{} is not in the ledger (end seen: {})", request.id, request.ended));
            return;
        };
        let tokens = whole(&row["input_tokens"]).zip(whole(&row["output_tokens"]));
        let right = row["outcome"] == "completed" && tokens == Some((request.tokens.input, request.tokens.output));
        if request.ended && !right {
            self.wrong += 1;
            self.example(format!(
                "{}: the client saw {:?} completed, the ledger says {row:?}",
                request.id, request.tokens
            ));
        }
    }

    fn example(&mut self, what: String) {
        if self.examples.len() < 10 {
            self.examples.push(what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(id: &str, outcome: &str, input: u64, output: u64) -> Map<String, Value> {
        let row = json!({ "request_id": id, "outcome": outcome, "input_tokens": input, "output_tokens": output });
        row.as_object().unwrap().clone()
    }

    #[test]
    fn every_kind_of_violation_is_found() {
        let tokens = Tokens { input: 3, output: 4 };
        let seen = |id: &str, ended| Seen { id: id.to_owned(), ended, tokens };
        let client = [
            seen("good", true),
            seen("lost", true),
            seen("cut", false),
            seen("lost-head", false),
            seen("wrong", true),
            seen("twice", true),
        ];
        let ledger = [
            row("good", "completed", 3, 4),
            row("cut", "crashed", 3, 0),
            row("wrong", "completed", 3, 5),
            row("twice", "completed", 3, 4),
            row("twice", "crashed", 3, 0),
            row("never-seen", "crashed", 9, 0),
        ];
        let found = compare(&ledger, &client);
        assert_eq!((found.ended, found.missing, found.head_missing, found.wrong, found.doubled), (4, 1, 1, 1, 1));
        assert_eq!(found.violations(), 5, "and the books were not verified");
    }

    #[test]
    fn an_answer_is_checked_to_the_token() {
        let plan = Plan { tokens: Tokens { input: 9, output: 2 }, stream: true, usage_chunk: false };
        let token = r#"data: {"choices":[{"delta":{"content":" token"}}]}"#;
        let whole = format!("{token}\n\n{token}\n\ndata: [DONE]\n\n");
        assert_eq!(plan.check(whole.as_bytes()), Ok(()));
        assert!(plan.check(whole.replacen(token, "", 1).as_bytes()).is_err());
        assert!(plan.check(whole.replace("data: [DONE]", "").as_bytes()).is_err());
        assert!(plan.check(format!(r#"data: {{"usage":null}}{whole}"#).as_bytes()).is_err());
        let body: Value = serde_json::from_str(&plan.body()).unwrap();
        assert_eq!((body["seed"].as_u64(), body["max_tokens"].as_u64()), (Some(9), Some(2)));
    }
}
