//! The kernels of `cached.cu` on the host, compared with the definition of attention, on pages shared by sequences.

use std::collections::BTreeMap;

use half::bf16;

use super::{Lists, PART, Run};
use crate::ops::cached::PAGE;
use crate::ops::cuda::attention::{Kernel, OWN, THREADS};
use crate::ops::cuda::tests::host::{
    Call, Guarded, Kernels, Manner, Number, assert_same, assert_within, each_block,
    every_mutant_is_caught, every_mutant_within_is_caught, manners, random, wide,
};

const FILE: &str = "cached.cu";
/// All pages have two layers; the kernels run on the second.
const LAYERS: usize = 2;
const LAYER: usize = 1;

/// A page, a slot in it, and the number of positions from there.
type Place = (usize, usize, usize);

/// A sequence by its spans, and its number of new positions.
type Seen<'a> = (&'a [Place], usize);

/// Key heads, query heads per key head, and head dimension.
type Heads = (usize, usize, usize);

/// A two-page prompt of which two answers share 70 and 64 positions, one longer than a part and one just begun; and a
/// sequence that sees only itself.
const ANSWERS: &[Seen<'_>] = &[
    (&[(0, 0, 64), (1, 0, 6), (2, 0, 64), (3, 0, 64), (4, 0, 64), (5, 0, 2)], 1),
    (&[(0, 0, 64), (6, 0, 3)], 1),
    (&[(7, 0, 1)], 1),
];
/// A prompt read in chunks, the second of which crosses the start of a part; and several speculative tokens starting
/// mid-page.
const PROMPTS: &[Seen<'_>] = &[
    (&[(0, 0, 64), (1, 0, 64), (2, 0, 64), (3, 0, 64), (4, 0, 20)], 45),
    (&[(5, 0, 64), (6, 10, 30)], 5),
];

struct Case<T> {
    sequences: Vec<(Vec<Place>, usize)>,
    heads: Heads,
    /// `[L, PAGE, 2, G, E]` each.
    pages: Vec<Vec<T>>,
    q: Vec<T>,
}

