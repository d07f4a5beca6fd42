//! All randomness of the crate but [`philox`]: counter-based streams keyed by (seed, stream name, epoch, index).
//!
//! A draw depends on its key alone, never on threads, on order, or on where a run stopped and resumed.
//! Candle's own generators are not used: the CPU device cannot be seeded.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// One named stream of a run's seed, e.g. `shuffle` or `sample`.
///
/// ```
/// use arriero::rng::Stream;
/// use rand::Rng;
/// let stream = Stream::new(7, "shuffle");
/// let first: u64 = stream.at(0, 3).random();
/// assert_eq!(first, stream.at(0, 3).random::<u64>());
/// assert_ne!(first, stream.at(1, 3).random::<u64>());
/// ```
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u8; 32],
}

impl Stream {
    /// The stream `name` of the run's `seed`.
    pub fn new(seed: u64, name: &str) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(seed.to_le_bytes());
        hasher.update(name.as_bytes());
        Self { key: hasher.finalize().into() }
    }

    /// The generator for one (epoch, index) of this stream.
    pub fn at(&self, epoch: u64, index: u64) -> ChaCha8Rng {
        let mut hasher = Sha256::new();
        hasher.update(self.key);
        hasher.update(epoch.to_le_bytes());
        hasher.update(index.to_le_bytes());
        ChaCha8Rng::from_seed(hasher.finalize().into())
    }

    /// A permutation of `0..len` for one epoch (Fisher-Yates).
    pub fn permutation(&self, epoch: u64, len: usize) -> Vec<usize> {
        use rand::seq::SliceRandom;
        let mut order: Vec<usize> = (0..len).collect();
        order.shuffle(&mut self.at(epoch, u64::MAX));
        order
    }

    /// `count` draws from a normal distribution with mean 0 and the given standard deviation.
    pub fn normal(&self, index: u64, count: usize, std: f32) -> Vec<f32> {
        use rand_distr::{Distribution, StandardNormal};
        let mut rng = self.at(0, index);
        (0..count)
            .map(|_| {
                let z: f32 = StandardNormal.sample(&mut rng);
                z * std
            })
            .collect()
    }
}

/// Philox-4x32-10 (Salmon et al., 2011): four random words of each of `N` counters under one key. `counters[w][n]` is word
/// `w` of counter `n`, as it is in the result. The same as in `adamw.cu`: words that a kernel draws for itself, where a
/// [`Stream`] would have to be sent.
///
/// ```
/// let [[word], ..] = arriero::rng::philox([[0]; 4], [0; 2]);
/// assert_eq!(word, 0x6627_e8d5);
/// ```
#[expect(clippy::inline_always, reason = "it is compiled for the instruction set of its caller")]
#[inline(always)]
pub fn philox<const N: usize>(counters: [[u32; N]; 4], key: [u32; 2]) -> [[u32; N]; 4] {
    let multiply = |x: u32, by: u32| {
        let product = u64::from(x) * u64::from(by);
        ((product >> 32) as u32, product as u32)
    };
    let ([mut a, mut b, mut c, mut d], [mut left, mut right]) = (counters, key);
    for _ in 0..10 {
        for n in 0..N {
            let ((high_a, low_a), (high_c, low_c)) =
                (multiply(a[n], 0xd251_1f53), multiply(c[n], 0xcd9e_8d57));
            (a[n], b[n]) = (high_c ^ b[n] ^ left, low_c);
            (c[n], d[n]) = (high_a ^ d[n] ^ right, low_a);
        }
        left = left.wrapping_add(0x9e37_79b9);
        right = right.wrapping_add(0xbb67_ae85);
    }
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors that the authors published with the generator (Random123, `kat_vectors`), alone and side by side.
    #[test]
    fn philox_matches_the_published_vectors() {
        let published = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in published {
            assert_eq!(philox(counter.map(|word| [word]), key), expected.map(|word| [word]));
            // Other counters beside it change nothing.
            let both = philox(counter.map(|word| [!word, word]), key);
            assert_eq!(both.map(|[_, word]| word), expected);
        }
    }
}
