//! Turns rows into trees: rendered, tokenized, masked and truncated.
//!
//! Tokens after the last trained one of a sequence have no effect and are dropped. This file handles rows in memory;
//! [`pipeline`](super::pipeline) reads them from files and writes the trees to one.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use super::account::{PrepareReport, Skipped};
use super::lessons::Lesson;
use super::record::{Message, Record, Row, Side};
use super::render::{self, Request};
use super::siblings::siblings;
use super::tokenizer::ChatTokenizer;
use super::tree::{Role, Tree};
use crate::error::{Error, Result};

/// What to do with a sequence longer than `max_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// Keep the first tokens.
    #[default]
    KeepStart,
    /// Keep the last tokens.
    KeepEnd,
    /// Skip the row, and count it.
    Drop,
    /// Refuse the row.
    Error,
}

/// What to do with an unusable row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// Stop.
    #[default]
    Error,
    /// Skip it, count it and list it.
    Skip,
}

/// How conversations and completions become sequences. Keys as in TRL and axolotl.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of a recipe, named by others")]
pub struct SftOptions {
    /// Longest sequence in tokens; `None` is no limit.
    #[serde(
        alias = "sequence_len",
        alias = "cutoff_len",
        alias = "max_seq_len",
        alias = "max_seq_length"
    )]
    pub max_length: Option<usize>,
    /// What to do with longer sequences.
    #[serde(alias = "truncation_mode")]
    pub truncation: Truncation,
    /// Train only on assistant messages. TRL's default is false; here it is true, because a model should not learn to
    /// write its prompts (Llama 3, section 4.1.3).
    pub assistant_only_loss: bool,
    /// For prompt and completion: train only on the completion.
    pub completion_only_loss: bool,
    /// Roles whose messages are trained on, instead of the assistant's.
    pub roles_to_train: Option<Vec<String>>,
    /// Train only on the last response of a conversation.
    pub final_response_only: bool,
    /// Accepted for compatibility: trees are always packed.
    #[serde(
        alias = "sample_packing",
        alias = "packed",
        alias = "neat_packing",
        alias = "packing_samples"
    )]
    pub packing: bool,
    /// Parse special tokens that a message quotes, as transformers does.
    pub parse_special_in_content: bool,
    /// What to do with unusable rows.
    pub on_bad_row: OnBadRow,
    /// Additional variables for the chat template.
    pub chat_template_kwargs: Map<String, Value>,
    /// The column with each row's weight, if rows have one: rows of weight 0 are skipped. Set from the stage's own key
    /// (`row_weight_column`).
    #[serde(skip_deserializing, skip_serializing_if = "String::is_empty")]
    pub weight_column: String,
}

impl Default for SftOptions {
    fn default() -> Self {
        Self {
            max_length: Some(1024),
            truncation: Truncation::KeepStart,
            assistant_only_loss: true,
            completion_only_loss: true,
            roles_to_train: None,
            final_response_only: false,
            packing: true,
            parse_special_in_content: false,
            on_bad_row: OnBadRow::Error,
            chat_template_kwargs: Map::new(),
            weight_column: String::new(),
        }
    }
}

/// How preference rows become trees. Keys as in TRL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PairOptions {
    /// Longest sequence (prompt and longest response) in tokens; `None` is no limit.
    #[serde(
        alias = "sequence_len",
        alias = "cutoff_len",
        alias = "max_seq_len",
        alias = "max_seq_length"
    )]
    pub max_length: Option<usize>,
    /// `keep_start` and `keep_end` both truncate the prompt from the left, once for all responses, and then the ends of
    /// the responses.
    #[serde(alias = "truncation_mode")]
    pub truncation: Truncation,
    /// Parse special tokens that a message quotes, as transformers does.
    pub parse_special_in_content: bool,
    /// What to do with unusable rows.
    pub on_bad_row: OnBadRow,
    /// Additional variables for the chat template.
    pub chat_template_kwargs: Map<String, Value>,
}

