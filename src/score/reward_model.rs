//! A learned reward model as a judge: all answers to a prompt in one tree, each read at its end.

use candle_core::Device;

use super::{Question, Score, Scorer};
use crate::data::forest::{Forest, micro_batches};
use crate::data::prepare::{PairOptions, Truncation, pair_trees};
use crate::data::record::{Message, Record, Row, Side};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::model::Architecture;
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::model::heads;
use crate::model::transformer::Transformer;

/// Most tokens of one forward pass.
const BUDGET: usize = 4096;

/// A reward model with its tokenizer.
pub struct RewardModel {
    model: Transformer,
    tokenizer: ChatTokenizer,
}

impl RewardModel {
    /// Loads a checkpoint: a directory or a hub id.
    ///
    /// # Errors
    /// What loading can fail with; a checkpoint without a score head or without a tokenizer.
    pub fn load(path: &str, device: &Device) -> Result<Self> {
        let checkpoint = Checkpoint::load(path, device, &LoadOptions::default())?;
        let tokenizer = checkpoint.tokenizer().at(path)?.clone();
        Self::new(&checkpoint, tokenizer).at(path)
    }

    /// From a checkpoint in memory.
    ///
    /// # Errors
    /// A model without a score head.
    pub fn new(checkpoint: &Checkpoint, tokenizer: ChatTokenizer) -> Result<Self> {
        if checkpoint.config.architecture != Architecture::SequenceClassification {
            return Err(Error::usage("is no reward model: it has no score head")
                .hint("give the checkpoint of a `reward` stage"));
        }
        let model = Transformer::new(&checkpoint.config, &checkpoint.weights)?;
        Ok(Self { model, tokenizer })
    }

    /// The score of every response of every row, row by row in the rows' order.
    ///
    /// # Errors
    /// A row that the chat template refuses, or that is longer than the model's positions.
    pub fn score_rows(&self, rows: &[Row]) -> Result<Vec<Vec<f64>>> {
        let options = PairOptions {
            max_length: Some(self.model.config().max_position_embeddings),
            truncation: Truncation::KeepStart,
            ..PairOptions::default()
        };
        let trees = pair_trees(rows, &self.tokenizer, &options)?.trees;
        let borrowed: Vec<_> = trees.iter().collect();
        let mut scores = Vec::with_capacity(rows.len());
        for range in micro_batches(&borrowed, BUDGET) {
            let forest = Forest::pack(&trees[range])?;
            let hidden = self.model.hidden(&forest)?;
            let flat = heads::scores(&hidden, self.model.head(), &forest.leaves)?;
            let mut of_tree = vec![Vec::new(); forest.trees()];
            for (leaf, score) in forest.leaves.iter().zip(flat) {
                of_tree[leaf.tree].push(f64::from(score));
            }
            scores.append(&mut of_tree);
        }
        Ok(scores)
    }
}

impl Scorer for RewardModel {
    fn score(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>> {
        // A tree wants siblings: a lone answer is judged beside itself.
        let mut sides: Vec<Side> = answers
            .iter()
            .map(|text| Side::Messages(vec![Message::new("assistant", *text)]))
            .collect();
        if let [only] = sides.as_slice() {
            sides.push(only.clone());
        }
        let prompt = Side::Messages(question.prompt.to_vec());
        let mut row = Row::new(question.place, Record::Preference { prompt, responses: sides });
        row.tools = question.tools.cloned();
        let scores = self.score_rows(&[row])?.remove(0);
        let judged = scores.into_iter().take(answers.len());
        Ok(judged.map(|value| Score { value, why: "reward model".to_owned() }).collect())
    }

    fn verifies(&self) -> bool {
        false
    }
}
