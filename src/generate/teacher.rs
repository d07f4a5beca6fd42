//! Teachers: the prompt format, the trait shared by in-process models and server clients, and a recipe's choice between
//! them.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::engine::Answer;
use super::openai::Account;
use super::openai::spec::ServerSpec;
use super::sampling::Sampling;
use crate::data::record::{Message, Row};
use crate::error::Result;

/// A conversation to be answered.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Keys the draws: the row's index in its dataset.
    pub index: u64,
    /// Identifies the row in errors.
    pub place: String,
    /// The conversation so far.
    pub messages: Vec<Message>,
    /// Tool descriptions for the chat template.
    pub tools: Option<Value>,
    /// Further variables for the chat template.
    pub template_kwargs: Map<String, Value>,
    /// JSON schema the answer must satisfy.
    pub schema: Option<Value>,
}

impl Asked {
    /// The prompt of row `index` of a dataset.
    ///
    /// # Errors
    /// A row without a prompt.
    pub fn from_row(index: usize, row: &Row) -> Result<Self> {
        Ok(Self {
            index: index as u64,
            place: row.place.clone(),
            messages: row.prompt_messages()?,
            tools: row.tools.clone(),
            template_kwargs: row.template_kwargs.clone(),
            schema: None,
        })
    }
}

/// Answers conversations: an in-process model ([`LocalModel`](super::local::LocalModel)) or a server
/// ([`Server`](super::openai::Server)).
///
/// May be called from several threads at once.
pub trait Teacher: Send + Sync {
    /// Samples `sampling.num_samples` answers to each prompt. `done` is called with a prompt's index and its answers as
    /// soon as all are finished, in any order; an error from it ends the call. With `sampling.skip_refused`, an
    /// unanswerable prompt gets no answers.
    ///
    /// # Errors
    /// An unanswerable prompt, identified by its `place`.
    fn answer(
        &self,
        asked: &[Asked],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()>;

    /// Whether it computes on a GPU. Launches from different threads are unordered there, so one thread must do all the
    /// work.
    fn on_gpu(&self) -> bool {
        false
    }

    /// Identity and usage of the server, if it is one.
    fn served_by(&self) -> Option<Account> {
        None
    }
}

/// A recipe's teacher: a string is a checkpoint to run in this process, a table is a server.
///
/// ```
/// use arriero::generate::teacher::TeacherSpec;
/// let spec: TeacherSpec = serde_json::from_str(r#"{"base_url": "http://host:8000/v1", "model": "llama"}"#)?;
/// assert!(matches!(spec, TeacherSpec::Server(server) if server.model == "llama"));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum TeacherSpec {
    /// A directory, a `.gguf` file or a hub id.
    Local(String),
    /// A server with OpenAI's API.
    Server(Box<ServerSpec>),
}

impl Default for TeacherSpec {
    fn default() -> Self {
        Self::Local(String::new())
    }
}

impl<'de> Deserialize<'de> for TeacherSpec {
    /// By hand, because serde's untagged enums do not report which key is wrong.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        match Value::deserialize(deserializer)? {
            Value::String(path) => Ok(Self::Local(path)),
            table @ Value::Object(_) => {
                let spec = serde_path_to_error::deserialize(table);
                spec.map(|spec| Self::Server(Box::new(spec))).map_err(|error| {
                    let path = error.path().to_string();
                    let inner = error.into_inner();
                    // "unknown field" already names its key.
                    if inner.to_string().starts_with("unknown") {
                        D::Error::custom(inner)
                    } else {
                        D::Error::custom(format!("{path}: {inner}"))
                    }
                })
            }
            other => Err(D::Error::custom(format!(
                "{other}, expected a path, a hub id or a table {{base_url = …, model = …}}"
            ))),
        }
    }
}

impl TeacherSpec {
    /// Whether no teacher is set.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Local(path) if path.is_empty())
    }

    /// Rejects invalid settings.
    ///
    /// # Errors
    /// Names the key, its value and the expected range.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Local(_) => Ok(()),
            Self::Server(spec) => spec.check(),
        }
    }
}
