//! The vocabulary head, the one place where logits exist (design idea 2).
//!
//! Works on *targets*: (hidden row, token id, sequence). Rows without a target are dropped before the product; logits
//! live for one chunk of rows and are never stored. Two calls: [`read`] says what each target's log-probability is and,
//! where asked, what else the row's softmax says ([`RowStats`]); [`backward`] takes the gradient with respect to each
//! log-probability and runs the head's own backward. Where that gradient is known beforehand (SFT), `backward` alone is a
//! single pass, as it returns what `read` does too; where it follows from margins of pairs, [`backward_of_pairs`] is both
//! passes, and [`backward_by`] where the host is to be asked between them. On a GPU nobody waits: readings are [`Pending`].

mod anchor;
mod chunks;
mod pairs;
mod pending;
mod plain;

use candle_core::{DType, Result, Tensor};
use half::bf16;

use super::cpu::simd;
use crate::data::forest::Target;
pub use anchor::Anchor;
use chunks::on_cpu;
#[cfg(any(feature = "cuda", all(test, unix)))]
pub(super) use pairs::Placed;
pub(crate) use pairs::starts;
pub use pairs::{MarginLoss, PairTerm, Pairs};
pub use pending::Pending;
use plain::plain;

/// Logits held at once, in elements: 48 MiB of f32.
pub const CHUNK_ELEMENTS: usize = 12 << 20;

/// The same on a GPU: 512 MiB of f32, and half as much of their gradient in bf16. A thousand rows of a vocabulary of 128
/// thousand: enough for the products to be bound by arithmetic.
pub const GPU_CHUNK_ELEMENTS: usize = 128 << 20;

/// How many of a row's likeliest tokens [`RowStats::top_entropy`] is of: EAFT's `K` (Diao et al., 2026).
pub const TOP: usize = 20;

/// How much is read of each row beside the log-probabilities of its targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// Nothing.
    #[default]
    Targets,
    /// [`RowStats`] without `top_entropy`.
    Rows,
    /// [`RowStats`], for which the row's likeliest tokens are looked for.
    Top,
}

/// What one row of logits `x` says beside the log-probabilities `ln p` of its targets. All logarithms are natural.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowStats {
    /// `ln Σ e^x`.
    pub log_sum_exp: f32,
    /// Mean of `x` over the vocabulary; less `log_sum_exp` it is the mean of `ln p`.
    pub mean_logit: f32,
    /// `−Σ p ln p`.
    pub entropy: f32,
    /// `ln Σ p²`.
    pub log_sum_squares: f32,
    /// `ln p` of the likeliest token.
    pub best_logp: f32,
    /// The entropy that is left if only the [`TOP`] likeliest tokens could follow; 0 unless [`Detail::Top`] is read.
    pub top_entropy: f32,
    /// `Σ q (ln q − ln p)`, with `q` the distribution of an [`Anchor`]; 0 without one.
    pub divergence: f32,
}

/// What is read of each target.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// Its log-probability, `[N]`.
    pub logps: Vec<f32>,
    /// Its row, `[N]` from [`Detail::Rows`] on, else empty.
    pub rows: Vec<RowStats>,
}

/// The gradient that [`backward`] is given: that of `Σ_n d_logps[n] · (logp[n] + mean_logp · mean_v ln p_n(v) +
/// squared_lse · lse_n²)`.
#[derive(Clone, Copy, Debug)]
pub struct Slopes<'a> {
    /// One a target.
    pub d_logps: &'a [f32],
    /// Label smoothing's part: the mean of the row's log-probabilities over the vocabulary.
    pub mean_logp: f32,
    /// The z-loss's part: the square of the row's log-sum-exp.
    pub squared_lse: f32,
}

impl<'a> From<&'a [f32]> for Slopes<'a> {
    /// Of the log-probabilities alone.
    fn from(d_logps: &'a [f32]) -> Self {
        Self { d_logps, mean_logp: 0.0, squared_lse: 0.0 }
    }
}