impl<T: Number> Case<T> {
    fn new(sequences: &[Seen<'_>], heads: Heads) -> Self {
        let (groups, share, width) = heads;
        let spans = sequences.iter().flat_map(|(spans, _)| spans.iter());
        let pages = spans.map(|span| span.0 + 1).max().unwrap_or(0);
        let new: usize = sequences.iter().map(|(_, new)| new).sum();
        let page = |index| random(10 + index as u64, LAYERS * PAGE * 2 * groups * width);
        Self {
            sequences: sequences.iter().map(|(spans, new)| (spans.to_vec(), *new)).collect(),
            heads,
            pages: (0..pages).map(page).collect(),
            q: random(1, new * groups * share * width),
        }
    }

    fn line(&self) -> usize {
        2 * self.heads.0 * self.heads.2
    }

    /// The lists over pages at these addresses, in slices of at most `most` scratch rows.
    fn lists(&self, pages: &[u64], most: usize) -> Lists {
        let line = (self.line() * size_of::<T>()) as u64;
        let runs = |(spans, new): &(Vec<Place>, usize)| {
            let mut position = 0;
            let run = |&(page, slot, count): &Place| {
                let run = Run { keys: pages[page] + slot as u64 * line, line, position, count };
                position += count;
                run
            };
            (spans.iter().map(run).collect(), *new)
        };
        Lists::new(self.sequences.iter().map(runs), self.heads.1, most)
    }

    /// On the kernels; values they do not write are NaN.
    fn on_kernels(&self, manner: Manner) -> Vec<T> {
        let (groups, share, width) = self.heads;
        let pages: Vec<_> = self.pages.iter().map(|page| Guarded::new(page, manner.side)).collect();
        let addresses: Vec<u64> = pages.iter().map(|page| page.as_ptr() as u64).collect();
        // Small slices, so that most cases have several.
        let lists = self.lists(&addresses, 100);
        let q = Guarded::new(&self.q, manner.side);
        let spans = Guarded::new(&lists.spans, manner.side);
        let mut out = Guarded::new(&vec![T::narrow(f32::NAN); self.q.len()], manner.side);
        for slice in &lists.slices {
            let parts = Guarded::new(&lists.parts[slice.parts.clone()], manner.side);
            let wholes = Guarded::new(&lists.wholes[slice.wholes.clone()], manner.side);
            let blank = |len| Guarded::new(&vec![f32::NAN; len], manner.side);
            let rows = groups * slice.rows;
            let (mut sums, mut numbers) = (blank(rows * width), blank(rows * 2));

            let grid = [parts.as_slice().len() as u32, groups as u32, 1];
            let entry = Kernel::Cached.entry(T::NAME, width);
            let call = Kernels::of(FILE).call(&entry, grid, Manner { block: THREADS, ..manner });
            let call = call.shared(Kernel::Cached.shared(size_of::<T>(), width));
            let call = call.input(&q).input(&parts).input(&spans);
            let call = call.output(&mut sums).output(&mut numbers);
            let layer = (LAYER * PAGE * self.line()) as u64;
            let scale = 1.0 / (width as f32).sqrt();
            call.arg(layer).arg(slice.rows as u32).arg(share as u32).arg(scale).run();

            let grid = [wholes.as_slice().len() as u32, groups as u32, 1];
            let entry = format!("attention_combine_{}", T::NAME);
            let call = Kernels::of(FILE).call(&entry, grid, manner);
            let call = call.input(&sums).input(&numbers).input(&wholes).output(&mut out);
            let sizes = [slice.rows, share, width].map(|x| x as u32);
            sizes.into_iter().fold(call, Call::arg).run();
            assert!(sums.is_clean() && numbers.is_clean(), "{manner:?}");
        }
        assert!(out.is_clean(), "{manner:?}");
        out.as_slice().to_vec()
    }

    /// By the definition, in double precision.
    fn by_definition(&self) -> Vec<f32> {
        let (groups, share, width) = self.heads;
        let double = |x: &[T]| x.iter().map(|x| f64::from(x.wide())).collect::<Vec<f64>>();
        let (mut out, mut token) = (Vec::new(), 0);
        for (spans, new) in &self.sequences {
            let positions: Vec<(usize, usize)> = spans
                .iter()
                .flat_map(|&(page, slot, count)| (slot..slot + count).map(move |slot| (page, slot)))
                .collect();
            for last in positions.len() - new..positions.len() {
                for head in 0..groups * share {
                    let at = (token * groups * share + head) * width;
                    let q = double(&self.q[at..at + width]);
                    let row = |&(page, slot): &(usize, usize), both: usize| {
                        let at = (LAYER * PAGE + slot) * self.line()
                            + (both * groups + head / share) * width;
                        double(&self.pages[page][at..at + width])
                    };
                    let seen = &positions[..=last];
                    let dot = |key: Vec<f64>| q.iter().zip(key).map(|(a, b)| a * b).sum::<f64>();
                    let scores: Vec<f64> =
                        seen.iter().map(|at| dot(row(at, 0)) / (width as f64).sqrt()).collect();
                    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|x| (x - most).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    let values: Vec<Vec<f64>> = seen.iter().map(|at| row(at, 1)).collect();
                    out.extend((0..width).map(|column| {
                        let mixed = weights.iter().zip(&values).map(|(w, v)| w * v[column]);
                        (mixed.sum::<f64>() / total) as f32
                    }));
                }
                token += 1;
            }
        }
        out
    }
}

/// In bf16 weights are rounded to eight bits before multiplying the values.
#[track_caller]
fn is_by_definition<T: Number>(sequences: &[Seen<'_>], heads: Heads, manners: &[Manner]) {
    let case = Case::<T>::new(sequences, heads);
    let expected = case.by_definition();
    let tolerance = if size_of::<T>() == 2 { 1e-2 } else { 1e-5 };
    let mut first = None;
    for &manner in manners {
        let found = case.on_kernels(manner);
        assert_within(&format!("cached {heads:?} {manner:?}"), &found, &expected, tolerance);
        let bits: Vec<u32> = found.iter().map(|x| x.wide().to_bits()).collect();
        assert_eq!(*first.get_or_insert_with(|| bits.clone()), bits, "{manner:?}");
    }
}

fn all_shapes<T: Number>() {
    is_by_definition::<T>(ANSWERS, (2, 3, 32), &manners(&[THREADS]));
    is_by_definition::<T>(PROMPTS, (2, 3, 32), &each_block(0));
    is_by_definition::<T>(ANSWERS, (1, 7, 64), &each_block(1)[..2]);
    is_by_definition::<T>(PROMPTS, (1, 1, 96), &each_block(2)[..2]);
    is_by_definition::<T>(ANSWERS, (1, 4, 128), &each_block(0)[2..3]);
}

#[test]
fn f32_attention_over_pages_matches_its_definition() {
    all_shapes::<f32>();
}

#[test]
fn bf16_attention_over_pages_matches_its_definition() {
    all_shapes::<bf16>();
}

fn neighbours_do_not_matter<T: Number>() {
    let manner = manners(&[THREADS])[0];
    let heads = (2, 3, 32);
    let all = Case::<T>::new(ANSWERS, heads);
    let found = all.on_kernels(manner);
    let row = 2 * 3 * 32;
    for (index, sequence) in ANSWERS.iter().enumerate() {
        let mut alone = Case::<T>::new(ANSWERS, heads);
        alone.sequences = vec![(sequence.0.to_vec(), sequence.1)];
        alone.q = all.q[index * row..][..row].to_vec();
        let bits = |x: &[T]| wide(x).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&alone.on_kernels(manner)), bits(&found[index * row..][..row]), "{index}");
    }
}

