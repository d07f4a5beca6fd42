//! AdamW's inner loop: one pass over a parameter, its moments and its bf16 copy; and stochastic rounding of the copy,
//! bit-identical to `adamw.cu`.

#![expect(
    unsafe_code,
    clippy::inline_always,
    reason = "a body compiled for a CPU feature may only be called where it was detected"
)]

use half::bf16;

use super::simd::{multiversion, to_bf16};
use crate::rng::philox;

/// The update's constants: `g ← g·grad_scale`, `m ← β₁m + (1 − β₁)g`, `v ← β₂v + (1 − β₂)g²`,
/// `p ← p·shrink − step_size · m / (√v / root_correction + eps)`.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// First-moment decay.
    pub beta1: f32,
    /// Second-moment decay.
    pub beta2: f32,
    /// Multiplies the gradient first (for clipping).
    pub grad_scale: f32,
    /// `1 − lr · weight decay`.
    pub shrink: f32,
    /// `lr / (1 − β₁ᵗ)`.
    pub step_size: f32,
    /// `√(1 − β₂ᵗ)`.
    pub root_correction: f32,
    /// Added to the square root of the second moment.
    pub eps: f32,
}

#[inline(always)]
fn update_body(
    param: &mut [f32],
    moments: [&mut [f32]; 2],
    grad: &[f32],
    copy: &mut [bf16],
    constants: Update,
) {
    let Update { beta1, beta2, grad_scale, shrink, step_size, root_correction, eps } = constants;
    let [first, second] = moments;
    for (((param, first), second), grad) in param.iter_mut().zip(first).zip(second).zip(grad) {
        let grad = grad * grad_scale;
        *first = beta1 * *first + (1.0 - beta1) * grad;
        *second = beta2 * *second + (1.0 - beta2) * (grad * grad);
        *param = *param * shrink - step_size * *first / (second.sqrt() / root_correction + eps);
    }
    if !copy.is_empty() {
        to_bf16(copy, param);
    }
}

multiversion! {
    /// Updates a chunk of a parameter, its first and second moment, and its bf16 copy if not empty.
    pub fn update(param: &mut [f32], moments: [&mut [f32]; 2], grad: &[f32], copy: &mut [bf16], constants: Update) =
        update_body
}

/// Random words for stochastic rounding: element `i` uses word `i % 4` of Philox with counter `(i / 4, stream)` and key
/// `seed`. Every parameter and step must have its own stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chance {
    /// The key.
    pub seed: u64,
    /// The upper half of the counter.
    pub stream: u64,
}

/// Counters computed together.
const COUNTERS: usize = 16;
/// Elements covered by them.
const BLOCK: usize = 4 * COUNTERS;

impl Chance {
    /// The words for a block of elements, the first of which is `4 · counter`.
    #[inline(always)]
    fn words(self, counter: u64) -> [u32; BLOCK] {
        let (mut low, mut high) = ([0; COUNTERS], [0; COUNTERS]);
        for n in 0..COUNTERS {
            let counter = counter + n as u64;
            (low[n], high[n]) = (counter as u32, (counter >> 32) as u32);
        }
        let upper = [[self.stream as u32; COUNTERS], [(self.stream >> 32) as u32; COUNTERS]];
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let words = philox([low, high, upper[0], upper[1]], key);
        let mut flat = [0; BLOCK];
        for n in 0..COUNTERS {
            for word in 0..4 {
                flat[4 * n + word] = words[word][n];
            }
        }
        flat
    }
}

/// Rounds up with the probability of the truncated fraction, hence without bias. Non-finite values stay non-finite.
#[inline(always)]
fn by_chance(x: f32, random: u32) -> bf16 {
    let bits = x.to_bits();
    let finite = bits & 0x7f80_0000 != 0x7f80_0000;
    // NaNs become the GPU's canonical NaN.
    let other = if x.is_nan() { 0x7fff } else { bits >> 16 };
    let rounded = bits.wrapping_add(random >> 16) >> 16;
    bf16::from_bits(if finite { rounded } else { other } as u16)
}

#[inline(always)]
fn round_by_chance_body(copy: &mut [bf16], values: &[f32], first: u64, chance: Chance) {
    // A chunk may begin within a counter's elements.
    let (mut counter, mut skip) = (first / 4, (first % 4) as usize);
    let (mut copy, mut values) = (copy, values);
    while !values.is_empty() {
        let words = chance.words(counter);
        let taken = (BLOCK - skip).min(values.len());
        let (piece, rest) = values.split_at(taken);
        let (out, later) = copy.split_at_mut(taken);
        for ((out, &value), &word) in out.iter_mut().zip(piece).zip(&words[skip..]) {
            *out = by_chance(value, word);
        }
        (copy, values) = (later, rest);
        (counter, skip) = (counter + COUNTERS as u64, 0);
    }
}

