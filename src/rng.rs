//! All randomness of the crate: counter-based streams keyed by (seed, stream name, epoch, index).
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
