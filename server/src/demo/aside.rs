//! What uses the demo's GPUs beside the gateway's requests: a script that calls an engine directly, and a training job.
//!
//! Neither is hidden: the first becomes `unobserved`, known from the engine's own counters, the second says so itself and
//! becomes `job`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde_json::{Value, json};

/// Pause between the script's calls.
const CALL_EVERY: Duration = Duration::from_millis(600);
/// The job's name, the part of the pool that it uses, and who runs it.
const JOB: &str = "weekly-finetune";
const JOB_SHARE: f64 = 0.25;
const JOB_TEAM: &str = "research";

/// What went past the gateway.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Bypassed {
    /// Calls that were answered.
    pub calls: u64,
    /// Their input tokens, as the answers say.
    pub input_tokens: u64,
    /// Their output tokens, as the answers say.
    pub output_tokens: u64,
}

/// A client of its own.
pub struct Aside {
    http: Client<HttpConnector, Full<Bytes>>,
}

impl Aside {
    /// One that has not called anybody.
    pub fn new() -> Aside {
        Aside { http: Client::builder(TokioExecutor::new()).build_http() }
    }

    /// Calls `model` of the engine at `engine` directly, now and then, for `time`.
    ///
    /// # Errors
    /// When the engine cannot be reached. That it refuses a call now and then belongs to the demo.
    pub async fn bypass(&self, engine: &str, model: &str, time: Duration) -> anyhow::Result<Bypassed> {
        let question =
            json!({ "role": "user", "content": "what is the state of the queue and who has waited longest" });
        let body = json!({ "model": model, "messages": [question], "max_tokens": 96 });
        let mut bypassed = Bypassed::default();
        let mut pauses = tokio::time::interval(CALL_EVERY);
        let end = tokio::time::sleep(time);
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => return Ok(bypassed),
                _ = pauses.tick() => {}
            }
            // A call that has begun is seen to its end, so that its tokens are known.
            let (status, answer) = self.post(&format!("{engine}/v1/chat/completions"), &body).await?;
            if status.is_success() {
                let tokens = |name: &str| answer["usage"][name].as_u64().context("an answer without usage");
                bypassed.calls += 1;
                bypassed.input_tokens += tokens("prompt_tokens")?;
                bypassed.output_tokens += tokens("completion_tokens")?;
            }
        }
    }

    /// Runs a training job on `pool`: tells the API of its start, and after `time` of its end.
    ///
    /// # Errors
    /// When the API does not take it.
    pub async fn job(&self, admin: &str, pool: &str, after: Duration, time: Duration) -> anyhow::Result<()> {
        tokio::time::sleep(after).await;
        let start = json!({
            "event": "start", "job": JOB, "pool": pool, "share": JOB_SHARE, "context": { "team": JOB_TEAM },
        });
        self.said(admin, &start).await?;
        tokio::time::sleep(time).await;
        self.said(admin, &json!({ "event": "stop", "job": JOB, "pool": pool })).await
    }

    async fn said(&self, admin: &str, event: &Value) -> anyhow::Result<()> {
        let (status, answer) = self.post(&format!("{admin}/api/v1/jobs"), event).await?;
        if !status.is_success() {
            bail!("the job's event was answered with {status}: {answer}");
        }
        Ok(())
    }

    async fn post(&self, url: &str, body: &Value) -> anyhow::Result<(http::StatusCode, Value)> {
        let request = Request::post(url).header("content-type", "application/json");
        let request = request.body(Full::new(Bytes::from(body.to_string())))?;
        let response = self.http.request(request).await.with_context(|| format!("POST {url}"))?;
        let status = response.status();
        let body = response.into_body().collect().await.with_context(|| format!("the answer of {url}"))?.to_bytes();
        Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
    }
}
