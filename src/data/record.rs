//! One row of a dataset: messages, pairs or plain text, with its location.
//!
//! A row keeps what it does not interpret ([`Row::extra`], [`Message::fields`]), so that a chat template sees every
//! field of a message, and a later stage every column of a row. `read` reads the files.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// One message of a conversation, as the chat template sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Message {
    fields: Map<String, Value>,
}

impl Message {
    /// A message of `role` with text `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), Value::String(role.into()));
        fields.insert("content".to_owned(), Value::String(content.into()));
        Self { fields }
    }

    /// Reads one message object: `role`/`content` or `from`/`value`; `human` becomes `user`, `gpt` and `bot` become
    /// `assistant`.
    ///
    /// # Errors
    /// Not an object, or no role.
    pub fn from_value(value: Value) -> Result<Self> {
        let Value::Object(mut fields) = value else {
            let found = kind(&value);
            return Err(Error::run(format!("a message is {found}, expected an object"))
                .hint("write {\"role\": \"user\", \"content\": \"…\"}"));
        };
        for (from, to) in [("from", "role"), ("value", "content")] {
            if !fields.contains_key(to)
                && let Some(value) = fields.shift_remove(from)
            {
                fields.insert(to.to_owned(), value);
            }
        }
        let Some(Value::String(role)) = fields.get_mut("role") else {
            return Err(Error::run("a message has no role")
                .hint("each message needs `role` and `content` (or `from` and `value`)"));
        };
        if let Some(canonical) = canonical_role(role) {
            canonical.clone_into(role);
        }
        // Parquet gives every message every key of the schema; an absent one reads as null.
        fields.retain(|key, value| key == "content" || !value.is_null());
        Ok(Self { fields })
    }

    /// `system`, `user`, `assistant`, `tool`, …
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The content if it is plain text, or the joined text parts of a list of parts.
    pub fn text(&self) -> String {
        match self.fields.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => {
                parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect()
            }
            _ => String::new(),
        }
    }

    /// Whether it says nothing: no text but white space, which templates trim, and no tool call.
    pub fn is_blank(&self) -> bool {
        let calls = self.fields.get("tool_calls").and_then(Value::as_array);
        self.text().trim().is_empty() && calls.is_none_or(Vec::is_empty)
    }

    /// Whether to train on this message, if its row says so (`training` or `train`).
    ///
    /// # Errors
    /// Neither a boolean nor 0 or 1.
    pub fn training(&self) -> Result<Option<bool>> {
        let flag =
            ["training", "train"].into_iter().find_map(|key| Some((key, self.fields.get(key)?)));
        let Some((key, value)) = flag else { return Ok(None) };
        truth(value).map(Some).ok_or_else(|| {
            Error::run(format!("`{key}` is {value}, expected true or false"))
                .hint("false leaves a message out of the loss, true takes it in")
        })
    }

    /// The [`training`](Self::training) of each message.
    ///
    /// # Errors
    /// As there, with the message's index.
    pub fn flags(messages: &[Self]) -> Result<Vec<Option<bool>>> {
        let flag = |(index, message): (usize, &Self)| {
            message.training().map_err(|error| error.at(format!("message {index}")))
        };
        messages.iter().enumerate().map(flag).collect()
    }

    /// Refuses an empty turn of the assistant among the messages to imitate.
    ///
    /// # Errors
    /// Names the message.
    pub fn check_said(messages: &[Self], trained: impl Fn(usize) -> bool) -> Result<()> {
        // A template may write the reasoning, and nothing else, of a turn.
        let reasons = |message: &Self| {
            let reasoning = message.fields.get("reasoning_content").and_then(Value::as_str);
            reasoning.is_some_and(|text| !text.trim().is_empty())
        };
        let says_nothing = |(index, message): &(usize, &Self)| {
            message.role() == "assistant"
                && message.is_blank()
                && !reasons(message)
                && trained(*index)
        };
        let Some((index, _)) = messages.iter().enumerate().find(says_nothing) else {
            return Ok(());
        };
        Err(Error::run(format!("message {index}: the assistant's turn is empty")).hint(
            "a trained turn needs text or a tool call; `training` = false leaves it out of the loss, \
             on_bad_row = \"skip\" the whole row",
        ))
    }

    /// Loss weight of the message's tokens, if its row has one (`weight`): 0 excludes them.
    ///
    /// # Errors
    /// Not a finite number of 0 or more.
    pub fn weight(&self) -> Result<Option<f64>> {
        let Some(value) = self.fields.get("weight") else { return Ok(None) };
        weight("weight", value).map(Some).map_err(|error| {
            error.hint("0 leaves a message out of the loss, 1 is what others weigh")
        })
    }

    /// The weight of each message; empty if no message has one.
    ///
    /// # Errors
    /// As [`weight`](Self::weight), with the message's index.
    pub fn weights(messages: &[Self]) -> Result<Vec<f64>> {
        let weight = |(index, message): (usize, &Self)| {
            message.weight().map_err(|error| error.at(format!("message {index}")))
        };
        let weights: Vec<Option<f64>> =
            messages.iter().enumerate().map(weight).collect::<Result<_>>()?;
        if weights.iter().all(Option::is_none) {
            return Ok(Vec::new());
        }
        Ok(weights.into_iter().map(|weight| weight.unwrap_or(1.0)).collect())
    }

    /// All fields, in source order.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// All fields, mutable, to add `tool_calls`, `name`, …
    pub fn fields_mut(&mut self) -> &mut Map<String, Value> {
        &mut self.fields
    }
}

