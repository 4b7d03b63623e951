//! Broken configurations: each gives one clear line with its place, and nothing else happens.

use crate::support::Books;

#[test]
fn a_broken_configuration_is_one_clear_line_with_its_place() {
    let books = Books::new();
    let upstream = "[[upstream]]\nname = \"a\"\nkind = \"openai\"\nbase_url = \"http://127.0.0.1:1\"\n";
    let pool = "[[pool]]\nname = \"shared\"\ngpu = \"A100\"\ngpus = 2\nusd_per_gpu_hour = \"2.50\"\n";
    let cases = [
        ("[gateway\n".to_owned(), "config.toml:1: "),
        ("[gatway]\n".to_owned(), "config.toml:1: unknown key `gatway`; did you mean `gateway`?"),
        (
            "[ledger]\nflush_every = 5\n".to_owned(),
            ":2: unknown key `ledger.flush_every`; did you mean `flush_every_ms`?",
        ),
        ("[admin]\nlissten = \"x\"\n".to_owned(), ":2: unknown key `admin.lissten`; did you mean `listen`?"),
        (upstream.replace("base_url", "baseurl"), ":4: unknown key `upstream.baseurl`; did you mean `base_url`?"),
        (
            format!("{upstream}[[route]]\nmodel = \"m\"\ntargets = [{{ upstream = \"a\", wieght = 3 }}]\n"),
            ":7: unknown key `route.wieght`; did you mean `weight`?",
        ),
        ("[[pool]]\nnam = \"a\"\n".to_owned(), ":2: unknown key `pool.nam`; did you mean `name`?"),
        ("[[discount]]\nprovidr = \"a\"\n".to_owned(), "providr"),
        (
            "[[price]]\nprovider = \"a\"\nmodel = \"b\"\ninptu = \"2.00\"\n".to_owned(),
            "unknown key `price.inptu`; did you mean `input`?",
        ),
        ("[gateway]\nbody_bytes_max = \"64 MB\"\n".to_owned(), ":2: gateway.body_bytes_max: "),
        ("[gateway]\nlisten = \"localhost\"\n".to_owned(), "write it like `listen = \"127.0.0.1:4000\"`"),
        (
            "[ledger]\ndurability = \"disk\"\n".to_owned(),
            ":2: ledger.durability: `disk` is not one of `process`, `power`",
        ),
        (format!("{upstream}api_key = \"sk-plain-secret\"\n"), "a secret is never written into the configuration"),
        ("[admin]\ntoken = \"plain-secret\"\n".to_owned(), ":2: admin.token: a secret is never written"),
        ("[gateway]\nlisten = \"0.0.0.0:4000\"\n".to_owned(), "admin.token is not set"),
        (upstream.replace("http://127.0.0.1:1", "http://169.254.169.254"), "no inference server"),
        (format!("{upstream}{upstream}"), "two upstreams are named `a`"),
        (format!("{pool}methd = \"tokens\"\n"), ":6: unknown key `pool.methd`; did you mean `method`?"),
        (
            format!("{pool}method = \"mood\"\n"),
            ":6: pool.method: `mood` is not one of `roofline`, `tokens`, `weighted-tokens`, `equal-time`",
        ),
        (
            format!("{pool}replicas = [{{ name = \"a\", gpu = 1 }}]\n"),
            ":6: unknown key `pool.gpu`; did you mean `gpus`?",
        ),
        (
            format!("{upstream}engine = {{ model_confg = \"x\" }}\n"),
            ":5: unknown key `upstream.model_confg`; did you mean `model_config`?",
        ),
        (
            format!("{upstream}[upstream.engine]\nrun = \"vllm\"\n"),
            ":6: unknown key `upstream.engine.run`; did you mean `runs`?",
        ),
        (
            format!("{upstream}[upstream.engine]\nruns = \"vlm\"\n"),
            ":6: upstream.engine.runs: `vlm` is not one of `vllm`, `sglang`",
        ),
        (
            format!("{upstream}engine = {{ adapters = [{{ model = \"x\", bytez = 1 }}] }}\n"),
            ":5: unknown key `upstream.bytez`; did you mean `bytes`?",
        ),
        (
            "[telemetry]\nscrape_ms = 5\n".to_owned(),
            "unknown key `telemetry.scrape_ms`; did you mean `scrape_every_ms`?",
        ),
        ("[settlement]\nlag = 5\n".to_owned(), "unknown key `settlement.lag`; did you mean `lag_ms`?"),
        ("[gpu]\nname = \"x\"\n".to_owned(), "gpu: there may be several; begin each with the line `[[gpu]]`"),
        (format!("{pool}peak_gpus = 3\n"), "peak_gpus = 3 is not within its 2 GPUs"),
    ];
    for (text, part) in cases {
        let file = books.write("config.toml", &text);
        for command in ["check", "serve"] {
            let ran = books.run(&[command, "--config", &file]);
            assert_ne!(ran.code, 0, "{text}: {ran:?}");
            assert!(ran.err.contains(part), "{text}\n{part}\n{ran:?}");
            assert!(!ran.err.contains("plain-secret") && !ran.out.contains("plain-secret"), "{ran:?}");
        }
    }
    assert!(!books.data().exists(), "a refused configuration leaves nothing behind");
}

