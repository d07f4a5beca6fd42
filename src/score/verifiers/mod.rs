//! Verifiers: 1 for right, 0 for wrong. One file per family; `docs/verifiers.md` lists their keys.
//!
//! A check sees the answer's text, the row's `answer` and, if needed, the row's other columns. It never queries a
//! model.

mod choice;
mod code;
mod ifeval;
mod json_schema;
mod language;
mod length;
mod math;
mod number;
mod repetition;
mod text;

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Question, Score, Scorer, ScorerSpec};
use crate::data::record::kind;
use crate::error::{Error, Result};

pub(crate) use code::tests as code_tests;
pub use length::Unit;
pub use number::last_number;

/// The available checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// The answer, ignoring case, surrounding whitespace and a final full stop.
    #[serde(alias = "exact_answer", alias = "exact_match")]
    Exact,
    /// The last number of the text, in any notation.
    #[serde(alias = "gsm8k")]
    Number,
    /// The final number or expression, compared by value.
    Math,
    /// The letter of a multiple-choice answer.
    #[serde(alias = "multiple_choice")]
    Choice,
    /// A pattern matches somewhere.
    Regex,
    /// A pattern matches the whole text.
    Format,
    /// The length lies within bounds.
    Length,
    /// All given strings occur, ignoring case.
    Contains,
    /// Few word n-grams are repeated.
    Repetition,
    /// The text is in a given language.
    Language,
    /// The text is JSON that validates against a schema.
    JsonSchema,
    /// The row's instructions are followed (Zhou et al., 2023).
    #[serde(alias = "instruction_following")]
    Ifeval,
    /// The program in the text passes the row's tests.
    #[serde(alias = "humaneval", alias = "python")]
    Code,
}

impl Check {
    /// The check's name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Number => "number",
            Self::Math => "math",
            Self::Choice => "choice",
            Self::Regex => "regex",
            Self::Format => "format",
            Self::Length => "length",
            Self::Contains => "contains",
            Self::Repetition => "repetition",
            Self::Language => "language",
            Self::JsonSchema => "json_schema",
            Self::Ifeval => "ifeval",
            Self::Code => "code",
        }
    }

    /// The keys the check reads, besides those of every scorer.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Exact | Self::Number | Self::Math | Self::Choice | Self::Regex | Self::Format => {
                &["pattern"]
            }
            Self::Length => &["min", "max", "unit", "tokenizer"],
            Self::Contains | Self::Language => &["values"],
            Self::Repetition => &["ngram", "max_share"],
            Self::JsonSchema => &["schema"],
            Self::Ifeval => &["loose"],
            Self::Code => &["timeout_s", "memory_mb", "allow_unsandboxed"],
        }
    }

    /// Rejects settings the check would ignore.
    fn refuse_ignored(self, spec: &ScorerSpec) -> Result<()> {
        let plain = serde_json::to_value(ScorerSpec::verifier(self))?;
        let given = serde_json::to_value(spec)?;
        let Value::Object(given) = given else { return Ok(()) };
        let of_all = ["name", "weight", "length_penalty", "length_unit"];
        let known = |key: &str| of_all.contains(&key) || self.keys().contains(&key);
        let ignored =
            given.iter().find(|(key, value)| !known(key) && plain.get(key) != Some(value));
        let Some((key, _)) = ignored else { return Ok(()) };
        Err(Error::usage(format!("the verifier `{}` has no key `{key}`", self.name()))
            .hint(format!("its keys: {}", self.keys().join(", "))))
    }
}

/// The implementation of a check. Each judgement depends only on the question and one text.
trait Rule: Send + Sync {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score>;

    /// All answers to a question; a rule that waits for external work may run them in parallel.
    fn verify_all(&self, question: &Question<'_>, texts: &[&str]) -> Result<Vec<Score>> {
        texts.iter().map(|text| self.verify(question, text)).collect()
    }

    /// As for a [`Scorer`].
    fn runs_programs(&self) -> bool {
        false
    }
}

/// A check with its settings.
pub struct Verifier {
    rule: Box<dyn Rule>,
}

impl Verifier {
    /// Rejects invalid settings, without loading or starting anything.
    ///
    /// # Errors
    /// A key the check does not read, or a missing required one; an invalid pattern or schema; bounds that nothing
    /// satisfies.
    pub fn check(check: Check, spec: &ScorerSpec) -> Result<()> {
        check.refuse_ignored(spec)?;
        match check {
            Check::Code => code::Limits::of(spec).map(|_| ()),
            Check::Length => length::check(spec),
            _ => Self::new(check, spec).map(|_| ()),
        }
    }

