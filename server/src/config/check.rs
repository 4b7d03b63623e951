//! What a well-formed configuration can still get wrong. A pure function of the configuration.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::check_fleet;
use super::place::nearest;
use super::sections::{Config, UpstreamSection};
use gateway::provider::Kind;

/// What holds outside the file and matters to it.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    /// Virtual keys that are valid now.
    pub keys: usize,
}

/// Everything that is wrong, one sentence each; empty when the server can start with it.
#[must_use]
pub fn check(config: &Config, standing: Standing) -> Vec<String> {
    let mut wrong = Vec::new();
    listeners(config, standing, &mut wrong);
    limits(config, &mut wrong);
    upstreams(config, &mut wrong);
    routes(config, &mut wrong);
    pools(config, &mut wrong);
    wrong.extend(check_fleet::check(config));
    wrong.extend(super::scale::check(config));
    prices(config, &mut wrong);
    wrong
}

fn listeners(config: &Config, standing: Standing, wrong: &mut Vec<String>) {
    let (gateway, admin) = (config.gateway.listen, config.admin.listen);
    if gateway == admin && gateway.port() != 0 {
        wrong.push(format!("gateway.listen and admin.listen are both {gateway}; give each its own port"));
    }
    for (key, address) in [("gateway.listen", gateway), ("admin.listen", admin)] {
        if address.ip().is_loopback() {
            continue;
        }
        if config.admin.token.is_none() {
            wrong.push(format!(
                "{key} = \"{address}\" is reachable from beyond this machine and admin.token is not set; \
                 set admin.token = {{ env = \"FARTHING_ADMIN_TOKEN\" }} or listen on 127.0.0.1"
            ));
        }
        if standing.keys == 0 {
            wrong.push(format!(
                "{key} = \"{address}\" is reachable from beyond this machine and there is no valid key; \
                 run `farthing key create` first or listen on 127.0.0.1"
            ));
        }
    }
}

fn limits(config: &Config, wrong: &mut Vec<String>) {
    let gateway = &config.gateway;
    let at_least = |name: &str, value: u64, least: u64, wrong: &mut Vec<String>| {
        if value < least {
            wrong.push(format!("{name} = {value} is too small; the least is {least}"));
        }
    };
    let bytes = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
    at_least("ledger.flush_every_ms", config.ledger.flush_every_ms, 10, wrong);
    at_least("gateway.header_bytes_max", bytes(gateway.header_bytes_max), 8_192, wrong);
    at_least("gateway.body_bytes_max", bytes(gateway.body_bytes_max), 1_024, wrong);
    at_least("gateway.first_byte_ms_max", gateway.first_byte_ms_max, 1, wrong);
    at_least("gateway.stream_idle_ms_max", gateway.stream_idle_ms_max, 1, wrong);
    at_least("gateway.request_ms_max", gateway.request_ms_max, 1, wrong);
}

fn upstreams(config: &Config, wrong: &mut Vec<String>) {
    let pools: BTreeSet<&str> = config.pool.iter().map(|pool| pool.name.as_str()).collect();
    let mut names = BTreeSet::new();
    for upstream in &config.upstream {
        let name = &upstream.name;
        if name.trim().is_empty() {
            wrong.push("an [[upstream]] has an empty name".to_owned());
        }
        if !names.insert(name.as_str()) {
            wrong.push(format!("two upstreams are named `{name}`"));
        }
        if let Err(reason) = base_url(upstream) {
            wrong.push(format!("upstream `{name}`: base_url {reason}"));
        }
        let Some(pool) = upstream.pool.as_deref() else {
            if upstream.deployment.is_some() && upstream.kind != Kind::Vllm {
                wrong.push(format!("upstream `{name}`: a deployment needs a pool that serves it"));
            }
            if upstream.engine.is_some() {
                wrong
                    .push(format!("upstream `{name}`: an engine needs a pool whose GPUs it uses; add pool = \"NAME\""));
            }
            continue;
        };
        if !matches!(upstream.kind, Kind::Vllm | Kind::OpenAi) {
            wrong.push(format!("upstream `{name}`: only kind = \"vllm\" or \"openai\" is served by a pool of our own"));
        }
        if !pools.contains(pool) {
            wrong.push(unknown("pool", pool, &pools, &format!("upstream `{name}`")));
        }
    }
}

fn base_url(upstream: &UpstreamSection) -> Result<(), String> {
    let text = &upstream.base_url;
    let uri = address(text, "use api_key with a reference instead")?;
    if uri.query().is_some() {
        return Err(format!("\"{text}\" has a query; leave it out"));
    }
    if uri.path().trim_end_matches('/').ends_with("/v1") {
        return Err(format!("\"{text}\" ends in /v1; leave that out, clients send it"));
    }
    Ok(())
}

/// Whether requests may be sent there. Link-local addresses hand out a cloud machine's own credentials.
pub(super) fn address(text: &str, instead_of_password: &str) -> Result<http::Uri, String> {
    let uri: http::Uri = text.parse().map_err(|error| format!("\"{text}\" is not a URL: {error}"))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(format!("\"{text}\" has no scheme; write https://HOST"));
    }
    let authority = uri.authority().ok_or_else(|| format!("\"{text}\" names no host"))?;
    if authority.as_str().contains('@') {
        return Err(format!("carries a user name or password; {instead_of_password}"));
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let forbidden = match host.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
        Ok(IpAddr::V4(ip)) => ip.is_link_local() || ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast(),
        Ok(IpAddr::V6(ip)) => ip.is_unicast_link_local() || ip.is_unspecified() || ip.is_multicast(),
        Err(_) => host.eq_ignore_ascii_case("metadata.google.internal"),
    };
    if forbidden { Err(format!("\"{text}\" is an address that no inference server has")) } else { Ok(uri) }
}

