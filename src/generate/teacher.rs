//! Who answers prompts: what is asked, the trait that a model in this process and a server's client share, and how
//! a recipe names one of them.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::engine::Answer;
use super::openai::Account;
use super::openai::spec::ServerSpec;
use super::sampling::Sampling;
use crate::data::record::{Message, Row};
use crate::error::Result;

/// One conversation that waits for its answer.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Keys the draws: the row's index in its dataset.
    pub index: u64,
    /// Names the row in errors.
    pub place: String,
    /// The conversation so far.
    pub messages: Vec<Message>,
    /// Tool descriptions for the chat template.
    pub tools: Option<Value>,
    /// Further variables for the chat template.
    pub template_kwargs: Map<String, Value>,
    /// JSON schema that the answer must obey.
    pub schema: Option<Value>,
}

impl Asked {
    /// What row `index` of a dataset asks.
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

/// Answers conversations: a model in this process ([`LocalModel`](super::local::LocalModel)) or a server
/// ([`Server`](super::openai::Server)).
///
/// Several threads may ask at once.
pub trait Teacher: Send + Sync {
    /// Draws `sampling.num_samples` answers to each. `done` is called with a question's place in the list and its
    /// answers as soon as they are all there, in any order; an error from it ends the call. With `sampling.skip_refused`
    /// a question that the model cannot be asked has no answers.
    ///
    /// # Errors
    /// A question that the model cannot be asked, by its place.
    fn answer(
        &self,
        asked: &[Asked],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()>;

    /// Whether it computes on a GPU: nothing there orders what two threads launch, so one thread has to do all of it.
    fn on_gpu(&self) -> bool {
        false
    }

    /// Who answered and what it cost, where that is a server.
    fn served_by(&self) -> Option<Account> {
        None
    }
}

/// A teacher as a recipe names it: text is a checkpoint that runs in this process, a table a server.
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
    /// A server that speaks OpenAI's interface.
    Server(Box<ServerSpec>),
}

impl Default for TeacherSpec {
    fn default() -> Self {
        Self::Local(String::new())
    }
}

impl<'de> Deserialize<'de> for TeacherSpec {
    /// By hand, because serde's untagged enums do not say which key is wrong.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        match Value::deserialize(deserializer)? {
            Value::String(path) => Ok(Self::Local(path)),
            table @ Value::Object(_) => {
                let spec = serde_path_to_error::deserialize(table);
                spec.map(|spec| Self::Server(Box::new(spec))).map_err(|error| {
                    let path = error.path().to_string();
                    let inner = error.into_inner();
                    // "unknown field" names its key already.
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
    /// Whether nobody is named.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Local(path) if path.is_empty())
    }

    /// Refuses settings that cannot be acted on.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Local(_) => Ok(()),
            Self::Server(spec) => spec.check(),
        }
    }
}
