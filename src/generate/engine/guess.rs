//! Speculative decoding: guessed tokens are read together with the last one, and those that would have been sampled
//! anyway are kept.
//!
//! Each guess is compared with the token the model itself samples at that position, with that position's random
//! numbers. Speculation therefore changes the number of tokens per forward pass but never an answer, bit for bit: the
//! exact distribution is kept because each draw is the same (Leviathan et al., 2023, keep it through an acceptance
//! test). A draft that samples from a similar distribution with the same random numbers is usually right.

use rand_chacha::ChaCha8Rng;

use super::Request;
use crate::error::Result;

/// An answer whose next tokens to guess.
pub struct Guess<'a> {
    /// Identifies the answer: its request's ticket and its sample. It reappears with more tokens.
    pub key: (u64, usize),
    /// The request.
    pub request: &'a Request,
    /// The answer so far, at least one token.
    pub ids: &'a [u32],
    /// Random numbers of the next positions.
    pub rng: ChaCha8Rng,
    /// Most guesses that can be used.
    pub most: usize,
    /// Receives the guess.
    pub guess: &'a mut Vec<u32>,
}

/// A source of speculative tokens.
pub trait Guesser {
    /// Fills in the guesses; they may be empty.
    ///
    /// # Errors
    /// A model error.
    fn guess(&mut self, asked: &mut [Guess<'_>]) -> Result<()>;

    /// An answer has ended.
    fn forget(&mut self, _key: (u64, usize)) {}
}

/// Prompt lookup: finds the newest tokens earlier in prompt and answer, and guesses the tokens that followed there.
/// Suited to answers that repeat parts of their prompt.
#[derive(Clone, Copy, Debug)]
pub struct Lookup {
    /// Longest n-gram to look up.
    pub longest: usize,
    /// Shortest n-gram to look up.
    pub shortest: usize,
}

impl Default for Lookup {
    fn default() -> Self {
        Self { longest: 4, shortest: 2 }
    }
}

impl Guesser for Lookup {
    fn guess(&mut self, asked: &mut [Guess<'_>]) -> Result<()> {
        let mut seen = Vec::new();
        for one in asked {
            seen.clear();
            seen.extend_from_slice(&one.request.prompt.tokens);
            seen.extend_from_slice(one.ids);
            one.guess.extend_from_slice(self.after(&seen, one.most));
        }
        Ok(())
    }
}

impl Lookup {
    /// Tokens after the last earlier match of the newest tokens; longer matches first.
    fn after<'a>(&self, seen: &'a [u32], most: usize) -> &'a [u32] {
        for len in (self.shortest..=self.longest.min(seen.len().saturating_sub(1))).rev() {
            let (earlier, newest) = (&seen[..seen.len() - 1], &seen[seen.len() - len..]);
            if let Some(place) = earlier.windows(len).rposition(|window| window == newest) {
                let next = place + len;
                return &seen[next..seen.len().min(next + most)];
            }
        }
        &[]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup_continues_the_longest_and_most_recent_match() {
        let after = |seen: &[u32], most| Lookup::default().after(seen, most).to_vec();
        assert_eq!(after(&[1, 2, 3, 4, 5, 1, 2, 3], 2), [4, 5]);
        assert_eq!(after(&[1, 2, 9, 1, 2, 8, 1, 2], 5), [8, 1, 2]);
        assert_eq!(after(&[7, 1, 2, 9, 5, 1, 2, 8, 7, 1, 2], 1), [9]);
        assert!(after(&[1, 2, 3, 1], 5).is_empty() && after(&[1], 5).is_empty());
        assert_eq!(after(&[1, 1, 1, 1], 5), [1]);
    }
}
