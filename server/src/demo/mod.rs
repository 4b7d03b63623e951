//! `farthing demo`: engines, gateway, ledger and traffic on loopback, and the bill at the end.

mod answer;
mod engines;
mod outcome;
mod traffic;
mod workload;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use gateway::keys::KeyRecord;
use gateway::{ModelRoute, RouteTarget};
use ledger::{Clock, ContextField, Period};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::cli::Demo;
use crate::clock::{self, SystemClock};
use crate::commands::serve::told_to_stop;
use crate::commands::{App, FOUND_WRONG, key, progress};
use crate::config::{Config, Loaded, PoolSection, UpstreamSection};
use crate::governance::{put_key, random};
use crate::wiring::{Server, SettleNow, Shutdown};
use crate::{books, render};
use engines::Engines;
use outcome::Outcome;
use workload::CONSUMERS;

/// Tasks that begin each second.
const TASKS_PER_SECOND: f64 = 2.0;

/// Runs the demo.
///
/// # Errors
/// When a part cannot be started or the ledger cannot be written.
pub async fn run(app: &App, options: &Demo) -> anyhow::Result<ExitCode> {
    let data = data_dir(app)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let engine_options = engines::Options { seed: options.seed, ..engines::Options::default() };
    let engines = engines::start(Arc::clone(&clock), engine_options).await.context("the demo's engines")?;
    let loaded = Loaded { config: configuration(&engines)?, file: None };
    let keys = make_keys(&data, &loaded).await?;

    let server = Server::start(&data, loaded, clock).await?;
    let (gateway, live) = (format!("http://{}", server.gateway_address), format!("http://{}/", server.admin_address));
    let serving = Serving::start(server);
    if !app.global.json {
        render::say(&banner(&gateway, &live, &data, options))?;
    }
    let growing = keep_settled(serving.settle_now.clone());
    let seen = traffic(&gateway, &keys, options).await;
    growing.abort();
    let seen = seen?;
    let totals = engines.totals().await.context("the engines' own counters")?;

    if options.headless {
        serving.stop().await?;
        let outcome = Outcome::of(&books::read(&data).await?, &seen, totals).await?;
        return finish(app, &outcome, &data, None);
    }
    serving.settle_now.request().await?;
    let outcome = Outcome::of(&books::read(&data).await?, &seen, totals).await?;
    let code = finish(app, &outcome, &data, Some(&live))?;
    told_to_stop().await;
    serving.stop().await?;
    Ok(code)
}

/// The folder of the demo's ledger: a new one, because the bill is of this demo alone.
fn data_dir(app: &App) -> anyhow::Result<PathBuf> {
    match &app.global.data {
        Some(data) if data.join("log").exists() || data.join("attempts").exists() => {
            bail!("{} holds a ledger already; the demo makes its own, name an empty folder", data.display())
        }
        Some(data) => Ok(data.clone()),
        None => {
            let name = format!("farthing-demo-{}", blake3::Hash::from_bytes(random::<32>()?).to_hex().split_at(8).0);
            Ok(std::env::temp_dir().join(name))
        }
    }
}

/// The configuration that a user would write for these engines.
fn configuration(engines: &Engines) -> anyhow::Result<Config> {
    let mut config = Config::default();
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    (config.gateway.listen, config.admin.listen) = (any_port, any_port);
    config.ledger.flush_every_ms = 1_000;
    for upstream in engines.upstreams() {
        for model in upstream.models {
            let target = RouteTarget { upstream: upstream.name.to_owned(), model: None, weight: 1 };
            let route =
                ModelRoute { model: (*model).to_owned(), targets: vec![target], fallbacks: Vec::new(), retries: 1 };
            config.route.push(route);
        }
        config.upstream.push(UpstreamSection {
            name: upstream.name.to_owned(),
            kind: upstream.kind.parse().map_err(|_| anyhow::anyhow!("`{}` is no kind of upstream", upstream.kind))?,
            base_url: upstream.base_url,
            api_key: None,
            provider: Some(upstream.provider.to_owned()),
            pool: upstream.pool.map(str::to_owned),
            deployment: upstream.deployment.map(str::to_owned),
        });
    }
    let now = clock::now();
    for pool in engines::capacity(Period { start: now, end: now }, now) {
        config.pool.push(PoolSection {
            name: pool.pool.to_string(),
            owner: pool.owner.as_deref().map(str::to_owned),
            gpu: pool.gpu.to_string(),
            gpus: pool.gpus,
            usd_per_gpu_hour: pool.rate,
            purchase: pool.purchase,
        });
    }
    Ok(config)
}