/// What [`backward`] returns beside the gradients that it always does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked<'a> {
    /// How much of [`Readings::rows`].
    pub detail: Detail,
    /// The gradient of the head's weight.
    pub d_weight: bool,
    /// A model to stay close to: [`RowStats::divergence`], and its part of the gradients.
    pub anchor: Option<&'a Anchor>,
}

/// What [`backward`] returns.
#[derive(Debug)]
pub struct HeadGrads {
    /// Of each target.
    pub readings: Pending,
    /// Gradient of the hidden states, `[T, D]`; zero in rows without a target.
    pub d_hidden: Tensor,
    /// Gradient of the head's weight, `[V, D]`, where it was asked for.
    pub d_weight: Option<Tensor>,
}

/// Log-probability of each target under the full softmax.
///
/// # Shapes
/// - `hidden`: `[T, D]`, `weight`: `[V, D]`, `targets`: `N`  →  `N` values
pub fn logps(hidden: &Tensor, weight: &Tensor, targets: &[Target]) -> Result<Vec<f32>> {
    Ok(read(hidden, weight, targets, Detail::Targets)?.logps)
}

/// Log-probability of each target under the full softmax, and as much of its row's [`RowStats`] as `detail` says.
///
/// # Shapes
/// As [`logps`].
pub fn read(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    detail: Detail,
) -> Result<Readings> {
    reading(hidden, weight, targets, (detail, None))?.wait()
}

/// [`read`], which a GPU may still be at, and each row's divergence from an anchor's where one is given.
///
/// # Shapes
/// As [`logps`].
pub fn reading(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    (detail, anchor): (Detail, Option<&Anchor>),
) -> Result<Pending> {
    Ok(run(hidden, weight, targets, Pass { detail, gradient: None, anchor })?.0)
}

/// What [`read`] reads, and the gradients of what [`Slopes`] says.
///
/// # Shapes
/// - `hidden`: `[T, D]`, `weight`: `[V, D]`, `targets` and the slopes: `N`
pub fn backward(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    slopes: Slopes<'_>,
    asked: Asked<'_>,
) -> Result<HeadGrads> {
    if slopes.d_logps.len() != targets.len() {
        candle_core::bail!("{} weights for {} targets", slopes.d_logps.len(), targets.len());
    }
    let Asked { detail, d_weight, anchor } = asked;
    let pass = Pass { detail, gradient: Some((slopes, d_weight)), anchor };
    HeadGrads::new(run(hidden, weight, targets, pass)?, hidden)
}

/// What [`read`] reads, and the gradients of losses of pairs. On a GPU nobody waits between the two passes.
///
/// # Shapes
/// - `hidden`: `[T, D]`, `weight`: `[V, D]`, `targets` and what the pairs say of them: `N`
pub fn backward_of_pairs(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    pairs: &Pairs,
    asked: Asked<'_>,
) -> Result<HeadGrads> {
    if pairs.sequences.len() != targets.len() {
        candle_core::bail!("pairs of {} targets, not {}", pairs.sequences.len(), targets.len());
    }
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        let (hidden, weight, rows) = prepared(hidden, weight, targets)?;
        let anchor = beside((&hidden, &weight), targets.len(), asked.anchor)?;
        let asked = Asked { anchor: anchor.as_ref(), ..asked };
        let out = super::cuda::head_launch::of_pairs(&hidden, &weight, rows, (pairs, asked))?;
        return HeadGrads::new(out, &hidden);
    }
    two_passes((hidden, weight), targets, |readings| pairs.slopes(&readings.logps), asked)
}

