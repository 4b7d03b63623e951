//! `farthing demo`: engines, gateway, ledger and traffic on loopback, and the bill at the end.

mod answer;
mod aside;
mod elastic;
mod engines;
mod outcome;
mod scaled;
mod traffic;
mod workload;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use gateway::keys::KeyRecord;
use gateway::{ModelRoute, RouteTarget};
use ledger::{Clock, ContextField};
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
use aside::{Aside, Bypassed};
use elastic::Elastic;
use engines::{Engines, POOLS};
use outcome::Outcome;
use workload::CONSUMERS;

/// Tasks that begin each second.
const TASKS_PER_SECOND: f64 = 2.0;

/// How often engines are read, and how long a minute waits for what comes late: shorter than usual, as is everything here.
const SCRAPE_EVERY_MS: u64 = 500;
const LAG_MS: u64 = 2_000;
/// How often the running minute is settled, so that the live page shows it.
const SETTLE_EVERY: Duration = Duration::from_secs(5);

/// Runs the demo.
///
/// # Errors
/// When a part cannot be started or the ledger cannot be written.
pub async fn run(app: &App, options: &Demo) -> anyhow::Result<ExitCode> {
    let data = data_dir(app)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let keys = make_keys(&data, &Loaded::default()).await?;
    let engine_options = engines::Options { seed: options.seed, ..engines::Options::default() };
    let engines = engines::start(Arc::clone(&clock), engine_options).await.context("the demo's engines")?;
    let elastic = elastic::start(Arc::clone(&clock), options.seed).await.context("the demo's replicas")?;
    let loaded = Loaded { config: configuration(&engines, &elastic)?, file: None };

    // From here on the pools are paid for, and their engines still load: that is what a cold start costs.
    let server = Server::start(&data, loaded, clock).await?;
    let (gateway, admin) = (format!("http://{}", server.gateway_address), format!("http://{}", server.admin_address));
    let live = format!("{admin}/");
    let serving = Serving::start(server);
    if !app.global.json {
        render::say(&banner(&gateway, &live, &data, options))?;
    }
    engines.ready().await?;
    let growing = (!options.headless).then(|| keep_settled(serving.settle_now.clone()));
    let (seen, bypassed) = tokio::join!(traffic(&gateway, &keys, options), beside(&engines, &admin, options));
    growing.inspect(JoinHandle::abort);
    let (seen, bypassed) = (seen?, bypassed?);
    // What the engines did last is read once more before the end.
    tokio::time::sleep(Duration::from_millis(2 * SCRAPE_EVERY_MS)).await;
    let totals = engines.totals().await.context("the engines' own counters")?;

    if options.headless {
        serving.stop().await?;
        let outcome = Outcome::of(&books::read(&data).await?, &seen, bypassed, totals).await?;
        return finish(app, &outcome, &data, None);
    }
    serving.settle_now.request().await?;
    let outcome = Outcome::of(&books::read(&data).await?, &seen, bypassed, totals).await?;
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
fn configuration(engines: &Engines, elastic: &Elastic) -> anyhow::Result<Config> {
    let mut config = Config::default();
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    (config.gateway.listen, config.admin.listen) = (any_port, any_port);
    config.ledger.flush_every_ms = 1_000;
    config.telemetry.scrape_every_ms = SCRAPE_EVERY_MS;
    // The demo's GPUs are simulated; this machine's own have nothing to do with them.
    config.telemetry.nvml = false;
    config.settlement.lag_ms = LAG_MS;
    for upstream in engines.upstreams() {
        for model in upstream.models {
            let target = RouteTarget { upstream: upstream.name.to_owned(), model: None, weight: 1 };
            let route =
                ModelRoute { model: (*model).to_owned(), targets: vec![target], retries: 1, ..ModelRoute::default() };
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
            engine: upstream.engine,
        });
    }
    for pool in POOLS {
        config.pool.push(PoolSection {
            name: pool.name.to_owned(),
            owner: Some(pool.owner.to_owned()),
            gpu: pool.gpu.to_owned(),
            gpus: pool.gpus,
            usd_per_gpu_hour: pool.usd_per_gpu_hour.parse().expect("the rates are decimal numbers, a test reads them"),
            peak_gpus: pool.peak_gpus,
            ..PoolSection::default()
        });
    }
    elastic.configure(&mut config)?;
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
        let mut seconds = tokio::time::interval(SETTLE_EVERY);
        loop {
            seconds.tick().await;
            if settle_now.request().await.is_err() {
                return;
            }
        }
    })
}

/// What uses the GPUs beside the gateway's requests, for as long as new tasks begin.
async fn beside(engines: &Engines, admin: &str, options: &Demo) -> anyhow::Result<Bypassed> {
    let seconds = Duration::from_secs(options.seconds);
    let engine = engines.base_url("vllm-b").context("there is no engine vllm-b")?;
    let aside = Aside::new();
    let (bypassed, job) = tokio::join!(
        aside.bypass(&engine, "model-b", seconds * 3 / 4),
        aside.job(admin, "dedicated", seconds / 4, seconds / 4)
    );
    job.context("the demo's training job")?;
    bypassed
}

async fn traffic(
    gateway: &str,
    keys: &BTreeMap<&'static str, String>,
    options: &Demo,
) -> anyhow::Result<traffic::Seen> {
    // Three quarters of the time is for new tasks, most of the rest for those that run.
    let seconds = Duration::from_secs(options.seconds).as_secs_f64();
    let mut tasks = workload::plan(options.seed, seconds * 0.75, TASKS_PER_SECOND);
    tasks.extend(workload::wave(options.seed, seconds * 0.75));
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
        "Farthing demo: three simulated engines, a fourth in one to four replicas as needed, two simulated providers, three teams, {} seconds of traffic\n\n  live page  {live}\n  gateway    \
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
