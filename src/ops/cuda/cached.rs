//! Attention over pages on CUDA: which queries meet which positions, for the kernels of `cached.cu`.

use std::ops::Range;

use super::attention::OWN;

#[cfg(feature = "cuda")]
mod launch;
#[cfg(all(test, unix))]
mod tests;

#[cfg(feature = "cuda")]
pub(crate) use launch::{Uploaded, attend, store};

/// Positions of a part: a sequence that sees more is read by several blocks at once.
const PART: usize = 256;

/// Successive positions of a sequence in one page.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Where the first one's keys in the first layer are.
    keys: u64,
    /// Bytes from one position to the next.
    line: u64,
    position: usize,
    count: usize,
}

/// Queries that are launched together, so that their scratch is not beyond bounds.
#[derive(Clone, Debug)]
struct Slice {
    /// Of the list of parts.
    parts: Range<usize>,
    /// Of the list of wholes.
    wholes: Range<usize>,
    /// Rows of scratch.
    rows: usize,
}

/// What the kernels are told. Each entry has the layout of the kernels' structs.
#[derive(Clone, Debug, Default)]
struct Lists {
    /// First query and number of queries, what to add to a token for its position, where the part's spans begin and end,
    /// and its first row of scratch.
    parts: Vec<[u32; 6]>,
    /// The address; the position, and above it the number of positions.
    spans: Vec<[u64; 2]>,
    /// First query and number of queries, the first row of scratch, and the number of parts.
    wholes: Vec<[u32; 4]>,
    slices: Vec<Slice>,
}

impl Lists {
    /// Of sequences: the positions that each sees, and how many at their end are its new tokens. `share`: query heads to
    /// a key head; `most`: rows of scratch of a slice, where a tile of queries alone does not need more.
    fn new(sequences: impl Iterator<Item = (Vec<Run>, usize)>, share: usize, most: usize) -> Self {
        let mut lists = Self::default();
        let mut token = 0;
        for (runs, new) in sequences {
            let begin = lists.spans.len();
            for run in &runs {
                lists.push(*run);
            }
            let len = runs.last().map_or(0, |run| run.position + run.count);
            // Positions count from 0, so this may wrap and wraps back.
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

    /// Adds positions, cut where parts begin.
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
    /// sequence's spans go from `begin` to the end of the list.
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