fn canonical_role(role: &str) -> Option<&'static str> {
    match role {
        "human" | "Human" | "USER" | "User" => Some("user"),
        "gpt" | "bot" | "chatgpt" | "model" | "ASSISTANT" | "Assistant" => Some("assistant"),
        "SYSTEM" | "System" => Some("system"),
        _ => None,
    }
}

/// A prompt or a response: plain text, or messages.
#[derive(Clone, Debug, PartialEq)]
pub enum Side {
    /// Text that is not passed through a chat template.
    Text(String),
    /// Messages for the chat template.
    Messages(Vec<Message>),
}

impl Side {
    /// Reads a string, one message or a list of messages. `role` names the speaker of strings inside a list.
    ///
    /// # Errors
    /// Anything else.
    pub fn from_value(value: Value) -> Result<Self> {
        match value {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(list) => {
                list.into_iter().map(Message::from_value).collect::<Result<_>>().map(Self::Messages)
            }
            object @ Value::Object(_) => Ok(Self::Messages(vec![Message::from_value(object)?])),
            other => Err(Error::run(format!(
                "found {}, expected text or a list of messages",
                kind(&other)
            ))),
        }
    }

    /// Whether there is no text and no message.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Messages(messages) => messages.is_empty(),
        }
    }

    /// Whether it says nothing: no text, or only [blank](Message::is_blank) messages.
    pub fn is_blank(&self) -> bool {
        match self {
            Self::Text(text) => text.trim().is_empty(),
            Self::Messages(messages) => messages.iter().all(Message::is_blank),
        }
    }

    /// The messages; plain text counts as one message of `role`.
    pub fn into_messages(self, role: &str) -> Vec<Message> {
        match self {
            Self::Text(text) => vec![Message::new(role, text)],
            Self::Messages(messages) => messages,
        }
    }
}

