//! Sampling parameters for a row of logits, shared by the CPU sampler and the kernel of `sample.cu`.

/// Settings and random state of one draw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chance {
    /// Divides the logits; 0 takes the likeliest token without a random number.
    pub temperature: f32,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest likeliest tokens whose total probability reaches this; 1 keeps all.
    pub top_p: f64,
    /// Keeps tokens with at least this fraction of the likeliest token's probability; 0 keeps all.
    pub min_p: f32,
    /// The key of a `ChaCha8` generator.
    pub key: [u8; 32],
    /// Number of f64 drawn from it before this one.
    pub draw: u64,
    /// How many of the likeliest tokens to return beside the sampled one.
    pub top: usize,
}

impl Default for Chance {
    /// The plain softmax, with the first number of the generator whose key is 0.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, key: [0; 32], draw: 0, top: 0 }
    }
}

/// Reason that no token was sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoDraw {
    /// Logits without a finite maximum.
    NotFinite,
    /// No token is allowed.
    NothingAllowed,
}

/// A sampled token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub id: u32,
    /// Log-probability under the model alone, in nats.
    pub logprob: f32,
    /// Log-probability under the sampling distribution, in nats.
    pub sample_logprob: f32,
}

/// Tokens with their log-probabilities under the model alone, likeliest first; ties by ascending id.
pub type Likeliest = Vec<(u32, f32)>;

/// Weights summed per kernel thread; must match the kernel's constant.
#[cfg(any(feature = "cuda", all(test, unix)))]
const PIECE: usize = 256;

/// Most kept tokens that the kernel lists to sample in the CPU's order; must match the kernel's constant.
#[cfg(any(feature = "cuda", all(test, unix)))]
pub(super) const LIST: usize = 4096;

/// Shared memory in bytes of the kernel's block for a row of `vocab` logits.
#[cfg(any(feature = "cuda", all(test, unix)))]
pub(super) fn shared(vocab: usize) -> usize {
    vocab.div_ceil(PIECE) * size_of::<f64>() + LIST * size_of::<u32>()
}

#[cfg(any(feature = "cuda", all(test, unix)))]
impl Chance {
    /// In the layout of the kernel's `Settings`: `top_p`; `draw`; `temperature`, with `min_p` in the upper half;
    /// `top_k`; the key.
    pub(super) fn words(&self) -> [u64; 8] {
        let key =
            |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| self.key[8 * at + byte]));
        let pair = u64::from(self.temperature.to_bits()) | u64::from(self.min_p.to_bits()) << 32;
        // A value larger than any vocabulary keeps all.
        let top_k = u64::from(u32::try_from(self.top_k).unwrap_or(0));
        [self.top_p.to_bits(), self.draw, pair, top_k, key(0), key(1), key(2), key(3)]
    }
}

#[cfg(any(feature = "cuda", all(test, unix)))]
impl Drawn {
    /// Parses the kernel's `Draw`: the token, or the reason there is none, and its two log-probabilities.
    pub(super) fn of(words: &[u32; 4]) -> Result<Self, NoDraw> {
        let [id, status, logprob, sample_logprob] = *words;
        match status {
            0 => Ok(Self {
                id,
                logprob: f32::from_bits(logprob),
                sample_logprob: f32::from_bits(sample_logprob),
            }),
            1 => Err(NoDraw::NotFinite),
            _ => Err(NoDraw::NothingAllowed),
        }
    }
}
