//! Attention of new tokens over their KV caches. Rows that see the same tiles are processed together: a tile is read
//! once for all samples of a prompt and for all query heads that share it.

use std::cell::Cell;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::cache::{PagedCache, Part};
use crate::ops::cpu::awake::share;
use crate::ops::cpu::rows::{Mixture, TILE, scores as score_tiles};
use crate::ops::cpu::{Element, simd};

/// Most rows processed together: their queries and probabilities stay in a core's private cache.
const TOGETHER: usize = 16;

/// New tokens: cache and position of each, those of one cache in order.
pub(super) type Rows<'a, E> = &'a [(&'a PagedCache<E>, usize)];

/// A layer's index, its query heads per key head, and the head dimension.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) layer: usize,
    pub(super) shared: usize,
    pub(super) group: usize,
    pub(super) width: usize,
}

/// `softmax(q · Kᵀ / √E) · V` for each row over all positions up to its own.
///
/// # Shapes
/// - `q`: `[M, H·E]`  →  `[M, H·E]`
pub(super) fn attention<E: Element>(q: &[E], rows: Rows<'_, E>, heads: Heads) -> Vec<E> {
    let Heads { shared, group, width, .. } = heads;
    let row_len = shared * group * width;
    let tasks: Vec<(Range<usize>, usize)> = groups(rows)
        .into_iter()
        .flat_map(|range| (0..shared).map(move |head| (range.clone(), head)))
        .collect();
    let results: Vec<OnceLock<Vec<E>>> = tasks.iter().map(|_| OnceLock::new()).collect();
    share(tasks.len(), |task| {
        let (range, head) = &tasks[task];
        let mut scratch = SCRATCH.take();
        scratch.queries.clear();
        for row in range.clone() {
            let from = row * row_len + head * group * width;
            let mut wide = Vec::new();
            scratch.queries.extend_from_slice(E::widen(&q[from..][..group * width], &mut wide));
        }
        let result = together(&mut scratch, &rows[range.clone()], *head, heads);
        // Narrowed here rather than in another parallel pass: a thread helping with that could pick up other work and
        // make the rest wait.
        results[task].get_or_init(|| E::narrow(&result, &mut Vec::new()).to_vec());
        SCRATCH.set(scratch);
    });
    let mut mixed = vec![E::default(); q.len()];
    for ((range, head), result) in tasks.into_iter().zip(results) {
        let result = result.into_inner().unwrap_or_default();
        for (row, result) in range.zip(result.chunks_exact(group * width)) {
            mixed[row * row_len + head * group * width..][..group * width].copy_from_slice(result);
        }
    }
    mixed
}

/// Groups rows that see the same positions: rows of one cache, or samples of one prompt.
fn groups<E: Element>(rows: Rows<'_, E>) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    for row in 0..rows.len() {
        match groups.last_mut() {
            Some(group)
                if group.len() < TOGETHER && see_alike(&rows[group.clone()], rows[row].0) =>
            {
                group.end += 1;
            }
            _ => groups.push(row..row + 1),
        }
    }
    groups
}

