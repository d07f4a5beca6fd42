//! Hidden states of texts, from which embeddings are made.

use super::decode::{Decoder, Feed, Wanted};
use crate::error::Result;

/// Most tokens per forward pass.
const BUDGET: usize = 512;

/// A decoder that exposes its hidden states.
pub(super) trait States: Decoder {
    /// Hidden states after the final norm of all tokens of the feeds, `[M, D]`, in feed order.
    ///
    /// # Errors
    /// A device error, or a token outside the vocabulary.
    fn states(&self, feeds: &mut [Feed<'_, Self::Cache>]) -> Result<Vec<f32>>;
}

/// Calls `done` with each text's index and its tokens' states, `[T, D]`, as soon as it is read. Short texts are
/// batched, long ones read in chunks.
///
/// # Errors
/// As [`States::states`].
pub(super) fn of_texts<D: States>(
    decoder: &D,
    texts: &[Vec<u32>],
    done: &mut dyn FnMut(usize, Vec<f32>),
) -> Result<()> {
    // Tokens read of each text, and the state of partially read ones.
    let mut read = vec![0; texts.len()];
    let mut begun: Vec<Option<(D::Cache, Vec<f32>)>> = texts.iter().map(|_| None).collect();
    loop {
        let (mut feeds, mut taken, mut left) = (Vec::new(), Vec::new(), BUDGET);
        for (place, (text, begun)) in texts.iter().zip(&mut begun).enumerate() {
            let tokens = &text[read[place]..];
            let tokens = &tokens[..tokens.len().min(left)];
            if !tokens.is_empty() {
                let (cache, _) = begun.get_or_insert_with(|| (decoder.cache(None), Vec::new()));
                feeds.push(Feed { cache, tokens, wanted: Wanted::Nothing, adaptation: None });
                taken.push((place, tokens.len()));
                left -= tokens.len();
            }
        }
        if taken.is_empty() {
            return Ok(());
        }
        let states = decoder.states(&mut feeds)?;
        let mut rows = states.chunks_exact(states.len() / (BUDGET - left));
        for (place, count) in taken {
            let Some((_, own)) = &mut begun[place] else { continue };
            rows.by_ref().take(count).for_each(|row| own.extend_from_slice(row));
            read[place] += count;
            if read[place] == texts[place].len()
                && let Some((_, states)) = begun[place].take()
            {
                done(place, states);
            }
        }
    }
}