/// The slope of each of a tensor's values by losses of pairs, in their order and without a graph. On a GPU nobody waits.
///
/// # Shapes
/// - `values` and the slopes: `N` in all, f32
pub fn slopes_of_pairs(values: &Tensor, pairs: &Pairs) -> Result<Tensor> {
    if pairs.sequences.len() != values.elem_count() || values.dtype() != DType::F32 {
        let (count, shape) = (pairs.sequences.len(), values.shape());
        candle_core::bail!("pairs of {count} values, not of {shape:?} in {:?}", values.dtype());
    }
    #[cfg(feature = "cuda")]
    if values.device().is_cuda() {
        return super::cuda::launch::pairs::of_values(&values.contiguous()?, pairs);
    }
    let slopes = pairs.slopes(&values.detach().flatten_all()?.to_vec1()?);
    Tensor::from_vec(slopes, values.shape(), values.device())
}

/// What makes the slopes of a pass's targets of what it read, on any thread, without calling the device.
pub type Weigh = Box<dyn FnOnce(&Readings) -> Vec<f32> + Send>;

/// What [`read`] reads, and the gradients by the slopes that `weigh` makes of it. On a GPU the driver calls it between the two
/// passes, and nobody waits; slopes are NaN there where it makes another number of them. With an [`Anchor`], `weigh` is called
/// before the divergences are known: their slopes are the anchor's.
///
/// # Shapes
/// - `hidden`: `[T, D]`, `weight`: `[V, D]`, `targets` and the slopes: `N`
pub fn backward_by(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    weigh: Weigh,
    asked: Asked<'_>,
) -> Result<HeadGrads> {
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        let (hidden, weight, rows) = prepared(hidden, weight, targets)?;
        let anchor = beside((&hidden, &weight), targets.len(), asked.anchor)?;
        let asked = Asked { anchor: anchor.as_ref(), ..asked };
        let out = super::cuda::head_launch::by_host(&hidden, &weight, rows, (weigh, asked))?;
        return HeadGrads::new(out, &hidden);
    }
    two_passes((hidden, weight), targets, weigh, asked)
}

fn two_passes(
    (hidden, weight): (&Tensor, &Tensor),
    targets: &[Target],
    weigh: impl FnOnce(&Readings) -> Vec<f32>,
    asked: Asked<'_>,
) -> Result<HeadGrads> {
    let readings = read(hidden, weight, targets, asked.detail)?;
    let slopes = weigh(&readings);
    if asked.anchor.is_some() {
        return backward(hidden, weight, targets, slopes.as_slice().into(), asked);
    }
    let asked = Asked { detail: Detail::Targets, ..asked };
    let grads = backward(hidden, weight, targets, slopes.as_slice().into(), asked)?;
    Ok(HeadGrads { readings: readings.into(), ..grads })
}

/// The predictions after some rows, in f32: rows enter the product in the weight's type, and its sums are not rounded. No
/// gradient.
///
/// # Shapes
/// - `hidden`: `[R, D]`, at least one row, `weight`: `[V, D]`  →  `[R, V]`
pub fn logits(hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let hidden = hidden.detach().to_dtype(weight.dtype())?;
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        return super::cuda::head_launch::logits(&hidden, weight);
    }
    super::linear(&hidden.to_dtype(DType::F32)?, &weight.detach().to_dtype(DType::F32)?, None)
}

/// Rows whose logits exist at once, for a vocabulary of this size.
pub fn rows_at_once(vocab: usize) -> usize {
    Rows::chunk(vocab)
}

pub(super) type Grads = Option<(Tensor, Option<Tensor>)>;

/// What one run over the chunks computes.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) detail: Detail,
    /// The slopes, and whether the weight's gradient is wanted.
    pub(super) gradient: Option<(Slopes<'a>, bool)>,
    pub(super) anchor: Option<&'a Anchor>,
}

impl HeadGrads {
    fn new((readings, grads): (Pending, Grads), hidden: &Tensor) -> Result<Self> {
        match grads {
            Some((d_hidden, d_weight)) => Ok(Self { readings, d_hidden, d_weight }),
            None => Ok(Self { readings, d_hidden: hidden.zeros_like()?, d_weight: None }),
        }
    }
}

