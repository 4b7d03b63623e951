//! The KV memory of an engine in blocks of tokens, with a prefix cache.
//!
//! A block that is full and computed can be found by the hash of all tokens up to its end. Several requests may use
//! it at once; when nobody does it stays findable until its memory is needed, the least recently used first.

use std::collections::{BTreeMap, HashMap};

use super::text::{Token, mix};

/// The blocks of one engine.
#[derive(Debug)]
pub struct Blocks {
    total: u32,
    caching: bool,
    /// Blocks owned by one request that nobody else can find.
    private: u32,
    /// Findable blocks by the hash of their prefix.
    cached: HashMap<u64, Cached>,
    /// Findable blocks that nobody uses, oldest first.
    unused: BTreeMap<u64, u64>,
    clock: u64,
}

#[derive(Debug)]
struct Cached {
    users: u32,
    /// Its key in `unused` while nobody uses it.
    released: u64,
}

impl Blocks {
    /// An empty memory of `total` blocks.
    #[must_use]
    pub fn new(total: u32, caching: bool) -> Blocks {
        Blocks { total, caching, private: 0, cached: HashMap::new(), unused: BTreeMap::new(), clock: 0 }
    }

    /// Blocks in all.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Blocks that requests use.
    #[must_use]
    pub fn used(&self) -> u32 {
        self.private + count(self.cached.len() - self.unused.len())
    }

    /// Takes blocks for one request, forgetting unused ones when memory is short. Takes nothing when it cannot take all.
    #[must_use]
    pub fn take(&mut self, blocks: u32) -> bool {
        if self.total - self.used() < blocks {
            return false;
        }
        self.private += blocks;
        while self.private + count(self.cached.len()) > self.total {
            let (_, hash) = self.unused.pop_first().expect("what is neither private nor used is unused");
            self.cached.remove(&hash);
        }
        true
    }

    /// Gives private blocks back.
    pub fn give_back(&mut self, blocks: u32) {
        self.private -= blocks;
    }

    /// How many leading blocks of a chain of prefix hashes are in the cache.
    #[must_use]
    pub fn find(&self, chain: &[u64]) -> usize {
        chain.iter().take_while(|hash| self.cached.contains_key(hash)).count()
    }

    /// Uses blocks that [`find`](Blocks::find) found.
    pub fn use_cached(&mut self, chain: &[u64]) {
        for hash in chain {
            let block = self.cached.get_mut(hash).expect("only found blocks are used");
            if block.users == 0 {
                self.unused.remove(&block.released);
            }
            block.users += 1;
        }
    }

    /// Makes a private block findable; its user goes on using it. False when the cache is off and it stays private.
    pub fn publish(&mut self, hash: u64) -> bool {
        if !self.caching {
            return false;
        }
        self.private -= 1;
        // Somebody may have computed the same prefix meanwhile: then theirs is shared.
        let block = self.cached.entry(hash).or_insert(Cached { users: 0, released: 0 });
        if block.users == 0 {
            self.unused.remove(&block.released);
        }
        block.users += 1;
        true
    }

    /// Stops using cached blocks. The end of a chain is forgotten before its beginning, which more requests share.
    pub fn stop_using(&mut self, chain: &[u64]) {
        for &hash in chain.iter().rev() {
            let block = self.cached.get_mut(&hash).expect("a block in use is never forgotten");
            block.users -= 1;
            if block.users == 0 {
                self.clock += 1;
                block.released = self.clock;
                self.unused.insert(self.clock, hash);
            }
        }
    }
}

/// Extends `chain` by the prefix hashes of all full blocks of `tokens` that it does not cover yet.
pub fn extend_chain(chain: &mut Vec<u64>, tokens: &[Token], block_size: usize) {
    for block in tokens.chunks_exact(block_size).skip(chain.len()) {
        let parent = chain.last().copied().unwrap_or(0);
        chain.push(block.iter().fold(parent, |hash, &token| mix(hash, token)));
    }
}

fn count(blocks: usize) -> u32 {
    u32::try_from(blocks).expect("there are never more blocks than the total, a u32")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_identifies_the_whole_prefix() {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        extend_chain(&mut a, &[1, 2, 3, 4, 5], 2);
        extend_chain(&mut b, &[9, 2, 3, 4], 2);
        assert_eq!((a.len(), b.len()), (2, 2));
        assert_ne!(a[1], b[1], "equal blocks after different prefixes differ");
        let first = a.clone();
        extend_chain(&mut a, &[1, 2, 3, 4, 5, 6], 2);
        assert_eq!(a[..2], first[..]);
        assert_eq!(a.len(), 3);
    }

    #[test]
    fn unused_blocks_are_found_until_memory_is_needed() {
        let mut blocks = Blocks::new(4, true);
        assert!(blocks.take(3));
        assert!([1, 2, 3].iter().all(|&hash| blocks.publish(hash)));
        assert_eq!(blocks.used(), 3);
        blocks.stop_using(&[1, 2, 3]);
        assert_eq!((blocks.used(), blocks.find(&[1, 2, 3])), (0, 3));
        assert!(blocks.take(2), "one free block and the least recently used one");
        assert_eq!(blocks.find(&[1, 2, 3]), 2, "the end of the chain goes first");
        blocks.use_cached(&[1, 2]);
        assert!(!blocks.take(1), "everything is in use");
        assert_eq!(blocks.used(), 4);
    }

    #[test]
    fn without_a_cache_blocks_stay_private() {
        let mut blocks = Blocks::new(2, false);
        assert!(blocks.take(2));
        assert!(!blocks.publish(1));
        assert_eq!((blocks.find(&[1]), blocks.used()), (0, 2));
        blocks.give_back(2);
        assert_eq!(blocks.used(), 0);
    }
}
