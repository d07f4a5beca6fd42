//! Memory accounting of KV caches, and the prefix cache: caches kept for prompts with a common prefix.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crate::generate::adaptation::Adaptation;

/// Shortest common prefix worth sharing, in tokens.
pub(super) const WORTH: usize = 16;
/// Most caches kept for later prompts.
const KEPT: usize = 64;

/// Tokens reserved by all caches together.
pub(super) type Reserved = Arc<AtomicUsize>;

/// A share of the cache memory; returned on drop.
#[derive(Debug)]
pub(super) struct Share {
    tokens: usize,
    reserved: Reserved,
}

impl Share {
    pub(super) fn new(tokens: usize, reserved: &Reserved) -> Self {
        reserved.fetch_add(tokens, Ordering::Relaxed);
        Self { tokens, reserved: Arc::clone(reserved) }
    }

    /// Returns the part reserved beyond `tokens`.
    pub(super) fn shrink(&mut self, tokens: usize) {
        let tokens = tokens.min(self.tokens);
        self.reserved.fetch_sub(self.tokens - tokens, Ordering::Relaxed);
        self.tokens = tokens;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.reserved.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

/// A cache that is now read-only. Keeps its parents' shares alive with its own.
#[derive(Debug)]
pub(super) struct Held<C> {
    pub(super) cache: Arc<C>,
    pub(super) _share: Share,
    pub(super) _parent: Option<Arc<Self>>,
}

/// Length of the common prefix of two token lists.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

struct Entry<C> {
    tokens: Vec<u32>,
    /// The adapter that it was read with. It may go while this is kept, but its address is no other's until then.
    adaptation: Option<Weak<Adaptation>>,
    held: Arc<Held<C>>,
    used: u64,
}

impl<C> Entry<C> {
    /// Whether it was computed with this adapter, or without one.
    fn is_of(&self, adaptation: Option<&Arc<Adaptation>>) -> bool {
        self.adaptation.as_ref().map(Weak::as_ptr) == adaptation.map(Arc::as_ptr)
    }

    /// Whether its adapter is gone, so that no request can match it.
    fn is_lost(&self) -> bool {
        self.adaptation.as_ref().is_some_and(|adaptation| adaptation.strong_count() == 0)
    }
}

/// Caches kept for prompts that begin like earlier ones. The least recently used is evicted first.
pub(super) struct Prefixes<C> {
    entries: Vec<Entry<C>>,
    clock: u64,
}

impl<C> Default for Prefixes<C> {
    fn default() -> Self {
        Self { entries: Vec::new(), clock: 0 }
    }
}

impl<C> Prefixes<C> {
    /// The cache with the longest prefix in common with `tokens`, and that length: at most all but the last token,
    /// since its prediction is needed. Caches of another adapter do not match.
    pub(super) fn find(
        &mut self,
        tokens: &[u32],
        adaptation: Option<&Arc<Adaptation>>,
    ) -> Option<(Arc<Held<C>>, usize)> {
        let most = tokens.len().saturating_sub(1);
        let shared = |entry: &Entry<C>| common(&entry.tokens, &tokens[..most]);
        let own = |entry: &&mut Entry<C>| entry.is_of(adaptation);
        let best = self.entries.iter_mut().filter(own).max_by_key(|entry| shared(entry))?;
        let len = common(&best.tokens, &tokens[..most]);
        if len < WORTH {
            return None;
        }
        self.clock += 1;
        best.used = self.clock;
        Some((Arc::clone(&best.held), len))
    }

    /// Keeps a cache of `tokens`; entries it extends are dropped.
    pub(super) fn keep(
        &mut self,
        tokens: Vec<u32>,
        adaptation: Option<&Arc<Adaptation>>,
        held: Arc<Held<C>>,
    ) {
        self.entries.retain(|entry| !entry.is_of(adaptation) || !tokens.starts_with(&entry.tokens));
        if self.entries.len() >= KEPT {
            self.drop_oldest_where(|_| true);
        }
        self.clock += 1;
        let adaptation = adaptation.map(Arc::downgrade);
        self.entries.push(Entry { tokens, adaptation, held, used: self.clock });
    }

    /// Drops the caches of adapters that are gone.
    pub(super) fn drop_lost(&mut self) {
        self.entries.retain(|entry| !entry.is_lost());
    }

    /// Evicts the least recently used cache that nothing else holds, which frees its memory; false if there is none.
    pub(super) fn free_oldest(&mut self) -> bool {
        self.drop_oldest_where(|held| Arc::strong_count(held) == 1)
    }

    fn drop_oldest_where(&mut self, may_go: impl Fn(&Arc<Held<C>>) -> bool) -> bool {
        let entries = self.entries.iter().enumerate();
        let oldest =
            entries.filter(|(_, entry)| may_go(&entry.held)).min_by_key(|(_, entry)| entry.used);
        let Some((index, _)) = oldest else { return false };
        self.entries.swap_remove(index);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_prefix_is_found_and_the_oldest_is_evicted_first() {
        let reserved = Reserved::default();
        let held = |name: &'static str| {
            let share = Share::new(10, &reserved);
            Arc::new(Held { cache: Arc::new(name), _share: share, _parent: None })
        };
        let tokens = |tail: u32| (0..20).chain([tail]).collect::<Vec<u32>>();
        let mut prefixes = Prefixes::default();
        assert!(prefixes.find(&tokens(1), None).is_none() && !prefixes.free_oldest());
        prefixes.keep((0..17).collect(), None, held("short"));
        prefixes.keep((100..150).collect(), None, held("other"));
        prefixes.keep(tokens(7), None, held("long"));
        // `long` extends `short`, which is dropped.
        assert_eq!(reserved.load(Ordering::Relaxed), 20);
        let (found, len) = prefixes.find(&tokens(8), None).unwrap();
        assert_eq!((*found.cache, len), ("long", 20));
        // The last token of a prompt is always read.
        assert_eq!(prefixes.find(&tokens(7), None).unwrap().1, 20);
        assert!(prefixes.find(&(0..10).chain(50..80).collect::<Vec<u32>>(), None).is_none());
        assert!(prefixes.free_oldest());
        assert!(prefixes.find(&(100..150).collect::<Vec<u32>>(), None).is_none());
        // `long` is in use: evicting it would free nothing.
        assert!(!prefixes.free_oldest());
        let mut share = Share::new(8, &reserved);
        share.shrink(3);
        assert_eq!(reserved.load(Ordering::Relaxed), 13);
        drop((found, prefixes, share));
        assert_eq!(reserved.load(Ordering::Relaxed), 0);
    }
}