impl Readings {
    /// Room for `count` targets.
    pub(super) fn zeros(count: usize, detail: Detail) -> Self {
        let rows = if detail == Detail::Targets { 0 } else { count };
        let rows = vec![RowStats::default(); rows];
        Self { logps: vec![0.0; count], rows }
    }

    pub(super) fn set(&mut self, index: usize, logp: f32, row: Option<RowStats>) {
        self.logps[index] = logp;
        if let Some(row) = row {
            self.rows[index] = row;
        }
    }
}

impl Slopes<'_> {
    /// Factors in a row's gradient, of its softmax and of one: both follow from the sum of its targets' slopes.
    fn of_row(&self, targets: &[(usize, u32)], log_sum_exp: f32, vocab: usize) -> (f32, f32) {
        let total: f32 = targets.iter().map(|&(index, _)| self.d_logps[index]).sum();
        let softmax = -1.0 - self.mean_logp + 2.0 * self.squared_lse * log_sum_exp;
        (total * softmax, total * self.mean_logp / vocab as f32)
    }
}

fn run(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    pass: Pass<'_>,
) -> Result<(Pending, Grads)> {
    let (hidden, weight, rows) = prepared(hidden, weight, targets)?;
    let anchor = beside((&hidden, &weight), targets.len(), pass.anchor)?;
    let pass = Pass { anchor: anchor.as_ref(), ..pass };
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        return super::cuda::head_launch::on_cuda(&hidden, &weight, rows, pass);
    }
    let (readings, grads) = match (hidden.device().is_cpu(), weight.dtype()) {
        (true, DType::BF16) => on_cpu::<bf16>((&hidden, &weight), &rows, pass)?,
        (true, _) => on_cpu::<f32>((&hidden, &weight), &rows, pass)?,
        (false, _) => plain(&hidden, &weight, &rows, pass)?,
    };
    Ok((readings.into(), grads))
}

/// Detached, contiguous inputs, and the rows of targets that fit them.
fn prepared(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
) -> Result<(Tensor, Tensor, Rows)> {
    let (t, width) = hidden.dims2()?;
    let (vocab, weight_width) = weight.dims2()?;
    let misplaced = targets.iter().find(|x| x.row as usize >= t || x.id as usize >= vocab);
    if let Some(target) = misplaced {
        candle_core::bail!(
            "target {} at row {} is outside {t} rows and {vocab} ids",
            target.id,
            target.row
        );
    }
    if width != weight_width {
        candle_core::bail!("hidden states of width {width} meet a head of width {weight_width}");
    }
    Ok((hidden.detach().contiguous()?, weight.detach().contiguous()?, Rows::new(targets)))
}

/// An anchor in the form of the model beside it.
fn beside(
    (hidden, weight): (&Tensor, &Tensor),
    targets: usize,
    anchor: Option<&Anchor>,
) -> Result<Option<Anchor>> {
    anchor.map(|anchor| anchor.beside(hidden, weight, targets)).transpose()
}

/// Targets grouped by hidden row.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    /// Hidden rows with at least one target, ascending.
    pub(super) hidden: Vec<u32>,
    /// Where each row's targets start in `order`; one more entry than rows.
    pub(super) starts: Vec<usize>,
    /// (index of the target, its token id), row by row.
    pub(super) order: Vec<(usize, u32)>,
}

impl Rows {
    pub(super) fn new(targets: &[Target]) -> Self {
        let mut sorted: Vec<usize> = (0..targets.len()).collect();
        sorted.sort_by_key(|&index| (targets[index].row, index));
        let (mut rows, mut starts) = (Vec::new(), Vec::new());
        for (place, &index) in sorted.iter().enumerate() {
            if rows.last() != Some(&targets[index].row) {
                rows.push(targets[index].row);
                starts.push(place);
            }
        }
        starts.push(sorted.len());
        Self {
            hidden: rows,
            starts,
            order: sorted.into_iter().map(|index| (index, targets[index].id)).collect(),
        }
    }

    fn targets(&self, slot: usize) -> &[(usize, u32)] {
        &self.order[self.starts[slot]..self.starts[slot + 1]]
    }