/// The content of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A conversation (`messages`, `conversations`, `instruction`/`input`/`output`).
    Conversation(Vec<Message>),
    /// A prompt and its single response.
    Completion {
        /// The context.
        prompt: Side,
        /// The text to train on.
        completion: Side,
    },
    /// A prompt and 2..n responses, best first.
    Preference {
        /// Shared by all responses; may be empty text.
        prompt: Side,
        /// Best first: `[edited,] chosen, rejected`, or `responses`.
        responses: Vec<Side>,
    },
    /// A prompt and a stepwise answer, each step right or wrong (`prompt`, `completions`, `labels`, as in TRL).
    Steps {
        /// The context.
        prompt: Side,
        /// The steps' texts, in order.
        steps: Vec<String>,
        /// Whether each step is right.
        labels: Vec<bool>,
    },
    /// Text to train on as is.
    Text(String),
    /// A prompt without a response.
    Prompt(Side),
}

impl Record {
    /// Whether prompt and responses are text, which is trained on as is, without the chat template.
    pub fn is_plain_text(&self) -> bool {
        let is_text = |side: &Side| matches!(side, Side::Text(_));
        match self {
            Self::Completion { prompt, completion } => is_text(prompt) && is_text(completion),
            Self::Preference { prompt, responses } => {
                is_text(prompt) && responses.iter().all(is_text)
            }
            Self::Steps { prompt, .. } => is_text(prompt),
            Self::Text(_) => true,
            Self::Conversation(_) | Self::Prompt(_) => false,
        }
    }

    /// The name of the format in user messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Conversation(_) => "messages",
            Self::Completion { .. } => "prompt and completion",
            Self::Preference { .. } => "prompt, chosen and rejected",
            Self::Steps { .. } => "prompt, completions and labels",
            Self::Text(_) => "text",
            Self::Prompt(_) => "prompt",
        }
    }
}

/// One row of a dataset.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its location: `file:line`.
    pub place: String,
    /// Its content.
    pub record: Record,
    /// Tool descriptions for the chat template.
    pub tools: Option<Value>,
    /// By how much each ranked response is better than the next, if annotated; otherwise empty.
    pub margins: Vec<f64>,
    /// The rank of each response, smallest first, if the row has them (`ranks`): among equal ranks neither is better.
    /// Empty if each is better than the next.
    pub ranks: Vec<f64>,
    /// Additional variables for the chat template (`chat_template_kwargs`).
    pub template_kwargs: Map<String, Value>,
    /// All other columns, such as `answer`.
    pub extra: Map<String, Value>,
}

const SAY_SOMETHING: &str = "a response needs text; on_bad_row = \"skip\" leaves such rows out";

impl Row {
    /// A row without further columns.
    pub fn new(place: impl Into<String>, record: Record) -> Self {
        Self {
            place: place.into(),
            record,
            tools: None,
            margins: Vec::new(),
            ranks: Vec::new(),
            template_kwargs: Map::new(),
            extra: Map::new(),
        }
    }

    /// The prompt and the ranked responses of a preference.
    ///
    /// # Errors
    /// A row of another kind.
    pub fn preference(&self) -> Result<(&Side, &[Side])> {
        match &self.record {
            Record::Preference { prompt, responses } => Ok((prompt, responses)),
            other => Err(Error::run(format!("a row of {} is not a preference", other.name()))
                .hint(
                    "preferences need `chosen` and `rejected`, or `responses` ranked best first",
                )),
        }
    }

    /// Refuses an empty response: a model would learn from it to end its turn immediately. Empty responses of a model
    /// are still scored.
    ///
    /// # Errors
    /// Names the response.
    pub fn check_said(&self) -> Result<()> {
        let responses = match &self.record {
            Record::Completion { completion, .. } => std::slice::from_ref(completion),
            Record::Preference { responses, .. } => responses,
            _ => return Ok(()),
        };
        match responses.iter().position(Side::is_blank) {
            Some(blank) => Err(self.blank(blank)),
            None => Ok(()),
        }
    }

    /// Refuses an empty imitation target: the completion or the best of ranked responses.
    ///
    /// # Errors
    /// Names it. For the turns of a conversation see [`Message::check_said`].
    pub fn check_imitated(&self) -> Result<()> {
        match &self.record {
            Record::Completion { completion, .. } if completion.is_blank() => Err(self.blank(0)),
            Record::Preference { responses, .. }
                if responses.first().is_some_and(Side::is_blank) =>
            {
                Err(self.blank(0))
            }
            _ => Ok(()),
        }
    }

