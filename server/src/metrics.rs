//! `/metrics`: what runs, what was metered and what it cost, as Prometheus text.

use std::collections::BTreeMap;
use std::fmt::Write;

use axum::extract::State as Shared;
use axum::http::header;
use axum::response::IntoResponse;

use ledger::{Line, Money};

use crate::api::{ApiError, State};
use crate::report::PoolBooks;
use crate::rows;
use crate::scaling::Shown;

/// Most providers that get a label of their own; the rest is `other`, so that no client can grow the page.
const PROVIDERS_MAX: usize = 50;
/// Pools that get labels of their own; the rest is `other`.
const POOLS_MAX: usize = 100;
/// Engines that get lines of their own.
const ENGINES_MAX: usize = 200;
/// Deployments that are scaled and get lines of their own.
const SCALED_MAX: usize = 200;

/// The page.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn page(Shared(state): Shared<State>) -> Result<impl IntoResponse, ApiError> {
    let mut text = state.cache.metrics(&state).await?;
    for (name, value, grows) in state.gateway.metrics().snapshot() {
        let (name, kind, help) = match grows {
            true => (format!("{name}_total"), "counter", "Counted by the gateway since it started."),
            false => (name.to_owned(), "gauge", "In the gateway now."),
        };
        single(&mut text, &format!("gateway_{name}"), kind, help, value);
    }
    let position = state.store.last_position().0;
    single(&mut text, "log_position", "counter", "Records that the log holds or held.", position);
    let waiting = state.store.unflushed();
    single(&mut text, "log_unflushed_records", "gauge", "Records that wait in the log for the tables.", waiting);
    single(&mut text, "lost_records_total", "counter", "Records that could not be written.", state.store.lost());
    sources(&mut text, &state);
    scaled(&mut text, &state.scaling.board.all());
    single(&mut text, "log_bytes", "gauge", "Bytes of the log's files on disk.", log_bytes(&state));
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}

/// How telemetry goes: each engine that is read, and what spans brought.
fn sources(text: &mut String, state: &State) {
    let engines = state.telemetry.engines();
    let now = state.clock.now();
    let families = [
        ("engine_up", "Whether the engine's metrics were read at the last try."),
        (
            "engine_reading_age_seconds",
            "Seconds since the engine's metrics were last read; absent when they never were.",
        ),
        ("engine_metrics_missing", "Names that were expected of the engine and are not there."),
    ];
    for (name, help) in families {
        let _ = writeln!(text, "# HELP farthing_{name} {help}\n# TYPE farthing_{name} gauge");
        for engine in engines.iter().take(ENGINES_MAX) {
            let age = engine.answered_at.map(|at| now.micros().saturating_sub(at.micros()).max(0) / 1_000_000);
            let value = match name {
                "engine_up" => Some(i64::from(engine.up)),
                "engine_reading_age_seconds" => age,
                _ => i64::try_from(engine.missing).ok(),
            };
            if let Some(value) = value {
                let _ = writeln!(text, "farthing_{name}{{engine=\"{}\"}} {value}", escaped(&engine.name));
            }
        }
    }
    let Some(receiver) = &state.spans else { return };
    let counts = receiver.counts();
    let spans = [
        ("spans_total", counts.spans, "Spans that were received."),
        ("span_calls_total", counts.calls, "Spans that were model calls and were kept."),
        ("spans_rejected_total", counts.rejected, "Spans of model calls that could not be used."),
        ("span_requests_refused_total", counts.refused_requests, "Requests with spans that were not taken."),
    ];
    for (name, value, help) in spans {
        single(text, name, "counter", help, value);
    }
}

