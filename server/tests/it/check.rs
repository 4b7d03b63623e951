//! Broken configurations: each gives one clear line with its place, and nothing else happens.

use crate::support::Books;

#[test]
fn a_broken_configuration_is_one_clear_line_with_its_place() {
    let books = Books::new();
    let upstream = "[[upstream]]\nname = \"a\"\nkind = \"openai\"\nbase_url = \"http://127.0.0.1:1\"\n";
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
