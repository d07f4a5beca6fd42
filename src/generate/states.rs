//! What a model makes of texts before it predicts: the states that embeddings are made of.

use super::decode::{Decoder, Feed, Wanted};
use crate::error::Result;

/// Most tokens of a forward pass.
const BUDGET: usize = 512;

/// A decoder that shows its states.
pub(super) trait States: Decoder {
    /// Hidden states after the final norm of all tokens of the feeds, `[M, D]`, as they come.
    ///
    /// # Errors
    /// The device fails, or a token lies outside the vocabulary.
    fn states(&self, feeds: &mut [Feed<'_, Self::Cache>]) -> Result<Vec<f32>>;
}

/// Calls `done` with the place of each text and the states of its tokens, `[T, D]`, as soon as it is read. Short texts are
/// read together, long ones piece by piece.
///
/// # Errors
/// As [`States::states`].
pub(super) fn of_texts<D: States>(
    decoder: &D,
    texts: &[Vec<u32>],
    done: &mut dyn FnMut(usize, Vec<f32>),
) -> Result<()> {
    // Tokens of each text that were read, and what is held of those that were begun.
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