/// One family of what is shown of a deployment that is scaled: its name, its type, what it says, and where it is.
type Family = (&'static str, &'static str, &'static str, fn(&Shown) -> Option<String>);

/// What is scaled, also for a Kubernetes HPA that reads external metrics. What is unknown has no line.
const SCALED: [Family; 12] = [
    ("desired_replicas", "gauge", "Replicas that should be there.", |one| one.desired.map(|count| count.to_string())),
    ("ready_replicas", "gauge", "Replicas that serve.", |one| Some(one.ready.to_string())),
    ("pending_replicas", "gauge", "Replicas on their way.", |one| Some(one.pending.to_string())),
    ("draining_replicas", "gauge", "Replicas that finish what they have.", |one| Some(one.draining.to_string())),
    ("static_replicas", "gauge", "Replicas of the plan without scaling.", |one| Some(one.static_replicas.to_string())),
    ("floor_replicas", "gauge", "Fewest replicas.", |one| Some(one.floor.to_string())),
    ("ceiling_replicas", "gauge", "Most replicas.", |one| Some(one.ceiling.to_string())),
    ("load_replicas", "gauge", "Arriving work in what one replica can do.", |one| one.load_milli().map(thousandths)),
    ("forecast_replicas", "gauge", "The same, expected for when a replica started now serves.", |one| {
        one.forecast_milli().map(thousandths)
    }),
    ("acting", "gauge", "Whether decisions are carried out.", |one| {
        Some(u8::from(one.mode == ledger::ScalingMode::Act).to_string())
    }),
    ("told_total", "counter", "Orders that were carried out since the server started.", |one| {
        Some(one.told.to_string())
    }),
    ("failures_total", "counter", "Tries to tell the actuator that failed.", |one| Some(one.failures.to_string())),
];

fn scaled(text: &mut String, deployments: &[Shown]) {
    if deployments.is_empty() {
        return;
    }
    for (name, kind, help, value) in SCALED {
        let _ = writeln!(text, "# HELP farthing_scaling_{name} {help}\n# TYPE farthing_scaling_{name} {kind}");
        for one in deployments.iter().take(SCALED_MAX) {
            let Some(value) = value(one) else { continue };
            let (pool, deployment) = (escaped(&one.pool), escaped(&one.deployment));
            let _ = writeln!(text, "farthing_scaling_{name}{{pool=\"{pool}\",deployment=\"{deployment}\"}} {value}");
        }
    }
}

fn thousandths(count: u64) -> String {
    ledger::decimal::format_scaled(count.into(), 3, 0)
}

/// The ledger's part: totals by provider. Asked for at most every few seconds.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn ledger(state: &State) -> anyhow::Result<String> {
    let session = state.store.session().await?;
    let query = "SELECT provider, sum(CASE WHEN attempt = 0 THEN 1 ELSE 0 END) AS requests, count(*) AS attempts, \
                 sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens, \
                 sum(CASE WHEN charge = 'unpriced' AND charge_reason <> 'self_hosted' THEN 1 ELSE 0 END) AS unpriced, \
                 sum(effective_cost) AS effective_cost FROM attempts GROUP BY provider ORDER BY attempts DESC, provider";
    let mut counts: BTreeMap<&str, Vec<(String, String)>> = BTreeMap::new();
    let mut seen = 0;
    for batch in session.sql(query).await? {
        for row in 0..batch.num_rows() {
            seen += 1;
            if seen > PROVIDERS_MAX {
                break;
            }
            let provider = rows::plain(rows::column(&batch, "provider")?, row)?;
            for name in ["requests", "attempts", "input_tokens", "output_tokens", "unpriced"] {
                let value = rows::count(rows::column(&batch, name)?, row)?.unwrap_or(0);
                counts.entry(name).or_default().push((provider.clone(), value.to_string()));
            }
            if let Some(cost) = rows::money(rows::column(&batch, "effective_cost")?, row)? {
                counts.entry("cost").or_default().push((provider, cost.to_string()));
            }
        }
    }
    let mut text = String::new();
    let families = [
        ("requests", "requests_total", "Requests in the ledger by the provider of their first attempt."),
        ("attempts", "attempts_total", "Attempts in the ledger."),
        ("unpriced", "unpriced_attempts_total", "Attempts whose cost is unknown, those on our own pools left out."),
        ("cost", "cost_usd_total", "What providers charge for the attempts in the ledger, USD."),
    ];
    for (key, name, help) in families {
        family(&mut text, name, help);
        for (provider, value) in counts.get(key).into_iter().flatten() {
            let _ = writeln!(text, "farthing_{name}{{provider=\"{}\"}} {value}", escaped(provider));
        }
    }
    family(&mut text, "tokens_total", "Tokens in the ledger.");
    for (key, direction) in [("input_tokens", "input"), ("output_tokens", "output")] {
        for (provider, value) in counts.get(key).into_iter().flatten() {
            let provider = escaped(provider);
            let _ =
                writeln!(text, "farthing_tokens_total{{provider=\"{provider}\",direction=\"{direction}\"}} {value}");
        }
    }
    pools(&mut text, &crate::report::booked(&session, ledger::Period::ALL).await?);
    Ok(text)
}