    /// The error of an empty response.
    fn blank(&self, index: usize) -> Error {
        let what = match &self.record {
            Record::Preference { .. } => format!("response {index}"),
            _ => "`completion`".to_owned(),
        };
        Error::run(format!("{what} is empty")).hint(SAY_SOMETHING)
    }

    /// The messages to answer: the prompt, or a conversation up to its last assistant turn. A text prompt becomes one
    /// user message.
    ///
    /// # Errors
    /// A `text` row, or a conversation without a message to answer.
    pub fn prompt_messages(&self) -> Result<Vec<Message>> {
        let messages = match &self.record {
            Record::Conversation(messages) => {
                let mut messages = messages.clone();
                while messages.last().is_some_and(|message| message.role() == "assistant") {
                    messages.pop();
                }
                messages
            }
            Record::Completion { prompt, .. }
            | Record::Preference { prompt, .. }
            | Record::Steps { prompt, .. }
            | Record::Prompt(prompt) => prompt.clone().into_messages("user"),
            Record::Text(_) => Vec::new(),
        };
        if messages.is_empty() {
            return Err(Error::run(format!("a row of {} has no prompt", self.record.name()))
                .at(&self.place)
                .hint("prompts come from `prompt`, or from `messages` before the last answer"));
        }
        Ok(messages)
    }

    /// The row's own answer as text: what follows [`prompt_messages`](Self::prompt_messages) in a conversation, a
    /// completion, or the best of ranked responses. `None` if there is none, or if it is more than one text message.
    pub fn reference_answer(&self) -> Option<String> {
        let messages: Vec<Message> = match &self.record {
            Record::Conversation(messages) => {
                let asked = messages.iter().rposition(|message| message.role() != "assistant")?;
                messages[asked + 1..].to_vec()
            }
            Record::Completion { completion, .. } => completion.clone().into_messages("assistant"),
            Record::Preference { responses, .. } => {
                responses.first()?.clone().into_messages("assistant")
            }
            Record::Steps { .. } | Record::Text(_) | Record::Prompt(_) => return None,
        };
        let [message] = &messages[..] else { return None };
        let is_text = !message.fields().contains_key("tool_calls");
        Some(message.text()).filter(|text| is_text && !text.trim().is_empty())
    }

    /// The row's weight, from the column `column`.
    ///
    /// # Errors
    /// No such column, or not a finite number of 0 or more.
    pub fn weight(&self, column: &str) -> Result<f64> {
        let Some(value) = self.extra.get(column) else {
            return Err(Error::run(format!("no column `{column}`"))
                .hint("`row_weight_column` names the column with each row's weight"));
        };
        weight(column, value)
    }

    /// The column `label` of a labelled response: whether it is desirable.
    ///
    /// # Errors
    /// No such column, or neither a boolean nor 0 or 1.
    pub fn label(&self) -> Result<bool> {
        let hint = "true for a response that is wanted, false for one that is not";
        let value = self.extra.get("label");
        let value = value.ok_or_else(|| Error::run("no column `label`").hint(hint))?;
        truth(value).ok_or_else(|| {
            Error::run(format!("`label` is {value}, expected true or false")).hint(hint)
        })
    }

    /// The values of the named columns; `None` where the row has no value.
    ///
    /// # Errors
    /// A column that is not a finite number; no number in any of them.
    pub fn numbers(&self, columns: &[String]) -> Result<Vec<Option<f64>>> {
        let number = |column: &String| match self.extra.get(column) {
            None => Ok(None),
            Some(value) => value
                .as_f64()
                .filter(|n| n.is_finite())
                .map(Some)
                .ok_or_else(|| Error::run(format!("`{column}` is {value}, expected a number"))),
        };
        let numbers: Vec<Option<f64>> = columns.iter().map(number).collect::<Result<_>>()?;
        if numbers.iter().all(Option::is_none) {
            return Err(Error::run(format!(
                "none of the columns {} has a number",
                columns.join(", ")
            ))
            .hint("`attributes` names the columns with a response's ratings"));
        }
        Ok(numbers)
    }

