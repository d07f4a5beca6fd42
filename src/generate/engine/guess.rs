//! Speculative decoding: tokens that are guessed to come next are read together with the last one, and those that would
//! have been drawn anyway are kept.
//!
//! Guesses are only ever compared with what the model itself draws, place by place, with the random numbers of that
//! place. So guessing changes how many tokens a forward pass gives, and never an answer, to the last bit: the exact
//! distribution is kept because the very draw is (compare Leviathan et al., 2023, whose acceptance test keeps it on
//! average). A guesser that draws with the same random numbers from a similar distribution is right most often.

use rand_chacha::ChaCha8Rng;

use super::Request;
use crate::error::Result;

/// An answer whose next tokens are to be guessed.
pub struct Guess<'a> {
    /// Names the answer: its request's ticket and its sample. The same answer comes again with more tokens.
    pub key: (u64, usize),
    /// What was asked.
    pub request: &'a Request,
    /// The answer so far, at least one token.
    pub ids: &'a [u32],
    /// The random numbers of the places that come next.
    pub rng: ChaCha8Rng,
    /// Most tokens that are of use.
    pub most: usize,
    /// The guess goes here.
    pub guess: &'a mut Vec<u32>,
}

/// Guesses what comes next.
pub trait Guesser {
    /// Fills in guesses, which may be empty.
    ///
    /// # Errors
    /// A model's.
    fn guess(&mut self, asked: &mut [Guess<'_>]) -> Result<()>;

    /// An answer has ended.
    fn forget(&mut self, _key: (u64, usize)) {}
}

/// Looks the newest tokens up in the prompt and the answer, and guesses that it goes on as it did there: for answers that
/// repeat parts of their prompt.
#[derive(Clone, Copy, Debug)]
pub struct Lookup {
    /// Most tokens that are looked up together.
    pub longest: usize,
    /// Fewest.
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
    /// What followed the last earlier place where the newest tokens stood, the longest such.
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
    fn the_longest_newest_tokens_seen_before_are_continued() {
        let after = |seen: &[u32], most| Lookup::default().after(seen, most).to_vec();
        assert_eq!(after(&[1, 2, 3, 4, 5, 1, 2, 3], 2), [4, 5]);
        assert_eq!(after(&[1, 2, 9, 1, 2, 8, 1, 2], 5), [8, 1, 2]);
        assert_eq!(after(&[7, 1, 2, 9, 5, 1, 2, 8, 7, 1, 2], 1), [9]);
        assert!(after(&[1, 2, 3, 1], 5).is_empty() && after(&[1], 5).is_empty());
        assert_eq!(after(&[1, 1, 1, 1], 5), [1]);
    }
}
