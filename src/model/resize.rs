//! Changes of a model's shape that preserve its training: more tokens, a score head instead of the LM head.

use candle_core::Tensor;

use super::checkpoint::Checkpoint;
use super::config::Architecture;
use super::{init, labels, params};
use crate::error::{Error, Result};

impl Checkpoint {
    /// Resizes the embedding, and an untied head, to `vocab_size` rows, for tokens added to the tokenizer.
    ///
    /// New rows are the mean of the existing ones: a new token's logit is then the mean logit, below that of any token
    /// the model favours, so behaviour is unchanged before training. A random row of the usual scale could outscore
    /// every trained token.
    ///
    /// # Errors
    /// Fewer rows than exist: removing tokens would discard trained rows.
    pub fn resize_embeddings(&mut self, vocab_size: usize) -> Result<()> {
        let old = self.config.vocab_size;
        if vocab_size < old {
            return Err(Error::usage(format!(
                "cannot shrink the embedding from {old} to {vocab_size} rows"
            )));
        }
        if vocab_size == old {
            return Ok(());
        }
        for name in [params::EMBEDDING, params::HEAD] {
            if let Some(rows) = self.weights.get_mut(name) {
                let mean = rows.mean_keepdim(0)?; // [1, D]
                let added = mean.broadcast_as((vocab_size - old, rows.dim(1)?))?;
                *rows = Tensor::cat(&[&*rows, &added.contiguous()?], 0)?;
            }
        }
        self.config.vocab_size = vocab_size;
        Ok(())
    }

    /// Adds special tokens to the tokenizer and rows to the embedding; returns the number of new ones.
    ///
    /// # Errors
    /// An empty token; a checkpoint without a tokenizer.
    pub fn add_tokens(&mut self, tokens: &[String]) -> Result<usize> {
        let (tokenizer, added) = self.tokenizer()?.with_special_tokens(tokens)?;
        // An embedding may have spare rows beyond the tokenizer's ids, often for a round size.
        let rows = self.config.vocab_size.max(tokenizer.vocab_size());
        self.resize_embeddings(rows)?;
        self.tokenizer = Some(tokenizer);
        Ok(added)
    }

    /// [`into_scorer`](Self::into_scorer) with one score, the reward.
    ///
    /// # Errors
    /// As [`into_scorer`](Self::into_scorer).
    pub fn into_reward_model(self, seed: u64) -> Result<Self> {
        self.into_scorer(Architecture::SequenceClassification, &[labels::REWARD], seed)
    }

    /// The same transformer with a fresh score head `[L, D]`, one output per label, in place of the vocabulary projection. A
    /// model that has this head already keeps it; outputs that transformers left unnamed (`LABEL_0`) get the names.
    ///
    /// # Errors
    /// A different score head; a failed tensor operation.
    pub fn into_scorer<S: AsRef<str>>(
        mut self,
        architecture: Architecture,
        labels: &[S],
        seed: u64,
    ) -> Result<Self> {
        let labels: Vec<String> = labels.iter().map(|label| label.as_ref().to_owned()).collect();
        if self.config.architecture != Architecture::CausalLm {
            let (found, names) = (self.config.architecture, &self.config.labels);
            if found == architecture && labels::agree(names, &labels) {
                self.config.labels = labels;
                return Ok(self);
            }
            return Err(Error::run(format!(
                "the model has a score head {found:?} of {names:?}, expected {architecture:?} of {labels:?}"
            ))
            .hint("begin with the base model, or with a reward model of the same `head`"));
        }
        let Some(embedding) = self.weights.get(params::EMBEDDING) else {
            return Err(Error::run(format!("missing tensor `{}`", params::EMBEDDING)));
        };
        let device = embedding.device().clone();
        self.config.architecture = architecture;
        self.config.labels = labels;
        self.weights.remove(params::HEAD);
        let shapes = params::shapes(&self.config);
        for name in [params::SCORE, params::SCORE_BIAS] {
            if let Some(shape) = shapes.get(name) {
                let score = init::tensor(&self.config, name, shape, seed, &device)?;
                self.weights.insert(name.to_owned(), score);
            }
        }
        Ok(self)
    }
}
