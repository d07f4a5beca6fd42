//! Datasets from files: JSON lines (also gzipped), JSON arrays and Parquet; a file, a directory or a glob.
//!
//! Each row's format is detected from its columns; see [`Format`]. Rows come in the order of the file names and of the
//! rows in them. [`Reader`] yields them in batches and never holds more, except that a file with a single JSON value is
//! read whole.

use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::columns::{self, Unseen};
use super::prepare::OnBadRow;
use super::ranks;
use super::record::{Message, Record, Row, Side, kind, truth};
use super::shared_prompt;
use crate::error::{Context, Error, Result};

/// How to read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReadOptions {
    /// Column names of this dataset: canonical name → its name here.
    pub columns: IndexMap<String, String>,
    /// The split to read, if the file names have one (`train`, `test`, …).
    pub split: Option<String>,
    /// The format, if columns of several formats are present.
    #[serde(rename = "type")]
    pub format: Option<Format>,
    /// What to do with unusable rows.
    pub on_bad_row: OnBadRow,
}

/// Row formats, in the order of detection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `chosen` and `rejected` (and `edited`), or `responses` ranked best first; `prompt` is explicit or the shared
    /// prefix.
    #[serde(alias = "dpo", alias = "pairs")]
    Preference,
    /// `prompt`, `completions` (one text per step) and `labels` (one truth value per step).
    #[serde(alias = "stepwise_supervision", alias = "prm")]
    Steps,
    /// `messages` of `role` and `content`.
    #[serde(alias = "chat_template", alias = "chat", alias = "openai")]
    Messages,
    /// `conversations` of `from` and `value`.
    #[serde(alias = "sharegpt")]
    Conversations,
    /// `prompt` and `completion` (or `response`).
    #[serde(alias = "input_output")]
    PromptCompletion,
    /// `instruction`, optional `input` and `system`, `output`.
    #[serde(alias = "alpaca")]
    Instruction,
    /// `prompt` alone.
    Prompt,
    /// `text`.
    #[serde(alias = "completion", alias = "pretrain")]
    Text,
}

/// Rows, and those that were skipped.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    /// In source order.
    pub rows: Vec<Row>,
    /// Location and reason of the skipped rows.
    pub skipped: Vec<(String, String)>,
}

/// Reads a file, a directory of files or a glob into memory.
///
/// # Errors
/// No such file, no rows, or (with `on_bad_row = "error"`) the first bad row by file and line.
pub fn read(path: &str, options: &ReadOptions) -> Result<Dataset> {
    let mut dataset = Dataset::default();
    for batch in Reader::open(path, options)? {
        let batch = batch?;
        dataset.rows.extend(batch.rows);
        dataset.skipped.extend(batch.skipped);
    }
    Ok(dataset)
}

/// Rows of a batch: enough to keep every core busy, few enough to hold.
const BATCH: usize = 1024;

/// Text of a batch in bytes; a batch of long rows has fewer.
const BATCH_BYTES: usize = 8 << 20;

/// Yields the rows of a file, a directory of files or a glob in order, in batches. Parses on all cores.
///
/// The iterator ends after its first error: no rows at all, a file that cannot be read, a name in `columns` that no row
/// has, or (with `on_bad_row = "error"`) the first bad row by file and line, which comes after all rows before it.
pub struct Reader {
    path: String,
    options: ReadOptions,
    files: std::vec::IntoIter<PathBuf>,
    file: Option<RawRows>,
    /// The error that ends the iterator once the rows before it are returned.
    failed: Option<Error>,
    done: bool,
    found: usize,
    first_skipped: Option<(String, String)>,
    unseen: Unseen,
}

impl Reader {
    /// Finds the files without opening them.
    ///
    /// # Errors
    /// No such file.
    pub fn open(path: &str, options: &ReadOptions) -> Result<Self> {
        let files = super::paths::files(path, options.split.as_deref())?;
        Ok(Self {
            path: path.to_owned(),
            options: options.clone(),
            files: files.into_iter(),
            file: None,
            failed: None,
            done: false,
            found: 0,
            first_skipped: None,
            unseen: Unseen::new(&options.columns),
        })
    }