    fn chunk(vocab: usize) -> usize {
        (CHUNK_ELEMENTS / vocab.max(1)).clamp(16, 4096)
    }
}

/// `ln Σ e^x` of one row of logits: what every log-probability subtracts, in training and in sampling. Not finite where
/// the row is not.
pub fn log_sum_exp(row: &[f32]) -> f32 {
    let max = simd::max(row);
    log_of_sum(max, simd::sum_exp_sub(row, max))
}

fn log_of_sum(max: f32, sum: f32) -> f32 {
    max + sum.ln()
}

/// `−Σ q ln q` of the softmax `q` over some logits alone.
pub(super) fn entropy_among(logits: &[f32]) -> f32 {
    let max = f64::from(simd::max(logits));
    let (mut sum, mut first) = (0.0, 0.0);
    for &logit in logits {
        let below = f64::from(logit) - max;
        // What has no probability adds nothing; minus infinity times 0 would.
        if below > f64::NEG_INFINITY {
            sum += below.exp();
            first += below * below.exp();
        }
    }
    (sum.ln() - first / sum) as f32
}

#[cfg(test)]
mod tests {
    use candle_core::D;

    use super::*;
    use crate::data::tree::Role;
    use crate::ops::linear::tests::{distance, random};

    fn targets(t: usize, vocab: usize) -> Vec<Target> {
        // Rows without, with one and with several targets, and one id twice in a row.
        (0..t * 2)
            .filter(|i| i % 3 != 0)
            .map(|i| Target {
                row: (i * 7 % t) as u32,
                id: (i * i % vocab) as u32,
                leaf: 0,
                role: Role::Content,
            })
            .collect()
    }

    #[test]
    fn both_forms_agree_with_candles_graph() {
        for (t, width, vocab) in [(1, 4, 3), (9, 8, 33), (40, 16, 257)] {
            let (hidden, weight) = (random(1, (t, width)), random(2, (vocab, width)));
            let targets = targets(t, vocab);
            let d_logps: Vec<f32> = (0..targets.len()).map(|i| (i as f32 * 0.3).sin()).collect();
            for (mean_logp, squared_lse) in [(0.0, 0.0), (0.25, 0.0), (0.0, -0.5), (0.3, 0.02)] {
                let slopes = Slopes { d_logps: &d_logps, mean_logp, squared_lse };
                let asked = Asked { detail: Detail::Top, d_weight: true, anchor: None };
                let ours = backward(&hidden, &weight, &targets, slopes, asked).unwrap();
                let read = read(&hidden, &weight, &targets, Detail::Top).unwrap();
                let found = ours.readings.wait().unwrap();
                assert_eq!((&found.logps, &found.rows), (&read.logps, &read.rows));
                assert_eq!(read.logps, logps(&hidden, &weight, &targets).unwrap());
                let gradient = Some((slopes, true));
                let pass = Pass { detail: Detail::Top, gradient, anchor: None };
                let (plain, grads) = plain(&hidden, &weight, &Rows::new(&targets), pass).unwrap();
                let (d_hidden, d_weight) = grads.unwrap();
                assert_near(&read, &plain, 1e-5);
                assert!(distance(&ours.d_hidden, &d_hidden) < 1e-5);
                assert!(distance(ours.d_weight.as_ref().unwrap(), &d_weight.unwrap()) < 1e-5);

                let [h, w] = graph((&hidden, &weight), &targets, slopes);
                assert!(distance(&ours.d_hidden, &h) < 1e-5, "{mean_logp} {squared_lse}");
                assert!(distance(&ours.d_weight.unwrap(), &w) < 1e-5, "{mean_logp} {squared_lse}");
            }
        }
    }

