//! The admin listener: token, shapes, page and metrics.

use serde_json::Value;

use crate::support::{Books, Served, ask};

fn books_with_a_trace() -> Books {
    let books = Books::new();
    let trace = "TIMESTAMP,ContextTokens,GeneratedTokens\n2026-11-02 10:00:00,1000,100\n2026-11-02 10:00:01,<b>,1\n";
    let file = books.write("conv.csv", trace);
    books.json(&["import", "azure-llm-trace", &file, "--model", "gpt-4o"]);
    books
}

fn json(body: &str) -> Value {
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"))
}

#[test]
fn with_a_token_every_figure_needs_it() {
    let books = books_with_a_trace();
    let served = Served::start(&books, "token = { env = \"ADMIN\" }", "");
    let token = "authorization: Bearer s3cret\r\n";
    let paths = [
        "/api/v1/report?by=team,model",
        "/api/v1/attempts",
        "/api/v1/postings",
        "/api/v1/pools",
        "/api/v1/capacity",
        "/api/v1/jobs",
        "/api/v1/engines",
        "/api/v1/gpus",
        "/api/v1/verify",
        "/api/v1/keys",
        "/api/v1/prices?model=gpt-4o",
        "/api/v1/live",
        "/api/v1/openapi.json",
        "/api/v1/health",
        "/metrics",
    ];
    for path in paths {
        for wrong in [
            "",
            "authorization: Bearer s3cre\r\n",
            "authorization: Bearer s3cretx\r\n",
            "authorization: Basic s3cret\r\n",
        ] {
            let (status, head, body) = served.ask("GET", path, wrong, "");
            assert_eq!(status, 401, "{path} {wrong}");
            assert!(head.contains("www-authenticate: bearer"), "{head}");
            assert_eq!(json(&body)["error"]["code"], "unauthorized");
        }
        let (status, _, body) = served.ask("GET", path, token, "");
        assert_eq!(status, 200, "{path}: {body}");
    }
    let (status, head, page) = served.ask("GET", "/", "", "");
    assert_eq!(status, 200);
    assert!(head.contains("content-security-policy: default-src 'none'; script-src 'self'"), "{head}");
    assert!(!page.contains("://") && !page.contains("<script>"), "the page brings everything itself");
    assert_eq!(served.ask("GET", "/health", "", "").0, 200);

    let (_, _, metrics) = served.ask("GET", "/metrics", token, "");
    assert!(metrics.contains("farthing_tokens_total{provider=\"openai\",direction=\"input\"} 1000"), "{metrics}");
    assert!(metrics.contains("farthing_cost_usd_total{provider=\"openai\"} 0.0035"), "{metrics}");
    assert_eq!(served.stop(), 0);
}

#[test]
fn without_a_token_this_machine_asks_by_its_own_name_only() {
    let books = books_with_a_trace();
    let served =
        Served::start(&books, "", "[[pool]]\nname = \"shared\"\ngpu = \"A100\"\ngpus = 2\nusd_per_gpu_hour = \"2.50\"");
    let (status, _, body) = served.ask("GET", "/api/v1/report?by=model", "", "");
    let report = json(&body);
    assert_eq!((status, &report["total"]["effective_cost"]), (200, &"0.0035".into()), "{body}");
    assert_eq!(served.ask("GET", "/api/v1/report", "host: evil.example\r\n", "").0, 403);

    let wrong = [
        ("GET", "/api/v1/report?by=teem", "", "did you mean `team`?"),
        ("GET", "/api/v1/report?form=2026", "", "form"),
        ("GET", "/api/v1/report?from=yesterday", "", "is not a time"),
        ("GET", "/api/v1/attempts?limit=0", "", "limit is from 1 to 1000"),
        ("GET", "/api/v1/attempts/x", "", "is not a request id"),
        ("POST", "/api/v1/sql", "{\"query\": \"DROP TABLE attempts\"}", ""),
        ("POST", "/api/v1/sql", "{\"quer\": 1}", "quer"),
        ("POST", "/api/v1/sql", "{", ""),
    ];
    for (method, path, body, part) in wrong {
        let (status, _, answer) = served.ask(method, path, "content-type: application/json\r\n", body);
        assert_eq!(status, 400, "{path} {body}: {answer}");
        let error = &json(&answer)["error"];
        assert_eq!(error["code"], "bad_request");
        assert!(error["message"].as_str().unwrap().contains(part), "{answer}");
    }
    let (status, _, body) = served.ask("GET", "/api/v1/nothing", "", "");
    assert_eq!((status, &json(&body)["error"]["code"]), (404, &"not_found".into()));

    let query = "{\"query\": \"SELECT request_id, effective_cost FROM attempts\"}";
    let (_, _, body) = served.ask("POST", "/api/v1/sql", "content-type: application/json\r\n", query);
    let rows = json(&body);
    assert_eq!(rows["rows"][0]["effective_cost"], "0.0035");
    let id = rows["rows"][0]["request_id"].as_str().unwrap();
    let (_, _, body) = served.ask("GET", &format!("/api/v1/attempts/{id}"), "", "");
    assert_eq!(json(&body)["effective_cost"], "0.0035");

    // Commands that read work beside the server, one that writes says why it does not.
    assert_eq!(books.json(&["report"])["total"]["requests"], 1);
    let file = books.write("more.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2026-11-02 10:00:00,1,1\n");
    books.run(&["import", "azure-llm-trace", &file]).fails_with("writes to the ledger in");

    // A key made beside the server is known to it within moments, and from then on one is needed.
    let made = books.json(&["key", "create", "--consumer", "a", "--team", "b"]);
    let key = format!("authorization: Bearer {}\r\n", made["key"].as_str().unwrap());
    let refused = (0..50).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        ask(served.gateway, "GET", "/v1/models", "", "").0 == 401
    });
    assert!(refused, "the gateway still takes anonymous requests");
    assert_ne!(ask(served.gateway, "GET", "/v1/models", &key, "").0, 401);

    assert_eq!(served.stop(), 0);
    let report = books.json(&["report", "--by", "pool,line"]);
    assert_ne!(report["unallocated_pool_cost"], "0.00", "the pool ran while the server did: {report}");
    assert_eq!(books.json(&["verify"])["clean"], true);
}
