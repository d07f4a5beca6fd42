//! A learned reward model as a judge: scores all answers to a prompt in one tree, at their ends, or each answer step by
//! step.

use std::collections::BTreeMap;

use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{LET_FAIL, OnError, Question, Score, Scorer};
use crate::data::forest::{Forest, micro_batches};
use crate::data::lessons::Lesson;
use crate::data::prepare::{PairOptions, Rule, Truncation, prompt_text_ids};
use crate::data::record::{Message, Record, Row, Side};
use crate::data::template;
use crate::data::tokenizer::ChatTokenizer;
use crate::data::tree::Tree;
use crate::error::{Context, Error, Result};
use crate::loss::reward::Correctness;
use crate::loss::sigmoid;
use crate::model::bases::{Bases, Form, Model};
use crate::model::transformer::Transformer;
use crate::model::{Architecture, Config, Precision, labels};

/// Most tokens per forward pass.
const BUDGET: usize = 4096;
/// Most answers per tree.
const ANSWERS: usize = 64;

/// Aggregates the probabilities that an answer's steps are right into one score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepAggregation {
    /// Minimum over steps.
    #[default]
    Min,
    /// The last step.
    Last,
    /// Product over steps, treated as independent (Lightman et al., 2023).
    Product,
}

impl StepAggregation {
    /// The aggregate; 0 for an answer without steps.
    ///
    /// ```
    /// use arriero::score::reward_model::StepAggregation::{Last, Min, Product};
    /// assert_eq!([Min, Last, Product].map(|how| how.of(&[0.5, 0.25, 0.75])), [0.25, 0.75, 0.09375]);
    /// assert_eq!(Product.of(&[]), 0.0);
    /// ```
    pub fn of(self, steps: &[f64]) -> f64 {
        let Some(&last) = steps.last() else { return 0.0 };
        match self {
            Self::Min => steps.iter().copied().fold(1.0, f64::min),
            Self::Last => last,
            Self::Product => steps.iter().product(),
        }
    }
}

/// How a model's outputs become one score.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// Weights of a rating model's attributes; attributes not listed have weight 0.
    pub attribute_weights: BTreeMap<String, f64>,
    /// For models that judge steps.
    pub step_aggregation: StepAggregation,
    /// Handling of an answer the model cannot score.
    pub on_error: OnError,
}

/// Meaning of the outputs.
enum Outputs {
    /// Attribute ratings with their weights.
    Weighted(Vec<f64>),
    /// Right or wrong after each step.
    Steps { separator: String, aggregation: StepAggregation },
}

impl Outputs {
    fn of(config: &Config, reading: &Reading) -> Result<Self> {
        let (weights, labels) = (&reading.attribute_weights, &config.labels);
        let known = || format!("the model's are: {}", labels.join(", "));
        match config.architecture {
            Architecture::CausalLm => {
                Err(Error::usage("is not a reward model: it has no score head")
                    .hint("give the checkpoint of a `reward` stage"))
            }
            Architecture::TokenClassification if !weights.is_empty() => {
                Err(Error::usage("`attribute_weights` for a model that judges steps")
                    .hint(format!("it has no attributes; {}", known())))
            }
            Architecture::TokenClassification if labels.len() != labels::STEP.len() => {
                Err(Error::usage(format!("{} outputs a step, expected 2", labels.len()))
                    .hint(format!("wrong and right, in this order; {}", known())))
            }
            Architecture::TokenClassification => {
                let separator = labels::step_separator(config).to_owned();
                Ok(Self::Steps { separator, aggregation: reading.step_aggregation })
            }
            Architecture::SequenceClassification
                if reading.step_aggregation != StepAggregation::default() =>
            {
                Err(Error::usage("`step_aggregation` for a model that judges no steps")
                    .hint(format!("it scores whole answers; {}", known())))
            }
            Architecture::SequenceClassification if weights.is_empty() => match labels.len() {
                1 => Ok(Self::Weighted(vec![1.0])),
                count => {
                    Err(Error::usage(format!("{count} attributes and no `attribute_weights`"))
                        .hint(format!("write a weight for some; {}", known())))
                }
            },
            Architecture::SequenceClassification => {
                if let Some(name) = weights.keys().find(|name| !labels.contains(name)) {
                    return Err(
                        Error::usage(format!("`attribute_weights` names `{name}`")).hint(known())
                    );
                }
                let weight = |label: &String| weights.get(label).copied().unwrap_or(0.0);
                Ok(Self::Weighted(labels.iter().map(weight).collect()))
            }
        }
    }
}

