//! Comparison of the written model with the one in memory.

use candle_core::DType;

use super::{Difference, Encoding};
use crate::data::forest::Forest;
use crate::data::tokenizer::ChatTokenizer;
use crate::data::tree::{Role, Tree};
use crate::error::{Error, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::{Architecture, Transformer};

/// Texts on which tokenizers tend to differ: digits, contractions, whitespace and line ends, code, other scripts, text
/// that looks like special tokens.
const TEXTS: [&str; 5] = [
    "The capital of France is Paris, isn't it? I'll say it in 1984 words or 12345.",
    "  two spaces,\ta tab,\r\n\r\n   line ends   ",
    "fn main() { println!(\"{:>8.3}\", x[0] + 3.14e-7); } // done",
    "Ünïcödé, 日本語のテキスト, Привет мир, 🙂🚀 ½ ²",
    "<|im_start|>user\n<s>[INST] DON'T STOP </s><|eot_id|>",
];

/// Most tokens to compare on.
const TOKENS: usize = 96;

/// A model's output on the texts.
pub(super) struct Reading {
    architecture: Architecture,
    tokens: Vec<u32>,
    /// `[T, V]`, or `[T, 1]` for a reward model.
    logits: Vec<Vec<f32>>,
    tokenizer: Option<ChatTokenizer>,
    ends: Vec<u32>,
}

impl Reading {
    /// Runs the model.
    pub(super) fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let (tokenizer, vocab) =
            (checkpoint.tokenizer.clone(), checkpoint.config.vocab_size as u32);
        let mut tokens: Vec<u32> = match &tokenizer {
            Some(tokenizer) => TEXTS.iter().flat_map(|text| tokenizer.encode(text)).collect(),
            None => (0..TOKENS as u32).map(|at| at * 7919 % vocab).collect(),
        };
        tokens.truncate(TOKENS.min(checkpoint.config.max_position_embeddings));
        let logits = logits(checkpoint, &tokens)?;
        let (architecture, ends) = (checkpoint.config.architecture, checkpoint.ends());
        Ok(Self { architecture, tokens, logits, tokenizer, ends })
    }

    /// Compares the model with the one read back.
    ///
    /// # Errors
    /// Different tokens or end tokens; logits further apart than the encoding explains.
    pub(super) fn compare(&self, back: &Checkpoint, encoding: Encoding) -> Result<Difference> {
        self.compare_tokenizer(back)?;
        let found = logits(back, &self.tokens)?;
        let pairs = || self.logits.iter().zip(&found);
        let apart = |(one, two): (&f32, &f32)| f64::from((one - two).abs());
        let largest = pairs().flat_map(|(one, two)| one.iter().zip(two).map(apart));
        let divergences = pairs().map(|(one, two)| divergence(one, two));
        let difference = Difference {
            max_logit_difference: largest.fold(0.0, f64::max),
            kl: divergences.sum::<f64>() / self.tokens.len().max(1) as f64,
            tokens: self.tokens.len(),
        };
        let (name, most) = (encoding.name(), encoding.most_divergence());
        let off = match (encoding, self.architecture) {
            (Encoding::F32, _) => difference.max_logit_difference > 0.0,
            (_, Architecture::CausalLm) => difference.kl.is_nan() || difference.kl > most,
            // A logit difference of √(2 KL) corresponds to a divergence of about KL.
            (_, Architecture::SequenceClassification | Architecture::TokenClassification) => {
                let scale = self.logits.iter().flatten().fold(1.0_f32, |a, b| a.max(b.abs()));
                difference.max_logit_difference > (2.0 * most).sqrt() * f64::from(scale)
            }
        };
        if off {
            let Difference { max_logit_difference, kl, .. } = difference;
            return Err(Error::run(format!(
                "what was written as {name} gives other logits: up to {max_logit_difference:.3e} apart, KL {kl:.3e}, \
                 expected at most {most}"
            ))
            .hint("a more precise --dtype may do; nothing was kept"));
        }
        Ok(difference)
    }

    fn compare_tokenizer(&self, back: &Checkpoint) -> Result<()> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(()) };
        let found = back.tokenizer()?;
        let sorted = |mut ids: Vec<u32>| {
            ids.sort_unstable();
            ids
        };
        let facts = |tokenizer: &ChatTokenizer, text| {
            (tokenizer.encode(text), tokenizer.encode_special(text).unwrap_or_default())
        };
        for text in TEXTS {
            let (ours, theirs) = (facts(tokenizer, text), facts(found, text));
            if ours != theirs {
                return Err(Error::run(format!(
                    "what was written reads {text:?} as the tokens {theirs:?}, the model as {ours:?}"
                ))
                .hint("the file's format cannot express this tokenizer; nothing was kept"));
            }
        }
        let (ours, theirs) = (sorted(self.ends.clone()), sorted(back.ends()));
        if ours != theirs {
            return Err(Error::run(format!(
                "what was written ends a turn with {theirs:?}, the model with {ours:?}"
            )));
        }
        Ok(())
    }
}

/// Logits of every token of one row.
fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
    let model = Transformer::new(&checkpoint.config, &checkpoint.weights)?;
    let tree = Tree::sequence(tokens.to_vec(), vec![Role::Content; tokens.len()], 0);
    let hidden = model.hidden(&Forest::pack([&tree])?)?;
    Ok(hidden.matmul(&model.head().t()?)?.to_dtype(DType::F32)?.to_vec2()?)
}

/// `KL(p ‖ q)` of the distributions given by these logits.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
        f64::from(most) + sum.ln()
    };
    let (p_sum, q_sum) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (f64::from(*p) - p_sum, f64::from(*q) - q_sum);
        p.exp() * (p - q)
    });
    terms.sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_matches_a_hand_computed_value() {
        // p = (1/2, 1/2), q = (1/4, 3/4): ½ ln 2 + ½ ln ⅔ = 0.1438.
        let found = divergence(&[1.0, 1.0], &[0.0, 3.0_f32.ln()]);
        assert!((found - 0.143_841).abs() < 1e-6, "{found}");
        assert!(divergence(&[0.5, -2.0, 3.0], &[1.5, -1.0, 4.0]) < 1e-6);
    }
}