/// What is booked for pools: dollars by line and GPU-seconds. Pools come from the configuration; beyond a bound the rest is `other`.
fn pools(text: &mut String, pools: &[PoolBooks]) {
    let mut sums: BTreeMap<(&str, &str), (Money, Option<i64>)> = BTreeMap::new();
    for (place, books) in pools.iter().enumerate() {
        let pool = if place < POOLS_MAX { books.pool.as_str() } else { "other" };
        for line in &books.lines {
            let (cost, gpu_us) = sums.entry((pool, line.line)).or_insert((Money::ZERO, Some(0)));
            *cost += line.part.cost;
            *gpu_us = gpu_us.zip(line.part.gpu_us).map(|(one, two)| one.saturating_add(two));
        }
    }
    let families = [
        ("pool_cost_usd", "What is booked for the pool by line, USD. Corrections can lower it."),
        ("pool_idle_usd", "What of it stood idle, whatever for, USD."),
        ("pool_unallocated_usd", "What of it nothing has allocated yet, USD."),
        ("pool_gpu_seconds", "GPU-seconds that are booked by line; absent where a part is unknown."),
    ];
    for (name, help) in families {
        let _ = writeln!(text, "# HELP farthing_{name} {help}\n# TYPE farthing_{name} gauge");
        let wanted = |line: &str| match name {
            "pool_idle_usd" => Line::ALL.into_iter().any(|known| known.name() == line && known.is_idle()),
            "pool_unallocated_usd" => line == Line::Unallocated.name(),
            _ => true,
        };
        for ((pool, line), (cost, gpu_us)) in sums.iter().filter(|((_, line), _)| wanted(line)) {
            let value = match name {
                "pool_gpu_seconds" => gpu_us.map(|micros| ledger::decimal::format_scaled(micros.into(), 6, 1)),
                _ => Some(cost.to_string()),
            };
            if let Some(value) = value {
                let _ = writeln!(text, "farthing_{name}{{pool=\"{}\",line=\"{line}\"}} {value}", escaped(pool));
            }
        }
    }
}

fn family(text: &mut String, name: &str, help: &str) {
    let _ = writeln!(text, "# HELP farthing_{name} {help}\n# TYPE farthing_{name} counter");
}

fn single(text: &mut String, name: &str, kind: &str, help: &str, value: u64) {
    let _ = writeln!(text, "# HELP farthing_{name} {help}\n# TYPE farthing_{name} {kind}\nfarthing_{name} {value}");
}

/// A label's value as the format wants it, control characters left out.
fn escaped(value: &str) -> String {
    let clean: String = value.chars().filter(|c| !c.is_control()).take(100).collect();
    clean.replace('\\', "\\\\").replace('"', "\\\"")
}

/// Bytes of the log's segments; zero when the folder cannot be looked at.
fn log_bytes(state: &State) -> u64 {
    let Ok(entries) = std::fs::read_dir(state.store.dir().join("log")) else { return 0 };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .filter(|meta| meta.is_file())
        .map(|meta| meta.len())
        .sum()
}