fn see_alike<E: Element>(group: Rows<'_, E>, cache: &PagedCache<E>) -> bool {
    let first = group[0].0;
    if std::ptr::eq(first, cache) {
        // A group is of one kind: rows of one cache, or children of one parent.
        return group.iter().all(|(other, _)| std::ptr::eq(*other, cache));
    }
    let one_each = group.windows(2).all(|pair| !std::ptr::eq(pair[0].0, pair[1].0));
    match (first.continues(), cache.continues()) {
        (Some((a, a_len)), Some((b, b_len))) => one_each && Arc::ptr_eq(a, b) && a_len == b_len,
        _ => false,
    }
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Per-thread buffers.
#[derive(Default)]
struct Scratch {
    /// `[rows, group, E]`.
    queries: Vec<f32>,
    /// `[rows, group, longest]`.
    probs: Vec<f32>,
    scores: Vec<[f32; TILE]>,
    tiles: [Vec<f32>; 2],
}

/// The segment a group of rows sees in common, and whether each row also sees its own.
struct Seen<'a, E> {
    shared: Option<(&'a PagedCache<E>, usize)>,
    /// Number of `shared` positions visible to row `i`.
    visible: Vec<usize>,
    own: bool,
}

impl<'a, E: Element> Seen<'a, E> {
    fn of(rows: &[(&'a PagedCache<E>, usize)]) -> Self {
        let (first, last) = (rows[0], rows[rows.len() - 1]);
        if rows.len() > 1 && std::ptr::eq(first.0, last.0) {
            let visible = rows.iter().map(|(_, position)| position + 1).collect();
            return Self { shared: Some((last.0, last.1 + 1)), visible, own: false };
        }
        match first.0.continues() {
            Some((parent, len)) if len > 0 => {
                Self { shared: Some((parent, len)), visible: vec![len; rows.len()], own: true }
            }
            _ => Self { shared: None, visible: vec![0; rows.len()], own: true },
        }
    }
}

/// One key head of a group of rows: `[rows, group, E]`.
fn together<E: Element>(
    scratch: &mut Scratch,
    rows: Rows<'_, E>,
    head: usize,
    heads: Heads,
) -> Vec<f32> {
    let Heads { layer, group, width, .. } = heads;
    let Scratch { queries, probs, scores, tiles } = scratch;
    let scale = 1.0 / (width as f32).sqrt();
    let seen = Seen::of(rows);
    let longest = rows.iter().map(|(_, position)| position + 1).max().unwrap_or(0);
    probs.clear();
    probs.resize(rows.len() * group * longest, 0.0);

    // Scores of some rows' queries against one or two tiles starting at position `from`; `visible` bounds each row.
    let mut score =
        |some: Range<usize>, pair: &[(usize, &[E])], mut from: usize, visible: &[usize]| {
            let queries = &queries[some.start * group * width..some.end * group * width];
            let keys: [&[E]; 2] = [pair[0].1, pair[pair.len() - 1].1];
            scores.resize(some.len() * group * pair.len(), [0.0; TILE]);
            score_tiles(scores, queries, &keys[..pair.len()], scale, tiles);
            for (&(count, _), scores) in pair.iter().zip(scores.chunks(some.len() * group)) {
                for (index, scores) in scores.iter().enumerate() {
                    let visible = visible[index / group].saturating_sub(from).min(count);
                    let at = (some.start * group + index) * longest + from;
                    probs[at..][..visible].copy_from_slice(&scores[..visible]);
                }
                from += count;
            }
        };
    let keys = (layer, Part::Keys, head);
    if let Some((shared, len)) = seen.shared {
        in_pairs(
            0,
            |see| shared.visit(keys, len - 1, see),
            |from, pair| score(0..rows.len(), pair, from, &seen.visible),
        );
    }
    for (row, &(cache, position)) in rows.iter().enumerate().filter(|_| seen.own) {
        in_pairs(
            seen.visible[row],
            |see| cache.visit_own(keys, position, see),
            |from, pair| score(row..row + 1, pair, from, &[position + 1]),
        );
    }
    for (index, probs) in probs.chunks_exact_mut(longest.max(1)).enumerate() {
        let probs = &mut probs[..=rows[index / group].1];
        let top = simd::max(probs);
        let sum = simd::exp_sub(probs, top);
        simd::scale(probs, 1.0 / sum);
    }
    mixture(probs, rows, &seen, (layer, head, group, width, longest), &mut tiles[0])
}

/// Pairs of tiles, the last one alone if the count is odd, each pair with the position of its first tile; the very
/// first tile starts at `from`.
fn in_pairs<'a, E: Element>(
    mut from: usize,
    visit: impl FnOnce(&mut dyn FnMut(usize, &'a [E])),
    mut see: impl FnMut(usize, &[(usize, &'a [E])]),
) {
    let mut waiting = None;
    visit(&mut |count, tile| match waiting.take() {
        None => waiting = Some((count, tile)),
        Some(first) => {
            see(from, &[first, (count, tile)]);
            from += first.0 + count;
        }
    });
    if let Some(last) = waiting {
        see(from, &[last]);
    }
}

/// Weighted sum of the values.
fn mixture<E: Element>(
    probs: &[f32],
    rows: Rows<'_, E>,
    seen: &Seen<'_, E>,
    (layer, head, group, width, longest): (usize, usize, usize, usize, usize),
    tile: &mut Vec<f32>,
) -> Vec<f32> {
    let mut out = vec![0.0; rows.len() * group * width];
    let mut sums: Vec<Mixture<'_>> =
        out.chunks_exact_mut(group * width).map(|out| Mixture::new(out, width)).collect();
    let values = (layer, Part::Values, head);
    if let Some((shared, len)) = seen.shared {
        let mut done = 0;
        shared.visit(values, len - 1, &mut |count, values| {
            let values = E::widen(&values[..count * width], tile);
            for (row, sum) in sums.iter_mut().enumerate() {
                let visible = seen.visible[row].saturating_sub(done).min(count);
                let probs = &probs[row * group * longest + done..];
                sum.add(probs, longest, &values[..visible * width]);
            }
            done += count;
        });
    }
    for (row, &(cache, position)) in rows.iter().enumerate().filter(|_| seen.own) {
        let mut done = seen.visible[row];
        cache.visit_own(values, position, &mut |count, values| {
            let probs = &probs[row * group * longest + done..];
            sums[row].add(probs, longest, &values[..count * width]);
            done += count;
        });
    }
    sums.into_iter().for_each(Mixture::finish);
    out
}
