//! Forest attention on CUDA: assigns to each tile of queries or keys the token ranges it covers, for the kernels of
//! `attention.cu`. The lists are proportional to the forest's paths, so the work matches the visible pairs.

use std::cmp::Reverse;
use std::ops::Range;

use crate::ops::AttentionPlan;

#[cfg(all(test, unix))]
mod case;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(all(test, unix))]
mod tests;

#[cfg(feature = "cuda")]
pub(crate) use launch::{Kept, on_cuda, padded, stage, takes};
#[cfg(feature = "cuda")]
pub(super) use launch::{aligned, prepared};

/// Threads per block: four warps, sixteen rows each.
pub(super) const THREADS: u32 = 128;
/// Rows of a block's tile.
pub(super) const OWN: usize = 64;

/// A kernel compiled for each dtype and head dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    Forward,
    /// The forward pass over pages of a cache, in `cached.cu`.
    Cached,
    /// The gradients of keys and values.
    BackwardKeys,
    /// The gradient of queries.
    BackwardQueries,
}

impl Kernel {
    /// Its source file.
    #[cfg(feature = "cuda")]
    fn module(self) -> &'static str {
        if self == Self::Cached { "cached" } else { "attention" }
    }

    /// Its entry for a dtype's suffix and a head dimension.
    pub(super) fn entry(self, number: &str, width: usize) -> String {
        let name = match self {
            Self::Forward => "forward",
            Self::Cached => "cached",
            Self::BackwardKeys => "backward_keys",
            Self::BackwardQueries => "backward_queries",
        };
        format!("attention_{name}_{number}_{width}")
    }

    /// Dynamic shared memory in bytes for elements of `size` bytes: the block's own rows and those of the pieces it
    /// iterates over, each padded by sixteen bytes. At most 83 KiB.
    pub(super) fn shared(self, size: usize, width: usize) -> usize {
        let (piece, stages) = if size == 2 { (32, 2) } else { (16, 1) };
        let (rows, numbers) = match self {
            Self::Forward | Self::Cached => (OWN + 4 * piece, 0),
            Self::BackwardKeys => (2 * OWN + 2 * stages * piece, 2 * stages * piece),
            Self::BackwardQueries => (2 * OWN + 2 * stages * piece, 0),
        };
        rows * (width * size + 16) + numbers * size_of::<f32>()
    }
}

/// Tiles, and the token ranges of each.
#[derive(Clone, Debug, Default)]
struct Lists {
    /// First row, number of rows, and start and end of the tile's ranges. For keys a row is a token; for queries it is
    /// one of the query heads sharing a token's keys.
    tiles: Vec<[u32; 4]>,
    /// First token and number of tokens.
    ranges: Vec<[u32; 2]>,
}

impl Lists {
    /// Tiles of queries, `share` per token, with the keys visible to them, root first.
    fn of_queries(plan: &AttentionPlan, share: usize) -> Self {
        let mut lists = Self::default();
        for (index, span) in plan.spans.iter().enumerate() {
            let ancestors = plan.ancestors(index);
            let (first, end) = (span.start * share, (span.start + span.len) * share);
            for first in (first..end).step_by(OWN) {
                let count = OWN.min(end - first);
                let own = span.start..(first + count).div_ceil(share);
                lists.push((first, count), ancestors.iter().cloned().chain([own]));
            }
        }
        lists.heaviest_first()
    }

    /// Tiles of keys, with the tokens that see them: those of their own segment from the tile on, then all descendants.
    fn of_keys(plan: &AttentionPlan) -> Self {
        let mut below: Vec<Vec<Range<usize>>> = vec![Vec::new(); plan.spans.len()];
        for span in &plan.spans {
            let mut above = span.parent;
            while let Some(index) = above {
                below[index].push(span.start..span.start + span.len);
                above = plan.spans[index].parent;
            }
        }
        let mut lists = Self::default();
        for (span, below) in plan.spans.iter().zip(&below) {
            let end = span.start + span.len;
            for first in (span.start..end).step_by(OWN) {
                let tile = (first, OWN.min(end - first));
                lists.push(tile, std::iter::once(first..end).chain(below.iter().cloned()));
            }
        }
        lists.heaviest_first()
    }

    fn push(&mut self, (first, count): (usize, usize), ranges: impl Iterator<Item = Range<usize>>) {
        let begin = self.ranges.len() as u32;
        let ranges = ranges.filter(|range| !range.is_empty());
        self.ranges.extend(ranges.map(|range| [range.start as u32, range.len() as u32]));
        self.tiles.push([first as u32, count as u32, begin, self.ranges.len() as u32]);
    }

    /// Blocks start in list order: the longest first, so that none remains alone at the end.
    fn heaviest_first(mut self) -> Self {
        let ranges = &self.ranges;
        let tokens = |&[_, _, begin, end]: &[u32; 4]| -> u64 {
            ranges[begin as usize..end as usize].iter().map(|range| u64::from(range[1])).sum()
        };
        self.tiles.sort_by_cached_key(|tile| Reverse(tokens(tile)));
        self
    }
}
