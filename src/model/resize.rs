//! Changes of a model's shape that keep what it has learned: more tokens, a score instead of a head.

use candle_core::Tensor;

use super::checkpoint::Checkpoint;
use super::config::Architecture;
use super::{init, labels, params};
use crate::error::{Error, Result};

impl Checkpoint {
    /// Gives the embedding, and an untied head, `vocab_size` rows, for tokens added to the tokenizer.
    ///
    /// New rows are the mean of the old ones: the logit of a new token is then the mean logit, which
    /// lies below the logit of any token the model favours, so that nothing changes before training.
    /// A random row of the usual spread can win against every trained token instead.
    ///
    /// # Errors
    /// Fewer rows than there are: removing tokens would shift nothing but lose what was learned.
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

    /// Adds special tokens to the tokenizer and rows to the embedding; returns how many were new.
    ///
    /// # Errors
    /// An empty token, a checkpoint without tokenizer.
    pub fn add_tokens(&mut self, tokens: &[String]) -> Result<usize> {
        let (tokenizer, added) = self.tokenizer()?.with_special_tokens(tokens)?;
        // An embedding may have spare rows beyond the tokenizer's ids, often to reach a round number.
        let rows = self.config.vocab_size.max(tokenizer.vocab_size());
        self.resize_embeddings(rows)?;
        self.tokenizer = Some(tokenizer);
        Ok(added)
    }

    /// [`into_scorer`](Self::into_scorer) with one score, the reward.
    ///
    /// # Errors
    /// As there.
    pub fn into_reward_model(self, seed: u64) -> Result<Self> {
        self.into_scorer(Architecture::SequenceClassification, &[labels::REWARD], seed)
    }

    /// The same transformer with a fresh score head `[L, D]`, an output a label, in place of the vocabulary projection. One
    /// that has this head already keeps it.
    ///
    /// # Errors
    /// Another score head; a tensor operation that fails.
    pub fn into_scorer<S: AsRef<str>>(
        mut self,
        architecture: Architecture,
        labels: &[S],
        seed: u64,
    ) -> Result<Self> {
        let labels: Vec<String> = labels.iter().map(|label| label.as_ref().to_owned()).collect();
        if self.config.architecture != Architecture::CausalLm {
            let found = (self.config.architecture, self.config.labels.clone());
            if found == (architecture, labels.clone()) {
                return Ok(self);
            }
            return Err(Error::run(format!(
                "the model has a score head {:?} of {:?}, expected {architecture:?} of {labels:?}",
                found.0, found.1
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
