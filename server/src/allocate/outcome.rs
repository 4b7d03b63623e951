//! An allocation as documents: totals, quality, the three prices of a token, and each request with its terms.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use ledger::allocate::fit::FitError;
use ledger::{AttemptId, Line, Money, Posting};
use serde_json::{Map, Value, json};
use store::parquet::Writer;

use super::Allocated;
use crate::rows;

/// Rows that are written at a time.
const CHUNK: usize = 65_536;

/// One request's bill.
#[derive(Debug)]
pub struct Bill<'a> {
    /// Its posting.
    pub posting: &'a Posting,
    /// The engine's name of it.
    pub name: &'a str,
    /// Its place in `requests.served`.
    pub place: usize,
    /// Seconds of the replica that it is charged, by the method: its part of the busy cost times the busy time.
    pub busy_s: f64,
    /// Seconds of idle replica that it would carry if idle followed busy. It is not charged for them.
    pub idle_s: f64,
    /// Seconds of the replica by term of the step-time model.
    pub share: ledger::allocate::share::Share,
    /// Seconds that it waited, preempted.
    pub preempted_s: f64,
    /// What it pays, by term of the method; adds up.
    pub terms: Vec<(&'static str, Money)>,
}

/// `$/M output tokens` in its three honest forms. What cannot be known is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerMillion {
    /// What requests paid.
    pub busy: Option<Money>,
    /// All that the GPUs cost.
    pub with_idle: Option<Money>,
    /// What it would be if the engine always had enough to do.
    pub full_load: Option<Money>,
}

impl Allocated {
    /// What all postings of a line add up to.
    #[must_use]
    pub fn line(&self, line: Line) -> Money {
        self.postings.iter().filter(|posting| posting.line == line).map(|posting| posting.costs.effective_cost).sum()
    }

    /// Tokens of the requests within the window, input and output, by how much of them lies in it.
    #[must_use]
    pub fn tokens(&self) -> [f64; 2] {
        let mut sums = [0.0, 0.0];
        for used in &self.used {
            for (sum, tokens) in sums.iter_mut().zip(used.tokens) {
                *sum += tokens;
            }
        }
        sums
    }

    /// What a million output tokens cost.
    #[must_use]
    pub fn per_million(&self) -> PerMillion {
        let [_, output] = self.tokens();
        let full_load = self.full_load.and_then(|load| {
            let hours = 1e6 / load.output_tokens_per_s / 3_600.0;
            let hourly = dollars(self.origin) / self.seconds.window * 3_600.0;
            money(hourly * hours)
        });
        let over = |amount: Money| (output >= 0.5).then(|| money(dollars(amount) / output * 1e6)).flatten();
        PerMillion { busy: over(self.line(Line::Request)), with_idle: over(self.origin), full_load }
    }

