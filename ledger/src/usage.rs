//! Token usage in disjoint kinds: every token of an attempt is counted in exactly one of them.

use std::fmt;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// A kind of token that providers price on its own. The kinds are disjoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenKind {
    /// Text input that no cache served.
    Input,
    /// Input read from a prompt cache.
    CacheRead,
    /// Input written to a cache that lives five minutes (or the provider's only lifetime).
    #[serde(rename = "cache_write_5m")]
    CacheWrite5m,
    /// Input written to a cache that lives an hour.
    #[serde(rename = "cache_write_1h")]
    CacheWrite1h,
    /// Audio input that no cache served.
    InputAudio,
    /// Audio input read from a cache.
    CacheReadAudio,
    /// Image input.
    InputImage,
    /// Text output that the consumer receives.
    Output,
    /// Output spent on reasoning.
    Reasoning,
    /// Audio output.
    OutputAudio,
    /// Image output.
    OutputImage,
}

impl TokenKind {
    /// Every kind, inputs first, in the order of the tables' columns.
    pub const ALL: [TokenKind; 11] = [
        TokenKind::Input,
        TokenKind::CacheRead,
        TokenKind::CacheWrite5m,
        TokenKind::CacheWrite1h,
        TokenKind::InputAudio,
        TokenKind::CacheReadAudio,
        TokenKind::InputImage,
        TokenKind::Output,
        TokenKind::Reasoning,
        TokenKind::OutputAudio,
        TokenKind::OutputImage,
    ];

    /// The name used in tables, JSON and price files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            TokenKind::Input => "input",
            TokenKind::CacheRead => "cache_read",
            TokenKind::CacheWrite5m => "cache_write_5m",
            TokenKind::CacheWrite1h => "cache_write_1h",
            TokenKind::InputAudio => "input_audio",
            TokenKind::CacheReadAudio => "cache_read_audio",
            TokenKind::InputImage => "input_image",
            TokenKind::Output => "output",
            TokenKind::Reasoning => "reasoning",
            TokenKind::OutputAudio => "output_audio",
            TokenKind::OutputImage => "output_image",
        }
    }

    /// The kind with this [`name`](TokenKind::name).
    #[must_use]
    pub fn from_name(name: &str) -> Option<TokenKind> {
        TokenKind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether the tokens went into the model rather than came out of it.
    #[must_use]
    pub const fn is_input(self) -> bool {
        !matches!(self, TokenKind::Output | TokenKind::Reasoning | TokenKind::OutputAudio | TokenKind::OutputImage)
    }
}

impl fmt::Display for TokenKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Tokens of one attempt by kind. An adapter has already undone whatever its provider counts twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenUsage {
    /// See [`TokenKind::Input`].
    pub input: u64,
    /// See [`TokenKind::CacheRead`].
    pub cache_read: u64,
    /// See [`TokenKind::CacheWrite5m`].
    pub cache_write_5m: u64,
    /// See [`TokenKind::CacheWrite1h`].
    pub cache_write_1h: u64,
    /// See [`TokenKind::InputAudio`].
    pub input_audio: u64,
    /// See [`TokenKind::CacheReadAudio`].
    pub cache_read_audio: u64,
    /// See [`TokenKind::InputImage`].
    pub input_image: u64,
    /// See [`TokenKind::Output`].
    pub output: u64,
    /// See [`TokenKind::Reasoning`].
    pub reasoning: u64,
    /// See [`TokenKind::OutputAudio`].
    pub output_audio: u64,
    /// See [`TokenKind::OutputImage`].
    pub output_image: u64,
}

impl TokenUsage {
    /// Tokens of one kind.
    #[must_use]
    pub const fn get(&self, kind: TokenKind) -> u64 {
        match kind {
            TokenKind::Input => self.input,
            TokenKind::CacheRead => self.cache_read,
            TokenKind::CacheWrite5m => self.cache_write_5m,
            TokenKind::CacheWrite1h => self.cache_write_1h,
            TokenKind::InputAudio => self.input_audio,
            TokenKind::CacheReadAudio => self.cache_read_audio,
            TokenKind::InputImage => self.input_image,
            TokenKind::Output => self.output,
            TokenKind::Reasoning => self.reasoning,
            TokenKind::OutputAudio => self.output_audio,
            TokenKind::OutputImage => self.output_image,
        }
    }

    /// The counter of one kind.
    pub const fn get_mut(&mut self, kind: TokenKind) -> &mut u64 {
        match kind {
            TokenKind::Input => &mut self.input,
            TokenKind::CacheRead => &mut self.cache_read,
            TokenKind::CacheWrite5m => &mut self.cache_write_5m,
            TokenKind::CacheWrite1h => &mut self.cache_write_1h,
            TokenKind::InputAudio => &mut self.input_audio,
            TokenKind::CacheReadAudio => &mut self.cache_read_audio,
            TokenKind::InputImage => &mut self.input_image,
            TokenKind::Output => &mut self.output,
            TokenKind::Reasoning => &mut self.reasoning,
            TokenKind::OutputAudio => &mut self.output_audio,
            TokenKind::OutputImage => &mut self.output_image,
        }
    }

    /// Kinds with at least one token, in the order of [`TokenKind::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (TokenKind, u64)> + '_ {
        TokenKind::ALL.into_iter().map(|kind| (kind, self.get(kind))).filter(|&(_, tokens)| tokens > 0)
    }

    /// Everything that went in, cached or not. Context price tiers look at this.
    #[must_use]
    pub fn input_tokens(&self) -> u64 {
        self.sum(TokenKind::is_input)
    }

    /// Everything that came out, reasoning included.
    #[must_use]
    pub fn output_tokens(&self) -> u64 {
        self.sum(|kind| !kind.is_input())
    }

    fn sum(&self, of: impl Fn(TokenKind) -> bool) -> u64 {
        self.iter().filter(|&(kind, _)| of(kind)).fold(0, |sum, (_, tokens)| sum.saturating_add(tokens))
    }
}

impl AddAssign for TokenUsage {
    fn add_assign(&mut self, other: TokenUsage) {
        for (kind, tokens) in other.iter() {
            let counter = self.get_mut(kind);
            *counter = counter.saturating_add(tokens);
        }
    }
}

/// How an attempt's usage is known. An explicit zero from the provider is `Reported`, not `Missing`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsageQuality {
    /// The provider said so.
    Reported,
    /// Counted by us from what was sent and delivered.
    Estimated,
    /// Nobody said and nothing could be counted; the numbers are zero because they are unknown.
    #[default]
    Missing,
}

impl UsageQuality {
    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            UsageQuality::Reported => "reported",
            UsageQuality::Estimated => "estimated",
            UsageQuality::Missing => "missing",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_counted_once() {
        let mut usage = TokenUsage::default();
        for (index, kind) in TokenKind::ALL.into_iter().enumerate() {
            *usage.get_mut(kind) = 1 << index;
            assert_eq!(TokenKind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(usage.input_tokens() + usage.output_tokens(), (1 << TokenKind::ALL.len()) - 1);
        assert_eq!(usage.iter().count(), TokenKind::ALL.len());
    }
}
