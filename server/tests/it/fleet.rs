//! GPUs, engines and jobs of a running server: what the API is told, what telemetry hears, and what is in the ledger afterwards.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Books, Served, free};

const POOL: &str = "[[pool]]\nname = \"shared\"\nowner = \"platform\"\ngpu = \"A100\"\ngpus = 2\nusd_per_gpu_hour = \"2.50\"\n\
                    [telemetry]\nscrape_every_ms = 100\nnvml = false\n";

/// A page of metrics on a port of its own; what it says can change.
struct Metrics {
    address: SocketAddr,
    page: Arc<Mutex<String>>,
    asked: Arc<AtomicU64>,
}

impl Metrics {
    fn serve(page: &str) -> Metrics {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let metrics = Metrics {
            address: listener.local_addr().unwrap(),
            page: Arc::new(Mutex::new(page.to_owned())),
            asked: Arc::default(),
        };
        let (page, asked) = (Arc::clone(&metrics.page), Arc::clone(&metrics.asked));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { continue };
                let mut head = [0; 2_048];
                let _ = stream.read(&mut head);
                let page = page.lock().unwrap().clone();
                let answer =
                    format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{page}", page.len());
                asked.fetch_add(1, Ordering::SeqCst);
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        metrics
    }

    fn say(&self, page: &str) {
        page.clone_into(&mut self.page.lock().unwrap());
    }

    fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }
}

/// A vLLM's page with some of its names.
fn vllm(generated: u64) -> String {
    format!(
        "vllm:num_requests_running{{model_name=\"m\"}} 3\nvllm:num_requests_waiting{{model_name=\"m\"}} 1\n\
         vllm:kv_cache_usage_perc{{model_name=\"m\"}} 0.25\nvllm:prompt_tokens_total{{model_name=\"m\"}} 1000\n\
         vllm:generation_tokens_total{{model_name=\"m\"}} {generated}\n\
         vllm:cache_config_info{{block_size=\"16\",num_gpu_blocks=\"2500\"}} 1\n"
    )
}

fn upstream(name: &str, address: SocketAddr) -> String {
    format!("[[upstream]]\nname = \"{name}\"\nkind = \"vllm\"\nbase_url = \"http://{address}\"\npool = \"shared\"\n")
}

fn parsed(body: &str) -> Value {
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"))
}

fn post(served: &Served, path: &str, body: &Value) -> (u16, Value) {
    let (status, _, answer) = served.ask("POST", path, "content-type: application/json\r\n", &body.to_string());
    (status, parsed(&answer))
}

fn get(served: &Served, path: &str) -> Value {
    let (status, _, answer) = served.ask("GET", path, "", "");
    assert_eq!(status, 200, "{path}: {answer}");
    parsed(&answer)
}