impl PairOptions {
    /// Variables for the chat template, from the stage and the row.
    pub(super) fn template_kwargs(&self, row: &Row) -> Map<String, Value> {
        merged(&self.chat_template_kwargs, &row.template_kwargs)
    }
}

impl Default for PairOptions {
    fn default() -> Self {
        Self {
            max_length: Some(1024),
            truncation: Truncation::KeepStart,
            parse_special_in_content: false,
            on_bad_row: OnBadRow::Error,
            chat_template_kwargs: Map::new(),
        }
    }
}

/// Trees and their accounting.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prepared {
    /// One tree per usable row; [`Tree::source`] is the row's index.
    pub trees: Vec<Tree>,
    /// The accounting.
    pub report: PrepareReport,
}

/// A usable row's tree and whether it was truncated, or why the settings skip the row.
pub(super) enum Outcome {
    Tree(Tree, bool),
    Dropped(String),
}

impl Outcome {
    /// Maps the tree.
    pub(super) fn map(self, f: impl FnOnce(Tree) -> Tree) -> Self {
        match self {
            Self::Tree(tree, cut) => Self::Tree(f(tree), cut),
            dropped @ Self::Dropped(_) => dropped,
        }
    }
}

/// Ids with one role each.
pub(super) type Tokens = (Vec<u32>, Vec<Role>);

/// The kind of tree that a row becomes.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// One sequence per row, for supervised fine-tuning.
    Sft(SftOptions),
    /// A prompt with 2..n responses per row, best first.
    Pairs(PairOptions),
    /// A prompt with its single response per row, for losses on labelled responses (KTO). The label stays with the row.
    Responses(PairOptions),
    /// Training data of a reward model.
    Reward(Lesson, PairOptions),
}

impl Rule {
    /// What to do with unusable rows.
    pub fn on_bad_row(&self) -> OnBadRow {
        match self {
            Self::Sft(options) => options.on_bad_row,
            Self::Pairs(options) | Self::Responses(options) | Self::Reward(_, options) => {
                options.on_bad_row
            }
        }
    }

    /// The tree of row `index`.
    pub(super) fn tree(
        &self,
        index: usize,
        row: &Row,
        tokenizer: &ChatTokenizer,
    ) -> Result<Outcome> {
        match self {
            Self::Sft(options) => sft_tree(index, row, tokenizer, options),
            Self::Pairs(options) => pair_tree(index, row, tokenizer, options),
            Self::Responses(options) => response_tree(index, row, tokenizer, options),
            Self::Reward(lesson, options) => lesson.tree(index, row, tokenizer, options),
        }
    }

    /// Prepares rows in memory. For datasets in files see [`pipeline`](super::pipeline).
    ///
    /// # Errors
    /// With `on_bad_row = "error"`, the first unusable row, by file and line; no usable row at all.
    pub fn trees(&self, rows: &[Row], tokenizer: &ChatTokenizer) -> Result<Prepared> {
        self.trees_where(rows, tokenizer, &|_, _| Ok(None))
    }

    /// Like [`trees`](Self::trees), for rows whose trees pass `check`. An error from it is the row's fault; a returned
    /// text says why the settings skip the row.
    ///
    /// # Errors
    /// As [`Rule::trees`].
    pub fn trees_where(
        &self,
        rows: &[Row],
        tokenizer: &ChatTokenizer,
        check: &(dyn Fn(&Row, &Tree) -> Result<Option<String>> + Sync),
    ) -> Result<Prepared> {
        let outcome = |(index, row): (usize, &Row)| match self.tree(index, row, tokenizer)? {
            Outcome::Tree(tree, cut) => Ok(match check(row, &tree)? {
                None => Outcome::Tree(tree, cut),
                Some(why) => Outcome::Dropped(why),
            }),
            dropped @ Outcome::Dropped(_) => Ok(dropped),
        };
        let outcomes: Vec<Result<Outcome>> = rows.par_iter().enumerate().map(outcome).collect();
        let mut trees = Vec::new();
        let mut report = PrepareReport { rows: rows.len(), ..PrepareReport::default() };
        for (row, outcome) in rows.iter().zip(outcomes) {
            trees.extend(report.count(&row.place, outcome, self.on_bad_row(), 1)?);
        }
        if trees.is_empty() {
            return Err(report.nothing());
        }
        Ok(Prepared { trees, report })
    }
}

