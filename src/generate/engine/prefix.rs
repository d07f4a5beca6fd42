//! Caches of what was read, with their share of the memory, and those that are kept for prompts with an equal beginning.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::request::same;
use crate::generate::adaptation::Adaptation;

/// Fewest equal tokens that are worth sharing.
pub(super) const WORTH: usize = 16;
/// Most caches that are kept for later prompts.
const KEPT: usize = 64;

/// Tokens promised to caches, counted by all who hold some.
pub(super) type Reserved = Arc<AtomicUsize>;

/// A share of the memory; given back when dropped.
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

    /// Gives back what was promised beyond `tokens`.
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

/// A cache that is read and not written any more. Holds its parents' shares as long as its own.
#[derive(Debug)]
pub(super) struct Held<C> {
    pub(super) cache: Arc<C>,
    pub(super) _share: Share,
    pub(super) _parent: Option<Arc<Self>>,
}

/// How many tokens two lists begin with in common.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

struct Entry<C> {
    tokens: Vec<u32>,
    adaptation: Option<Arc<Adaptation>>,
    held: Arc<Held<C>>,
    used: u64,
}

/// Caches kept for prompts that begin like ones read before. The least recently used go first.
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
    /// The cache that shares the longest beginning with `tokens`, and its length: at most all but the last token, whose
    /// prediction is wanted. Keys and values of another adapter are of no use.
    pub(super) fn find(
        &mut self,
        tokens: &[u32],
        adaptation: Option<&Arc<Adaptation>>,
    ) -> Option<(Arc<Held<C>>, usize)> {
        let most = tokens.len().saturating_sub(1);
        let shared = |entry: &Entry<C>| common(&entry.tokens, &tokens[..most]);
        let own = |entry: &&mut Entry<C>| same(entry.adaptation.as_ref(), adaptation);
        let best = self.entries.iter_mut().filter(own).max_by_key(|entry| shared(entry))?;
        let len = common(&best.tokens, &tokens[..most]);
        if len < WORTH {
            return None;
        }
        self.clock += 1;
        best.used = self.clock;
        Some((Arc::clone(&best.held), len))
    }

    /// Keeps a cache of `tokens`; one that it continues is no longer needed by itself.
    pub(super) fn keep(
        &mut self,
        tokens: Vec<u32>,
        adaptation: Option<Arc<Adaptation>>,
        held: Arc<Held<C>>,
    ) {
        self.entries.retain(|entry| {
            !same(entry.adaptation.as_ref(), adaptation.as_ref())
                || !tokens.starts_with(&entry.tokens)
        });
        if self.entries.len() >= KEPT {
            self.drop_oldest_where(|_| true);
        }
        self.clock += 1;
        self.entries.push(Entry { tokens, adaptation, held, used: self.clock });
    }

    /// Lets the least recently used cache go that nobody else holds, which frees its memory; false where there is none.
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
    fn the_longest_beginning_is_found_and_the_oldest_goes_first() {
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
        // `long` continues `short`, which is let go.
        assert_eq!(reserved.load(Ordering::Relaxed), 20);
        let (found, len) = prefixes.find(&tokens(8), None).unwrap();
        assert_eq!((*found.cache, len), ("long", 20));
        // The last token of a prompt is always read.
        assert_eq!(prefixes.find(&tokens(7), None).unwrap().1, 20);
        assert!(prefixes.find(&(0..10).chain(50..80).collect::<Vec<u32>>(), None).is_none());
        assert!(prefixes.free_oldest());
        assert!(prefixes.find(&(100..150).collect::<Vec<u32>>(), None).is_none());
        // `long` is in use: letting it go would free nothing.
        assert!(!prefixes.free_oldest());
        let mut share = Share::new(8, &reserved);
        share.shrink(3);
        assert_eq!(reserved.load(Ordering::Relaxed), 13);
        drop((found, prefixes, share));
        assert_eq!(reserved.load(Ordering::Relaxed), 0);
    }
}
