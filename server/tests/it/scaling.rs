//! Scaling by the running server: shadow writes down and touches nothing, acting follows the load without failing a request, and
//! the switch stops it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ledger::Money;
use serde_json::{Value, json};

use crate::support::{Books, Served, ask};

/// Two engines and the tool that starts and stops them, each on a port of its own.
#[derive(Default)]
struct Host {
    /// Replicas that run.
    replicas: Mutex<u32>,
    /// What the tool was told: replicas and keys.
    told: Mutex<Vec<(u32, String)>>,
    /// Tries that the tool refuses first.
    refusals: Mutex<u32>,
}

struct Machines {
    host: Arc<Host>,
    engines: Vec<SocketAddr>,
    tool: SocketAddr,
}

/// Windows of a second instead of minutes.
const QUICK: &str = "policy = \"token-rate:window=1,stabilise=1\"\nguards = { stabilise_s = 1, down_per_minute = 0 }";

fn listen(answer: impl Fn(&str, &str) -> Option<(u16, String)> + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let Some((head, body)) = request(&mut stream) else { continue };
            // Nobody is there: the connection ends without a word.
            let Some((status, text)) = answer(&head, &body) else { continue };
            let answer = format!(
                "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{text}",
                text.len()
            );
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    address
}

/// The head and the body of a request.
fn request(stream: &mut TcpStream) -> Option<(String, String)> {
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let mut bytes = Vec::new();
    let mut part = [0; 4_096];
    loop {
        let read = stream.read(&mut part).ok().filter(|&read| read > 0)?;
        bytes.extend_from_slice(&part[..read]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.to_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            return Some((head.to_owned(), body.to_owned()));
        }
    }
}

impl Machines {
    fn start(running: u32) -> Machines {
        let host = Arc::new(Host { replicas: Mutex::new(running), ..Host::default() });
        let engines = (0..2).map(|number| {
            let host = Arc::clone(&host);
            listen(move |head, _| (number < *host.replicas.lock().unwrap()).then(|| (200, engine(head))))
        });
        let engines = engines.collect();
        let tools = Arc::clone(&host);
        let tool = listen(move |head, body| Some(tools.tool(head, body)));
        Machines { host, engines, tool }
    }

    fn config(&self, scale: &str) -> String {
        let mut text = "[[pool]]\nname = \"shared\"\ngpu = \"H100\"\ngpus = 2\nusd_per_gpu_hour = \"3.60\"\nreplicas = [{ name = \"r0\", \
                        gpus = 1 }, { name = \"r1\", gpus = 1 }]\n[telemetry]\nscrape_every_ms = 100\nnvml = false\n"
            .to_owned();
        let mut targets = Vec::new();
        for (number, address) in self.engines.iter().enumerate() {
            text += &format!(
                "[[upstream]]\nname = \"chat-{number}\"\nkind = \"vllm\"\nbase_url = \"http://{address}\"\npool = \"shared\"\ndeployment = \
                 \"chat\"\nengine = {{ replica = \"r{number}\" }}\n"
            );
            targets.push(format!("{{ upstream = \"chat-{number}\" }}"));
        }
        text + &format!(
            "[[route]]\nmodel = \"chat\"\ntargets = [{}]\nbalance = \"least-outstanding\"\n[[scale]]\ndeployment = \"chat\"\npool = \
             \"shared\"\ndecide_every_ms = 100\ncold_start_s = 0.5\ncapacity = {{ requests_per_s = 5, input_tokens = 10, output_tokens \
             = 5 }}\nactuator = {{ kind = \"webhook\", url = \"http://{}/scale\" }}\n{scale}\n",
            targets.join(", "),
            self.tool
        )
    }

    fn told(&self) -> Vec<(u32, String)> {
        self.host.told.lock().unwrap().clone()
    }
}