/// Refuses a tree that is longer than the model's positions.
///
/// # Errors
/// Names the length of its longest sequence and the limit.
pub fn check_positions(tree: &Tree, positions: usize) -> Result<()> {
    let length =
        |leaf| tree.path(leaf).iter().map(|&segment| tree.segments[segment].tokens.len()).sum();
    let longest: usize = tree.leaves().into_iter().map(length).max().unwrap_or(0);
    if longest <= positions {
        return Ok(());
    }
    Err(Error::run(format!("{longest} tokens, the model has {positions} positions"))
        .hint(format!("set max_length = {positions} or less")))
}

/// [`Rule::Sft`] on rows in memory.
///
/// # Errors
/// As [`Rule::trees`].
pub fn sft_trees(
    rows: &[Row],
    tokenizer: &ChatTokenizer,
    options: &SftOptions,
) -> Result<Prepared> {
    Rule::Sft(options.clone()).trees(rows, tokenizer)
}

/// [`Rule::Pairs`] on rows in memory.
///
/// # Errors
/// As [`Rule::trees`].
pub fn pair_trees(
    rows: &[Row],
    tokenizer: &ChatTokenizer,
    options: &PairOptions,
) -> Result<Prepared> {
    Rule::Pairs(options.clone()).trees(rows, tokenizer)
}

fn response_tree(
    index: usize,
    row: &Row,
    tokenizer: &ChatTokenizer,
    options: &PairOptions,
) -> Result<Outcome> {
    let Record::Completion { prompt, completion } = &row.record else {
        let name = row.record.name();
        return Err(Error::run(format!("a row of {name}, expected a completion"))
            .hint("labelled responses need `prompt`, `completion` and `label`"));
    };
    siblings(index, row, (prompt, std::slice::from_ref(completion)), tokenizer, options)
}

fn sft_tree(
    index: usize,
    row: &Row,
    tokenizer: &ChatTokenizer,
    options: &SftOptions,
) -> Result<Outcome> {
    row.check_imitated()?;
    if !options.weight_column.is_empty() && row.weight(&options.weight_column)? <= 0.0 {
        return Ok(Outcome::Dropped(format!("its `{}` is 0", options.weight_column)));
    }
    let mut tree = sft_tokens(row, tokenizer, options)?;
    tree.source = index;
    // The last trained token, ignoring the first `skip` tokens.
    let last = |tree: &Tree, skip: usize| {
        tree.segments[0].roles.iter().skip(skip).rposition(|role| role.trained())
    };
    let keep = 1 + last(&tree, 0).ok_or_else(untrained)?;
    tree.keep(0..keep);
    let limit = options.max_length.unwrap_or(usize::MAX);
    let truncated = keep > limit;
    if truncated {
        let why = too_long(keep, limit);
        match options.truncation {
            Truncation::KeepStart => tree.keep(0..limit),
            Truncation::KeepEnd => tree.keep(keep - limit..keep),
            Truncation::Drop => return Ok(Outcome::Dropped(why)),
            Truncation::Error => return Err(Error::run(why).hint(TOO_LONG_HINT)),
        }
    }
    // Nothing predicts the first token.
    match last(&tree, 1) {
        Some(last) => tree.keep(0..last + 2),
        None if truncated => {
            return Err(Error::run(format!("no trained token is left of the first {limit}"))
                .hint("raise max_length, or set truncation = \"drop\" or \"keep_end\""));
        }
        None => return Err(untrained()),
    }
    Ok(Outcome::Tree(tree, truncated))
}