    /// The next unparsed rows; empty at the end or after an error.
    fn raw_batch(&mut self) -> Vec<Raw> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < BATCH && bytes < BATCH_BYTES && self.failed.is_none() {
            if let Some(raw) = self.file.as_mut().and_then(Iterator::next) {
                match raw {
                    Ok(raw) => {
                        bytes += raw.bytes();
                        batch.push(raw);
                    }
                    Err(error) => self.failed = Some(error),
                }
                continue;
            }
            let Some(next) = self.files.next() else { break };
            match raw_rows(&next) {
                Ok(rows) => self.file = Some(rows),
                Err(error) => self.failed = Some(error),
            }
        }
        batch
    }

    fn parse(&mut self, raw: Vec<Raw>) -> Dataset {
        let options = &self.options;
        let all_seen = self.unseen.is_empty();
        let rows: Vec<(String, Vec<String>, Result<Row>)> = raw
            .into_par_iter()
            .map(|Raw { place, content }| {
                let value = content.value();
                let names = match &value {
                    Ok(value) if !all_seen => columns::names(value),
                    _ => Vec::new(),
                };
                let row = value.and_then(|value| from_value(value, &place, options));
                (place, names, row)
            })
            .collect();
        let mut batch = Dataset::default();
        for (place, names, row) in rows {
            self.unseen.see(&names);
            match row {
                Ok(row) => batch.rows.push(row),
                Err(error) if options.on_bad_row == OnBadRow::Skip => {
                    batch.skipped.push((place, error.to_string()));
                }
                Err(error) => {
                    self.failed = Some(error.at(place));
                    break;
                }
            }
        }
        self.found += batch.rows.len();
        if self.first_skipped.is_none() {
            self.first_skipped = batch.skipped.first().cloned();
        }
        batch
    }

    /// Call after the first batch if the last one may never be reached.
    ///
    /// # Errors
    /// A name in `columns` that none of the rows so far has.
    pub(super) fn check_columns(&self) -> Result<()> {
        // The error is reported with its row.
        if self.failed.is_some() {
            return Ok(());
        }
        self.unseen.check("none of the first rows").at(&self.path)
    }

    fn no_rows(&self) -> Error {
        let error = Error::run(format!("{}: no rows", self.path));
        match &self.first_skipped {
            Some((place, why)) => error.hint(format!("the first, {place}: {why}")),
            None => error.hint("the dataset is empty; check its path and split"),
        }
    }
}

impl Iterator for Reader {
    type Item = Result<Dataset>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        if self.failed.is_none() {
            let raw = self.raw_batch();
            let batch = self.parse(raw);
            if !batch.rows.is_empty() || !batch.skipped.is_empty() {
                return Some(Ok(batch));
            }
        }
        self.done = true;
        if let Some(error) = self.failed.take() {
            return Some(Err(error));
        }
        if self.found == 0 && self.first_skipped.is_none() {
            return Some(Err(self.no_rows()));
        }
        // Check first: without the column, all rows may be bad.
        match self.unseen.check("no row") {
            Err(error) => Some(Err(error.at(&self.path))),
            Ok(()) => (self.found == 0).then(|| Err(self.no_rows())),
        }
    }
}

/// The rows of a file, a directory of files or a glob, unchanged and one by one, each with its location.
///
/// # Errors
/// No such file. Errors of the iterator: a file that cannot be read, or a row that is not a JSON object, by file and line.
pub fn objects(
    path: &str,
) -> Result<impl Iterator<Item = Result<(String, Map<String, Value>)>> + use<>> {
    let files = super::paths::files(path, None)?;
    let rows = files.into_iter().flat_map(|file| match raw_rows(&file) {
        Ok(rows) => rows,
        Err(error) => Box::new(std::iter::once(Err(error))),
    });
    Ok(rows.map(|raw| {
        let Raw { place, content } = raw?;
        match content.value() {
            Ok(Value::Object(columns)) => Ok((place, columns)),
            Ok(other) => {
                let found = kind(&other);
                Err(Error::run(format!("a row is {found}, expected an object")).at(place))
            }
            Err(error) => Err(error.at(place)),
        }
    }))
}

/// One row before its columns are interpreted.
pub(super) struct Raw {
    pub(super) place: String,
    pub(super) content: Content,
}

/// A row's content as stored in the file.
pub(super) enum Content {
    /// One line of JSON.
    Line(String),
    /// Already parsed with its file.
    Value(Value),
}

impl Raw {
    /// Approximate memory of the row; for parsed values only the number of rows counts.
    fn bytes(&self) -> usize {
        match &self.content {
            Content::Line(line) => line.len(),
            Content::Value(_) => 0,
        }
    }
}

impl Content {
    fn value(self) -> Result<Value> {
        match self {
            Self::Line(line) => super::jsonl::parse(&line),
            Self::Value(value) => Ok(value),
        }
    }
}

/// The rows of one file. An error of the iterator itself ends the file.
pub(super) type RawRows = Box<dyn Iterator<Item = Result<Raw>>>;

fn raw_rows(file: &Path) -> Result<RawRows> {
    if file.extension().is_some_and(|extension| extension == "parquet") {
        return super::parquet::rows(file);
    }
    super::jsonl::rows(file)
}