    /// Every request with a posting, in the order of their schedule.
    ///
    /// # Errors
    /// When an amount leaves the range of the ledger.
    pub fn bills(&self) -> anyhow::Result<Vec<Bill<'_>>> {
        let mut postings: BTreeMap<AttemptId, &Posting> = BTreeMap::new();
        for posting in self.postings.iter().filter(|posting| posting.line == Line::Request) {
            postings.extend(posting.attempt.map(|attempt| (attempt, posting)));
        }
        let places: BTreeMap<AttemptId, usize> =
            self.requests.served.iter().enumerate().map(|(place, one)| (one.attempt, place)).collect();
        let paid = dollars(self.line(Line::Request));
        let mut bills = Vec::with_capacity(self.used.len());
        for used in &self.used {
            let Some(&posting) = postings.get(&used.attempt) else { continue };
            let Some(&place) = places.get(&used.attempt) else { continue };
            let amount = posting.costs.effective_cost;
            let part = if paid > 0.0 { dollars(amount) / paid } else { 0.0 };
            bills.push(Bill {
                posting,
                name: &self.requests.names[place],
                place,
                busy_s: self.seconds.busy * part,
                idle_s: self.seconds.idle * part,
                share: used.share,
                preempted_s: used.preempted_s,
                terms: used.divide(amount, self.method)?,
            });
        }
        Ok(bills)
    }

    /// The whole outcome as one JSON document.
    ///
    /// # Errors
    /// When an amount leaves the range of the ledger.
    pub fn document(&self) -> anyhow::Result<Value> {
        let gpus = f64::from(self.constants.gpus);
        let lines: Map<String, Value> =
            Line::ALL.iter().map(|line| (line.name().to_owned(), json!(self.line(*line)))).collect();
        let posted: Money = self.postings.iter().map(|posting| posting.costs.effective_cost).sum();
        let [input, output] = self.tokens();
        let per_million = self.per_million();
        let bills = self.bills()?;
        let model = &self.constants.model;
        let known = self.limits.kv_tokens.map(|_| ());
        Ok(json!({
            "method": self.method.name(),
            "window": {
                "from": self.window.start,
                "to": self.window.end,
                "seconds": rounded(self.seconds.window, 6),
            },
            "requests": {
                "read": self.requests.served.len(),
                "within_window": self.used.len(),
                "duplicates": self.requests.duplicates,
                "refused": self.requests.refused,
                "first_refused": self.requests.first_refused.as_ref().map(|(line, reason)| json!({ "line": line, "reason": reason })),
                "without_context": self.requests.without_context,
            },
            "model": {
                "layers": model.shape.layers,
                "active_parameters": model.shape.active_parameters,
                "total_parameters": model.shape.total_parameters,
                "weight_bytes": model.weight_bytes,
                "kv_bytes_per_token": model.shape.kv_bytes_per_token(),
            },
            "gpu": { "name": self.constants.gpu.name, "gpus": self.constants.gpus, "source": self.constants.gpu.source },
            "constants": {
                "fitted": self.calibration.fit.is_some(),
                "eta_c": rounded(self.constants.efficiencies.compute, 6),
                "eta_b": rounded(self.constants.efficiencies.bandwidth, 6),
                "overhead_s": rounded(self.constants.efficiencies.overhead_s, 9),
                "overlap": self.constants.overlap,
                "observations": self.calibration.fit.map(|fit| fit.observations),
                "error": self.calibration.fit.map(|fit| error(fit.error)),
                "held_out_error": self.calibration.held_out.map(error),
            },
            "quality": {
                "score": rounded(self.calibration.quality.score, 6),
                "samples": self.calibration.samples,
                "running_error": self.calibration.quality.running_error.map(|error| rounded(error, 6)),
                "waiting_error": self.calibration.quality.waiting_error.map(|error| rounded(error, 6)),
                "kv_error": self.calibration.quality.kv_error.map(|error| rounded(error, 6)),
                "kv_tokens": self.limits.kv_tokens,
                // Without the cache's size preemptions are unknown, not none.
                "preempted_share": known.map(|()| rounded(self.calibration.quality.preempted_share, 6)),
                "preempted_requests": known.map(|()| self.calibration.preempted_requests),
                "preemptions": known.map(|()| self.calibration.preemptions),
            },
            "totals": { "origin_usd": self.origin, "posted_usd": posted, "closed": self.closed, "lines": lines },
            "gpu_seconds": {
                "all": rounded(self.seconds.window * gpus, 6),
                "busy": rounded(self.seconds.busy * gpus, 6),
                "waste": rounded(self.seconds.waste * gpus, 6),
                "idle": rounded(self.seconds.idle * gpus, 6),
            },
            "tokens": { "input": rounded(input, 3), "output": rounded(output, 3) },
            "usd_per_million_output_tokens": {
                "busy": per_million.busy,
                "with_idle": per_million.with_idle,
                "full_load": per_million.full_load,
            },
            "full_load": self.full_load.map(|load| json!({
                "batch": rounded(load.batch, 3),
                "step_s": rounded(load.step_s, 9),
                "output_tokens_per_s": rounded(load.output_tokens_per_s, 3),
            })),
            "postings": bills.iter().map(|bill| self.entry(bill)).collect::<Vec<_>>(),
        }))
    }

    fn entry(&self, bill: &Bill<'_>) -> Value {
        let gpus = f64::from(self.constants.gpus);
        let timeline = &self.requests.served[bill.place].timeline;
        let seconds = |from: ledger::Timestamp, until: ledger::Timestamp| {
            rounded(f64::from(u32::try_from(until.micros_since(from)).unwrap_or(u32::MAX)) * 1e-6, 6)
        };
        let terms: Map<String, Value> =
            bill.terms.iter().map(|(name, amount)| ((*name).to_owned(), json!(amount))).collect();
        json!({
            "posting_id": bill.posting.id,
            "request_id": bill.posting.attempt.map(|attempt| attempt.request),
            "engine_request_id": bill.name,
            "context": bill.posting.context,
            "line": bill.posting.line.name(),
            "policy": bill.posting.policy,
            "tier": bill.posting.tier,
            "usd": bill.posting.costs.effective_cost,
            "terms_usd": terms,
            "busy_gpu_s": rounded(bill.busy_s * gpus, 9),
            "idle_gpu_s_not_charged": rounded(bill.idle_s * gpus, 9),
            "model_gpu_s": {
                "overhead": rounded(bill.share.overhead_s * gpus, 9),
                "weights": rounded(bill.share.weights_s * gpus, 9),
                "kv": rounded(bill.share.memory_s * gpus, 9),
                "compute": rounded(bill.share.compute_s * gpus, 9),
            },
            "input_tokens": timeline.input_tokens,
            "output_tokens": timeline.output_tokens,
            "waiting_s": seconds(timeline.arrived, timeline.scheduled),
            "prefill_s": seconds(timeline.scheduled, timeline.first_token),
            "decode_s": seconds(timeline.first_token, timeline.last_token),
            "preempted_s": rounded(bill.preempted_s, 6),
        })
    }

    /// Writes all postings, lines of no request included, with the columns of the `postings` table.
    ///
    /// # Errors
    /// When the file's ending is neither `.parquet` nor `.jsonl`, or it cannot be written.
    pub fn write(&self, file: &Path) -> anyhow::Result<()> {
        let cannot = || format!("cannot write {}", file.display());
        let create = || std::fs::File::create(file).with_context(cannot);
        match Ending::of(file)? {
            Ending::Parquet => {
                let columns = store::tables::schema::TableName::Postings.schema();
                let mut writer = Writer::create(create()?, columns)?;
                for chunk in self.postings.chunks(CHUNK) {
                    writer.write(&store::tables::postings_rows(chunk)?)?;
                }
                writer.finish()?;
            }
            Ending::JsonLines => {
                use std::io::Write;
                let mut out = std::io::BufWriter::new(create()?);
                for chunk in self.postings.chunks(CHUNK) {
                    let batch = store::tables::postings_rows(chunk)?;
                    let schema = batch.schema();
                    for row in 0..batch.num_rows() {
                        let mut document = Map::new();
                        for (field, column) in schema.fields().iter().zip(batch.columns()) {
                            document.insert(field.name().clone(), rows::json(column, row)?);
                        }
                        writeln!(out, "{}", Value::Object(document)).with_context(cannot)?;
                    }
                }
                out.flush().with_context(cannot)?;
            }
        }
        Ok(())
    }
}

