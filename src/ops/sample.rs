//! What decides which token a row of logits becomes, for whoever draws: the CPU's sampler, or the kernel of `sample.cu`.

/// Settings of one draw, and the random number that it takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chance {
    /// Divides the logits; 0 takes the likeliest token, and no random number.
    pub temperature: f32,
    /// Keeps this many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest likeliest tokens that together have this probability; 1 keeps all.
    pub top_p: f64,
    /// Keeps tokens at least so many times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// The key of a `ChaCha8` generator.
    pub key: [u8; 32],
    /// How many f64 it has drawn before this one.
    pub draw: u64,
    /// So many of the likeliest tokens are named beside the drawn one.
    pub top: usize,
}

impl Default for Chance {
    /// From the softmax as it is, by the first number of the generator whose key is 0.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, key: [0; 32], draw: 0, top: 0 }
    }
}

/// Why no token was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoDraw {
    /// Logits without one finite maximum.
    NotFinite,
    /// No token is allowed.
    NothingAllowed,
}

/// A drawn token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub id: u32,
    /// Its log-probability under the model alone, in nats.
    pub logprob: f32,
    /// Its log-probability under the distribution it was drawn from, in nats.
    pub sample_logprob: f32,
}

/// Tokens with their log-probabilities under the model alone, likeliest first; of equals the smaller id.
pub type Likeliest = Vec<(u32, f32)>;

/// Weights that one thread of the kernel adds up; it has the same number.
#[cfg(any(feature = "cuda", all(test, unix)))]
const PIECE: usize = 256;

/// Kept tokens that the kernel lists and draws from in the CPU's order; it has the same number.
#[cfg(any(feature = "cuda", all(test, unix)))]
pub(super) const LIST: usize = 4096;

/// Bytes of shared memory of the kernel's block for a row of `vocab` logits.
#[cfg(any(feature = "cuda", all(test, unix)))]
pub(super) fn shared(vocab: usize) -> usize {
    vocab.div_ceil(PIECE) * size_of::<f64>() + LIST * size_of::<u32>()
}

#[cfg(any(feature = "cuda", all(test, unix)))]
impl Chance {
    /// As the kernel's `Settings`: `top_p`; `draw`; `temperature` and, above it, `min_p`; `top_k`; the key.
    pub(super) fn words(&self) -> [u64; 8] {
        let key =
            |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| self.key[8 * at + byte]));
        let pair = u64::from(self.temperature.to_bits()) | u64::from(self.min_p.to_bits()) << 32;
        // More than any vocabulary keeps all.
        let top_k = u64::from(u32::try_from(self.top_k).unwrap_or(0));
        [self.top_p.to_bits(), self.draw, pair, top_k, key(0), key(1), key(2), key(3)]
    }
}

#[cfg(any(feature = "cuda", all(test, unix)))]
impl Drawn {
    /// From the kernel's `Draw`: the token, why there is none, and its two log-probabilities.
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
