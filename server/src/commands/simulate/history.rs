//! The ledger's own history as a trace: when its attempts arrived, with the tokens they had.

use anyhow::{Context as _, bail};
use arrow::array::{Array, AsArray};
use arrow::datatypes::TimestampMicrosecondType;
use fleet::sim::{Arrival, Prefixes, Trace};
use futures_util::StreamExt;
use ledger::{Period, Timestamp};
use store::StoreError;

use crate::commands::App;
use crate::{books, render, rows};

/// More requests than this are no history to hold in memory; they take 0.6 GB.
const REQUESTS_MAX: usize = 20_000_000;

/// Reads the attempts on GPU pools within a period, of these deployments or of all. Says what was left out of them.
///
/// # Errors
/// When there is no ledger, or nothing in it that could be played.
pub async fn trace(app: &App, period: Period, deployments: &[String]) -> anyhow::Result<(Trace, String)> {
    let data = app.global.data_dir();
    let store = books::read(&data).await?;
    let of = match deployments {
        [] => "pool IS NOT NULL".to_owned(),
        names => {
            let names: Vec<String> = names.iter().map(|name| rows::literal(name)).collect();
            format!("deployment IN ({})", names.join(", "))
        }
    };
    let query = format!(
        "SELECT received_at, input_tokens - coalesce(cache_read_tokens, 0) AS input, output_tokens AS output FROM attempts \
         WHERE {} AND {of} ORDER BY received_at, request_id, attempt",
        rows::within("received_at", period)
    );
    let mut batches = store.sql_stream(&query).await?;
    let mut read = Read::default();
    while let Some(batch) = batches.next().await {
        let batch = batch.map_err(StoreError::from)?;
        let times = rows::column(&batch, "received_at")?;
        let times =
            times.as_primitive_opt::<TimestampMicrosecondType>().context("a time is stored as something else")?;
        let (input, output) = (rows::column(&batch, "input")?, rows::column(&batch, "output")?);
        for row in 0..batch.num_rows() {
            let tokens = |column: &dyn Array| -> anyhow::Result<u32> {
                let count = rows::signed(column, row)?.unwrap_or(0);
                Ok(u32::try_from(count.max(0)).unwrap_or(u32::MAX))
            };
            read.take(Timestamp::from_micros(times.value(row)), tokens(input)?, tokens(output)?);
        }
        if read.arrivals.len() > REQUESTS_MAX {
            bail!("the ledger has more than {REQUESTS_MAX} attempts in this time; choose less with --from and --to");
        }
    }
    read.trace(&format!("the ledger in {}", data.display()), deployments)
}

/// What was read so far.
#[derive(Debug, Default)]
struct Read {
    start: Option<Timestamp>,
    arrivals: Vec<Arrival>,
    without_output: u64,
}

impl Read {
    fn take(&mut self, at: Timestamp, input_tokens: u32, output_tokens: u32) {
        // An attempt without an answer did no work that could be told.
        if output_tokens == 0 {
            self.without_output += 1;
            return;
        }
        let start = *self.start.get_or_insert(at);
        self.arrivals.push(Arrival {
            id: u64::try_from(self.arrivals.len()).unwrap_or(u64::MAX),
            at_us: at.micros_since(start),
            input_tokens: input_tokens.max(1),
            output_tokens,
            ..Arrival::default()
        });
    }

    fn trace(self, name: &str, deployments: &[String]) -> anyhow::Result<(Trace, String)> {
        let Some(start) = self.start else {
            let which = match deployments {
                [] => "attempts on GPU pools".to_owned(),
                names => format!("attempts on {}", names.join(", ")),
            };
            let empty = match self.without_output {
                0 => String::new(),
                some => format!(" with output ({} without)", render::count(some)),
            };
            bail!("{name} has no {which}{empty} in this time; name a trace with --trace");
        };
        let name = match deployments {
            [] => name.to_owned(),
            names => format!("{} of {name}", names.join(", ")),
        };
        let left_out = match self.without_output {
            0 => String::new(),
            some => format!("; {} without output left out", render::counted(some, "attempt")),
        };
        let note = format!("input tokens that a prompt cache served are not counted{left_out}");
        Ok((Trace::of_arrivals(&name, start, self.arrivals, Prefixes::default()), note))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_arrivals_since_the_first() {
        let mut read = Read::default();
        read.take(Timestamp::from_micros(5_000_000), 10, 0);
        read.take(Timestamp::from_micros(6_000_000), 0, 3);
        read.take(Timestamp::from_micros(8_500_000), 20, 4);
        let (trace, note) = read.trace("books", &[]).unwrap();
        assert!(note.contains("1 attempt without output"), "{note}");
        assert_eq!(trace.start(), Timestamp::from_micros(6_000_000));
        let arrivals: Vec<Arrival> = trace.arrivals().unwrap().map(Result::unwrap).collect();
        assert_eq!(
            arrivals.iter().map(|one| (one.at_us, one.input_tokens)).collect::<Vec<_>>(),
            [(0, 1), (2_500_000, 20)]
        );
    }

    #[test]
    fn nothing_to_play_is_said() {
        let mut read = Read::default();
        read.take(Timestamp::from_micros(1), 10, 0);
        let error = read.trace("the ledger in x", &["chat".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("no attempts on chat with output (1 without)") && error.contains("--trace"), "{error}");
    }
}