/// A reward model with its tokenizer.
pub struct RewardModel {
    model: Transformer,
    /// The underlying model; while held, other models on the same base can share it.
    held: Model,
    tokenizer: ChatTokenizer,
    outputs: Outputs,
    on_error: OnError,
    /// Whether it was trained on plain text, and is therefore given plain text.
    plain: bool,
}

impl RewardModel {
    /// Loads a checkpoint: a directory or a hub id.
    ///
    /// # Errors
    /// A loading error; a checkpoint without a score head or a tokenizer; weights that do not match its attributes.
    pub fn load(path: &str, device: &Device, reading: &Reading) -> Result<Self> {
        Self::load_among(&Bases::default(), path, device, reading)
    }

    /// As [`load`](Self::load), sharing an adapter's base with the other models of `bases`. The adapter is applied
    /// beside its base with its own score head, and computes as in training.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_among(
        bases: &Bases,
        path: &str,
        device: &Device,
        reading: &Reading,
    ) -> Result<Self> {
        let held = bases.model(path, &Form::dense(device, Precision::F32))?;
        let tokenizer = held.tokenizer().at(path)?.clone();
        let outputs = Outputs::of(&held.config, reading).at(path)?;
        let on_error = reading.on_error;
        let plain = labels::is_of_plain_text(&held.config);
        Ok(Self { model: held.transformer()?, held, tokenizer, outputs, on_error, plain })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &ChatTokenizer {
        &self.tokenizer
    }

    /// The underlying model.
    pub fn made_of(&self) -> &Model {
        &self.held
    }

    /// Number of prompt tokens as the model sees them.
    ///
    /// # Errors
    /// A conversation the model does not support, or that the chat template refuses.
    pub fn prompt_len(&self, prompt: &[Message], tools: Option<&Value>) -> Result<usize> {
        match self.prompt(prompt, tools)? {
            Side::Text(text) => Ok(prompt_text_ids(&self.tokenizer, &text, false)?.len()),
            Side::Messages(messages) => Ok(self.tokenizer.prompt_ids(&messages, tools)?.len()),
        }
    }

    /// A prompt in the model's training format.
    fn prompt(&self, prompt: &[Message], tools: Option<&Value>) -> Result<Side> {
        if !self.plain {
            return Ok(Side::Messages(prompt.to_vec()));
        }
        match (prompt, tools) {
            ([], None) => Ok(Side::Text(String::new())),
            ([only], None) if only.role() == "user" => Ok(Side::Text(only.text())),
            _ => Err(Error::run("a conversation for a reward model that learned from plain text")
                .hint(
                    "it takes single user messages without tools; train it on messages for others",
                )),
        }
    }

    /// Most tokens in a conversation with its answer; longer ones are truncated before scoring.
    pub fn positions(&self) -> usize {
        self.model.config().max_position_embeddings
    }

    /// Scores of all responses, row by row. Ranked responses and completions are scored at their ends; answers in
    /// steps, by a step-judging model, as a whole.
    ///
    /// # Errors
    /// A row that the chat template refuses, or that exceeds the model's maximum positions.
    pub fn score_rows(&self, rows: &[Row]) -> Result<Vec<Vec<f64>>> {
        self.score_trees(&self.trees(rows)?)
    }

    fn score_trees(&self, trees: &[Tree]) -> Result<Vec<Vec<f64>>> {
        let of_row = |scores: Vec<f64>| match &self.outputs {
            Outputs::Steps { aggregation, .. } => {
                vec![aggregation.of(&scores.into_iter().map(sigmoid).collect::<Vec<_>>())]
            }
            Outputs::Weighted(_) => scores,
        };
        Ok(self.ends(trees)?.into_iter().map(of_row).collect())
    }

    /// The model's input for each row.
    fn trees(&self, rows: &[Row]) -> Result<Vec<Tree>> {
        let options = PairOptions {
            max_length: Some(self.model.config().max_position_embeddings),
            truncation: Truncation::KeepStart,
            ..PairOptions::default()
        };
        let rule = match &self.outputs {
            Outputs::Steps { separator, .. } => {
                Rule::Reward(Lesson::Steps(separator.clone()), options)
            }
            Outputs::Weighted(_)
                if rows.iter().all(|row| matches!(row.record, Record::Completion { .. })) =>
            {
                Rule::Responses(options)
            }
            Outputs::Weighted(_) => Rule::Pairs(options),
        };
        Ok(rule.trees(rows, &self.tokenizer)?.trees)
    }

    /// One score per end of each tree.
    fn ends(&self, trees: &[Tree]) -> Result<Vec<Vec<f64>>> {
        let mut scores = Vec::with_capacity(trees.len());
        for range in micro_batches(trees, BUDGET) {
            let forest = Forest::pack(&trees[range])?;
            let hidden = self.model.hidden(&forest)?;
            let outputs = self.model.scores(&hidden, &forest.ends)?;
            let mut of_tree = vec![Vec::new(); forest.trees()];
            for (end, value) in forest.ends.iter().zip(self.combined(&outputs)) {
                of_tree[end.tree].push(value);
            }
            scores.append(&mut of_tree);
        }
        Ok(scores)
    }

    fn combined(&self, outputs: &[f32]) -> Vec<f64> {
        match &self.outputs {
            Outputs::Steps { .. } => Correctness { outputs: 2 }.log_odds(outputs),
            Outputs::Weighted(weights) => {
                let sum = |of_end: &[f32]| {
                    of_end.iter().zip(weights).map(|(x, weight)| f64::from(*x) * weight).sum()
                };
                outputs.chunks(weights.len()).map(sum).collect()
            }
        }
    }

    /// Scores of answers in one tree. If they cannot be scored together and `on_error` allows failures, each is tried
    /// alone.
    fn judged(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>> {
        match (self.trees(&self.rows(question, answers)?), self.on_error) {
            (Ok(trees), _) => {
                let values = self.score_trees(&trees)?.into_iter().flatten();
                Ok(values.map(|value| Score { value, ..Score::default() }).collect())
            }
            // Errors in the prompt are not an answer's fault.
            (Err(error), _) if template::is_refusal(&error) => Err(error),
            (Err(error), OnError::Error) => Err(self.unreadable(question, &error).because(error)),
            (Err(error), OnError::Fail) if answers.len() == 1 => {
                Ok(vec![Score::unjudged(self.unreadable(question, &error))])
            }
            (Err(_), OnError::Fail) => {
                let each = answers.iter().map(|answer| self.judged(question, &[*answer]));
                Ok(each.collect::<Result<Vec<_>>>()?.concat())
            }
        }
    }

    /// The error without the row's place, which the caller adds, and with a scorer's hint; its own hint names training
    /// keys.
    fn unreadable(&self, question: &Question<'_>, error: &Error) -> Error {
        let error = error.to_string();
        let place = format!("{}: ", question.place);
        let said = error.strip_prefix(&place).unwrap_or(&error);
        let positions = self.positions();
        Error::run(format!("{said} (the model has {positions} positions)")).hint(LET_FAIL)
    }

    /// Rows that request a score for each answer.
    fn rows(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Row>> {
        let side_of_prompt = self.prompt(question.prompt, question.tools)?;
        let prompt = || side_of_prompt.clone();
        let row = |record| {
            let mut row = Row::new(question.place, record);
            row.tools = question.tools.cloned();
            row
        };
        let side = |text: &&str| {
            if self.plain {
                return Side::Text((*text).to_owned());
            }
            Side::Messages(vec![Message::new("assistant", *text)])
        };
        Ok(match (&self.outputs, answers) {
            (Outputs::Steps { separator, .. }, _) => {
                let steps = |answer: &&str| {
                    let steps: Vec<String> = steps_of(answer, separator);
                    let labels = vec![false; steps.len()];
                    row(Record::Steps { prompt: prompt(), steps, labels })
                };
                answers.iter().map(steps).collect()
            }
            (Outputs::Weighted(_), [only]) => {
                vec![row(Record::Completion { prompt: prompt(), completion: side(only) })]
            }
            (Outputs::Weighted(_), _) => {
                let responses = answers.iter().map(side).collect();
                vec![row(Record::Preference { prompt: prompt(), responses })]
            }
        })
    }
}

/// The steps of an answer. Without any text it is one step, judged as is.
fn steps_of(answer: &str, separator: &str) -> Vec<String> {
    let parts = answer.split(separator).filter(|part| !part.trim().is_empty());
    let steps: Vec<String> = parts.map(str::to_owned).collect();
    if steps.is_empty() { vec![answer.to_owned()] } else { steps }
}

impl Scorer for RewardModel {
    fn score(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>> {
        let mut scores = Vec::with_capacity(answers.len());
        for answers in answers.chunks(ANSWERS) {
            scores.append(&mut self.judged(question, answers)?);
        }
        Ok(scores)
    }

    fn verifies(&self) -> bool {
        false
    }

    fn on_gpu(&self) -> bool {
        self.model.device().is_cuda()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outputs(labels: &[&str], weights: &[(&str, f64)]) -> Result<Outputs> {
        outputs_of("LlamaForSequenceClassification", labels, weights)
    }

    fn outputs_of(class: &str, labels: &[&str], weights: &[(&str, f64)]) -> Result<Outputs> {
        let attribute_weights =
            weights.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect();
        read(class, labels, &Reading { attribute_weights, ..Reading::default() })
    }

    fn read(class: &str, labels: &[&str], reading: &Reading) -> Result<Outputs> {
        let keys = serde_json::json!({
            "model_type": "llama", "architectures": [class], "vocab_size": 8,
            "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1,
            "id2label": labels.iter().enumerate().map(|(id, name)| (id.to_string(), *name)).collect::<BTreeMap<_, _>>(),
        });
        Outputs::of(&Config::from_json(&keys.to_string())?, reading)
    }

    #[test]
    fn a_way_to_aggregate_steps_is_for_models_that_judge_them() {
        let of = |class: &str, labels: &[&str], step_aggregation| {
            read(class, labels, &Reading { step_aggregation, ..Reading::default() })
        };
        let (steps, whole) = ("LlamaForTokenClassification", "LlamaForSequenceClassification");
        assert!(of(steps, &labels::STEP, StepAggregation::Last).is_ok());
        assert!(of(whole, &["reward"], StepAggregation::Min).is_ok());
        let error = of(whole, &["reward"], StepAggregation::Last).err().unwrap();
        assert_eq!(
            format!("{error:?}"),
            "`step_aggregation` for a model that judges no steps (hint: it scores whole answers; the model's are: reward)"
        );
    }

    #[test]
    fn attributes_are_weighted_by_name_and_several_require_weights() {
        let two = ["helpfulness", "verbosity"];
        let Ok(Outputs::Weighted(weights)) = outputs(&two, &[("verbosity", -0.5)]) else {
            panic!()
        };
        assert_eq!(weights, [0.0, -0.5]);
        let refused =
            |weights: &[(&str, f64)]| format!("{:?}", outputs(&two, weights).err().unwrap());
        assert_eq!(
            refused(&[]),
            "2 attributes and no `attribute_weights` (hint: write a weight for some; the model's are: helpfulness, verbosity)"
        );
        assert_eq!(
            refused(&[("help", 1.0)]),
            "`attribute_weights` names `help` (hint: the model's are: helpfulness, verbosity)"
        );
        assert!(matches!(outputs(&["reward"], &[]), Ok(Outputs::Weighted(one)) if one == [1.0]));
    }

    #[test]
    fn step_model_must_have_exactly_the_outputs_wrong_and_right() {
        let of = |labels: &[&str], weights: &[(&str, f64)]| {
            outputs_of("LlamaForTokenClassification", labels, weights)
        };
        assert!(matches!(of(&labels::STEP, &[]), Ok(Outputs::Steps { .. })));
        let refused = |labels: &[&str], weights: &[(&str, f64)]| {
            format!("{:?}", of(labels, weights).err().unwrap())
        };
        assert_eq!(
            refused(&["wrong", "neutral", "right"], &[]),
            "3 outputs a step, expected 2 (hint: wrong and right, in this order; the model's are: wrong, neutral, right)"
        );
        assert_eq!(
            refused(&labels::STEP, &[("right", 1.0)]),
            "`attribute_weights` for a model that judges steps (hint: it has no attributes; the model's are: wrong, right)"
        );
    }

    #[test]
    fn answer_is_split_into_steps() {
        assert_eq!(steps_of("a = 1\n\nb = 2\n", "\n"), ["a = 1", "b = 2"]);
        assert_eq!(steps_of("", "\n"), [""]);
    }
}