/// Asks until the answer is as wanted.
fn until(what: &str, mut met: impl FnMut() -> bool) {
    for _ in 0..200 {
        if met() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{what} did not happen");
}

#[test]
fn replicas_come_and_go_and_what_was_said_outlives_the_server() {
    let books = Books::new();
    let served = Served::start(&books, "", POOL);
    let wrong = [
        (json!({"event": "started", "pool": "shared", "replica": "shared-1"}), "`gpus` is missing"),
        (json!({"event": "started", "pool": "nowhere", "replica": "x", "gpus": 1}), "`gpu` is missing"),
        (json!({"event": "started", "pool": "shared", "replica": "x", "gpus": 0}), "`gpus` is 0"),
        (json!({"event": "started", "pool": "shared", "replica": " ", "gpus": 1}), "`replica` has to be a name"),
        (json!({"event": "started", "pool": "shared", "replica": "x", "gpuss": 1}), "unknown field `gpuss`"),
        (json!({"event": "begun", "pool": "shared", "replica": "x"}), "unknown variant `begun`"),
        (json!({"event": "ready", "pool": "shared", "replica": "x"}), "does not run"),
        (
            json!({"event": "stopped", "pool": "shared", "replica": "shared-0", "gpus": 1}),
            "belongs to the event `started`",
        ),
        (
            json!({"event": "stopped", "pool": "shared", "replica": "shared-0", "at": "2200-01-01T00:00:00Z"}),
            "yet to come",
        ),
        (
            json!({"event": "started", "pool": "shared", "replica": "x", "gpus": 1, "at": "2001-01-01T00:00:00Z"}),
            "31 days",
        ),
        (json!({"event": "started", "pool": "shared", "replica": "x", "gpus": 1, "usd_per_gpu_hour": "two"}), "two"),
    ];
    for (body, part) in wrong {
        let (status, answer) = post(&served, "/api/v1/capacity", &body);
        assert_eq!((status, &answer["error"]["code"]), (400, &"bad_request".into()), "{body}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{part}: {answer}");
    }
    assert_eq!(get(&served, "/api/v1/capacity").as_array().unwrap().len(), 1, "what was refused changed nothing");
    let at = get(&served, "/api/v1/health")["time"].clone();
    let started = json!({
        "event": "started", "pool": "shared", "replica": "shared-1", "gpus": 4, "usd_per_gpu_hour": "1.25",
        "purchase": "spot", "owner": "research", "at": at,
    });
    let (status, first) = post(&served, "/api/v1/capacity", &started);
    assert_eq!((status, &first["changed"]), (200, &true.into()), "{first}");
    assert_eq!(
        (&first["fact"]["gpu"], &first["fact"]["rate"], &first["fact"]["purchase"]),
        (&"A100".into(), &"1.25".into(), &"spot".into())
    );
    let (_, again) = post(&served, "/api/v1/capacity", &started);
    assert_eq!(again["changed"], false, "{again}");
    let (status, ready) =
        post(&served, "/api/v1/capacity", &json!({"event": "ready", "pool": "shared", "replica": "shared-1"}));
    assert_eq!(status, 200, "{ready}");
    assert_eq!(served.stop(), 0);

    // It ran while the server did not.
    let served = Served::start(&books, "", POOL);
    let running = get(&served, "/api/v1/capacity");
    let replica = running.as_array().unwrap().iter().find(|fact| fact["replica"] == "shared-1").expect("still there");
    assert_eq!((&replica["period"]["start"], &replica["gpus"]), (&at, &4.into()), "{running}");
    let stopped = json!({"event": "stopped", "pool": "shared", "replica": "shared-1"});
    let (_, answer) = post(&served, "/api/v1/capacity", &stopped);
    assert_eq!(answer["changed"], true);
    assert_eq!(post(&served, "/api/v1/capacity", &stopped).1["changed"], false);
    assert_eq!(served.stop(), 0);
    let query = "SELECT count(DISTINCT period_start) AS starts, max(period_end) AS ended FROM capacity WHERE replica = 'shared-1'";
    let rows = books.json(&["sql", query]);
    assert_eq!(rows[0]["starts"], 1, "{rows}");
    assert_eq!(rows[0]["ended"], answer["fact"]["period"]["end"], "{rows}");
    assert_eq!(books.json(&["verify"])["clean"], true);
}

#[test]
fn jobs_start_live_and_stop_through_the_api() {
    let books = Books::new();
    let served = Served::start(&books, "", POOL);
    let start = json!({"event": "start", "job": "finetune-7", "pool": "shared", "share": 0.25, "context": {"team": "research"}});
    let wrong = [
        (json!({"event": "start", "job": "j", "pool": "shared", "share": 1.5}), "`share` is 1.5"),
        (json!({"event": "start", "job": "j", "pool": "other"}), "no running replica"),
        (
            json!({"event": "start", "job": "j", "pool": "shared", "replica": "shared-9"}),
            "no running replica `shared-9`",
        ),
        (json!({"event": "start", "job": "j", "pool": "shared", "context": {"teem": "a"}}), "unknown field `teem`"),
        (json!({"event": "start", "job": "j", "pool": "shared", "lease_s": 0}), "`lease_s` is 0"),
        (json!({"event": "heartbeat", "job": "j", "pool": "shared"}), "does not run"),
        (json!({"event": "stop", "job": "j", "pool": "shared", "share": 0.5}), "belongs to the event `start`"),
    ];
    for (body, part) in wrong {
        let (status, answer) = post(&served, "/api/v1/jobs", &body);
        assert_eq!(status, 400, "{body}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{part}: {answer}");
    }
    let (status, first) = post(&served, "/api/v1/jobs", &start);
    assert_eq!((status, &first["changed"], &first["fact"]["share"]), (200, &true.into(), &250_000.into()), "{first}");
    assert_eq!(post(&served, "/api/v1/jobs", &start).1["changed"], false);
    let beat = json!({"event": "heartbeat", "job": "finetune-7", "pool": "shared", "lease_s": 600});
    assert_eq!(post(&served, "/api/v1/jobs", &beat).0, 200);
    assert_eq!(get(&served, "/api/v1/jobs")[0]["job"], "finetune-7");
    let stop = json!({"event": "stop", "job": "finetune-7", "pool": "shared"});
    assert_eq!(post(&served, "/api/v1/jobs", &stop).1["changed"], true);
    assert_eq!(post(&served, "/api/v1/jobs", &stop).1["changed"], false);
    assert_eq!(get(&served, "/api/v1/jobs"), json!([]));
    assert_eq!(served.stop(), 0);
    let query = "SELECT job, replica, team, source, count(DISTINCT period_start) AS runs FROM jobs GROUP BY job, replica, team, source";
    let rows = books.json(&["sql", query]);
    assert_eq!(
        rows,
        json!([{"job": "finetune-7", "replica": "shared-0", "team": "research", "source": "api", "runs": 1}])
    );
}

#[test]
fn engines_are_read_and_what_they_lack_is_shown() {
    let books = Books::new();
    let engine = Metrics::serve(&vllm(500));
    let served = Served::start(&books, "", &format!("{POOL}{}", upstream("vllm-a", engine.address)));
    let telemetry = || get(&served, "/api/v1/engines")[0].clone();
    until("a first reading", || telemetry()["telemetry"]["metrics"]["reading"]["generation_tokens"] == 500);
    let shown = telemetry();
    assert_eq!(
        (&shown["engine"], &shown["state"], &shown["ready_at"]),
        (&"vllm-a".into(), &"running".into(), &Value::Null)
    );
    assert_eq!(shown["setup"]["limits"]["kv_tokens"], 40_000.0, "16 tokens in each of 2,500 blocks: {shown}");
    let metrics = &shown["telemetry"]["metrics"];
    assert_eq!((&metrics["failure"], &metrics["runs"]), (&Value::Null, &"vllm".into()));
    let missing: Vec<&str> =
        metrics["missing"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert!(missing.iter().any(|name| name.contains("num_preemptions")), "{missing:?}");
    assert!(metrics["missing"][0]["costs"].as_str().is_some_and(|costs| !costs.is_empty()), "{metrics}");

    engine.say(&vllm(7));
    until("a restart", || telemetry()["telemetry"]["metrics"]["restarts"] == 1);
    engine.say("nothing of ours 1\n");
    until("a failure", || telemetry()["telemetry"]["metrics"]["failure"].is_string());
    let failed = telemetry();
    assert!(failed["telemetry"]["metrics"]["failure"].as_str().unwrap().contains("no `vllm:"), "{failed}");
    assert_eq!(failed["state"], "running", "silence later on says nothing");
    let (_, _, page) = served.ask("GET", "/metrics", "", "");
    assert!(page.contains("farthing_engine_up{engine=\"vllm-a\"} 0"), "{page}");

    // Its replica goes and comes back: the engine loads until it answers again.
    let event = |event: &str| json!({"event": event, "pool": "shared", "replica": "shared-0"});
    assert_eq!(post(&served, "/api/v1/capacity", &event("stopped")).0, 200);
    assert_eq!(telemetry()["state"], "stopped");
    engine.say(&vllm(8));
    assert_eq!(post(&served, "/api/v1/capacity", &event("started")).0, 200);
    until("it is ready", || telemetry()["ready_at"].is_string());
    assert!(engine.asked() > 3);
    assert_eq!(served.stop(), 0);
    let rows = books.json(&[
        "sql",
        "SELECT max(generation_tokens) AS most, max(running) AS running, max(kv_tokens) AS kv FROM readings",
    ]);
    assert_eq!(rows, json!([{"most": 500, "running": 3, "kv": 40_000}]));
    let rows = books.json(&["sql", "SELECT count(DISTINCT period_start) AS runs FROM engines WHERE engine = 'vllm-a'"]);
    assert_eq!(rows[0]["runs"], 2, "{rows}");
}

#[test]
fn an_engine_that_is_not_there_yet_is_loading_and_stops_nothing() {
    let books = Books::new();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let served = Served::start(&books, "", &format!("{POOL}{}", upstream("late", nobody)));
    until("it is looked for", || get(&served, "/api/v1/engines")[0]["state"] == "loading");
    let shown = get(&served, "/api/v1/engines")[0].clone();
    assert!(shown["telemetry"]["metrics"]["failure"].as_str().unwrap().contains("nobody answers"), "{shown}");
    assert_eq!(get(&served, "/api/v1/health")["status"], "ok");
    assert_eq!(served.stop(), 0);
}

#[test]
fn a_changed_configuration_is_listened_to_and_a_wrong_one_changes_nothing() {
    let books = Books::new();
    let (first, second) = (Metrics::serve(&vllm(500)), Metrics::serve(&vllm(600)));
    let served = Served::start(&books, "", &format!("{POOL}{}", upstream("vllm-a", first.address)));
    let reading = |place: usize| get(&served, "/api/v1/engines")[place]["telemetry"]["metrics"]["reading"].clone();
    until("a first reading", || reading(0)["generation_tokens"] == 500);
    served.reload(&books, &upstream("vllm-b", second.address));
    until("the second is read", || reading(1)["generation_tokens"] == 600);
    until("the first is read on", || reading(0)["generation_tokens"] == 500);
    served.reload(
        &books,
        &format!("{}engine = {{ model_config = \"none.json\" }}\n", upstream("vllm-c", second.address)),
    );
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(get(&served, "/api/v1/engines").as_array().unwrap().len(), 2);
    let (code, log) = served.stop_and_read();
    assert_eq!(code, 0);
    assert!(log.contains("upstream `vllm-c`: engine.model_config: cannot read"), "{log}");
    let rows = books.json(&[
        "sql",
        "SELECT engine, count(DISTINCT period_start) AS runs FROM engines GROUP BY engine ORDER BY engine",
    ]);
    assert_eq!(
        rows,
        json!([{"engine": "vllm-a", "runs": 1}, {"engine": "vllm-b", "runs": 1}]),
        "the first went on as it was"
    );
}

#[test]
fn the_port_for_spans_is_open_and_an_open_connection_does_not_keep_the_server() {
    let books = Books::new();
    let address = free();
    let served = Served::start(&books, "", &format!("{POOL}otlp_grpc = \"{address}\"\n"));
    assert_eq!(get(&served, "/api/v1/health")["status"], "ok");
    let connection = std::net::TcpStream::connect(address).expect("somebody listens");
    assert_eq!(served.stop(), 0);
    drop(connection);
    assert!(std::net::TcpStream::connect(address).is_err(), "nobody listens any more");
}

#[test]
fn gpus_are_read_and_the_jobs_that_hold_them_are_found() {
    let books = Books::new();
    let page = |active: &str| {
        format!(
            "DCGM_FI_PROF_GR_ENGINE_ACTIVE{{gpu=\"0\",UUID=\"GPU-1\",modelName=\"NVIDIA A100\",Hostname=\"n1\",namespace=\"ml\",pod=\"train-7\"}} {active}\n\
             DCGM_FI_DEV_FB_USED{{gpu=\"0\",UUID=\"GPU-1\",modelName=\"NVIDIA A100\",Hostname=\"n1\",namespace=\"ml\",pod=\"train-7\"}} 1000\n\
             DCGM_FI_PROF_GR_ENGINE_ACTIVE{{gpu=\"1\",UUID=\"GPU-2\",modelName=\"NVIDIA A100\",Hostname=\"n1\",namespace=\"ml\",pod=\"mystery\"}} 0.5\n"
        )
    };
    let exporter = Metrics::serve(&page("0.5"));
    let telemetry = format!(
        "{POOL}gpu_exporters = [{{ url = \"http://{}/metrics\", pool = \"shared\" }}]\n\
         jobs = [{{ pod = \"train-*\", job = \"training\", context = {{ team = \"research\" }} }}]\n",
        exporter.address
    );
    let served = Served::start(&books, "", &telemetry);
    until("a reading", || get(&served, "/api/v1/gpus")[0]["gpus"] == 2);
    until("two looks", || exporter.asked() > 5);
    let source = get(&served, "/api/v1/gpus")[0].clone();
    assert!(source["unknown_holders"].to_string().contains("mystery"), "{source}");
    assert_eq!(served.stop(), 0);
    let rows =
        books.json(&["sql", "SELECT DISTINCT uuid, pool, engine_active_millionths AS active FROM gpus ORDER BY uuid"]);
    assert_eq!(rows[0], json!({"uuid": "GPU-1", "pool": "shared", "active": 500_000}), "{rows}");
    let rows = books.json(&[
        "sql",
        "SELECT job, team, source, count(DISTINCT period_start) AS runs FROM jobs GROUP BY job, team, source",
    ]);
    assert_eq!(rows, json!([{"job": "training", "team": "research", "source": "pod_labels", "runs": 1}]));
}

#[test]
fn spans_are_taken_with_the_admin_token_only() {
    let books = Books::new();
    let served = Served::start(&books, "token = { env = \"ADMIN\" }", POOL);
    let attribute = |key: &str, value: Value| json!({"key": key, "value": value});
    let body = json!({"resourceSpans": [{
        "resource": {"attributes": [attribute("service.name", json!({"stringValue": "app"}))]},
        "scopeSpans": [{"spans": [{
            "traceId": "5b8efff798038103d269b633813fc60c", "spanId": "eee19b7ec3c1b174", "name": "chat m", "kind": 3,
            "startTimeUnixNano": "1794000000000000000", "endTimeUnixNano": "1794000001000000000",
            "attributes": [
                attribute("gen_ai.operation.name", json!({"stringValue": "chat"})),
                attribute("gen_ai.request.model", json!({"stringValue": "m"})),
                attribute("gen_ai.response.id", json!({"stringValue": "chatcmpl-1"})),
                attribute("gen_ai.usage.input_tokens", json!({"intValue": "12"})),
                attribute("gen_ai.usage.output_tokens", json!({"intValue": "3"})),
                attribute("gen_ai.input.messages", json!({"stringValue": "a secret prompt"})),
            ],
        }]}],
    }]})
    .to_string();
    let head = |token: &str| format!("content-type: application/json\r\n{token}");
    let (status, _, answer) = served.ask("POST", "/v1/traces", &head(""), &body);
    assert_eq!(status, 401, "{answer}");
    let (status, _, answer) = served.ask("POST", "/v1/traces", &head("authorization: Bearer s3cret\r\n"), &body);
    assert_eq!(status, 200, "{answer}");
    let (_, _, page) = served.ask("GET", "/metrics", "authorization: Bearer s3cret\r\n", "");
    assert!(page.contains("farthing_span_calls_total 1"), "{page}");
    assert_eq!(served.stop(), 0);
    let rows =
        books.json(&["sql", "SELECT service, request_model, response_id, input_tokens, output_tokens FROM spans"]);
    let expected = json!([{
        "service": "app", "request_model": "m", "response_id": "chatcmpl-1", "input_tokens": 12, "output_tokens": 3,
    }]);
    assert_eq!(rows, expected);

    let off = Served::start(&books, "", &POOL.replace("nvml = false", "nvml = false\notlp = false"));
    assert_eq!(off.ask("POST", "/v1/traces", &head(""), &body).0, 404);
    assert_eq!(off.stop(), 0);
}
