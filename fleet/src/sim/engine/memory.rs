//! The KV memory of a simulated engine, counted in blocks, with a prefix cache.
//!
//! As in the step-by-step engine's [`Blocks`](crate::engine::blocks::Blocks), a full block stays findable when nobody uses it
//! until its memory is needed, the least recently used first. Here only what can be found again is told apart: blocks that
//! prompts have in common have names; the blocks of one request that was put back stay together until it comes again; and
//! blocks that nobody will look for are a mere number.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// No node.
const NONE: u32 = u32::MAX;

/// The blocks of one engine.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    total: u32,
    /// Blocks that running requests hold.
    used: u32,
    /// Findable blocks that nobody holds.
    unused: u32,
    caching: bool,
    /// Blocks of one named unit.
    unit_blocks: u32,
    named: HashMap<u64, Named, BuildHasherDefault<Fold>>,
    nodes: Vec<Node>,
    free_node: u32,
    oldest: u32,
    newest: u32,
    stamp: u64,
}

#[derive(Debug, Clone, Copy)]
struct Named {
    users: u32,
    /// Its place among the unused while nobody uses it.
    node: u32,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    older: u32,
    newer: u32,
    stamp: u64,
    what: What,
}

#[derive(Debug, Clone, Copy)]
enum What {
    /// A unit with this name.
    Named(u64),
    /// This many blocks of one request, its last ones forgotten first.
    Own(u32),
    /// This many blocks that nobody will look for.
    Gone(u32),
}

/// Where the blocks of a request that was put back lie, if they are still there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Aside {
    node: u32,
    stamp: u64,
}

impl Memory {
    pub(super) fn new(total: u32, caching: bool, unit_blocks: u32) -> Memory {
        Memory {
            total,
            used: 0,
            unused: 0,
            caching,
            unit_blocks,
            named: HashMap::default(),
            nodes: Vec::new(),
            free_node: NONE,
            oldest: NONE,
            newest: NONE,
            stamp: 0,
        }
    }

    /// The same memory with nothing in it.
    pub(super) fn emptied(&self) -> Memory {
        Memory::new(self.total, self.caching, self.unit_blocks)
    }

    pub(super) fn total(&self) -> u32 {
        self.total
    }

    pub(super) fn used(&self) -> u32 {
        self.used
    }

    /// Blocks that can be taken.
    pub(super) fn free(&self) -> u32 {
        self.total - self.used
    }

    /// Takes blocks, which must be free, and forgets unused ones where memory is short.
    pub(super) fn take(&mut self, blocks: u32) {
        self.used += blocks;
        debug_assert!(self.used <= self.total, "only free blocks are taken");
        while self.used + self.unused > self.total {
            self.forget(self.used + self.unused - self.total);
        }
    }

    /// Gives blocks back that nobody can find.
    pub(super) fn give_back(&mut self, blocks: u32) {
        self.used -= blocks;
    }

    /// Gives full blocks back that nobody will look for.
    pub(super) fn retire(&mut self, blocks: u32) {
        self.used -= blocks;
        if !self.caching || blocks == 0 {
            return;
        }
        self.unused += blocks;
        if let Some(Node { what: What::Gone(count), .. }) = self.nodes.get_mut(self.newest as usize) {
            *count += blocks;
        } else {
            self.append(What::Gone(blocks));
        }
    }

    /// Gives full blocks back that their request will look for. `None` when nothing can be found again.
    pub(super) fn put_aside(&mut self, blocks: u32) -> Option<Aside> {
        self.used -= blocks;
        if !self.caching || blocks == 0 {
            return None;
        }
        self.unused += blocks;
        let node = self.append(What::Own(blocks));
        Some(Aside { node, stamp: self.stamp })
    }

    /// Takes back what is left of blocks that were put aside.
    pub(super) fn take_back(&mut self, aside: Aside) -> u32 {
        let Some(Node { stamp, what: What::Own(blocks), .. }) = self.nodes.get(aside.node as usize).copied() else {
            return 0;
        };
        if stamp != aside.stamp {
            return 0;
        }
        self.remove(aside.node);
        self.unused -= blocks;
        self.used += blocks;
        blocks
    }

    /// How many leading units of a prompt are in the cache.
    pub(super) fn find(&self, names: &[u64]) -> u32 {
        if self.named.is_empty() {
            return 0;
        }
        let found = names.iter().take_while(|name| self.named.contains_key(name)).count();
        u32::try_from(found).unwrap_or(u32::MAX)
    }

    /// Uses units that [`find`](Memory::find) found.
    pub(super) fn use_named(&mut self, names: &[u64]) {
        for name in names {
            let unit = self.named.get_mut(name).expect("only found units are used");
            unit.users += 1;
            let node = std::mem::replace(&mut unit.node, NONE);
            if node != NONE {
                self.wake(node);
            }
        }
    }