fn engine(head: &str) -> String {
    if head.starts_with("GET /metrics") {
        return "vllm:num_requests_running{model_name=\"m\"} 0\nvllm:num_requests_waiting{model_name=\"m\"} 0\n\
                vllm:kv_cache_usage_perc{model_name=\"m\"} 0.1\nvllm:prompt_tokens_total{model_name=\"m\"} 10\n\
                vllm:generation_tokens_total{model_name=\"m\"} 10\n"
            .to_owned();
    }
    json!({
        "id": "x", "object": "chat.completion", "created": 1, "model": "chat",
        "choices": [{ "index": 0, "message": { "role": "assistant", "content": "yes" }, "finish_reason": "stop" }],
        "usage": { "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15 },
    })
    .to_string()
}

impl Host {
    fn tool(&self, head: &str, body: &str) -> (u16, String) {
        let mut replicas = self.replicas.lock().unwrap();
        if head.starts_with("POST") {
            let body: Value = serde_json::from_str(body).unwrap();
            let wanted = u32::try_from(body["replicas"].as_u64().unwrap()).unwrap();
            let key =
                head.to_lowercase().lines().find_map(|line| line.strip_prefix("idempotency-key: ").map(str::to_owned));
            self.told.lock().unwrap().push((wanted, key.unwrap_or_default()));
            let mut refusals = self.refusals.lock().unwrap();
            if *refusals > 0 {
                *refusals -= 1;
                return (500, "{}".to_owned());
            }
            *replicas = wanted;
        }
        (200, json!({ "replicas": *replicas }).to_string())
    }
}

fn chat(served: &Served) -> u16 {
    let body = json!({ "model": "chat", "messages": [{ "role": "user", "content": "well?" }] }).to_string();
    ask(served.gateway, "POST", "/v1/chat/completions", "content-type: application/json\r\n", &body).0
}

fn stand(served: &Served) -> Value {
    let (status, _, answer) = served.ask("GET", "/api/v1/scaling", "", "");
    assert_eq!(status, 200, "{answer}");
    let document: Value = serde_json::from_str(&answer).unwrap();
    document["deployments"][0].clone()
}

fn turn(served: &Served, how: &str, body: &str) -> (u16, Value) {
    let (status, _, answer) =
        served.ask("POST", &format!("/api/v1/scaling/{how}"), "content-type: application/json\r\n", body);
    (status, serde_json::from_str(&answer).unwrap())
}

/// Asks until the answer is as wanted.
#[track_caller]
fn until(what: &str, mut met: impl FnMut() -> bool) {
    for _ in 0..400 {
        if met() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{what} did not happen");
}

fn usd(value: &Value) -> Money {
    value.as_str().unwrap_or_else(|| panic!("{value} is no amount")).parse().unwrap()
}

#[test]
fn shadow_writes_everything_down_and_touches_nothing() {
    let books = Books::new();
    let machines = Machines::start(2);
    let served = Served::start(&books, "", &machines.config(QUICK));
    for _ in 0..5 {
        assert_eq!(chat(&served), 200);
    }
    until("decisions", || stand(&served)["decisions"].as_array().is_some_and(|decisions| decisions.len() > 10));
    until("it would give one back", || stand(&served)["desired"] == 1);
    std::thread::sleep(Duration::from_millis(500));
    let shown = stand(&served);
    assert_eq!((&shown["mode"], &shown["ready"], &shown["static_replicas"]), (&"shadow".into(), &2.into(), &2.into()));
    let decision = &shown["decisions"][0];
    assert!(!decision["reasons"].as_array().unwrap().is_empty() && decision["told"].is_null(), "{decision}");
    let (_, _, metrics) = served.ask("GET", "/metrics", "", "");
    for line in
        ["ready_replicas{pool=\"shared\",deployment=\"chat\"} 2", "acting{pool=\"shared\",deployment=\"chat\"} 0"]
    {
        assert!(metrics.contains(&format!("farthing_scaling_{line}")), "{metrics}");
    }
    assert_eq!(served.stop(), 0);
    assert_eq!(machines.told(), [], "nobody is told anything in shadow");

    let count =
        &books.json(&["sql", "SELECT count(*) AS n, sum(told) AS told FROM decisions WHERE mode = 'shadow'"])[0];
    assert!(count["n"].as_u64().unwrap() > 10 && count["told"].is_null(), "{count}");
    let report = books.json(&["report", "--by", "team"]);
    let row = &report["gpus_given_back"][0];
    assert_eq!(
        (&row["deployment"], &row["mode"], &row["estimated"]),
        (&"chat".into(), &"shadow".into(), &false.into())
    );
    assert_eq!(usd(&row["static_cost"]), usd(&row["actual_cost"]) + usd(&row["given_back"]), "{row}");
    assert_eq!(usd(&row["actual_cost"]), usd(&row["desired_cost"]) + usd(&row["would_save"]), "{row}");
    assert!(usd(&row["would_save"]) > Money::ZERO, "five requests need no second replica: {row}");
    let text = books.run(&["report", "--by", "team"]).out;
    assert!(text.contains("GPUs given back") && text.contains("chat on shared"), "{text}");
    assert_eq!(books.json(&["verify"])["clean"], true);
}

#[test]
fn from_nothing_the_first_request_wakes_a_replica_and_the_ledger_shows_what_that_cost() {
    let books = Books::new();
    let machines = Machines::start(0);
    *machines.host.refusals.lock().unwrap() = 1;
    let config = machines.config(&format!("mode = \"act\"\nfloor = 0\n{QUICK}"));
    let served = Served::start(&books, "", &config);
    until("a first decision", || stand(&served)["desired"] == 0);
    assert_eq!(stand(&served)["ready"], 0);
    assert_eq!(chat(&served), 200, "it waited for its replica");
    let told = machines.told();
    assert!(told.len() >= 2 && told[0].0 >= 1, "{told:?}");
    until("a replica", || stand(&served)["ready"].as_u64() >= Some(1));

    // The switch: whatever comes, nobody is told any more, and a restart does not forget it.
    let (status, shown) = turn(&served, "stop", "{\"deployment\": \"chat\"}");
    assert_eq!((status, &shown["deployments"][0]["stopped_by"]), (200, &"api".into()));
    assert_eq!(turn(&served, "stop", "{\"deployment\": \"chad\"}").0, 404);
    until("stopped decisions", || stand(&served)["mode"] == "stopped");
    let told = machines.told().len();
    for _ in 0..20 {
        assert_eq!(chat(&served), 200);
    }
    assert_eq!(served.stop(), 0);
    let served = Served::start(&books, "", &config);
    until("stopped decisions", || stand(&served)["mode"] == "stopped");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(machines.told().len(), told, "nobody was told while it was stopped");
    assert_eq!(turn(&served, "resume", "{}").0, 200);
    until("acting", || stand(&served)["mode"] == "act");
    assert_eq!(served.stop(), 0);

    let facts =
        books.json(&["sql", "SELECT count(*) AS n FROM decisions WHERE failure LIKE '%500%' OR mode = 'stopped'"]);
    assert!(facts[0]["n"].as_u64().unwrap() > 1, "{facts}");
    let lines = books
        .json(&["sql", "SELECT line, sum(effective_cost) AS usd FROM postings WHERE pool = 'shared' GROUP BY line"]);
    assert!(lines.as_array().unwrap().iter().any(|row| row["line"] == "cold_start"), "{lines}");
    assert_eq!(books.json(&["verify"])["clean"], true);
    let report = books.json(&["report", "--by", "team"]);
    let given_back: Money =
        report["gpus_given_back"].as_array().unwrap().iter().map(|row| usd(&row["given_back"])).sum();
    assert!(given_back > Money::ZERO, "a replica stood still: {report}");
}

#[test]
fn what_somebody_else_asked_for_is_respected_and_a_file_stops_everything() {
    let books = Books::new();
    let machines = Machines::start(0);
    *machines.host.refusals.lock().unwrap() = 2;
    let file = books.path("stop");
    let config = machines.config(&format!("mode = \"act\"\nfloor = 1\n{QUICK}"));
    let config = format!("[scaling]\nstop_file = \"{}\"\n{config}", file.display());
    let served = Served::start(&books, "", &config);
    until("a first decision", || stand(&served)["desired"] == 1);
    until("it is known what was asked for", || stand(&served)["asked"] == 1);
    let told = machines.told();
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(told.iter().all(|one| *one == told[0]) && !told[0].1.is_empty(), "a try keeps its key: {told:?}");
    *machines.host.replicas.lock().unwrap() = 2;
    until("the change is seen", || stand(&served)["manual_replicas"] == 2);
    until("both replicas serve", || stand(&served)["ready"] == 2);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(machines.told(), told, "it was left as somebody wanted it: {}", stand(&served));
    std::fs::write(&file, "").unwrap();
    until("the file stops it", || stand(&served)["mode"] == "stopped" && stand(&served)["stopped_by"] == "file");
    assert_eq!(served.stop(), 0);
}