const TOOLS: &str = "tools";
const MARGIN: &str = "margin";
const KWARGS: &str = "chat_template_kwargs";
/// Columns that rows of every format take for themselves: they are never among [`Row::extra`].
pub const RESERVED: [&str; 3] = [TOOLS, MARGIN, KWARGS];

/// Converts one JSON object to a row. `place` names it in errors.
///
/// # Errors
/// Not an object, columns of no known format, or a column of the wrong type.
pub fn from_value(value: Value, place: &str, options: &ReadOptions) -> Result<Row> {
    let Value::Object(mut columns) = value else {
        return Err(Error::run(format!("a row is {}, expected an object", kind(&value))));
    };
    rename(&mut columns, &options.columns);
    let format = options.format.map_or_else(|| detect(&columns), Ok)?;
    let listed = columns.contains_key("responses");
    let record = record(format, &mut columns)?;
    let mut row = Row::new(place, record);
    if listed && let Some(value) = columns.shift_remove("ranks") {
        ranks::rank(&mut row, &value)?;
    }
    row.tools = columns.shift_remove(TOOLS).map(tools).transpose()?;
    if let Some(value) = columns.shift_remove(MARGIN) {
        row.margins = ranks::margins(&value, &row)?;
    }
    row.template_kwargs = match columns.shift_remove(KWARGS) {
        None => Map::new(),
        Some(Value::Object(kwargs)) => kwargs,
        Some(other) => return Err(wrong_type(KWARGS, &other, "an object")),
    };
    row.extra = columns;
    Ok(row)
}

/// Gives columns their canonical names (canonical → the name in the row) and drops null ones.
pub(crate) fn rename(columns: &mut Map<String, Value>, names: &IndexMap<String, String>) {
    for (canonical, actual) in names {
        if let Some(value) = columns.shift_remove(actual) {
            columns.insert(canonical.clone(), value);
        }
    }
    // A null column counts as absent: Parquet and merged datasets give every row every column.
    columns.retain(|_, value| !value.is_null());
}

fn detect(columns: &Map<String, Value>) -> Result<Format> {
    let has = |name: &str| columns.contains_key(name);
    let answers = has("chosen") && has("rejected");
    Ok(if answers || (has("responses") && has("prompt")) {
        Format::Preference
    } else if has("prompt") && has("completions") && has("labels") {
        Format::Steps
    } else if has("messages") {
        Format::Messages
    } else if has("conversations") {
        Format::Conversations
    } else if has("prompt") && (has("completion") || has("response")) {
        Format::PromptCompletion
    } else if has("instruction") && has("output") {
        Format::Instruction
    } else if has("prompt") {
        Format::Prompt
    } else if has("text") {
        Format::Text
    } else {
        let found: Vec<&str> = columns.keys().map(String::as_str).collect();
        return Err(Error::run(format!("columns of no known format: {}", found.join(", "))).hint(
            "known: messages; conversations; prompt + completion; chosen + rejected; prompt + completions + labels; \
             instruction + output; prompt; text. Name yours with `columns`, e.g. columns = { prompt = \"question\" }",
        ));
    })
}

fn record(format: Format, columns: &mut Map<String, Value>) -> Result<Record> {
    match format {
        Format::Preference => preference(columns),
        Format::Messages => messages(columns, "messages").map(Record::Conversation),
        Format::Conversations => messages(columns, "conversations").map(Record::Conversation),
        Format::Steps => steps(columns),
        Format::PromptCompletion => {
            let name = if columns.contains_key("completion") { "completion" } else { "response" };
            Ok(Record::Completion {
                prompt: side(columns, "prompt")?,
                completion: side(columns, name)?,
            })
        }
        Format::Instruction => instruction(columns),
        Format::Prompt => {
            let prompt = side(columns, "prompt")?;
            if prompt.is_empty() {
                return Err(Error::run("`prompt` is empty"));
            }
            Ok(Record::Prompt(prompt))
        }
        Format::Text => text(columns, "text").map(Record::Text),
    }
}

fn take(columns: &mut Map<String, Value>, name: &str) -> Result<Value> {
    columns.shift_remove(name).ok_or_else(|| {
        let known: Vec<&str> = columns.keys().map(String::as_str).collect();
        Error::run(format!("no column `{name}`")).hint(format!("found: {}", known.join(", ")))
    })
}

fn side(columns: &mut Map<String, Value>, name: &str) -> Result<Side> {
    Side::from_value(take(columns, name)?).at(format!("`{name}`"))
}

