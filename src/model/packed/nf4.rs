//! 4-bit NormalFloat with double quantisation (Dettmers et al., 2023, sections 3 and 3.1), compatible with
//! bitsandbytes.

use std::sync::LazyLock;

use rayon::prelude::*;

use crate::ops::unpack::Parts;

/// Weights per scale.
pub(super) const LEN: usize = 64;
/// Scales per second-level scale.
const SCALES: usize = 256;

/// Quantiles of a normal distribution, scaled to −1 … 1, with an exact zero (appendix E of the paper).
static LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// 4-bit levels times the absmax of their block; the absmax values are quantised to 8 bits in turn.
#[derive(Debug)]
pub(super) struct Nf4 {
    /// Two levels per byte, the first in the high nibble.
    levels: Vec<u8>,
    /// One per block.
    scales: Vec<u8>,
    /// One per [`SCALES`] blocks.
    scale_of_scales: Vec<f32>,
    /// Mean of all scales, subtracted before quantising them.
    offset: f32,
}

impl Nf4 {
    pub(super) fn pack(weights: &[f32]) -> Self {
        let largest = |values: &[f32]| values.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let absmax: Vec<f32> = weights.par_chunks(LEN).map(largest).collect();
        let sum: f64 = absmax.iter().map(|&x| f64::from(x)).sum();
        let offset = (sum / absmax.len().max(1) as f64) as f32;
        let centred: Vec<f32> = absmax.iter().map(|scale| scale - offset).collect();
        let scale_of_scales: Vec<f32> = centred.chunks(SCALES).map(largest).collect();
        let scales = centred
            .iter()
            .enumerate()
            .map(|(index, &scale)| nearest(&*BYTES, ratio(scale, scale_of_scales[index / SCALES])))
            .collect();
        // Levels use the exact scale, as in bitsandbytes; the scale's rounding error is not compensated.
        let levels = weights
            .par_chunks(LEN)
            .zip(&absmax)
            .flat_map_iter(|(block, &scale)| {
                block.chunks(2).map(move |pair| {
                    let level = |x: f32| nearest(&LEVELS, ratio(x, scale));
                    level(pair[0]) << 4 | pair.get(1).map_or(0, |&x| level(x))
                })
            })
            .collect();
        Self { levels, scales, scale_of_scales, offset }
    }

    pub(super) fn bytes(&self) -> usize {
        self.levels.len() + self.scales.len() + size_of_val(self.scale_of_scales.as_slice())
    }

    pub(super) fn parts(&self) -> Parts<'_> {
        Parts::Nf4 {
            levels: &self.levels,
            scales: &self.scales,
            scale_of_scales: &self.scale_of_scales,
            offset: self.offset,
            tables: (&BYTES, &LEVELS),
        }
    }

    /// Dequantises block `index`, which may be partial.
    pub(super) fn unpack(&self, index: usize, out: &mut [f32]) {
        let byte = BYTES[usize::from(self.scales[index])];
        let scale = byte.mul_add(self.scale_of_scales[index / SCALES], self.offset);
        let levels = &self.levels[index * (LEN / 2)..];
        for (pair, levels) in out.chunks_mut(2).zip(levels) {
            pair[0] = scale * LEVELS[usize::from(levels >> 4)];
            if let Some(second) = pair.get_mut(1) {
                *second = scale * LEVELS[usize::from(levels & 15)];
            }
        }
    }
}

fn ratio(value: f32, scale: f32) -> f32 {
    if scale > 0.0 { value / scale } else { 0.0 }
}

/// Index of the nearest entry of an ascending table.
fn nearest(table: &[f32], value: f32) -> u8 {
    let above = table.partition_point(|&entry| entry < value);
    let nearest = match above {
        0 => 0,
        _ if above == table.len() => above - 1,
        _ if value - table[above - 1] <= table[above] - value => above - 1,
        _ => above,
    };
    nearest as u8
}

/// bitsandbytes' 8-bit dynamic map: seven decades on either side of zero, each with twice as many steps as the one
/// below (Dettmers, 2016).
static BYTES: LazyLock<[f32; 256]> = LazyLock::new(|| {
    const DECADES: i32 = 7;
    let mut table = vec![0.0, 1.0];
    for decade in 0..DECADES {
        let steps = 1 << decade;
        let scale = 10_f64.powi(decade - (DECADES - 1));
        for step in 0..steps {
            // Midpoint of one of the equal parts of 0.1 … 1.
            let middle = 0.1 + 0.9 * (f64::from(step) + 0.5) / f64::from(steps);
            table.extend([scale * middle, -scale * middle]);
        }
    }
    table.sort_by(f64::total_cmp);
    std::array::from_fn(|index| table[index] as f32)
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn tables_ascend_and_match_bitsandbytes() {
        assert!(LEVELS.is_sorted() && BYTES.is_sorted());
        // create_dynamic_map(True, 7, 8): both ends, zero, and the smallest steps next to it.
        let expected =
            [(0, -0.992_968_75), (127, 0.0), (128, 5.5e-7), (254, 0.992_968_75), (255, 1.0)];
        for (index, value) in expected {
            assert!((BYTES[index] - value).abs() < 1e-9, "{index}: {}", BYTES[index]);
        }
    }

    #[test]
    fn every_weight_is_within_half_a_level_of_its_block() {
        // Neither a multiple of the block size nor of the second-level block size; one block of zeros.
        let mut weights = Stream::new(1, "nf4").normal(0, 300 * LEN + 37, 0.02);
        weights[LEN..2 * LEN].fill(0.0);
        let nf4 = Nf4::pack(&weights);
        let bits = 8.0 * nf4.bytes() as f64 / weights.len() as f64;
        assert!((bits - 4.127).abs() < 0.01, "{bits}");
        for (index, block) in weights.chunks(LEN).enumerate() {
            let mut out = vec![f32::NAN; block.len()];
            nf4.unpack(index, &mut out);
            let scale = block.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            for (x, y) in block.iter().zip(&out) {
                // The widest gap between levels is 0.304; a scale is off by at most a 128th of the largest difference.
                assert!((x - y).abs() <= 0.153 * scale + 1.5e-3, "block {index}: {x} {y}");
            }
        }
    }

    #[test]
    fn weights_on_the_levels_round_trip() {
        let weights: Vec<f32> = (0..4).flat_map(|_| LEVELS.map(|x| 0.5 * x)).collect();
        let nf4 = Nf4::pack(&weights);
        let mut out = vec![0.0; LEN];
        nf4.unpack(0, &mut out);
        assert_eq!(out, weights);
    }
}
