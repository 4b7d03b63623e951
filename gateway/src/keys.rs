//! Virtual keys: shown once, kept as a keyed hash, looked up without touching a table.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ledger::{ContextField, KeyId, Label, Timestamp};
use serde::{Deserialize, Serialize};

/// What every key starts with, so that leaked ones can be found by a scanner.
pub const KEY_PREFIX: &str = "fk-";
/// Length of a key: the prefix and 32 bytes in base64url without padding.
const KEY_LENGTH: usize = KEY_PREFIX.len() + 43;

/// A key in clear. Printed once when it is made, then gone; `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct PlainKey(String);

impl PlainKey {
    /// The key itself.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PlainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PlainKey(fk-…)")
    }
}

/// The keyed BLAKE3 hash of a key, 32 bytes. Without the installation's secret it cannot be tested against guesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// Hashes a presented key under the installation's secret.
    #[must_use]
    pub fn of(key: &str, secret: &[u8; 32]) -> KeyHash {
        KeyHash(*blake3::keyed_hash(secret, key.as_bytes()).as_bytes())
    }
}

impl From<KeyHash> for String {
    fn from(hash: KeyHash) -> String {
        blake3::Hash::from_bytes(hash.0).to_hex().to_string()
    }
}

impl TryFrom<String> for KeyHash {
    type Error = String;
    fn try_from(text: String) -> Result<KeyHash, String> {
        let hash = blake3::Hash::from_hex(&text).map_err(|_| "a key's hash is 64 hex digits".to_owned())?;
        Ok(KeyHash(*hash.as_bytes()))
    }
}

/// Makes a key from 32 random bytes. The key in clear is shown once; only the hash is kept.
#[must_use]
pub fn mint(random: [u8; 32], secret: &[u8; 32]) -> (PlainKey, KeyHash) {
    let mut text = String::with_capacity(KEY_LENGTH);
    text.push_str(KEY_PREFIX);
    base64url(&random, &mut text);
    let hash = KeyHash::of(&text, secret);
    (PlainKey(text), hash)
}

fn base64url(bytes: &[u8], out: &mut String) {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0u32, |word, &byte| word << 8 | u32::from(byte)) << (8 * (3 - group.len()));
        for digit in 0..=group.len() {
            let index = (word >> (18 - 6 * digit)) & 63;
            out.push(char::from(DIGITS[index as usize]));
        }
    }
}

/// A source network, such as `10.0.0.0/8` or `2001:db8::/32`. A plain address is a network of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network {
    address: IpAddr,
    prefix_bits: u8,
}

impl Network {
    /// Whether `address` lies in it. IPv4 addresses mapped into IPv6 count as IPv4.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                same_prefix(u32::from(net).into(), u32::from(ip).into(), 32, self.prefix_bits)
            }
            (IpAddr::V6(net), IpAddr::V6(ip)) => same_prefix(net.into(), ip.into(), 128, self.prefix_bits),
            _ => false,
        }
    }
}

fn same_prefix(a: u128, b: u128, width: u32, prefix_bits: u8) -> bool {
    let ignored = width.saturating_sub(u32::from(prefix_bits));
    (a ^ b).checked_shr(ignored).unwrap_or(0) == 0
}

impl FromStr for Network {
    type Err = String;
    fn from_str(text: &str) -> Result<Network, String> {
        let wrong = || format!("`{text}` is not a network; write 10.0.0.0/8 or 2001:db8::/32");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = bits.map_or(Ok(most), |bits| bits.parse().map_err(|_| wrong()))?;
        if prefix_bits > most { Err(wrong()) } else { Ok(Network { address, prefix_bits }) }
    }
}

impl TryFrom<String> for Network {
    type Error = String;
    fn try_from(text: String) -> Result<Network, String> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> String {
        format!("{}/{}", network.address, network.prefix_bits)
    }
}