#[test]
fn bytes_that_are_no_text_and_missing_files_are_said_so() {
    let books = Books::new();
    let file = books.write("config.toml", b"[gateway]\n\xff\xfe = 1\n");
    books.run(&["check", "--config", &file]).fails_with("config.toml:2: the file is not UTF-8 text");
    books.run(&["check", "--config", "/nowhere/at/all.toml"]).fails_with("cannot read /nowhere/at/all.toml");
}

#[test]
fn every_key_of_the_documentation_is_taken() {
    let books = Books::new();
    let text = r#"
[ledger]
durability = "power"
when_log_fails = "fail_closed"
flush_every_ms = 2000
[gateway]
listen = "127.0.0.1:4000"
header_bytes_max = 65536
body_bytes_max = 67108864
first_byte_ms_max = 600000
stream_idle_ms_max = 120000
request_ms_max = 3600000
on_client_abort = "drain"
drain_ms_max = 60000
drain_bytes_max = 16777216
hold_ms_max = 120000
hold_requests_max = 256
anonymous = "never"
[admin]
listen = "127.0.0.1:4001"
token = { env = "ADMIN" }
[[upstream]]
name = "openai"
kind = "openai"
base_url = "https://api.openai.com"
api_key = { file = "openai.key" }
provider = "openai"
[[upstream]]
name = "vllm-a"
kind = "vllm"
base_url = "http://127.0.0.1:8000"
pool = "shared"
deployment = "model-a"
[upstream.engine]
model_config = "model.json"
replica = "shared-0"
runs = "vllm"
metrics = "http://127.0.0.1:8000/metrics"
kv_tokens = 400000
block_tokens = 16
max_num_batched_tokens = 2048
kept_warm_for = { team = "search" }
forward_pass = "tcp://127.0.0.1:20380"
efficiencies = { compute = 0.5, bandwidth = 0.8, overhead_us = 500 }
adapters = [{ model = "my-adapter", bytes = 33554432, flop_per_token = 33554432 }]
[[upstream]]
name = "sliced"
kind = "openai"
base_url = "http://127.0.0.1:8001"
pool = "shared"
engine = { model_config = "model.json", replica = "shared-1", runs = "sglang", slice = "3g.40gb" }
[[route]]
model = "smart"
targets = [{ upstream = "openai", model = "gpt-4o", weight = 3 }, { upstream = "vllm-a", weight = 1 }]
fallbacks = [{ upstream = "openai", model = "gpt-4o-mini" }]
retries = 1
[[pool]]
name = "shared"
owner = "platform"
gpu = "A100"
gpus = 2
usd_per_gpu_hour = "2.50"
purchase = "reserved"
method = "weighted-tokens"
headroom = "airport"
waste = "spread"
sharing = "mps"
fixed = "tenant"
peak_gpus = 1.5
replicas = [{ name = "shared-0", gpus = 1 }, { name = "shared-1", gpus = 1 }]
[[gpu]]
name = "my-card"
bf16_tflops = 100
gb_per_s = 1000.5
memory_gb = 48
[telemetry]
scrape_every_ms = 5000
gpu_exporters = [{ url = "http://127.0.0.1:9400/metrics", pool = "shared" }]
nvml = false
nvml_pool = "shared"
otlp = true
otlp_grpc = "127.0.0.1:4317"
[settlement]
lag_ms = 15000
look_back_h = 2
[[price]]
provider = "openai"
model = "gpt-4o"
input = "2.00"
output = "8.00"
from = "2026-01-01"
[[discount]]
provider = "anthropic"
percent = "12.5"
"#;
    let file = books.write("config.toml", text);
    books.write("openai.key", "sk-1\n");
    books.write("model.json", LLAMA_8B);
    let run = |set: bool| {
        let mut command = books.command(&["check", "--config", &file, "--json"]);
        if set {
            command.env("ADMIN", "s3cret");
        }
        let output = command.output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (good, said) = run(true);
    assert!(good && !said.contains("sk-1") && !said.contains("s3cret"), "{said}");
    let (good, said) = run(false);
    assert!(!good && said.contains("environment variable ADMIN is not set"), "{said}");
}

/// The dimensions of Llama 3.1 8B.
const LLAMA_8B: &str = r#"{ "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16" }"#;

#[test]
fn engines_are_shown_with_what_is_known_of_them() {
    let books = Books::new();
    books.write("model.json", LLAMA_8B);
    let pools = "[[pool]]\nname = \"big\"\ngpu = \"H100\"\ngpus = 2\nusd_per_gpu_hour = \"3\"\n[[pool]]\nname = \"small\"\ngpu = \
                 \"toy\"\ngpus = 1\nusd_per_gpu_hour = \"1\"\n[[gpu]]\nname = \"toy\"\nbf16_tflops = 10\ngb_per_s = 100\nmemory_gb = 8\n";
    let upstream = |name: &str, pool: &str, engine: &str| {
        format!(
            "[[upstream]]\nname = \"{name}\"\nkind = \"vllm\"\nbase_url = \"http://127.0.0.1:9\"\npool = \"{pool}\"\nengine = {engine}\n"
        )
    };
    let text = [
        pools.to_owned(),
        upstream("a", "big", "{ model_config = \"model.json\" }"),
        upstream("b", "small", "{ model_config = \"model.json\" }"),
        upstream("c", "big", "{ metrics = \"none\" }"),
    ];
    let file = books.write("config.toml", text.concat());
    let ran = books.run(&["check", "--config", &file]);
    assert_eq!(ran.code, 0, "{ran:?}");
    for part in [
        "engine a on big-0 (2 x H100): 8.0 B parameters, 16.1 GB of weights fit in 160.0 GB",
        "vllm metrics at http://127.0.0.1:9/metrics",
        "engine b on small-0 (1 x toy): 8.0 B parameters, 16.1 GB of weights do NOT fit in 8.0 GB",
        "engine c on big-0 (2 x H100): its model's dimensions are unknown; its metrics are not read",
    ] {
        assert!(ran.out.contains(part), "{part}\n{ran:?}");
    }
    assert!(ran.err.contains("the model's weights take 16.1 GB and its GPUs have 8.0 GB"), "{ran:?}");
    assert!(ran.err.contains("upstream `c`: the model's dimensions are unknown"), "{ran:?}");
    let document = books.json(&["check", "--config", &file]);
    let fits: Vec<&serde_json::Value> =
        document["engines"].as_array().unwrap().iter().map(|engine| &engine["fits"]).collect();
    assert_eq!(fits, [&serde_json::Value::from(true), &false.into(), &serde_json::Value::Null]);
    assert_eq!(document["warnings"].as_array().unwrap().len(), 3);

    let file = books.write("broken.toml", text.concat().replace("model.json", "none.json"));
    books.run(&["check", "--config", &file]).fails_with("upstream `a`: engine.model_config: cannot read");
}
