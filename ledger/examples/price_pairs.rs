//! Prices usage from standard input, one JSON object a line, and writes one JSON object with the charge for each.
//!
//! `cargo run -p ledger --example price_pairs [-- --litellm model_prices_and_context_window.json]`
//!
//! A line is `{"provider", "model", "service_class", "usage": {"input": 1000, …}, "at": "2026-11-20T12:00:00Z"}`.
//! With `--litellm` an imported price map is asked before the base catalogue, and rejected models go to standard error.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;

use ledger::Charge;
use ledger::price::{PastUsage, PriceBook, import_litellm};
use serde::Serialize;

#[derive(Serialize)]
struct Line<'a> {
    charge: &'static str,
    reason: Option<&'static str>,
    list_usd: Option<String>,
    rates: Option<&'a str>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "price_pairs: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let book = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => PriceBook::base(),
        ["--litellm", file] => imported(file)?,
        _ => return Err("usage: price_pairs [--litellm FILE] < usages.jsonl".into()),
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    for (number, line) in (1..).zip(io::stdin().lock().lines()) {
        let past: PastUsage = serde_json::from_str(&line?).map_err(|error| format!("line {number}: {error}"))?;
        write_charge(&mut out, &book.charge(&past.query()))?;
    }
    Ok(out.flush()?)
}

fn imported(file: &str) -> Result<PriceBook, Box<dyn std::error::Error>> {
    let (imported, rejects) = import_litellm(&std::fs::read_to_string(file)?)?;
    for reject in rejects {
        writeln!(io::stderr(), "{}", serde_json::to_string(&reject)?)?;
    }
    Ok(PriceBook::base().with_imported(imported))
}

fn write_charge(out: &mut impl Write, charge: &Charge) -> io::Result<()> {
    let line = Line {
        charge: charge.name(),
        reason: charge.reason(),
        list_usd: charge.costs().map(|costs| costs.list_cost.to_string()),
        rates: charge.rates().map(ledger::ResolvedRates::as_str),
    };
    serde_json::to_writer(&mut *out, &line)?;
    out.write_all(b"\n")
}
