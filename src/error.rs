//! The crate's error type: what went wrong, where, and what to do about it.
//!
//! Every message names the place (file, line, key, tensor), the value found and what was expected; a
//! [`hint`](Error::hint) tells the reader the next step. Messages are lower-case fragments without a full stop.

use std::fmt;

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The exit status that an error leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The recipe, the arguments or the settings are wrong: exit 2, nothing was run.
    Usage,
    /// The work itself failed: exit 1.
    Run,
    /// The user asked to stop (Ctrl-C): exit 130. Finished work is kept.
    Interrupted,
}

/// An error with its location and a hint.
///
/// ```
/// use arriero::error::Error;
/// let error = Error::run("12 tokens, expected at most 8").at("data.jsonl:3").hint("raise max_length");
/// assert_eq!(error.to_string(), "data.jsonl:3: 12 tokens, expected at most 8");
/// assert_eq!(error.hint_text(), Some("raise max_length"));
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    fn new(kind: Kind, message: impl fmt::Display) -> Self {
        Self(Box::new(Inner { kind, message: message.to_string(), hint: None, source: None }))
    }

    /// A failure of the work itself.
    pub fn run(message: impl fmt::Display) -> Self {
        Self::new(Kind::Run, message)
    }

    /// A recipe, argument or setting that is invalid.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// The user asked to stop.
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted").hint("run the same command again to resume")
    }

    /// Prefixes the message with a location: a file and line, a key, a tensor name.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.0.message = format!("{place}: {}", self.0.message);
        self
    }

    /// Says what the reader can do. A hint set earlier, closer to the cause, is kept.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.0.hint.get_or_insert_with(|| hint.to_string());
        self
    }

    /// Keeps the cause for [`std::error::Error::source`].
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The hint, if there is one.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The exit status that this error leads to.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Reclassifies the error as a mistake in the recipe or the arguments.
    #[must_use]
    pub fn as_usage(mut self) -> Self {
        self.0.kind = Kind::Usage;
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        match self.hint_text() {
            Some(hint) => write!(f, " (hint: {hint})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source.as_ref() as _)
    }
}

macro_rules! from_foreign {
    ($($foreign:ty),* $(,)?) => {$(
        impl From<$foreign> for Error {
            fn from(error: $foreign) -> Self {
                Self::run(&error).because(error)
            }
        }
    )*};
}

from_foreign!(
    candle_core::Error,
    std::io::Error,
    serde_json::Error,
    safetensors::SafeTensorError,
    minijinja::Error,
    parquet::errors::ParquetError,
    std::num::TryFromIntError,
);

impl From<tokenizers::Error> for Error {
    fn from(error: tokenizers::Error) -> Self {
        Self::run(&error).because(error)
    }
}

/// Adds a location or a hint to the error of any result.
pub trait Context<T> {
    /// Prefixes the error message with a location.
    fn at(self, place: impl fmt::Display) -> Result<T>;
    /// Says what the reader can do.
    fn hint(self, hint: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for Result<T, E> {
    fn at(self, place: impl fmt::Display) -> Result<T> {
        self.map_err(|error| error.into().at(place))
    }

    fn hint(self, hint: impl fmt::Display) -> Result<T> {
        self.map_err(|error| error.into().hint(hint))
    }
}

/// The known name closest to a mistyped one, for "did you mean" hints.
///
/// ```
/// assert_eq!(arriero::error::did_you_mean("learning_rat", ["beta", "learning_rate"]), Some("learning_rate"));
/// assert_eq!(arriero::error::did_you_mean("zzz", ["beta", "learning_rate"]), None);
/// ```
pub fn did_you_mean<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(name.len()).div_ceil(3))
        .min()
        .map(|(_, candidate)| candidate)
}

/// The first `most` characters of a text, on one line.
pub(crate) fn start_of(text: &str, most: usize) -> String {
    let words: Vec<&str> = text.split_whitespace().take(most).collect();
    let line = words.join(" ");
    match line.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