    /// Makes computed units findable; their request goes on using them.
    pub(super) fn publish(&mut self, names: &[u64]) {
        for &name in names {
            let unit = self.named.entry(name).or_insert(Named { users: 0, node: NONE });
            let known = unit.users > 0 || unit.node != NONE;
            unit.users += 1;
            let node = std::mem::replace(&mut unit.node, NONE);
            if known {
                // Somebody computed the same meanwhile: theirs is shared, the copy is given back.
                self.used -= self.unit_blocks;
            }
            if node != NONE {
                self.wake(node);
            }
        }
    }

    /// Stops using units. The end of a prompt is forgotten before its beginning, which more requests share.
    pub(super) fn stop_using(&mut self, names: &[u64]) {
        for &name in names.iter().rev() {
            let unit = self.named.get_mut(&name).expect("a unit in use is never forgotten");
            unit.users -= 1;
            if unit.users > 0 {
                continue;
            }
            self.used -= self.unit_blocks;
            self.unused += self.unit_blocks;
            let node = self.append(What::Named(name));
            self.named.get_mut(&name).expect("it was there above").node = node;
        }
    }

    fn wake(&mut self, node: u32) {
        self.remove(node);
        self.unused -= self.unit_blocks;
        self.used += self.unit_blocks;
    }

    /// Forgets up to `blocks` of the oldest unused blocks.
    fn forget(&mut self, blocks: u32) {
        let oldest = self.oldest;
        let node = &mut self.nodes[oldest as usize];
        match &mut node.what {
            What::Own(count) | What::Gone(count) if *count > blocks => {
                *count -= blocks;
                self.unused -= blocks;
            }
            What::Own(count) | What::Gone(count) => {
                self.unused -= *count;
                self.remove(oldest);
            }
            What::Named(name) => {
                let name = *name;
                self.named.remove(&name);
                self.unused -= self.unit_blocks;
                self.remove(oldest);
            }
        }
    }

    fn append(&mut self, what: What) -> u32 {
        self.stamp += 1;
        let node = Node { older: self.newest, newer: NONE, stamp: self.stamp, what };
        let at = self.free_node;
        let at = if let Some(place) = self.nodes.get_mut(at as usize) {
            self.free_node = place.newer;
            *place = node;
            at
        } else {
            self.nodes.push(node);
            u32::try_from(self.nodes.len() - 1).expect("there are fewer nodes than blocks, a u32")
        };
        match self.nodes.get_mut(self.newest as usize) {
            Some(newest) => newest.newer = at,
            None => self.oldest = at,
        }
        self.newest = at;
        at
    }

    fn remove(&mut self, at: u32) {
        let Node { older, newer, .. } = self.nodes[at as usize];
        match self.nodes.get_mut(older as usize) {
            Some(node) => node.newer = newer,
            None => self.oldest = newer,
        }
        match self.nodes.get_mut(newer as usize) {
            Some(node) => node.older = older,
            None => self.newest = older,
        }
        self.nodes[at as usize] = Node { older: NONE, newer: self.free_node, stamp: 0, what: What::Gone(0) };
        self.free_node = at;
    }
}

/// The names are hashes already or small numbers: one multiplication spreads both.
#[derive(Debug, Clone, Copy, Default)]
struct Fold(u64);

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_units_are_found_until_memory_is_needed() {
        let mut memory = Memory::new(4, true, 1);
        memory.take(3);
        memory.publish(&[1, 2, 3]);
        assert_eq!(memory.used(), 3);
        memory.stop_using(&[1, 2, 3]);
        assert_eq!((memory.used(), memory.find(&[1, 2, 3])), (0, 3));
        memory.take(2);
        assert_eq!(memory.find(&[1, 2, 3]), 2, "one free block and the end of the prompt");
        memory.use_named(&[1, 2]);
        assert_eq!(memory.free(), 0);
    }

    #[test]
    fn what_was_put_aside_shrinks_from_its_end() {
        let mut memory = Memory::new(10, true, 1);
        memory.take(6);
        let aside = memory.put_aside(6).unwrap();
        memory.take(7);
        assert_eq!(memory.take_back(aside), 3);
        assert_eq!((memory.used(), memory.take_back(aside)), (10, 0));
        memory.retire(10);
        memory.take(10);
        assert_eq!(memory.free(), 0);
    }

    #[test]
    fn a_unit_computed_twice_is_kept_once() {
        let mut memory = Memory::new(10, true, 2);
        memory.take(4);
        memory.publish(&[7]);
        memory.publish(&[7]);
        assert_eq!(memory.used(), 2);
        memory.stop_using(&[7]);
        assert_eq!(memory.used(), 2);
        memory.stop_using(&[7]);
        assert_eq!((memory.used(), memory.find(&[7])), (0, 1));
    }

    #[test]
    fn without_a_cache_nothing_is_found() {
        let mut memory = Memory::new(4, false, 1);
        memory.take(4);
        assert!(memory.put_aside(2).is_none());
        memory.retire(2);
        memory.take(4);
        assert_eq!(memory.free(), 0);
    }
}