    /// With a narrower anchor, whose rows are read where the model's are.
    #[test]
    fn anchor_divergence_and_gradients_agree_with_candles_graph() {
        for (t, width, vocab) in [(1, 4, 3), (9, 8, 33), (40, 16, 2100)] {
            let (hidden, weight) = (random(1, (t, width)), random(2, (vocab, width)));
            let targets = targets(t, vocab);
            let slope = |i: usize, pace: f32| (i as f32 * pace).sin();
            let d_logps: Vec<f32> = (0..targets.len()).map(|i| slope(i, 0.3)).collect();
            let anchor = Anchor {
                hidden: random(3, (t, width / 2)),
                weight: random(4, (vocab, width / 2)),
                slopes: (0..targets.len()).map(|i| slope(i, 0.7)).collect(),
            };
            let slopes = Slopes::from(d_logps.as_slice());
            let asked = Asked { detail: Detail::Rows, d_weight: true, anchor: Some(&anchor) };
            let ours = backward(&hidden, &weight, &targets, slopes, asked).unwrap();
            let found = ours.readings.wait().unwrap();
            let what = (Detail::Rows, Some(&anchor));
            let read = reading(&hidden, &weight, &targets, what).unwrap().wait().unwrap();
            assert_eq!((&found.logps, &found.rows), (&read.logps, &read.rows));
            assert!(found.rows.iter().all(|row| row.divergence > 0.0), "{:?}", found.rows);

            let gradient = Some((slopes, true));
            let pass = Pass { detail: Detail::Rows, gradient, anchor: Some(&anchor) };
            let (plain, grads) = plain(&hidden, &weight, &Rows::new(&targets), pass).unwrap();
            assert_near(&read, &plain, 1e-5);
            let (plain_d_hidden, plain_d_weight) = grads.unwrap();
            let [h, w] = graph_beside((&hidden, &weight), &targets, (slopes, Some(&anchor)));
            for (what, d) in [(&ours.d_hidden, &h), (&plain_d_hidden, &h)] {
                assert!(distance(what, d) < 1e-5, "{t} {vocab}");
            }
            for what in [&ours.d_weight.unwrap(), &plain_d_weight.unwrap()] {
                assert!(distance(what, &w) < 1e-5, "{t} {vocab}");
            }

            // By the slopes that are asked for between the passes too, and what is read is the same.
            let weigh = move |_: &Readings| d_logps;
            let by = backward_by(&hidden, &weight, &targets, Box::new(weigh), asked).unwrap();
            assert!(distance(&by.d_hidden, &h) < 1e-5);
            assert_eq!(by.readings.wait().unwrap().rows, read.rows);
        }
    }

    #[test]
    fn bf16_divergence_is_close_to_f32_and_zero_from_itself() {
        let (hidden, weight) = (random(1, (12, 16)), random(2, (65, 16)));
        let bf16 = weight.to_dtype(DType::BF16).unwrap();
        let targets = targets(12, 65);
        let (other, head) = (random(3, (12, 16)), random(4, (65, 16)));
        let divergences = |weight: &Tensor, hidden_: &Tensor, head: &Tensor| -> Vec<f32> {
            let anchor =
                Anchor { hidden: hidden_.clone(), weight: head.clone(), slopes: Vec::new() };
            let what = (Detail::Rows, Some(&anchor));
            let read = reading(&hidden, weight, &targets, what).unwrap().wait().unwrap();
            read.rows.iter().map(|row| row.divergence).collect()
        };
        let exact = divergences(&weight, &other, &head);
        for (a, b) in divergences(&bf16, &other, &head).iter().zip(&exact) {
            assert!((a - b).abs() < 0.02 * (1.0 + b), "{a}, {b} in f32");
        }
        for weight in [weight, bf16] {
            let own = divergences(&weight, &hidden, &weight);
            assert!(own.iter().all(|value| value.to_bits() == 0), "{own:?}");
        }
    }