pub(super) const TOO_LONG_HINT: &str =
    "raise max_length, or set truncation to \"keep_start\", \"keep_end\" or \"drop\"";

pub(super) fn too_long(tokens: usize, limit: usize) -> String {
    format!("{tokens} tokens, expected at most max_length = {limit}")
}

pub(super) fn untrained() -> Error {
    Error::run("no token of this row is trained").hint(
        "a row needs a response with text; check roles, `training` flags and the mask settings",
    )
}

/// A row as one sequence, before truncation.
fn sft_tokens(row: &Row, tokenizer: &ChatTokenizer, options: &SftOptions) -> Result<Tree> {
    match &row.record {
        Record::Conversation(messages) => {
            conversation(row, messages, 0, !options.assistant_only_loss, (tokenizer, options))
        }
        Record::Completion { prompt, completion } => {
            answered(row, prompt, completion, tokenizer, options)
        }
        Record::Preference { prompt, responses } => match responses.first() {
            Some(chosen) => answered(row, prompt, chosen, tokenizer, options),
            None => Err(untrained()),
        },
        Record::Text(text) => {
            let ids = text_ids(tokenizer, text, options.parse_special_in_content, true)?;
            let roles = text_roles(tokenizer, &ids);
            Ok(Tree::sequence(ids, roles, 0))
        }
        Record::Steps { .. } => Err(Error::run("an answer in steps is for reward models")
            .hint("a reward stage reads it with head = \"process\"")),
        Record::Prompt(_) => Err(Error::run("a prompt without a response cannot be trained on")
            .hint("add a column `completion`, or use `messages` with an assistant turn")),
    }
}

/// A prompt with its single response, as text or as messages.
fn answered(
    row: &Row,
    prompt: &Side,
    response: &Side,
    tokenizer: &ChatTokenizer,
    options: &SftOptions,
) -> Result<Tree> {
    if let (Side::Text(prompt), Side::Text(response)) = (prompt, response) {
        let parse = options.parse_special_in_content;
        let mut ids = prompt_text_ids(tokenizer, prompt, parse)?;
        let mut roles =
            vec![
                if options.completion_only_loss { Role::Context } else { Role::Content };
                ids.len()
            ];
        let response = plain_tokens(tokenizer, response, parse)?;
        ids.extend(response.0);
        roles.extend(response.1);
        return Ok(Tree::sequence(ids, roles, 0));
    }
    let mut messages = prompt.clone().into_messages("user");
    let first = if options.completion_only_loss { messages.len() } else { 0 };
    messages.extend(response.clone().into_messages("assistant"));
    conversation(row, &messages, first, !options.completion_only_loss, (tokenizer, options))
}