    /// Compiles the check.
    ///
    /// # Errors
    /// As [`check`](Self::check); an unreadable tokenizer; no sandbox on this machine.
    pub fn new(check: Check, spec: &ScorerSpec) -> Result<Self> {
        check.refuse_ignored(spec)?;
        let rule: Box<dyn Rule> = match check {
            Check::Exact => Box::new(text::Exact::new(spec)?),
            Check::Number => Box::new(number::Number::new(spec)?),
            Check::Math => Box::new(math::Math::new(spec)?),
            Check::Choice => Box::new(choice::Choice::new(spec)?),
            Check::Regex => Box::new(text::Occurs::new(spec)?),
            Check::Format => Box::new(text::Whole::new(spec)?),
            Check::Length => Box::new(length::Length::new(spec)?),
            Check::Contains => Box::new(text::Contains::new(spec)),
            Check::Repetition => Box::new(repetition::Repetition::new(spec)?),
            Check::Language => Box::new(language::Language::new(spec)?),
            Check::JsonSchema => Box::new(json_schema::JsonSchema::new(spec)?),
            Check::Ifeval => Box::new(ifeval::Ifeval::new(spec)),
            Check::Code => Box::new(code::Code::new(spec)?),
        };
        Ok(Self { rule })
    }
}

impl Scorer for Verifier {
    fn score(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>> {
        self.rule.verify_all(question, answers)
    }

    fn verifies(&self) -> bool {
        true
    }

    fn is_light(&self) -> bool {
        true
    }

    fn runs_programs(&self) -> bool {
        self.rule.runs_programs()
    }
}

fn judged(right: bool, why: impl Into<String>) -> Score {
    Score { value: f64::from(u8::from(right)), why: why.into(), ..Score::default() }
}

fn needed<'a>(question: &Question<'a>) -> Result<&'a str> {
    if let Some(other @ (Value::Array(_) | Value::Object(_))) = column(question, "answer") {
        return Err(Error::run(format!(
            "`answer` is {}, expected a text or a number",
            kind(other)
        ))
        .hint("one right answer a row; several as one pattern of the verifier `regex`"));
    }
    question.answer.ok_or_else(|| {
        Error::run("the row has no `answer` to check against")
            .hint("map its column, e.g. columns = {answer = \"solution\"}, or use another scorer")
    })
}

/// A further column of the row; null counts as absent.
fn column<'a>(question: &Question<'a>, name: &str) -> Option<&'a Value> {
    question.extra.and_then(|extra| extra.get(name)).filter(|value| !value.is_null())
}

/// The part of an answer to look at.
#[derive(Clone, Debug, Default)]
pub(in crate::score) struct Part(Option<Regex>);

impl Part {
    fn new(spec: &ScorerSpec) -> Result<Self> {
        Self::at(spec.pattern.as_deref(), "pattern")
    }

    /// Selects by a pattern, or everything without one. Errors name the pattern by its key.
    ///
    /// # Errors
    /// An invalid regular expression.
    pub(in crate::score) fn at(pattern: Option<&str>, key: &str) -> Result<Self> {
        pattern.map(|pattern| compiled(pattern, key)).transpose().map(Self)
    }

    /// Whether no pattern is set, so that all of the text is used.
    pub(in crate::score) fn is_all(&self) -> bool {
        self.0.is_none()
    }

    /// The part of the text selected by the pattern: its first group, or the whole match. The last match counts, since
    /// conclusions come at the end. Without a pattern, all of the text.
    pub(in crate::score) fn of<'a>(&self, text: &'a str) -> Option<&'a str> {
        let Some(pattern) = &self.0 else { return Some(text) };
        let found = pattern.captures_iter(text).last()?;
        found.get(1).or_else(|| found.get(0)).map(|part| part.as_str())
    }
}

/// A user's pattern, with `^` and `$` matching at line ends. Errors name it by its key.
///
/// # Errors
/// An invalid regular expression.
pub(in crate::score) fn compiled(pattern: &str, key: &str) -> Result<Regex> {
    RegexBuilder::new(pattern).multi_line(true).build().map_err(|error| {
        Error::usage(format!("`{key}` is not a valid regular expression: {error}"))
    })
}

/// The text after a model's reasoning; all of it if there is no reasoning, or nothing after it.
pub(in crate::score) fn after_thoughts(text: &str) -> &str {
    let after = text.rsplit_once("</think>").map_or("", |(_, after)| after);
    if after.trim().is_empty() { text } else { after }
}

/// A built-in pattern; an invalid one would never match, which tests would reveal.
macro_rules! pattern {
    ($text:expr) => {{
        static PATTERN: std::sync::LazyLock<Option<regex::Regex>> =
            std::sync::LazyLock::new(|| regex::Regex::new($text).ok());
        PATTERN.as_ref()
    }};
}
use pattern;

#[cfg(test)]
mod testing;
