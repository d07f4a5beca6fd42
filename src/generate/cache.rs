//! Paged KV cache; samples of one prompt share its pages.

use std::sync::Arc;

use crate::model::Config;
use crate::ops::cpu::Element;
use crate::ops::cpu::rows::{TILE, call_for_beginning};

/// Positions per page. All weights are read between two reads of a layer's keys, so keys come from memory, which is
/// fast only for large contiguous pieces. The unused part of a sequence's last page is wasted.
pub const PAGE: usize = TILES * TILE;

/// Contiguous tiles of one layer, head and part.
const TILES: usize = 4;

/// Cache layout of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Number of transformer blocks.
    pub layers: usize,
    /// Number of key/value heads, `G`.
    pub heads: usize,
    /// Head dimension, `E`.
    pub width: usize,
}

impl CacheShape {
    /// The layout for a model.
    pub fn new(config: &Config) -> Self {
        Self {
            layers: config.num_hidden_layers,
            heads: config.num_key_value_heads,
            width: config.head_dim,
        }
    }

    /// Elements in a page: keys and values of [`PAGE`] positions in every layer and head.
    fn page_len(self) -> usize {
        self.layers * 2 * self.heads * PAGE * self.width
    }

    /// Bytes per position in a cache of `E`.
    pub fn bytes_a_token<E>(self) -> usize {
        self.page_len() / PAGE * size_of::<E>()
    }
}

/// The KV cache of one segment, prompt or sample, on the CPU. A page has contiguous tiles of [`TILE`] positions for
/// each layer, head and part: values as `[TILE, E]`, keys transposed to `[E, TILE]`.
#[derive(Debug)]
pub struct PagedCache<E = f32> {
    shape: CacheShape,
    /// The segment this one continues, up to `start`.
    parent: Option<Arc<Self>>,
    /// Position of the first token. The parent is visible before it.
    start: usize,
    len: usize,
    pages: Vec<Vec<E>>,
}

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Keys after RoPE.
    Keys = 0,
    /// Values.
    Values = 1,
}

impl<E: Element> PagedCache<E> {
    /// An empty segment that continues the first positions of `parent`.
    pub fn new(shape: CacheShape, parent: Option<(Arc<Self>, usize)>) -> Self {
        let (parent, start) = match parent {
            Some((parent, shared)) => (Some(parent), shared),
            None => (None, 0),
        };
        Self { shape, parent, start, len: 0, pages: Vec::new() }
    }

    /// Position after the last token.
    pub fn end(&self) -> usize {
        self.start + self.len
    }

    /// Makes room for `count` more tokens; returns the position of the first.
    pub fn extend(&mut self, count: usize) -> usize {
        let first = self.end();
        self.len += count;
        while self.pages.len() * PAGE < self.len {
            self.pages.push(vec![E::default(); self.shape.page_len()]);
        }
        first
    }

    /// Drops positions from `end` on, within this segment.
    pub fn truncate(&mut self, end: usize) {
        self.len = self.len.min(end.saturating_sub(self.start));
    }

    /// Stores one token's keys or values of one layer, `[G, E]`, at a `position` from [`extend`](Self::extend).
    pub fn write(&mut self, layer: usize, part: Part, position: usize, values: &[E]) {
        let width = self.shape.width;
        let own = position - self.start;
        for (head, values) in values.chunks_exact(width).enumerate() {
            let start = self.start_of(own / TILE, (layer, part, head));
            let tile = &mut self.pages[own / PAGE][start..][..TILE * width];
            match part {
                Part::Keys => {
                    let places = tile.iter_mut().skip(own % TILE).step_by(TILE);
                    places.zip(values).for_each(|(place, value)| *place = *value);
                }
                Part::Values => tile[own % TILE * width..][..width].copy_from_slice(values),
            }
        }
    }

    /// Offset of a tile of this segment in its page.
    fn start_of(&self, index: usize, (layer, part, head): (usize, Part, usize)) -> usize {
        let CacheShape { heads, width, .. } = self.shape;
        (((layer * heads + head) * 2 + part as usize) * TILES + index % TILES) * TILE * width
    }

    fn tile(&self, index: usize, tile: (usize, Part, usize)) -> &[E] {
        let start = self.start_of(index, tile);
        &self.pages[index / TILES][start..][..TILE * self.shape.width]
    }

    /// Visits the keys or values of one layer and head up to and including `position`, tile by tile, from the root on,
    /// each segment from its start. Tiles are passed whole, with the number of visible positions of their [`TILE`].
    pub fn visit<'a>(
        &'a self,
        tile: (usize, Part, usize),
        position: usize,
        see: &mut (impl FnMut(usize, &'a [E]) + ?Sized),
    ) {
        if let (Some(parent), Some(last)) = (&self.parent, self.start.checked_sub(1)) {
            parent.visit(tile, position.min(last), see);
        }
        self.visit_own(tile, position, see);
    }

    /// The parent segment, and how many of its positions this one continues.
    pub fn continues(&self) -> Option<(&Arc<Self>, usize)> {
        self.parent.as_ref().map(|parent| (parent, self.start))
    }

    /// As [`visit`](Self::visit), for this segment only.
    pub fn visit_own<'a>(
        &'a self,
        tile: (usize, Part, usize),
        position: usize,
        see: &mut (impl FnMut(usize, &'a [E]) + ?Sized),
    ) {
        let visible = (position + 1).saturating_sub(self.start).min(self.len);
        let tiles = visible.div_ceil(TILE);
        for index in 0..tiles {
            // Hardware prefetchers cannot predict the address of the next page.
            if index % TILES == 0 && index + TILES < tiles {
                call_for_beginning(self.tile(index + TILES, tile));
            }
            see((visible - index * TILE).min(TILE), self.tile(index, tile));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_sees_the_prompt_and_itself_up_to_its_position() {
        let shape = CacheShape { layers: 2, heads: 2, width: 1 };
        let fill = |cache: &mut PagedCache, count: usize| {
            let first = cache.extend(count);
            for position in first..first + count {
                for layer in 0..2 {
                    let value = (position * 10 + layer) as f32;
                    cache.write(layer, Part::Keys, position, &[value, value + 0.5]);
                    cache.write(layer, Part::Values, position, &[-value, -value - 0.5]);
                }
            }
        };
        let mut prompt = PagedCache::new(shape, None);
        fill(&mut prompt, 19);
        let prompt = Arc::new(prompt);
        let mut sample = PagedCache::new(shape, Some((Arc::clone(&prompt), 19)));
        fill(&mut sample, 1);
        fill(&mut sample, 2);
        let read = |cache: &PagedCache, tile, position| {
            let mut seen = Vec::new();
            cache.visit(tile, position, &mut |rows, tile| seen.extend_from_slice(&tile[..rows]));
            seen
        };
        let keys: Vec<f32> = (0..21).map(|position| (position * 10 + 1) as f32 + 0.5).collect();
        assert_eq!(read(&sample, (1, Part::Keys, 1), 20), keys);
        assert_eq!(read(&prompt, (0, Part::Values, 0), 1), [0.0, -10.0]);
        assert_eq!((prompt.end(), sample.end()), (19, 22));
        // Another segment continues the prompt's first 17 positions, is truncated, and goes on.
        let mut other = PagedCache::new(shape, Some((prompt, 17)));
        fill(&mut other, 3);
        other.truncate(18);
        fill(&mut other, 1);
        let keys: Vec<f32> = (0..19).map(|position| (position * 10 + 1) as f32 + 0.5).collect();
        assert_eq!((other.end(), read(&other, (1, Part::Keys, 1), 18)), (19, keys));
    }
}