/// How postings can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Columns.
    Parquet,
    /// One object a line.
    JsonLines,
}

impl Ending {
    /// What a file's name asks for.
    ///
    /// # Errors
    /// When it asks for neither.
    pub fn of(file: &Path) -> anyhow::Result<Ending> {
        match file.extension().and_then(|ending| ending.to_str()) {
            Some("parquet") => Ok(Ending::Parquet),
            Some("jsonl") => Ok(Ending::JsonLines),
            _ => bail!("{} ends neither in .parquet nor in .jsonl", file.display()),
        }
    }
}

fn error(error: FitError) -> Value {
    json!({ "median": rounded(error.median, 6), "p95": rounded(error.p95, 6), "bias": rounded(error.bias, 6) })
}

/// Fewer digits than a float has: the last ones differ between machines.
fn rounded(value: f64, places: i32) -> f64 {
    let scale = 10f64.powi(places);
    (value * scale).round() / scale
}

#[expect(clippy::cast_precision_loss, reason = "for ratios and prices that are shown, never booked")]
fn dollars(amount: Money) -> f64 {
    amount.pico() as f64 * 1e-12
}

/// A price that is shown, never booked.
#[expect(clippy::cast_possible_truncation, reason = "limited to what fits")]
fn money(dollars: f64) -> Option<Money> {
    (dollars.is_finite() && dollars.abs() < 1e15).then(|| Money::from_pico((dollars * 1e12).round() as i128))
}