    #[test]
    fn anchor_with_a_mismatched_shape_is_refused() {
        let (hidden, weight) = (random(1, (4, 8)), random(2, (33, 8)));
        let targets = targets(4, 33);
        let refused = |rows: usize, vocab: usize, slopes: usize| {
            let (hidden_, head) = (random(1, (rows, 8)), random(2, (vocab, 8)));
            let anchor = Anchor { hidden: hidden_, weight: head, slopes: vec![1.0; slopes] };
            let what = (Detail::Rows, Some(&anchor));
            reading(&hidden, &weight, &targets, what).unwrap_err().to_string()
        };
        let of = |rows, vocab| refused(rows, vocab, 0);
        let expected = |rows, ids| {
            format!("an anchor of {rows} rows and {ids} ids is beside 4 rows and 33 ids")
        };
        assert!(of(3, 33).contains(&expected(3, 33)), "{}", of(3, 33));
        assert!(of(4, 32).contains(&expected(4, 32)), "{}", of(4, 32));
        let count = targets.len();
        let error = refused(4, 33, 1);
        assert!(error.contains(&format!("1 slopes of divergences for {count} targets")), "{error}");
    }

    #[test]
    fn slopes_requested_between_passes_give_the_same_gradients() {
        let (hidden, weight) = (random(1, (40, 16)), random(2, (257, 16)));
        let targets = targets(40, 257);
        let asked = Asked { detail: Detail::Rows, d_weight: true, anchor: None };
        let slope = |(logp, row): (&f32, &RowStats)| logp.exp() - 0.1 * row.entropy;
        let weigh = move |read: &Readings| -> Vec<f32> {
            read.logps.iter().zip(&read.rows).map(slope).collect()
        };
        let slopes = weigh(&read(&hidden, &weight, &targets, Detail::Rows).unwrap());
        let given = backward(&hidden, &weight, &targets, slopes.as_slice().into(), asked).unwrap();
        let by_host = |weigh| backward_by(&hidden, &weight, &targets, weigh, asked);
        let found = by_host(Box::new(weigh)).unwrap();
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&found.d_hidden), flat(&given.d_hidden));
        assert_eq!(flat(&found.d_weight.unwrap()), flat(&given.d_weight.unwrap()));
        let (found, given) = (found.readings.wait().unwrap(), given.readings.wait().unwrap());
        assert_eq!((found.logps, found.rows), (given.logps, given.rows));
        let error = by_host(Box::new(|_| vec![1.0])).unwrap_err().to_string();
        assert!(error.contains("1 weights for"), "{error}");
    }

    fn assert_near(a: &Readings, b: &Readings, tolerance: f32) {
        let near = |a: f32, b: f32| (a - b).abs() <= tolerance * (1.0 + b.abs());
        assert!(a.logps.iter().zip(&b.logps).all(|(a, b)| near(*a, *b)));
        assert!(!a.rows.is_empty() && a.rows.len() == b.rows.len());
        let parts = |row: &RowStats| {
            let RowStats { log_sum_exp, mean_logit, entropy, best_logp, divergence, .. } = *row;
            let squares = row.log_sum_squares;
            [log_sum_exp, mean_logit, entropy, squares, best_logp, row.top_entropy, divergence]
        };
        for (a, b) in a.rows.iter().zip(&b.rows) {
            assert!(parts(a).into_iter().zip(parts(b)).all(|(a, b)| near(a, b)), "{a:?} {b:?}");
        }
    }

    /// Gradients of what [`Slopes`] says, by Candle's own graph over the full logits.
    fn graph(inputs: (&Tensor, &Tensor), targets: &[Target], slopes: Slopes<'_>) -> [Tensor; 2] {
        graph_beside(inputs, targets, (slopes, None))
    }

    /// [`graph`], and of an anchor's divergences.
    fn graph_beside(
        (h, w): (&Tensor, &Tensor),
        targets: &[Target],
        (slopes, anchor): (Slopes<'_>, Option<&Anchor>),
    ) -> [Tensor; 2] {
        let [h, w] = [h, w].map(|tensor| candle_core::Var::from_tensor(tensor).unwrap());
        let logits = h.matmul(&w.t().unwrap()).unwrap();
        let (t, vocab) = logits.dims2().unwrap();
        let log_probs = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap();
        let lse = logits.log_sum_exp(D::Minus1).unwrap();
        let (mut picks, mut totals) = (vec![0_f32; t * vocab], vec![0_f32; t]);
        for (target, d) in targets.iter().zip(slopes.d_logps) {
            picks[target.row as usize * vocab + target.id as usize] += d;
            totals[target.row as usize] += d;
        }
        let picks = Tensor::from_vec(picks, (t, vocab), h.device()).unwrap();
        let totals = Tensor::from_vec(totals, t, h.device()).unwrap();
        let mean = (log_probs.mean(D::Minus1).unwrap() * f64::from(slopes.mean_logp)).unwrap();
        let square = (lse.sqr().unwrap() * f64::from(slopes.squared_lse)).unwrap();
        let mut rows = (mean + square).unwrap().mul(&totals).unwrap().sum_all().unwrap();
        if let Some(anchor) = anchor {
            let mut slopes = vec![0_f32; t];
            for (target, d) in targets.iter().zip(&anchor.slopes) {
                slopes[target.row as usize] += d;
            }
            let logits = anchor.hidden.matmul(&anchor.weight.t().unwrap()).unwrap();
            let log_q = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap();
            let apart = (log_q.exp().unwrap() * (&log_q - &log_probs).unwrap()).unwrap();
            let slopes = Tensor::from_vec(slopes, t, h.device()).unwrap();
            let apart = apart.sum(D::Minus1).unwrap().mul(&slopes).unwrap();
            rows = (rows + apart.sum_all().unwrap()).unwrap();
        }
        let own = (log_probs * picks).unwrap().sum_all().unwrap();
        let grads = (own + rows).unwrap().backward().unwrap();
        [h, w].map(|var| grads.get(&var).unwrap().clone())
    }

    /// The definitions, in double precision.
    #[test]
    fn row_statistics_match_the_definition_of_softmax() {
        let (hidden, weight) = (random(5, (6, 24)), random(6, (71, 24)));
        let targets = targets(6, 71);
        let logits = hidden.matmul(&weight.t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
        for (bf16, tolerance) in [(false, 1e-5), (true, 3e-2)] {
            let weight = if bf16 { weight.to_dtype(DType::BF16).unwrap() } else { weight.clone() };
            let read = read(&hidden, &weight, &targets, Detail::Top).unwrap();
            let exact: Vec<RowStats> = targets
                .iter()
                .map(|target| {
                    let x: Vec<f64> =
                        logits[target.row as usize].iter().map(|&x| f64::from(x)).collect();
                    let lse = x.iter().map(|x| x.exp()).sum::<f64>().ln();
                    let p = || x.iter().map(|x| (x - lse).exp());
                    let mut top: Vec<f64> = p().collect();
                    top.sort_by(|a, b| b.total_cmp(a));
                    let all = top[..TOP].iter().sum::<f64>();
                    let top = top[..TOP].iter().map(|p| p / all);
                    RowStats {
                        log_sum_exp: lse as f32,
                        mean_logit: (x.iter().sum::<f64>() / x.len() as f64) as f32,
                        entropy: -p().map(|p| p * p.ln()).sum::<f64>() as f32,
                        log_sum_squares: p().map(|p| p * p).sum::<f64>().ln() as f32,
                        best_logp: p().fold(0.0, f64::max).ln() as f32,
                        top_entropy: -top.map(|q| q * q.ln()).sum::<f64>() as f32,
                        divergence: 0.0,
                    }
                })
                .collect();
            assert_near(&read, &Readings { logps: read.logps.clone(), rows: exact }, tolerance);
        }
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_refused() {
        let target = Target { row: 0, id: 3, leaf: 0, role: Role::Content };
        let error = logps(&random(1, (1, 4)), &random(2, (3, 4)), &[target]).unwrap_err();
        assert!(error.to_string().contains("target 3 at row 0 is outside 1 rows and 3 ids"));
    }
}