/// Renders a conversation; messages before `first` are context.
fn conversation(
    row: &Row,
    messages: &[Message],
    first: usize,
    everything: bool,
    (tokenizer, options): (&ChatTokenizer, &SftOptions),
) -> Result<Tree> {
    let mut weights = Message::weights(messages)?;
    if weights.iter().all(|weight| [1.0].contains(weight)) {
        weights.clear();
    }
    let flags = Message::flags(messages)?;
    let everything = everything && options.roles_to_train.is_none();
    let trains = |role: &str| match &options.roles_to_train {
        Some(roles) => roles.iter().any(|name| name == role),
        None => everything || role == "assistant",
    };
    let last = messages.iter().rposition(|message| trains(message.role()));
    let wanted = |index: usize| {
        let by_role =
            trains(messages[index].role()) && (!options.final_response_only || Some(index) == last);
        let wanted = flags[index].unwrap_or(by_role);
        index >= first && wanted && weights.get(index).is_none_or(|weight| *weight > 0.0)
    };
    Message::check_said(messages, wanted)?;
    let kwargs = merged(&options.chat_template_kwargs, &row.template_kwargs);
    let request = Request {
        messages,
        tools: row.tools.as_ref(),
        kwargs: &kwargs,
        add_generation_prompt: false,
    };
    let rendered = render::render(tokenizer, request)?;
    let encoded = rendered.encode(tokenizer, options.parse_special_in_content)?;
    let all_alike =
        weights.is_empty() && !options.final_response_only && !flags.contains(&Some(false));
    if everything && all_alike {
        let turn = render::Turn { message: 0, span: 0..rendered.text.len() };
        let roles = rendered.roles(&encoded, &[turn], messages);
        return Ok(Tree::sequence(encoded.ids, roles, 0));
    }
    let turns = if everything {
        let mut parts = rendered.parts(tokenizer, request)?;
        parts.retain(|part| wanted(part.message));
        parts
    } else {
        rendered.turns(tokenizer, request, wanted)?
    };
    let roles = rendered.roles(&encoded, &turns, messages);
    let plain = weights.iter().all(|weight| [0.0, 1.0].contains(weight));
    let weights = if plain { Vec::new() } else { render::weights(&encoded, &turns, &weights) };
    Ok(Tree { weights, ..Tree::sequence(encoded.ids, roles, 0) })
}

fn merged(base: &Map<String, Value>, row: &Map<String, Value>) -> Map<String, Value> {
    let mut kwargs = base.clone();
    kwargs.extend(row.iter().map(|(key, value)| (key.clone(), value.clone())));
    kwargs
}

/// Ids of plain text, preceded by `bos` if the tokenizer asks for one (never two).
pub(crate) fn prompt_text_ids(
    tokenizer: &ChatTokenizer,
    text: &str,
    parse: bool,
) -> Result<Vec<u32>> {
    let mut ids = plain_ids(tokenizer, text, parse)?;
    tokenizer.begin(&mut ids);
    Ok(ids)
}

/// A plain text response to train on, terminated by `eos`.
pub(super) fn plain_tokens(tokenizer: &ChatTokenizer, text: &str, parse: bool) -> Result<Tokens> {
    let ids = text_ids(tokenizer, text, parse, false)?;
    let roles = text_roles(tokenizer, &ids);
    Ok((ids, roles))
}

/// Ids of plain text to train on, terminated by `eos`.
fn text_ids(tokenizer: &ChatTokenizer, text: &str, parse: bool, begins: bool) -> Result<Vec<u32>> {
    let mut ids = if begins {
        prompt_text_ids(tokenizer, text, parse)?
    } else {
        plain_ids(tokenizer, text, parse)?
    };
    if let Some(eos) = tokenizer.eos().filter(|eos| ids.last() != Some(eos)) {
        ids.push(eos);
    }
    Ok(ids)
}

pub(super) fn plain_ids(tokenizer: &ChatTokenizer, text: &str, parse: bool) -> Result<Vec<u32>> {
    if parse { tokenizer.encode_special(text) } else { Ok(tokenizer.encode_inert(text)?.ids) }
}

/// All content except the final `eos`.
pub(super) fn text_roles(tokenizer: &ChatTokenizer, ids: &[u32]) -> Vec<Role> {
    let mut roles = vec![Role::Content; ids.len()];
    if let (Some(last), Some(role)) = (ids.last(), roles.last_mut())
        && tokenizer.eos() == Some(*last)
    {
        *role = Role::Format;
    }
    roles
}

fn pair_tree(
    index: usize,
    row: &Row,
    tokenizer: &ChatTokenizer,
    options: &PairOptions,
) -> Result<Outcome> {
    let (prompt, responses) = row.preference()?;
    if responses.len() < 2 {
        return Err(Error::run(format!("{} response, expected two or more", responses.len())));
    }
    siblings(index, row, (prompt, responses), tokenizer, options)
}
