//! Chat templates: Jinja as run by Hugging Face, compiled once.
//!
//! Follows transformers' environment: `trim_blocks`, `lstrip_blocks`, Python's string methods, `tojson` like
//! `json.dumps(ensure_ascii=False)`, `raise_exception`, `strftime_now`, `{% generation %}` blocks. Deviations:
//! `strftime_now` returns a pinned date, since prompts that change daily can be neither cached nor compared;
//! `{% break %}` and `{% continue %}` are not available.

use std::sync::{Arc, LazyLock};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, Output, State};
use regex::Regex;
use serde_json::ser::{Formatter, PrettyFormatter};

use super::record::Message;
use crate::error::{Error, Result};

/// The date that `strftime_now` returns: Llama 3.1's own default, "26 Jul 2024".
const PINNED_DATE: (i32, u32, u32) = (2024, 7, 26);

/// Opens a `{% generation %}` span in rendered text; never part of real text (a Unicode noncharacter).
pub(crate) const GENERATION_OPEN: char = '\u{FDD0}';
/// Closes a `{% generation %}` span.
pub(crate) const GENERATION_CLOSE: char = '\u{FDD1}';

/// Names of the templates that ship with the crate.
pub const BUILT_IN: [&str; 3] = ["chatml", "llama3.1", "plain"];

/// The source of a built-in template.
pub fn built_in(name: &str) -> Option<&'static str> {
    match name {
        "chatml" => Some(include_str!("templates/chatml.jinja")),
        "llama3.1" | "llama3" | "llama-3.1" => Some(include_str!("templates/llama31.jinja")),
        "plain" => Some(include_str!("templates/plain.jinja")),
        _ => None,
    }
}

/// The source of a template given by built-in name, by path, or as Jinja text.
///
/// # Errors
/// Neither a known name nor a readable file.
pub fn resolve(template: &str) -> Result<String> {
    if let Some(source) = built_in(template) {
        return Ok(source.to_owned());
    }
    if template.contains("{{") || template.contains("{%") {
        return Ok(template.to_owned());
    }
    std::fs::read_to_string(template).map_err(|error| {
        Error::usage(format!(
            "chat_template: {template:?} is not a built-in template, nor a file: {error}"
        ))
        .hint(format!("built-in templates: {}", BUILT_IN.join(", ")))
    })
}

/// A compiled chat template.
#[derive(Clone)]
pub struct Template {
    environment: Arc<Environment<'static>>,
    source: Arc<str>,
    marks_generation: bool,
}

/// The inputs of a rendering.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// The conversation.
    pub messages: &'a [Message],
    /// Tool descriptions.
    pub tools: Option<&'a serde_json::Value>,
    /// Additional variables, which take precedence.
    pub kwargs: &'a serde_json::Map<String, serde_json::Value>,
    /// Whether to end with the header of the next answer.
    pub add_generation_prompt: bool,
}

