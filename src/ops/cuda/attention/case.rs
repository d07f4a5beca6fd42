//! A forest for testing attention's kernels, and its results: on the kernels under the host shim, by the definition
//! with the kernels' rounding, and by the plain form with Candle's gradients.

#![expect(clippy::unwrap_used, reason = "only tests use it; a failure here is a failed test")]

use candle_core::{Device, Tensor, Var};

use super::{Kernel, Lists};
use crate::data::forest::Forest;
use crate::data::tree::{Role, Segment, Tree};
use crate::ops::cuda::tests::host::{Call, Guarded, Kernels, Manner, Number, random, wide};
use crate::ops::{AttentionPlan, attention, cpu};

pub(super) const FILE: &str = "attention.cu";

/// Trees, given by their segments' parents and lengths.
pub(super) type Trees<'a> = &'a [&'a [(Option<usize>, usize)]];

/// Query heads, key heads and head dimension.
pub(super) type Heads = (usize, usize, usize);

pub(super) fn plan(trees: Trees<'_>) -> AttentionPlan {
    let segment = |&(parent, len): &(Option<usize>, usize)| Segment {
        parent,
        tokens: vec![0; len],
        roles: vec![Role::Content; len],
    };
    let tree = |segments: &&[(Option<usize>, usize)]| Tree {
        segments: segments.iter().map(segment).collect(),
        ..Tree::default()
    };
    let trees: Vec<Tree> = trees.iter().map(tree).collect();
    AttentionPlan::new(&Forest::pack(&trees).unwrap())
}

/// A forest with its tensors.
pub(super) struct Case<T> {
    pub(super) plan: AttentionPlan,
    heads: usize,
    groups: usize,
    width: usize,
    pub(super) q: Vec<T>,
    pub(super) k: Vec<T>,
    pub(super) v: Vec<T>,
    pub(super) d_out: Vec<T>,
}

/// Results; `N` is the case's dtype, or f32 for expected values.
#[derive(Clone, Debug)]
pub(super) struct Results<N> {
    pub(super) out: Vec<N>,
    /// `[G, T, H/G]`.
    pub(super) log_sums: Vec<f32>,
    pub(super) d_q: Vec<N>,
    pub(super) d_k: Vec<N>,
    pub(super) d_v: Vec<N>,
}

impl<T: Number> Case<T> {
    pub(super) fn new(trees: Trees<'_>, (heads, groups, width): Heads) -> Self {
        let plan = plan(trees);
        let (queries, keys) = (plan.tokens * heads * width, plan.tokens * groups * width);
        Self {
            plan,
            heads,
            groups,
            width,
            q: random(1, queries),
            k: random(2, keys),
            v: random(3, keys),
            d_out: random(4, queries),
        }
    }

    fn share(&self) -> usize {
        self.heads / self.groups
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// Index of a query in `[G, T, H/G]`.
    pub(super) fn slot(&self, token: usize, head: usize) -> usize {
        let share = self.share();
        (head / share * self.plan.tokens + token) * share + head % share
    }

    /// On the kernels. Values they do not write are NaN.
    pub(super) fn on_kernels(&self, manner: Manner) -> Results<T> {
        let input = |values: &[T]| Guarded::new(values, manner.side);
        let blank = |len| Guarded::new(&vec![T::narrow(f32::NAN); len], manner.side);
        let rows = || Guarded::new(&vec![f32::NAN; self.plan.tokens * self.heads], manner.side);
        let [q, k, v, d_out] = [&self.q, &self.k, &self.v, &self.d_out].map(|x| input(x));
        let [mut out, mut d_q] = [&self.q, &self.q].map(|x| blank(x.len()));
        let [mut d_k, mut d_v] = [&self.k, &self.v].map(|x| blank(x.len()));
        let (mut log_sums, mut deltas) = (rows(), rows());
        let (of_queries, of_keys) =
            (Lists::of_queries(&self.plan, self.share()), Lists::of_keys(&self.plan));

        let launch = |which: Kernel, lists: &Lists| {
            let grid = [lists.tiles.len() as u32, self.groups as u32, 1];
            let call = Kernels::of(FILE).call(&which.entry(T::NAME, self.width), grid, manner);
            let call = call.shared(which.shared(size_of::<T>(), self.width));
            let tiles = Guarded::new(&lists.tiles, manner.side);
            let ranges = Guarded::new(&lists.ranges, manner.side);
            (call, tiles, ranges)
        };
        let (tokens, share) = (self.plan.tokens as u32, self.share() as u32);

        let (call, tiles, ranges) = launch(Kernel::Forward, &of_queries);
        let call = call.input(&q).input(&k).input(&v).output(&mut out).output(&mut log_sums);
        call.input(&tiles).input(&ranges).arg(tokens).arg(share).arg(self.scale()).run();

        self.delta(&out, &d_out, &mut deltas, manner);

        let (call, tiles, ranges) = launch(Kernel::BackwardKeys, &of_keys);
        let call = call.input(&q).input(&k).input(&v).input(&d_out).input(&log_sums);
        let call = call.input(&deltas).output(&mut d_k).output(&mut d_v);
        call.input(&tiles).input(&ranges).arg(tokens).arg(share).arg(self.scale()).run();

        let (call, tiles, ranges) = launch(Kernel::BackwardQueries, &of_queries);
        let call = call.input(&q).input(&k).input(&v).input(&d_out).input(&log_sums);
        let call = call.input(&deltas).output(&mut d_q);
        call.input(&tiles).input(&ranges).arg(tokens).arg(share).arg(self.scale()).run();

        assert!([&out, &d_q, &d_k, &d_v].iter().all(|x| x.is_clean()), "{manner:?}");
        assert!(log_sums.is_clean() && deltas.is_clean(), "{manner:?}");
        let [out, d_q, d_k, d_v] = [out, d_q, d_k, d_v].map(|x| x.as_slice().to_vec());
        Results { out, log_sums: log_sums.as_slice().to_vec(), d_q, d_k, d_v }
    }

    pub(super) fn delta(
        &self,
        out: &Guarded<T>,
        d_out: &Guarded<T>,
        deltas: &mut Guarded<f32>,
        manner: Manner,
    ) {
        let entry = format!("attention_delta_{}", T::NAME);
        let call = Kernels::of(FILE).call(&entry, [3, 1, 1], manner);
        let sizes = [self.plan.tokens, self.groups, self.share(), self.width].map(|x| x as u32);
        let call = call.input(out).input(d_out).output(deltas);
        sizes.into_iter().fold(call, Call::arg).run();
    }

    /// The keys visible to the token at `row`, in the kernels' order and pieces.
    fn pieces(&self, span: usize, row: usize) -> Vec<Vec<usize>> {
        let piece = if size_of::<T>() == 2 { 32 } else { 16 };
        let own = self.plan.spans[span].start..row + 1;
        let ranges = self.plan.ancestors(span).into_iter().chain([own]);
        let cut = |range: std::ops::Range<usize>| {
            range.collect::<Vec<_>>().chunks(piece).map(<[usize]>::to_vec).collect::<Vec<_>>()
        };
        ranges.flat_map(cut).collect()
    }

    /// By the definition, one query at a time in double precision, except that product inputs are rounded to the case's
    /// dtype: a query's weights relative to the running maximum, and the gradients of its scores.
    pub(super) fn by_definition(&self) -> Results<f32> {
        let rounded = |x: f64| f64::from(T::narrow(x as f32).wide());
        let double = |x: &[T]| x.iter().map(|x| f64::from(x.wide())).collect::<Vec<f64>>();
        let [q, k, v, d_out] = [&self.q, &self.k, &self.v, &self.d_out].map(|x| double(x));
        let (e, scale) = (self.width, f64::from(self.scale()));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let [mut out, mut d_q] = [&q, &q].map(|x| vec![0.0; x.len()]);
        let [mut d_k, mut d_v] = [&k, &k].map(|x| vec![0.0; x.len()]);
        let mut log_sums = vec![0.0; self.plan.tokens * self.heads];
        let of_spans = self.plan.spans.iter().enumerate();
        let rows = of_spans.flat_map(|(index, span)| {
            (span.start..span.start + span.len).map(move |row| (index, row))
        });
        for ((span, row), head) in rows.flat_map(|at| (0..self.heads).map(move |h| (at, h))) {
            let pieces = self.pieces(span, row);
            let at = (row * self.heads + head) * e;
            let key = |key: usize| (key * self.groups + head / self.share()) * e;
            let score = |at_key: usize| scale * dot(&q[at..at + e], &k[key(at_key)..][..e]);
            let (mut most, mut total, mut sum) = (f64::NEG_INFINITY, 0.0, vec![0.0; e]);
            for piece in &pieces {
                let higher = piece.iter().map(|&key| score(key)).fold(most, f64::max);
                let factor = (most - higher).exp();
                (most, total) = (higher, total * factor);
                for x in &mut sum {
                    *x *= factor;
                }
                for &seen in piece {
                    let p = (score(seen) - most).exp();
                    total += p;
                    add(&mut sum, rounded(p), &v[key(seen)..][..e]);
                }
            }
            let log_sum = most + total.ln();
            log_sums[self.slot(row, head)] = log_sum as f32;
            for x in &mut sum {
                *x = rounded(*x / total);
            }
            let delta = dot(&sum, &d_out[at..at + e]);
            out[at..at + e].copy_from_slice(&sum);
            for &seen in pieces.iter().flatten() {
                let (p, from) = ((score(seen) - log_sum).exp(), key(seen));
                let d = p * (dot(&v[from..from + e], &d_out[at..at + e]) - delta);
                add(&mut d_q[at..at + e], scale * rounded(d), &k[from..from + e]);
                add(&mut d_k[from..from + e], scale * rounded(d), &q[at..at + e]);
                add(&mut d_v[from..from + e], rounded(p), &d_out[at..at + e]);
            }
        }
        let [out, d_q, d_k, d_v] =
            [out, d_q, d_k, d_v].map(|x| x.iter().map(|&x| x as f32).collect());
        Results { out, log_sums, d_q, d_k, d_v }
    }

    /// By the plain form and Candle's gradients, in f32, with the log-sum-exps of the CPU kernel.
    pub(super) fn on_candle(&self) -> Results<f32> {
        let t = self.plan.tokens;
        let tensor = |x: &[T], heads| {
            let x = Tensor::from_vec(wide(x), (t, heads, self.width), &Device::Cpu).unwrap();
            Var::from_tensor(&x).unwrap()
        };
        let (q, d_out) = (tensor(&self.q, self.heads), tensor(&self.d_out, self.heads));
        let (k, v) = (tensor(&self.k, self.groups), tensor(&self.v, self.groups));
        let out = attention::plain(&q, &k, &v, &self.plan).unwrap();
        let grads = (&out * d_out.detach()).unwrap().sum_all().unwrap().backward().unwrap();
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let [d_q, d_k, d_v] = [&q, &k, &v].map(|x| flat(grads.get(x).unwrap()));
        let values = [&q, &k, &v].map(|x| flat(x));
        let [q, k, v] = values.each_ref().map(Vec::as_slice);
        let (heads, groups, width) = (self.heads, self.groups, self.width);
        let inputs = cpu::attention::Inputs { plan: &self.plan, heads, groups, width, q, k, v };
        let (_, by_unit) = cpu::attention::forward(&inputs);
        let mut log_sums = vec![0.0; by_unit.len()];
        let mut by_unit = by_unit.into_iter();
        for tree in &self.plan.trees {
            let spans = &self.plan.spans[tree.clone()];
            let first = spans[0].start;
            let end = first + spans.iter().map(|span| span.len).sum::<usize>();
            for (head, row) in (0..heads).flat_map(|head| (first..end).map(move |row| (head, row)))
            {
                log_sums[self.slot(row, head)] = by_unit.next().unwrap();
            }
        }
        Results { out: flat(&out), log_sums, d_q, d_k, d_v }
    }
}

/// `sum += by · x`.
fn add(sum: &mut [f64], by: f64, x: &[f64]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += by * x);
}
