//! The simulated engine's language: a token is a word, an answer is drawn from a small vocabulary under a seed.
//!
//! The rule that makes counters exact: a text has as many tokens as words between white space; a conversation has, in
//! addition, one token for the role of each message and one that opens the answer.

/// A token, identified by a hash of its word.
pub type Token = u64;

const VOCABULARY: [&str; 48] = [
    "account", "after", "agent", "answer", "because", "before", "budget", "cache", "change", "check", "cluster",
    "cost", "customer", "data", "document", "engine", "every", "find", "first", "graph", "index", "invoice", "item",
    "latency", "ledger", "list", "model", "month", "next", "number", "order", "page", "pool", "price", "query",
    "question", "reads", "result", "search", "server", "step", "table", "team", "ticket", "token", "under", "value",
    "write",
];

/// The tokens of a text: one for each word.
pub fn tokens(text: &str) -> impl Iterator<Item = Token> + '_ {
    text.split_whitespace().map(token)
}

/// The token of one word.
#[must_use]
pub fn token(word: &str) -> Token {
    // FNV-1a: small, stable across versions and platforms.
    word.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The token that opens a message of this role in a conversation. No word of a text can be taken for it.
#[must_use]
pub fn role_token(role: &str) -> Token {
    mix(0x726f_6c65, token(role))
}

/// Word number `index` of the answer with this seed.
#[must_use]
pub fn answer_word(seed: u64, index: u32) -> &'static str {
    let draw = mix(seed, u64::from(index)) % VOCABULARY.len() as u64;
    usize::try_from(draw).map_or(VOCABULARY[0], |draw| VOCABULARY[draw])
}

/// Two numbers stirred into one that looks random (the finaliser of splitmix64).
#[must_use]
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number in `[0, 1)` made of a random-looking one.
#[must_use]
pub fn unit(random: u64) -> f64 {
    (random >> 11) as f64 / (1u64 << 53) as f64
}

/// How long the answer with this seed is when nothing cuts it: exponential with this mean, at least one token.
#[must_use]
pub fn natural_length(seed: u64, mean: f64) -> u32 {
    let drawn = -mean.max(1.0) * (1.0 - unit(mix(seed, 0x6c65_6e67_7468))).ln();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "float to integer casts saturate, and the value is clamped to a small positive range"
    )]
    let tokens = drawn.clamp(1.0, 1e6).round() as u32;
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_word() {
        for (text, count) in [("", 0), ("  \n", 0), ("one", 1), ("one two\tthree\n four ", 4)] {
            assert_eq!(tokens(text).count(), count, "{text:?}");
        }
        assert_ne!(role_token("user"), token("user"));
    }

    #[test]
    fn answers_depend_on_their_seed_only() {
        let answer = |seed| (0..50).map(|index| answer_word(seed, index)).collect::<Vec<_>>();
        assert_eq!(answer(1), answer(1));
        assert_ne!(answer(1), answer(2));
    }

    #[test]
    fn lengths_have_the_mean_they_are_drawn_with() {
        let sum: u64 = (0..10_000).map(|seed| u64::from(natural_length(seed, 80.0))).sum();
        assert!((78.0..82.0).contains(&(sum as f64 / 10_000.0)), "{sum}");
    }
}
