//! Paged attention on CUDA: assigns positions to queries, for the kernels of `cached.cu`.

use std::ops::Range;

use super::attention::OWN;

#[cfg(feature = "cuda")]
mod launch;
#[cfg(all(test, unix))]
mod tests;

#[cfg(feature = "cuda")]
pub(crate) use launch::{Uploaded, attend, store};

/// Positions per part: longer sequences are read by several blocks in parallel.
const PART: usize = 256;

/// Consecutive positions of a sequence in one page.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Address of the first position's keys in the first layer.
    keys: u64,
    /// Bytes between consecutive positions.
    line: u64,
    position: usize,
    count: usize,
}

/// Queries launched together, to bound their scratch memory.
#[derive(Clone, Debug)]
struct Slice {
    /// Range in the list of parts.
    parts: Range<usize>,
    /// Range in the list of wholes.
    wholes: Range<usize>,
    /// Scratch rows.
    rows: usize,
}

/// Kernel inputs. Each entry has the layout of the kernels' structs.
#[derive(Clone, Debug, Default)]
struct Lists {
    /// First query and number of queries, offset from token to position, start and end of the part's spans, and its
    /// first scratch row.
    parts: Vec<[u32; 6]>,
    /// Address; position, with the number of positions in the upper half.
    spans: Vec<[u64; 2]>,
    /// First query and number of queries, first scratch row, and number of parts.
    wholes: Vec<[u32; 4]>,
    slices: Vec<Slice>,
}

impl Lists {
    /// Lists for sequences, each with its visible positions and number of new tokens at the end. `share`: query heads
    /// per key head; `most`: scratch rows per slice, unless a single tile of queries needs more.
    fn new(sequences: impl Iterator<Item = (Vec<Run>, usize)>, share: usize, most: usize) -> Self {
        let mut lists = Self::default();
        let mut token = 0;
        for (runs, new) in sequences {
            let begin = lists.spans.len();
            for run in &runs {
                lists.push(*run);
            }
            let len = runs.last().map_or(0, |run| run.position + run.count);
            // May wrap, and wraps back: positions count from 0.
            let shift = (len - new).wrapping_sub(token);
            let (first, end) = (token * share, (token + new) * share);
            for first in (first..end).step_by(OWN) {
                let count = OWN.min(end - first);
                let last = ((first + count - 1) / share).wrapping_add(shift);
                lists.tile((first, count), (shift, last), (begin, most));
            }
            token += new;
        }
        lists
    }

    /// Adds positions, split where parts begin.
    fn push(&mut self, run: Run) {
        let (mut at, end) = (run.position, run.position + run.count);
        while at < end {
            let next = (at / PART + 1) * PART;
            let count = next.min(end) - at;
            let keys = run.keys + (at - run.position) as u64 * run.line;
            self.spans.push([keys, at as u64 | (count as u64) << 32]);
            at += count;
        }
    }

    /// Adds queries whose last one is at position `last`, and a part for every [`PART`] positions up to there. The
    /// sequence's spans are the list's tail from `begin`.
    fn tile(
        &mut self,
        (first, count): (usize, usize),
        (shift, last): (usize, usize),
        (begin, most): (usize, usize),
    ) {
        let position = |span: &[u64; 2]| span[1] as u32 as usize;
        let seen = self.spans[begin..].partition_point(|span| position(span) <= last);
        let spans = &self.spans[begin..begin + seen];
        let number = last / PART + 1;
        let out = match self.slices.last() {
            Some(slice) if slice.rows + number * count <= most => slice.rows,
            _ => {
                let (parts, wholes) = (self.parts.len(), self.wholes.len());
                self.slices.push(Slice { parts: parts..parts, wholes: wholes..wholes, rows: 0 });
                0
            }
        };
        self.wholes.push([first, count, out, number].map(|x| x as u32));
        for part in 0..number {
            let start = begin + spans.partition_point(|span| position(span) < part * PART);
            let end = begin + spans.partition_point(|span| position(span) < (part + 1) * PART);
            let numbers = [first, count, shift, start, end, out + part * count];
            self.parts.push(numbers.map(|x| x as u32));
        }
        if let Some(slice) = self.slices.last_mut() {
            slice.parts.end = self.parts.len();
            slice.wholes.end = self.wholes.len();
            slice.rows = out + number * count;
        }
    }
}