impl Template {
    /// Compiles `source`.
    ///
    /// # Errors
    /// A syntax error, with its line.
    pub fn new(source: &str) -> Result<Self> {
        static GENERATION: LazyLock<Option<Regex>> =
            LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").ok());
        // A filter block keeps the tag a block tag, so that white space around it is trimmed as in Jinja.
        let compiled = GENERATION.as_ref().map_or_else(
            || source.to_owned(),
            |tag| {
                tag.replace_all(source, |found: &regex::Captures<'_>| match found.get(2) {
                    Some(_) => format!("{{%{} endfilter {}%}}", &found[1], &found[3]),
                    None => format!("{{%{} filter generation_span {}%}}", &found[1], &found[3]),
                })
                .into_owned()
            },
        );
        let marks_generation = compiled != source;
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(python_format);
        environment.add_filter("tojson", to_json);
        environment.add_filter("generation_span", |body: String| {
            format!("{GENERATION_OPEN}{body}{GENERATION_CLOSE}")
        });
        environment.add_function("raise_exception", |message: String| -> Result<(), _> {
            Err::<(), _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned("chat_template", compiled)
            .map_err(|error| refusal("does not compile", &error).as_usage())?;
        Ok(Self { environment: Arc::new(environment), source: source.into(), marks_generation })
    }

    /// The original Jinja text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether `{% generation %}` blocks mark the trained parts.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Renders; `{% generation %}` spans are enclosed in [`GENERATION_OPEN`] and [`GENERATION_CLOSE`].
    ///
    /// # Errors
    /// Anything the template refuses.
    pub(crate) fn render_marked(
        &self,
        inputs: Inputs<'_>,
        special_tokens: &[(&'static str, String)],
    ) -> Result<String> {
        let mut context: Vec<(String, Value)> = vec![
            ("messages".to_owned(), Value::from_serialize(inputs.messages)),
            ("add_generation_prompt".to_owned(), inputs.add_generation_prompt.into()),
        ];
        // transformers always passes `tools`, as None if there are none; templates test for both.
        context.push((
            "tools".to_owned(),
            inputs.tools.map_or_else(|| Value::from(()), Value::from_serialize),
        ));
        context.extend(special_tokens.iter().map(|(name, text)| ((*name).to_owned(), text.into())));
        context.extend(
            inputs.kwargs.iter().map(|(name, value)| (name.clone(), Value::from_serialize(value))),
        );
        let context: Value = context.into_iter().collect();
        let template = self.environment.get_template("chat_template")?;
        template.render(context).map_err(|error| refusal(REFUSES, &error))
    }
}

/// Error text for messages that a template does not accept.
const REFUSES: &str = "refuses these messages";

/// Whether an error says that a template refused the messages, which is the fault of their author.
pub(crate) fn is_refusal(error: &Error) -> bool {
    error.to_string().contains(&format!("the chat template {REFUSES}"))
}

fn refusal(what: &str, error: &minijinja::Error) -> Error {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let line = error.line().map(|line| format!(" (template line {line})")).unwrap_or_default();
    Error::run(format!("the chat template {what}: {detail}{line}"))
        .hint("check the order of the roles, or give another `chat_template`")
}

/// Prints values like Python's `str`, where Jinja's output and minijinja's differ.
fn python_format(
    out: &mut Output<'_>,
    state: &State<'_, '_>,
    value: &Value,
) -> Result<(), minijinja::Error> {
    use minijinja::value::ValueKind;
    match value.kind() {
        ValueKind::None => out.write_str("None").map_err(minijinja::Error::from),
        ValueKind::Bool => out
            .write_str(if value.is_true() { "True" } else { "False" })
            .map_err(minijinja::Error::from),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    use std::fmt::Write;
    let (year, month, day) = PINNED_DATE;
    let fail = |why: String| minijinja::Error::new(ErrorKind::InvalidOperation, why);
    let now = chrono::NaiveDate::from_ymd_opt(year, month, day)
        .and_then(|date| date.and_hms_opt(0, 0, 0))
        .ok_or_else(|| fail("the pinned date is not a date".to_owned()))?;
    let mut text = String::new();
    write!(text, "{}", now.format(format))
        .map_err(|_| fail(format!("strftime_now: unknown date format {format:?}")))?;
    Ok(text)
}

/// `json.dumps(value, ensure_ascii=False, indent=…)`: unlike Jinja's own, it does not escape for HTML.
#[expect(clippy::needless_pass_by_value, reason = "filters get their arguments by value")]
fn to_json(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let fail = |why: String| minijinja::Error::new(ErrorKind::InvalidOperation, why);
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let mut json = serde_json::to_value(value).map_err(|error| fail(error.to_string()))?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let text = dumps(&json, indent).map_err(|error| fail(error.to_string()))?;
    Ok(Value::from(if ensure_ascii == Some(true) { escape_non_ascii(&text) } else { text }))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
pub(crate) fn dumps(value: &serde_json::Value, indent: Option<usize>) -> Result<String> {
    use serde::Serialize;
    let mut bytes = Vec::new();
    if let Some(width) = indent {
        let spaces = " ".repeat(width);
        let inner = PrettyFormatter::with_indent(spaces.as_bytes());
        let formatter = Python { inner: Some(inner) };
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))?;
    } else {
        let formatter = Python { inner: None };
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn escape_non_ascii(text: &str) -> String {
    use std::fmt::Write;
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            escaped.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a string cannot fail.
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        }
    }
    escaped
}

/// Python's separators (", " and ": ") and number formats around serde_json's writer.
struct Python<'a> {
    inner: Option<PrettyFormatter<'a>>,
}

type Io = std::io::Result<()>;

/// Forwards a call to the indenting formatter, if any.
macro_rules! indented {
    ($($name:ident($($arg:ident: $kind:ty),*) else $plain:expr;)*) => {$(
        fn $name<W: ?Sized + std::io::Write>(&mut self, writer: &mut W $(, $arg: $kind)*) -> Io {
            match &mut self.inner {
                Some(inner) => inner.$name(writer $(, $arg)*),
                None => { let bytes: &[u8] = $plain; writer.write_all(bytes) }
            }
        }
    )*};
}

impl Formatter for Python<'_> {
    indented! {
        begin_array() else b"[";
        end_array() else b"]";
        begin_array_value(first: bool) else if first { b"" } else { b", " };
        end_array_value() else b"";
        begin_object() else b"{";
        end_object() else b"}";
        begin_object_key(first: bool) else if first { b"" } else { b", " };
        begin_object_value() else b": ";
        end_object_value() else b"";
    }

    fn write_f64<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, value: f64) -> Io {
        writer.write_all(python_float(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> Io {
        writer.write_all(fragment.as_bytes())
    }
}

/// Python's `repr` of a float: shortest digits, exponents from 1e16 up and below 1e-4.
fn python_float(value: f64) -> String {
    let magnitude = value.abs();
    if value == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) =
                exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}