    /// The column `answer`, as text.
    pub fn answer(&self) -> Option<String> {
        answer(&self.extra)
    }
}

/// The column `answer` of `columns`, as text.
pub(crate) fn answer(columns: &Map<String, Value>) -> Option<String> {
    match columns.get("answer")? {
        Value::String(text) => Some(text.clone()),
        Value::Null => None,
        other => Some(other.to_string()),
    }
}

/// True, false, 1 or 0.
pub(super) fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(truth) => Some(*truth),
        Value::Number(number) => match number.as_u64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        },
        _ => None,
    }
}

/// The name of a value's JSON type, with its article.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Parses a loss weight.
fn weight(name: &str, value: &Value) -> Result<f64> {
    value
        .as_f64()
        .filter(|weight| weight.is_finite() && *weight >= 0.0)
        .ok_or_else(|| Error::run(format!("`{name}` is {value}, expected a number of 0 or more")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reference_answer_is_what_follows_the_prompt() {
        let message = |role: &str, text: &str| Message::new(role, text);
        let answer = |record| Row::new("f:1", record).reference_answer();
        let talk = |messages: Vec<Message>| answer(Record::Conversation(messages));
        let asked = message("user", "q");
        assert_eq!(talk(vec![asked.clone(), message("assistant", "a")]).as_deref(), Some("a"));
        assert_eq!(talk(vec![asked.clone()]), None);
        assert_eq!(talk(vec![asked.clone(), message("assistant", " ")]), None);
        let twice = vec![asked, message("assistant", "a"), message("assistant", "b")];
        assert_eq!(talk(twice), None);
        let side = |text: &str| Side::Text(text.to_owned());
        let ranked =
            Record::Preference { prompt: side("q"), responses: vec![side("a"), side("b")] };
        assert_eq!(answer(ranked).as_deref(), Some("a"));
        assert_eq!(answer(Record::Prompt(side("q"))), None);
    }

    #[test]
    fn weights_must_be_numbers_and_labels_true_or_false() {
        let row = |value: Value| {
            let mut row = Row::new("f:1", Record::Text("t".to_owned()));
            row.extra.insert("label".to_owned(), value.clone());
            row.extra.insert("weight".to_owned(), value);
            row
        };
        assert!(row(json!(1)).label().unwrap() && !row(json!(false)).label().unwrap());
        assert_eq!(row(json!(2.5)).weight("weight").unwrap().to_bits(), 2.5_f64.to_bits());
        let refused = |value: Value| {
            let row = row(value);
            (row.label().unwrap_err().to_string(), row.weight("weight").unwrap_err().to_string())
        };
        assert_eq!(
            refused(json!("yes")),
            (
                "`label` is \"yes\", expected true or false".to_owned(),
                "`weight` is \"yes\", expected a number of 0 or more".to_owned()
            )
        );
        assert_eq!(refused(json!(-1)).1, "`weight` is -1, expected a number of 0 or more");
        assert_eq!(row(json!(1)).weight("w").unwrap_err().to_string(), "no column `w`");
        let numbers = |value: Value| {
            let columns = ["label", "other"].map(str::to_owned);
            row(value).numbers(&columns).map_err(|error| error.to_string())
        };
        assert_eq!(numbers(json!(3)), Ok(vec![Some(3.0), None]));
        assert_eq!(numbers(json!("3")), Err("`label` is \"3\", expected a number".to_owned()));
        let nothing = row(json!(1)).numbers(&["other".to_owned()]).unwrap_err().to_string();
        assert_eq!(nothing, "none of the columns other has a number");
    }
}