#[test]
fn sequence_is_bitwise_independent_of_its_neighbours() {
    neighbours_do_not_matter::<f32>();
    neighbours_do_not_matter::<bf16>();
}

fn rows_come_to_their_places<T: Number>(width: usize, turn: usize) {
    let line = 2 * width;
    let rows: usize = 5;
    let (k, v) = (random::<T>(1, rows * width), random::<T>(2, rows * width));
    // Pages of two layers and four positions; slots alternate between two pages.
    let before: Vec<T> = random(3, LAYERS * 4 * line);
    for manner in each_block(turn) {
        let mut pages = [(); 2].map(|()| Guarded::new(&before, manner.side));
        let (mut expected, mut places) = ([before.clone(), before.clone()], Vec::new());
        for row in 0..rows {
            let (page, slot) = (row % 2, row / 2 + 1);
            places.push(
                pages[page].as_mut().as_mut_ptr() as u64 + (slot * line * size_of::<T>()) as u64,
            );
            let at = (LAYER * 4 + slot) * line;
            expected[page][at..at + width].copy_from_slice(&k[row * width..][..width]);
            expected[page][at + width..at + line].copy_from_slice(&v[row * width..][..width]);
        }
        let places = Guarded::new(&places, manner.side);
        let (k, v) = (Guarded::new(&k, manner.side), Guarded::new(&v, manner.side));
        let entry = format!("cache_store_{}", T::NAME);
        let call = Kernels::of(FILE).call(&entry, [rows as u32, 1, 1], manner);
        let layer = (LAYER * 4 * line) as u64;
        call.input(&k).input(&v).input(&places).arg(layer).arg(width as u32).run();
        for (page, expected) in pages.iter().zip(&expected) {
            assert!(page.is_clean(), "{manner:?}");
            let what = format!("pages {width} {manner:?}");
            assert_same(&what, T::NAME, &wide(page.as_slice()), &wide(expected));
        }
    }
}

#[test]
fn keys_and_values_are_stored_at_their_places() {
    for (turn, width) in [64, 12, 7, 1].into_iter().enumerate() {
        rows_come_to_their_places::<f32>(width, turn);
        rows_come_to_their_places::<bf16>(width, turn);
    }
}