multiversion! {
    /// Stochastically rounds a chunk of a parameter; `first` is the index of its first element in the parameter.
    pub fn round_by_chance(copy: &mut [bf16], values: &[f32], first: u64, chance: Chance) = round_by_chance_body
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// A seed and a stream with four distinct halves.
    const CHANCE: Chance = Chance { seed: 0x0123_4567_89ab_cdef, stream: 0xfedc_ba98_7654_3210 };

    /// One element at a time, by definition.
    fn by_hand(values: &[f32], first: u64, Chance { seed, stream }: Chance) -> Vec<u16> {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        let round = |(at, value): (usize, &f32)| {
            let i = first + at as u64;
            let ([a, b], [c, d]) = (halves(i / 4), halves(stream));
            let [word] = philox([[a], [b], [c], [d]], halves(seed))[(i % 4) as usize];
            if !value.is_finite() {
                return if value.is_nan() { 0x7fff } else { bf16::from_f32(*value).to_bits() };
            }
            // Of the 65536 possible upper halves, as many round up as the value's lower half says.
            let [kept, cut] = [value.to_bits() >> 16, value.to_bits() & 0xffff];
            (kept + u32::from(cut + (word >> 16) > 0xffff)) as u16
        };
        values.iter().enumerate().map(round).collect()
    }

    fn rounded(values: &[f32], first: u64, chance: Chance) -> Vec<u16> {
        let mut copy = vec![bf16::NAN; values.len()];
        round_by_chance(&mut copy, values, first, chance);
        copy.into_iter().map(bf16::to_bits).collect()
    }

    #[test]
    fn random_words_depend_on_position_not_on_piece_boundaries() {
        let mut values = Stream::new(1, "chance").normal(0, 1003, 1.0);
        let special = [
            f32::NAN,
            -f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN,
            0.0,
            -0.0,
            1e-40,
            -1e-40,
            f32::from_bits(0x7f80_0001),
            f32::from_bits(1),
        ];
        values[40..][..special.len()].copy_from_slice(&special);
        for first in [0, 1, 2, 3, 64, 127, 65_536, (1 << 34) - 8, (1 << 34) + 5] {
            let expected = by_hand(&values, first, CHANCE);
            assert_eq!(rounded(&values, first, CHANCE), expected, "from {first}");
            for cut in [0, 1, 5, 63, 64, 200, 1003] {
                let (before, after) = values.split_at(cut);
                let later = rounded(after, first + cut as u64, CHANCE);
                assert_eq!([rounded(before, first, CHANCE), later].concat(), expected, "{cut}");
            }
        }
        for other in [Chance { seed: 1, ..CHANCE }, Chance { stream: 1, ..CHANCE }] {
            assert_ne!(rounded(&values, 0, other), rounded(&values, 0, CHANCE));
        }
    }

    /// Values representable in bf16 are unchanged, including zero, such as a LoRA factor initialised to zero.
    #[test]
    fn exactly_representable_values_are_unchanged() {
        let values: Vec<f32> =
            (0..=u16::MAX).map(bf16::from_bits).map(bf16::to_f32).filter(|x| !x.is_nan()).collect();
        let expected: Vec<u16> = values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
        assert_eq!(rounded(&values, 0, CHANCE), expected);
    }

    /// Over 1000 streams the mean of a copy is its master. A draw is off by at most the spacing of neighbours, 2^-7 of
    /// the value, with a standard deviation of at most half that; rounding to nearest would keep the whole error.
    #[test]
    fn mean_of_many_roundings_by_chance_approaches_the_value() {
        let (draws, values) = (1000, [1.001_f32, -1.003_9, 0.333_333, -12.345, 1.007_8, 3e-5]);
        for (at, &value) in values.iter().enumerate() {
            let sum: f64 = (0..draws)
                .map(|stream| {
                    let copies = rounded(&values, 0, Chance { seed: 7, stream });
                    f64::from(bf16::from_bits(copies[at]).to_f32())
                })
                .sum();
            let off = (sum / f64::from(draws as u32) / f64::from(value) - 1.0).abs();
            assert!(off < 5.0 / 256.0 / f64::from(draws as u32).sqrt(), "{value}: {off}");
        }
        let nearest = f64::from(bf16::from_f32(values[0]).to_f32());
        assert!((nearest / f64::from(values[0]) - 1.0).abs() > 9e-4);
    }
}