fn routes(config: &Config, wrong: &mut Vec<String>) {
    let upstreams: BTreeSet<&str> = config.upstream.iter().map(|upstream| upstream.name.as_str()).collect();
    let mut models = BTreeSet::new();
    for route in &config.route {
        let place = format!("route `{}`", route.model);
        if !models.insert(route.model.as_str()) {
            wrong.push(format!("two routes are for model `{}`", route.model));
        }
        if route.targets.is_empty() {
            wrong.push(format!("{place} has no targets"));
        }
        let weight: u64 = route.targets.iter().map(|target| u64::from(target.weight)).sum();
        if weight == 0 && !route.targets.is_empty() {
            wrong.push(format!("{place}: all weights are 0, so nothing could be chosen"));
        }
        if route.retries > 10 {
            wrong.push(format!("{place}: retries = {} is too many; the most is 10", route.retries));
        }
        for target in route.targets.iter().chain(&route.fallbacks) {
            if !upstreams.contains(target.upstream.as_str()) {
                wrong.push(unknown("upstream", &target.upstream, &upstreams, &place));
            }
        }
    }
}

fn pools(config: &Config, wrong: &mut Vec<String>) {
    let mut names = BTreeSet::new();
    for pool in &config.pool {
        if !names.insert(pool.name.as_str()) {
            wrong.push(format!("two pools are named `{}`", pool.name));
        }
        if pool.name.trim().is_empty() {
            wrong.push("a [[pool]] has an empty name".to_owned());
        }
        if pool.gpus == 0 {
            wrong.push(format!("pool `{}` has no GPUs; set gpus to 1 or more", pool.name));
        }
    }
}

fn prices(config: &Config, wrong: &mut Vec<String>) {
    if let Err(error) = super::settings::overrides(config).check() {
        wrong.push(error.to_string());
    }
}

pub(super) fn unknown(what: &str, name: &str, known: &BTreeSet<&str>, place: &str) -> String {
    let hint = match nearest(name, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => format!("there is no [[{what}]]"),
        None => format!("known are {}", known.iter().copied().collect::<Vec<_>>().join(", ")),
    };
    format!("{place}: there is no {what} named `{name}`; {hint}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    fn problems(text: &str, keys: usize) -> String {
        check(&parse(text).expect("well formed"), Standing { keys }).join("\n")
    }

    #[test]
    fn each_mistake_is_named_with_its_fix() {
        let upstream = |url: &str| format!("[[upstream]]\nname = \"a\"\nkind = \"openai\"\nbase_url = \"{url}\"");
        let cases = [
            ("[gateway]\nlisten = \"127.0.0.1:1\"\n[admin]\nlisten = \"127.0.0.1:1\"".to_owned(), "its own port"),
            (upstream("https://api.openai.com/v1"), "ends in /v1"),
            (upstream("ftp://x"), "write https://HOST"),
            (upstream("http://169.254.169.254/latest"), "no inference server"),
            (upstream("http://[fe80::1]:80"), "no inference server"),
            (upstream("http://user:pass@host"), "user name or password"),
            ([upstream("http://h"), upstream("http://h")].join("\n"), "two upstreams are named `a`"),
            ("[[route]]\nmodel = \"m\"\ntargets = []".to_owned(), "no targets"),
            (
                format!("{}\n[[route]]\nmodel = \"m\"\ntargets = [{{ upstream = \"b\" }}]", upstream("http://h")),
                "there is no upstream named `b`; did you mean `a`?",
            ),
            (
                "[[upstream]]\nname = \"a\"\nkind = \"vllm\"\nbase_url = \"http://h\"\npool = \"shard\"\n[[pool]]\nname = \
                 \"shared\"\ngpu = \"A100\"\ngpus = 0\nusd_per_gpu_hour = \"1\""
                    .to_owned(),
                "did you mean `shared`?\npool `shared` has no GPUs",
            ),
            ("[[price]]\nprovider = \"a\"\nmodel = \"b\"".to_owned(), "names no kind of token"),
            ("[ledger]\nflush_every_ms = 0".to_owned(), "ledger.flush_every_ms = 0 is too small"),
        ];
        for (text, part) in cases {
            let found = problems(&text, 0);
            assert!(found.contains(part), "{text}\ngave\n{found}");
        }
    }

    #[test]
    fn the_documented_configurations_are_right() {
        let pages = [include_str!("../../../docs/configuration.md"), include_str!("../../../README.md")];
        for page in pages {
            let (_, rest) = page.split_once("```toml\n").expect("a configuration");
            let (text, _) = rest.split_once("```").expect("its end");
            assert_eq!(problems(text, 0), "", "{text}");
        }
    }

    #[test]
    fn beyond_loopback_needs_a_token_and_a_key() {
        let open = "[gateway]\nlisten = \"0.0.0.0:4000\"\n";
        assert!(problems(open, 1).contains("admin.token is not set"));
        let with_token = format!("{open}[admin]\ntoken = {{ env = \"T\" }}");
        assert!(problems(&with_token, 0).contains("farthing key create"));
        assert_eq!(problems(&with_token, 1), "");
        assert!(problems("[admin]\nlisten = \"[::]:4001\"", 1).contains("admin.listen"));
    }
}