fn text(columns: &mut Map<String, Value>, name: &str) -> Result<String> {
    match take(columns, name)? {
        Value::String(text) => Ok(text),
        other => Err(wrong_type(name, &other, "text")),
    }
}

pub(super) fn wrong_type(name: &str, found: &Value, expected: &str) -> Error {
    Error::run(format!("`{name}` is {}, expected {expected}", kind(found)))
}

fn messages(columns: &mut Map<String, Value>, name: &str) -> Result<Vec<Message>> {
    let mut messages = match side(columns, name)? {
        Side::Messages(messages) if !messages.is_empty() => messages,
        Side::Messages(_) => return Err(Error::run(format!("`{name}` is an empty list"))),
        Side::Text(_) => {
            return Err(Error::run(format!("`{name}` is a string, expected a list of messages")));
        }
    };
    if let Some(Value::String(system)) = columns.get("system")
        && messages[0].role() != "system"
    {
        messages.insert(0, Message::new("system", system.clone()));
        columns.shift_remove("system");
    }
    Ok(messages)
}

fn instruction(columns: &mut Map<String, Value>) -> Result<Record> {
    let mut question = text(columns, "instruction")?;
    if columns.contains_key("input") {
        let input = text(columns, "input")?;
        if !input.is_empty() {
            question = format!("{question}\n\n{input}");
        }
    }
    let mut messages = Vec::new();
    if columns.contains_key("system") {
        messages.push(Message::new("system", text(columns, "system")?));
    }
    messages.push(Message::new("user", question));
    messages.push(Message::new("assistant", text(columns, "output")?));
    Ok(Record::Conversation(messages))
}

fn steps(columns: &mut Map<String, Value>) -> Result<Record> {
    let prompt = side(columns, "prompt")?;
    let mut list = |name: &str| match take(columns, name)? {
        Value::Array(list) => Ok(list),
        other => Err(wrong_type(name, &other, "a list with one entry a step")),
    };
    let (texts, truths) = (list("completions")?, list("labels")?);
    if texts.is_empty() || texts.len() != truths.len() {
        return Err(Error::run(format!("{} completions and {} labels", texts.len(), truths.len()))
            .hint("each step has a text and a label, true or false"));
    }
    let step = |(index, text): (usize, Value)| match text {
        Value::String(text) if !text.trim().is_empty() => Ok(text),
        Value::String(_) => Err(Error::run(format!("step {index} of `completions` is empty"))),
        other => Err(wrong_type(&format!("completions[{index}]"), &other, "text")),
    };
    let label = |(index, value): (usize, &Value)| {
        truth(value).ok_or_else(|| {
            Error::run(format!("`labels[{index}]` is {value}, expected true or false"))
        })
    };
    Ok(Record::Steps {
        prompt,
        steps: texts.into_iter().enumerate().map(step).collect::<Result<_>>()?,
        labels: truths.iter().enumerate().map(label).collect::<Result<_>>()?,
    })
}

fn preference(columns: &mut Map<String, Value>) -> Result<Record> {
    let mut responses = Vec::new();
    if columns.contains_key("chosen") {
        for name in ["edited", "chosen", "rejected"] {
            if name != "edited" || columns.contains_key(name) {
                responses.push(side(columns, name)?);
            }
        }
    } else {
        match take(columns, "responses")? {
            Value::Array(list) => {
                for value in list {
                    responses.push(Side::from_value(value).at("`responses`")?);
                }
            }
            other => return Err(wrong_type("responses", &other, "a list, best first")),
        }
    }
    if responses.len() < 2 {
        return Err(Error::run(format!("{} response, expected two or more", responses.len())));
    }
    let named = columns.contains_key("prompt");
    let prompt = if named { side(columns, "prompt")? } else { Side::Text(String::new()) };
    // Some datasets repeat the prompt in both conversations: with or without the column, the shared prefix is the
    // prompt.
    let prompt = if prompt.is_empty() {
        shared_prompt::implicit(&mut responses)?
    } else {
        shared_prompt::repeated(prompt, &mut responses)?
    };
    if let Some(empty) = responses.iter().position(Side::is_empty) {
        return Err(Error::run(format!("response {empty} is empty"))
            .hint("an answer needs text; on_bad_row = \"skip\" leaves such rows out"));
    }
    if !named {
        shared_prompt::check(&prompt)?;
    }
    Ok(Record::Preference { prompt, responses })
}

/// Tools as a list; some datasets store them as JSON text.
pub(crate) fn tools(value: Value) -> Result<Value> {
    match value {
        Value::Array(_) => Ok(value),
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| Error::run(format!("`tools` is text that is not JSON: {error}"))),
        other => Err(wrong_type("tools", &other, "a list of tool descriptions")),
    }
}
