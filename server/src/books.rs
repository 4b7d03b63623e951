//! Opening the ledger: for reading beside a running server, or as its one writer.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use ledger::price::{PriceBook, PriceQuery};
use ledger::{Charge, EstimateReason, Opened, TokenUsage, UsageQuality};
use object_store::local::LocalFileSystem;
use store::{ControlLog, Options, Recovery, Store, StoreError};

use crate::clock;
use crate::config::{Loaded, price_book};
use crate::governance::Governance;

/// The ledger for reading; a server may be writing to it.
///
/// # Errors
/// When the folder holds no ledger, saying how to make one.
pub async fn read(data: &Path) -> anyhow::Result<Store> {
    match Store::open_read_only(data, Options::default()).await {
        Err(StoreError::NoLedger { .. }) if data.is_file() => {
            anyhow::bail!("{} is a file; --data names the ledger's folder", data.display())
        }
        Err(StoreError::NoLedger { .. }) => anyhow::bail!(
            "there is no ledger in {}; run `farthing demo`, `farthing serve` or `farthing import` first, or name one with --data",
            data.display()
        ),
        other => other.with_context(|| format!("cannot open the ledger in {}", data.display())),
    }
}

/// The ledger for writing, keys and prices as they stand, and what the start had to repair.
///
/// # Errors
/// When another process writes to it, or it cannot be read.
pub async fn write(data: &Path, loaded: &Loaded) -> anyhow::Result<(Store, Governance, Recovery)> {
    let governance = standing(data).await?;
    let book = price_book(&loaded.config, governance.price_map.as_ref());
    let price = |opened: &Opened, usage: &TokenUsage| price_crashed(&book, opened, usage);
    let (store, recovery) = match Store::open(data, Options::default(), clock::now(), &price).await {
        Err(StoreError::Locked { holder, .. }) => anyhow::bail!(
            "{holder} writes to the ledger in {}; stop that server first, or use another --data",
            data.display()
        ),
        other => other.with_context(|| format!("cannot open the ledger in {}", data.display()))?,
    };
    Ok((store, governance, recovery))
}

/// Keys and prices as the control log says; nothing where there is no ledger yet.
///
/// # Errors
/// When there is a ledger and it cannot be read.
pub async fn standing(data: &Path) -> anyhow::Result<Governance> {
    match Store::open_read_only(data, Options::default()).await {
        Ok(store) => Governance::load(&store.control()).await,
        Err(StoreError::NoLedger { .. }) => Ok(Governance::default()),
        Err(error) => Err(error).with_context(|| format!("cannot open the ledger in {}", data.display())),
    }
}

/// An attempt that was open when the process died is charged for what is known of it, and says so.
fn price_crashed(book: &PriceBook, opened: &Opened, usage: &TokenUsage) -> Charge {
    let charge = book.charge(&PriceQuery {
        provider: &opened.route.provider,
        model: opened.route.model().map(|model| &**model),
        operation: opened.route.operation,
        service_class: opened.route.service_class,
        usage,
        quality: UsageQuality::Estimated,
        at: opened.received_at,
    });
    match charge {
        Charge::Priced { costs, rates } | Charge::Estimated { costs, rates, .. } => {
            Charge::Estimated { costs, rates, reason: EstimateReason::Crash }
        }
        unpriced @ Charge::Unpriced { .. } => unpriced,
    }
}

/// The control log of an existing ledger, for changes beside a running server: each is one put-if-absent.
///
/// # Errors
/// When there is no ledger.
pub async fn control(data: &Path) -> anyhow::Result<ControlLog> {
    // Opening for reading proves that the folder holds a ledger.
    read(data).await?;
    let objects = LocalFileSystem::new_with_prefix(data)
        .with_context(|| format!("cannot open the control log in {}", data.display()))?;
    Ok(ControlLog::new(Arc::new(objects), true))
}

/// As [`control`], making the ledger when there is none.
///
/// # Errors
/// When the folder cannot be written.
pub async fn control_or_new(data: &Path, loaded: &Loaded) -> anyhow::Result<ControlLog> {
    if let Err(StoreError::NoLedger { .. }) = Store::open_read_only(data, Options::default()).await {
        write(data, loaded).await?;
    }
    control(data).await
}
