//! The configuration in the words of the crates that act on it.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context as _;
use gateway::{Limits, Settings, Upstream};
use ledger::Label;
use ledger::price::{Imported, Overrides, PriceBook, SELF_HOSTED};
use ledger::settle::PoolPolicy;

use super::fleet::PoolSection;
use super::sections::{Config, UpstreamSection};
use super::{Loaded, secret::SecretRef};

/// What the gateway is told, secrets read.
///
/// # Errors
/// When a secret cannot be read or an address is none, naming the upstream.
pub fn settings(loaded: &Loaded) -> anyhow::Result<Settings> {
    let config = &loaded.config;
    let upstreams = config
        .upstream
        .iter()
        .map(|section| upstream(loaded, section).with_context(|| format!("upstream `{}`", section.name)).map(Arc::new))
        .collect::<anyhow::Result<_>>()?;
    let gateway = &config.gateway;
    let settings = Settings {
        upstreams,
        routes: config.route.clone(),
        limits: Limits {
            header_bytes_max: gateway.header_bytes_max,
            body_bytes_max: gateway.body_bytes_max,
            first_byte_ms_max: gateway.first_byte_ms_max,
            stream_idle_ms_max: gateway.stream_idle_ms_max,
            request_ms_max: gateway.request_ms_max,
            drain_ms_max: gateway.drain_ms_max,
            drain_bytes_max: gateway.drain_bytes_max,
            hold_ms_max: gateway.hold_ms_max,
            hold_requests_max: gateway.hold_requests_max,
            ..Limits::default()
        },
        durability: config.ledger.durability,
        when_log_fails: config.ledger.when_log_fails,
        on_client_abort: gateway.on_client_abort,
        anonymous: gateway.anonymous,
    };
    settings.check().map_err(anyhow::Error::msg)?;
    Ok(settings)
}

fn upstream(loaded: &Loaded, section: &UpstreamSection) -> anyhow::Result<Upstream> {
    let base_url = section.base_url.parse().map_err(anyhow::Error::msg)?;
    let mut upstream = Upstream::new(&section.name, section.kind, base_url);
    let secret = |reference: &SecretRef| loaded.secret(reference).context("api_key");
    upstream.api_key = section.api_key.as_ref().map(secret).transpose()?.map(Into::into);
    match &section.provider {
        Some(provider) => upstream.provider = provider.as_str().into(),
        // Whatever protocol it speaks: what runs on GPUs of our own is priced by allocation.
        None if section.pool.is_some() => upstream.provider = SELF_HOSTED.into(),
        None => {}
    }
    upstream.pool = section.pool.as_deref().map(Into::into);
    upstream.deployment = section.deployment.as_deref().map(Into::into);
    Ok(upstream)
}

/// How each pool is divided.
#[must_use]
pub fn policies(config: &Config) -> BTreeMap<Label, PoolPolicy> {
    let of = |pool: &PoolSection| PoolPolicy { policy: pool.policy(), peak_gpus: pool.peak_gpus };
    config.pool.iter().map(|pool| (pool.name.as_str().into(), of(pool))).collect()
}

/// The prices and discounts that the configuration sets.
#[must_use]
pub fn overrides(config: &Config) -> Overrides {
    Overrides { price: config.price.clone(), discount: config.discount.clone() }
}

/// The price book: public prices, under an imported map, under the configuration's own.
#[must_use]
pub fn price_book(config: &Config, price_map: Option<&Imported>) -> PriceBook {
    let mut book = PriceBook::base();
    if let Some(map) = price_map {
        book = book.with_imported(map.clone());
    }
    if config.price.is_empty() && config.discount.is_empty() { book } else { book.with_overrides(overrides(config)) }
}