/// What is known about a virtual key. Empty lists do not restrict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// The key's public id.
    pub id: KeyId,
    /// The keyed hash of the key.
    pub hash: KeyHash,
    /// Who holds it.
    #[serde(default)]
    pub consumer: Option<Label>,
    /// The holder's team.
    #[serde(default)]
    pub team: Option<Label>,
    /// The application that uses it.
    #[serde(default)]
    pub application: Option<Label>,
    /// Where finance books its use.
    #[serde(default)]
    pub cost_centre: Option<Label>,
    /// Production, staging, …
    #[serde(default)]
    pub environment: Option<Label>,
    /// Which dimensions its holder may set by header.
    #[serde(default)]
    pub may_set: Vec<ContextField>,
    /// Models it may ask for, by the name the client uses; a trailing `*` matches any ending.
    #[serde(default)]
    pub models: Vec<Label>,
    /// Paths it may call, such as `/v1/chat/completions`; a trailing `*` matches any ending.
    #[serde(default)]
    pub routes: Vec<Label>,
    /// Upstreams, by name, that it may reach. Pass-through requests go to the first of them.
    #[serde(default)]
    pub upstreams: Vec<Label>,
    /// Networks it may be used from.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// Not valid before; the overlap of a rotation starts here.
    #[serde(default)]
    pub not_before: Option<Timestamp>,
    /// Not valid from this moment on.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// Withdrawn at this moment.
    #[serde(default)]
    pub revoked_at: Option<Timestamp>,
}

impl KeyRecord {
    /// A key that restricts and attributes nothing yet.
    #[must_use]
    pub fn new(id: KeyId, hash: KeyHash) -> KeyRecord {
        KeyRecord {
            id,
            hash,
            consumer: None,
            team: None,
            application: None,
            cost_centre: None,
            environment: None,
            may_set: Vec::new(),
            models: Vec::new(),
            routes: Vec::new(),
            upstreams: Vec::new(),
            networks: Vec::new(),
            not_before: None,
            expires_at: None,
            revoked_at: None,
        }
    }

    /// Whether the key counts at `now`.
    #[must_use]
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        self.not_before.is_none_or(|start| start <= now)
            && self.expires_at.is_none_or(|end| now < end)
            && self.revoked_at.is_none_or(|end| now < end)
    }

    /// Whether its holder may ask for `model`.
    #[must_use]
    pub fn allows_model(&self, model: &str) -> bool {
        allows(&self.models, model)
    }

    /// Whether its holder may call `path`.
    #[must_use]
    pub fn allows_route(&self, path: &str) -> bool {
        allows(&self.routes, path)
    }

    /// Whether its holder may be sent to the upstream of this name.
    #[must_use]
    pub fn allows_upstream(&self, name: &str) -> bool {
        allows(&self.upstreams, name)
    }

    /// Whether it may be used from `address`.
    #[must_use]
    pub fn allows_source(&self, address: IpAddr) -> bool {
        self.networks.is_empty() || self.networks.iter().any(|network| network.contains(address))
    }
}

fn allows(patterns: &[Label], name: &str) -> bool {
    patterns.is_empty()
        || patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => &**pattern == name,
        })
}

/// Every key the gateway knows, as one immutable snapshot.
pub struct KeyRing {
    secret: [u8; 32],
    by_hash: HashMap<KeyHash, Arc<KeyRecord>>,
}

impl KeyRing {
    /// A ring of `records` whose hashes were made with `secret`. Of two records with one hash the later counts.
    #[must_use]
    pub fn new(secret: [u8; 32], records: impl IntoIterator<Item = KeyRecord>) -> KeyRing {
        let by_hash = records.into_iter().map(|record| (record.hash, Arc::new(record))).collect();
        KeyRing { secret, by_hash }
    }

    /// The record of a presented key, whether or not it is valid now.
    ///
    /// The comparison is of keyed hashes, so its timing says nothing about the key.
    #[must_use]
    pub fn find(&self, presented: &str) -> Option<&Arc<KeyRecord>> {
        if !looks_like_key(presented) {
            return None;
        }
        self.by_hash.get(&KeyHash::of(presented, &self.secret))
    }