/// One key for each consumer, in clear only in this process.
async fn make_keys(data: &Path, loaded: &Loaded) -> anyhow::Result<BTreeMap<&'static str, String>> {
    let control = books::control_or_new(data, loaded).await?;
    let mut keys = BTreeMap::new();
    for consumer in &CONSUMERS {
        let now = clock::now();
        let (plain, record) = key::minted(data, now, |fresh| KeyRecord {
            consumer: Some(consumer.name.into()),
            team: consumer.team.map(Into::into),
            application: consumer.application.map(Into::into),
            cost_centre: consumer.cost_centre.map(Into::into),
            may_set: ContextField::ALL.to_vec(),
            ..fresh
        })?;
        put_key(&control, &record, "demo", now).await?;
        keys.insert(consumer.name, plain.reveal().to_owned());
    }
    Ok(keys)
}

/// The running server and its switches.
struct Serving {
    switch: watch::Sender<bool>,
    settle_now: SettleNow,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Serving {
    fn start(server: Server) -> Serving {
        let (switch, shutdown) = Shutdown::new();
        let settle_now = server.settle_now();
        Serving { switch, settle_now, task: tokio::spawn(server.run(shutdown)) }
    }

    async fn stop(self) -> anyhow::Result<()> {
        let _ = self.switch.send(true);
        self.task.await?
    }
}

/// Settles every few seconds, so that the live page shows the pools' cost before their first minute is over.
fn keep_settled(settle_now: SettleNow) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut seconds = tokio::time::interval(std::time::Duration::from_secs(5));
        loop {
            seconds.tick().await;
            if settle_now.request().await.is_err() {
                return;
            }
        }
    })
}

async fn traffic(
    gateway: &str,
    keys: &BTreeMap<&'static str, String>,
    options: &Demo,
) -> anyhow::Result<traffic::Seen> {
    // Three quarters of the time is for new tasks, most of the rest for those that run.
    let seconds = std::time::Duration::from_secs(options.seconds).as_secs_f64();
    let tasks = workload::plan(options.seed, seconds * 0.75, TASKS_PER_SECOND);
    let bar = progress("{msg} {wide_bar} {pos}/{len} tasks");
    bar.set_length(u64::try_from(tasks.len()).unwrap_or(u64::MAX));
    bar.set_message("traffic");
    let shown = bar.clone();
    let on_progress: traffic::OnProgress = Arc::new(move |progress| {
        shown.set_position(progress.tasks_done);
        shown.set_message(format!("{} requests, {} tokens out", progress.calls_sent, progress.output_tokens));
    });
    let behave = traffic::Options {
        start_within_s: seconds * 0.75,
        drain_s: (seconds * 0.2).max(1.0),
        ..traffic::Options::default()
    };
    let seen = traffic::run(gateway, keys, tasks, behave, on_progress).await.context("the demo's traffic")?;
    bar.finish_and_clear();
    Ok(seen)
}

fn banner(gateway: &str, live: &str, data: &Path, options: &Demo) -> String {
    format!(
        "Farthing demo: three simulated engines and two simulated providers, three teams, {} seconds of traffic\n\n  live page  {live}\n  gateway    \
         {gateway}\n  ledger     {}\n",
        options.seconds,
        data.display()
    )
}

fn finish(app: &App, outcome: &Outcome, data: &Path, live: Option<&str>) -> anyhow::Result<ExitCode> {
    if app.global.json {
        render::say_json(&outcome.document(data))?;
    } else {
        render::say(&outcome.text())?;
        render::say(&hints(outcome, data))?;
        if let Some(live) = live {
            render::say(&format!("the live page is at {live}; Ctrl-C stops everything"))?;
        }
    }
    Ok(if outcome.is_good() { ExitCode::SUCCESS } else { FOUND_WRONG })
}

fn hints(outcome: &Outcome, data: &Path) -> String {
    let data = data.display();
    let request = outcome.some_request.as_deref().unwrap_or("REQUEST_ID");
    format!(
        "\nnext:\n  farthing --data {data} report --by team,feature --unit task\n  farthing --data {data} explain {request}\n  \
         farthing --data {data} sql 'SELECT model, count(*) FROM attempts GROUP BY model'\n  farthing --data {data} verify\n"
    )
}
