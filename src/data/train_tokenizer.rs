//! Training of a byte-level BPE vocabulary, for models trained from scratch.

use std::collections::BTreeSet;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, DecoderWrapper, Tokenizer};

use crate::error::{Error, Result};

/// Trains a vocabulary of at most `vocab_size` tokens on `texts`. `special_tokens` get the first ids, in order,
/// followed by the 256 bytes, so that any text can be encoded. Digits are split individually, which is what lets small
/// models do arithmetic.
///
/// # Errors
/// A vocabulary too small for the bytes and the special tokens, or a special token given twice.
pub fn train_tokenizer<T: AsRef<str> + Send>(
    texts: impl Iterator<Item = T> + Send,
    vocab_size: usize,
    special_tokens: &[&str],
) -> Result<Tokenizer> {
    let least = 256 + special_tokens.len();
    if vocab_size < least {
        return Err(Error::usage(format!(
            "vocab_size = {vocab_size}, expected {least} or more (256 bytes and {} special tokens)",
            special_tokens.len()
        )));
    }
    if special_tokens.iter().collect::<BTreeSet<_>>().len() != special_tokens.len() {
        return Err(Error::usage("a special token is given twice"));
    }
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer = Tokenizer::new(ModelWrapper::BPE(BPE::default()));
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(vec![
        PreTokenizerWrapper::Digits(Digits::new(true)),
        PreTokenizerWrapper::ByteLevel(byte_level),
    ]))));
    tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(byte_level)));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special_tokens.iter().map(|text| AddedToken::from(*text, true)).collect())
        .build();
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts)?;
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train() -> Tokenizer {
        let texts = ["the cat sat on the mat", "12 cats and 345 mats", "the hat"];
        train_tokenizer(texts.iter(), 300, &["<|end|>", "<|start|>"]).unwrap()
    }

    #[test]
    fn text_round_trips_through_the_trained_tokenizer() {
        let tokenizer = train();
        for text in ["the cat", "日本語 🙂\n\tü", "", "12345"] {
            let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
        assert_eq!(tokenizer.encode("2345", false).unwrap().get_ids().len(), 4);
        assert_eq!(tokenizer.token_to_id("<|end|>"), Some(0));
        assert!(tokenizer.get_vocab_size(true) <= 300);
    }

    #[test]
    fn training_twice_gives_the_same_vocabulary() {
        assert_eq!(train().to_string(false).unwrap(), train().to_string(false).unwrap());
    }

    #[test]
    fn a_vocabulary_smaller_than_the_bytes_is_refused() {
        let error = train_tokenizer(["a"].iter(), 100, &["<s>"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "vocab_size = 100, expected 257 or more (256 bytes and 1 special tokens)"
        );
    }
}