    /// Keys in the ring.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Whether there is no key at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing").field("keys", &self.by_hash.len()).finish_non_exhaustive()
    }
}

/// Whether `text` is meant to be one of our keys, known or not. Such text never goes to an upstream.
#[must_use]
pub fn looks_like_key(text: &str) -> bool {
    text.starts_with(KEY_PREFIX)
}

/// Whether a key of ours, of full length, stands anywhere in `bytes`: in a cookie, say, or behind a percent escape undone.
#[must_use]
pub(crate) fn contains_key(bytes: &[u8]) -> bool {
    let digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let is_key = |at: usize| bytes.get(at..at + KEY_LENGTH).is_some_and(|key| key.iter().all(digit));
    memchr::memmem::find_iter(bytes, KEY_PREFIX).any(is_key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: [u8; 32] = [7; 32];

    fn record(random: [u8; 32]) -> (PlainKey, KeyRecord) {
        let (key, hash) = mint(random, &SECRET);
        (key, KeyRecord::new(KeyId::new(Timestamp::from_micros(0), [1; 10]), hash))
    }

    #[test]
    fn a_minted_key_is_found_and_no_other() {
        let (key, record) = record([0xfb; 32]);
        assert_eq!(key.reveal().len(), KEY_LENGTH);
        assert!(key.reveal().starts_with("fk--_v7"), "base64url of fb fb fb");
        let ring = KeyRing::new(SECRET, [record.clone()]);
        assert_eq!(ring.find(key.reveal()).map(|found| found.id), Some(record.id));
        let mut wrong = key.reveal().to_owned();
        wrong.pop();
        assert!(ring.find(&wrong).is_none() && ring.find("sk-abc").is_none());
        assert!(KeyRing::new([8; 32], [record]).find(key.reveal()).is_none(), "another secret");
    }

    #[test]
    fn nothing_prints_a_secret() {
        let (key, record) = record([3; 32]);
        let ring = KeyRing::new(SECRET, [record]);
        let printed = format!("{key:?} {ring:?}");
        assert!(!printed.contains(&key.reveal()[3..]) && !printed.contains("7, 7"), "{printed}");
    }

    #[test]
    fn a_rotation_overlaps() {
        let at = Timestamp::from_micros;
        let (_, mut old) = record([1; 32]);
        let (_, mut new) = record([2; 32]);
        (old.expires_at, new.not_before) = (Some(at(20)), Some(at(10)));
        let valid = |micros| (old.is_valid_at(at(micros)), new.is_valid_at(at(micros)));
        assert_eq!(
            [valid(9), valid(10), valid(19), valid(20)],
            [(true, false), (true, true), (true, true), (false, true)]
        );
        new.revoked_at = Some(at(30));
        assert!(!new.is_valid_at(at(30)));
    }

    #[test]
    fn networks_match_by_prefix() {
        let cases = [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("0.0.0.0/0", "203.0.113.9", true),
            ("192.0.2.7", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.8", false),
            ("10.0.0.0/8", "::ffff:10.1.2.3", true),
            ("2001:db8::/32", "2001:db8:1::1", true),
            ("2001:db8::/32", "2001:db9::1", false),
            ("::/0", "10.0.0.1", false),
        ];
        for (network, address, inside) in cases {
            let network: Network = network.parse().unwrap();
            assert_eq!(network.contains(address.parse().unwrap()), inside, "{network:?} {address}");
        }
        for wrong in ["10.0.0.0/33", "ten", "10.0.0.0/", "::/129"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn scopes_match_whole_names_or_beginnings() {
        let (_, mut record) = record([1; 32]);
        assert!(record.allows_model("anything"));
        record.models = vec!["gpt-4o".into(), "claude-*".into()];
        assert!(record.allows_model("gpt-4o") && record.allows_model("claude-sonnet-4-5"));
        assert!(!record.allows_model("gpt-4o-mini"));
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<KeyRecord>(&json).unwrap(), record);
    }
}