/// Every query covers every visible position in exactly one part, and a tile's parts are contiguous.
#[test]
fn lists_hold_every_visible_pair_once() {
    let slices = [usize::MAX, 100, 1];
    let cases = [(ANSWERS, 1), (ANSWERS, 7), (PROMPTS, 3), (PROMPTS, 70)];
    for ((sequences, share), most) in
        cases.into_iter().flat_map(|one| slices.map(|most| (one, most)))
    {
        let case = Case::<f32>::new(sequences, (1, share, 32));
        let lists = case.lists(&[0; 8], most);
        let mut parts = lists.parts.iter();
        let mut seen = BTreeMap::<(u32, u64), u32>::new();
        for slice in &lists.slices {
            let mut rows = 0;
            assert!(slice.rows <= most || slice.wholes.len() == 1);
            for &[first, count, out, number] in &lists.wholes[slice.wholes.clone()] {
                assert!(count as usize <= OWN && out == rows);
                for (part, of) in parts.by_ref().take(number as usize).enumerate() {
                    let &[part_first, part_count, shift, begin, end, part_out] = of;
                    assert_eq!((part_first, part_count), (first, count));
                    assert_eq!(part_out, out + part as u32 * count);
                    for span in &lists.spans[begin as usize..end as usize] {
                        let (position, number) = (span[1] & 0xffff_ffff, span[1] >> 32);
                        assert_eq!(position as usize / PART, part);
                        assert_eq!((position + number - 1) as usize / PART, part);
                        for query in first..first + count {
                            let own = u64::from((query / share as u32).wrapping_add(shift));
                            for position in (position..position + number).filter(|at| *at <= own) {
                                *seen.entry((query, position)).or_default() += 1;
                            }
                        }
                    }
                }
                rows += number * count;
            }
            assert_eq!(
                (lists.parts.len() - parts.len(), rows as usize),
                (slice.parts.end, slice.rows)
            );
        }
        assert_eq!(parts.len(), 0);
        assert!(seen.values().all(|&times| times == 1));
        let mut expected = 0;
        for (spans, new) in sequences {
            let len: usize = spans.iter().map(|span| span.2).sum();
            expected += (len - new + 1..=len).sum::<usize>() * share;
        }
        assert_eq!(seen.len(), expected);
    }
}

/// Target of the mutation tests: small, with a group size that is not a power of two.
#[test]
fn a_few_sequences_in_both_types() {
    let manners = &each_block(0)[..2];
    is_by_definition::<f32>(ANSWERS, (2, 3, 32), manners);
    is_by_definition::<bf16>(ANSWERS, (2, 3, 32), manners);
    is_by_definition::<f32>(PROMPTS, (2, 3, 32), &manners[..1]);
    is_by_definition::<bf16>(PROMPTS, (2, 3, 32), &manners[1..]);
    rows_come_to_their_places::<f32>(8, 0);
    // Vector copies, some at addresses that allow none.
    rows_come_to_their_places::<bf16>(12, 1);
}

const CHECK: &str = "ops::cuda::cached::tests::a_few_sequences_in_both_types";

#[test]
fn every_mutant_of_attention_over_pages_is_caught() {
    let mutants = [
        // Spans and pieces.
        ("+ offset, at->position, at->count}", ", at->position, at->count}"),
        ("left.keys + u64(piece.count) * line", "left.keys + u64(step) * line + line"),
        ("left.position + piece.count, left.count", "left.position, left.count"),
        ("piece.keys + u64(key) * values * 2 + values;", "piece.keys + u64(key) * values * 2;"),
        ("layer + blockIdx.y * O::E, values", "layer, values"),
        // Positions.
        (
            "{(part.first + row) / share + part.shift,",
            "{(part.first + row) / share + part.shift + 1,",
        ),
        ("(part.first + row + 8) / share", "(part.first + row) / share"),
        // Rows out of range.
        (
            "if (row + half * 8 >= part.count) continue;",
            "if (row + half * 8 > part.count) continue;",
        ),
        // Parts.
        ("u64(blockIdx.y) * rows + part.out", "part.out"),
        ("total += numbers[at + 1] * expf(numbers[at] - most);", "total += numbers[at + 1];"),
        ("sums[at * width + column] * expf(numbers[at * 2] - most)", "sums[at * width + column]"),
        ("u32 query = whole.first + row;", "u32 query = row;"),
        ("row < whole.count; row += warp_count()", "row <= whole.count; row += warp_count()"),
        ("u64(query / share) * gridDim.y + blockIdx.y", "u64(query / share) + blockIdx.y"),
        // Copies.
        ("(places[blockIdx.x]) + layer;", "(places[blockIdx.x]);"),
        (
            "store_pack(to + width + i, load_pack<C>(v + i));",
            "store_pack(to + i, load_pack<C>(v + i));",
        ),
        ("bool packed = packs(k, width) && packs(v, width);", "bool packed = true;"),
    ];
    every_mutant_is_caught(FILE, CHECK, &mutants);
}

/// Header code used only for parts: a query may have seen nothing.
#[test]
fn every_mutant_of_the_shared_attention_code_is_caught_over_pages() {
    let mutants = [
        ("most[half] == NEG_INF ? 1 : exponential", "most[half] == 1 ? 1 : exponential"),
        ("most[i / 2] == NEG_INF ? 0 : exponential", "most[i / 2] == 1 ? 0 : exponential"),
    ];
    every_mutant_within_is_caught("attention.cuh", FILE, CHECK, &mutants);
}
