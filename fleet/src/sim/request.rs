//! A request on its way through the simulator. Times are microseconds since the simulation's start.

/// A request that arrives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Arrival {
    /// Its number, counted by whoever made it.
    pub id: u64,
    /// When it arrives.
    pub at_us: u64,
    /// Input tokens, at least 1.
    pub input_tokens: u32,
    /// Output tokens, at least 1.
    pub output_tokens: u32,
    /// Where the blocks of its prompt begin in [`Prefixes::ids`].
    pub prefix_at: u32,
    /// How many there are; 0 when nothing is known of what prompts share.
    pub prefix_blocks: u32,
}

/// What prompts have in common: requests whose first block ids are equal share those blocks' tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prefixes {
    /// Tokens of one block.
    pub block_tokens: u32,
    /// The ids of all requests' blocks, one request after the other.
    pub ids: Vec<u64>,
}

impl Prefixes {
    /// The block ids of a request's prompt.
    #[must_use]
    pub fn of(&self, arrival: &Arrival) -> &[u64] {
        let at = arrival.prefix_at as usize;
        self.ids.get(at..at + arrival.prefix_blocks as usize).unwrap_or_default()
    }
}

/// A request that ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// The request.
    pub arrival: Arrival,
    /// When it was first scheduled.
    pub scheduled_us: u64,
    /// When its first token was there.
    pub first_token_us: u64,
    /// When its last token was there.
    pub last_token_us: u64,
    /// Input tokens found in the prefix cache.
    pub cached_tokens: u32,
    /// How often it was put back for lack of memory.
    pub preemptions: u32,
}
