//! Names of a score head's outputs, from `id2label` or `num_labels` in `config.json`, and the step separator of a
//! step-judging model.

use serde_json::{Map, Value, json};

use super::config::{Architecture, Config, Keys};
use crate::error::{Error, Result};

/// Name of a reward model's only output.
pub const REWARD: &str = "reward";
/// Names of a process reward model's two outputs, in order.
pub const STEP: [&str; 2] = ["wrong", "right"];
/// The key in `config.json` for the text that ends a step.
pub const STEP_SEPARATOR: &str = "step_separator";

/// The key in `config.json` for the row format a model was trained on, set if that was [`PLAIN_TEXT`].
pub const PROMPT_FORMAT: &str = "prompt_format";
/// Prompt and response concatenated as text, without the chat template.
pub const PLAIN_TEXT: &str = "text";

/// The text that ends a step, for a step-judging model.
pub fn step_separator(config: &Config) -> &str {
    let written = config.other.get(STEP_SEPARATOR).and_then(Value::as_str);
    written.filter(|text| !text.is_empty()).unwrap_or("\n")
}

/// Rejects heads whose outputs mean different things: the mean of helpfulness and verbosity is neither.
///
/// # Errors
/// A different kind of head, different outputs or order, a different step separator: names both values.
pub(super) fn check_same(first: &Config, other: &Config) -> Result<()> {
    let differ = |key: &str, [first, other]: [String; 2]| {
        Err(Error::run(format!("`{key}` is {other}, in the first one {first}"))
            .hint("only heads whose outputs mean the same can be averaged"))
    };
    if first.architecture != other.architecture {
        let both = [first, other].map(|config| format!("{:?}", config.architecture));
        return differ("architectures", both);
    }
    if !agree(&first.labels, &other.labels) {
        return differ("id2label", [first, other].map(|config| format!("{:?}", config.labels)));
    }
    let formats = [first, other].map(is_of_plain_text);
    if first.architecture != Architecture::CausalLm && formats[0] != formats[1] {
        let name = |plain| if plain { PLAIN_TEXT } else { "messages" };
        return differ(PROMPT_FORMAT, formats.map(|plain| name(plain).to_owned()));
    }
    let ends = [first, other].map(step_separator);
    if first.architecture == Architecture::TokenClassification && ends[0] != ends[1] {
        return differ(STEP_SEPARATOR, ends.map(|text| format!("{text:?}")));
    }
    Ok(())
}

/// Whether a reward model was trained on plain text, and so is asked in plain text.
pub fn is_of_plain_text(config: &Config) -> bool {
    config.other.get(PROMPT_FORMAT).is_some_and(|format| format == PLAIN_TEXT)
}

/// Whether outputs may mean the same. `LABEL_0` is transformers' name for an unnamed output.
pub(super) fn agree(first: &[String], other: &[String]) -> bool {
    let unnamed = |at: usize, name: &str| name == format!("LABEL_{at}");
    let mut pairs = first.iter().zip(other).enumerate();
    first.len() == other.len()
        && pairs.all(|(at, (one, two))| one == two || unnamed(at, one) || unnamed(at, two))
}

/// Takes the names from `config.json`; empty for a language model. A reward model has one output by default.
pub(super) fn read(architecture: Architecture, keys: &mut Keys) -> Result<Vec<String>> {
    if architecture == Architecture::CausalLm {
        return Ok(Vec::new());
    }
    let names = keys.0.shift_remove("id2label");
    keys.0.shift_remove("label2id");
    let count = keys.optional_size("num_labels")?;
    let labels = match &names {
        None | Some(Value::Null) => unnamed(architecture, count),
        Some(Value::Object(names)) => named(names)?,
        Some(other) => return Err(Keys::wrong("id2label", other, "an object of names")),
    };
    match count {
        Some(count) if count != labels.len() => {
            Err(Error::run(format!("num_labels is {count}, id2label has {} names", labels.len())))
        }
        _ => Ok(labels),
    }
}

/// Default output names; empty for a language model.
fn unnamed(architecture: Architecture, count: Option<usize>) -> Vec<String> {
    match (architecture, count) {
        (Architecture::CausalLm, _) => Vec::new(),
        (Architecture::TokenClassification, None) => STEP.map(str::to_owned).to_vec(),
        (_, None | Some(1)) => vec![REWARD.to_owned()],
        (_, Some(count)) => (0..count).map(|index| format!("LABEL_{index}")).collect(),
    }
}

/// Output names of a head of which only the size is known.
pub(super) fn of_head(architecture: Architecture, outputs: usize) -> Vec<String> {
    let usual = unnamed(architecture, None);
    if usual.len() == outputs { usual } else { unnamed(architecture, Some(outputs)) }
}

fn named(names: &Map<String, Value>) -> Result<Vec<String>> {
    let name = |index: usize| {
        names.get(&index.to_string()).and_then(Value::as_str).map(str::to_owned).ok_or_else(|| {
            Error::run(format!("id2label has no name for \"{index}\""))
                .hint("names are numbered from \"0\" without gaps")
        })
    };
    (0..names.len()).map(name).collect()
}

/// Writes the names. transformers derives `num_labels` from them, and assumes two if they are absent.
pub(super) fn write(labels: &[String], mut put: impl FnMut(&str, Value)) {
    if labels.is_empty() {
        return;
    }
    let ids = labels.iter().enumerate();
    let id2label: Map<String, Value> =
        ids.clone().map(|(id, name)| (id.to_string(), json!(name))).collect();
    let label2id: Map<String, Value> = ids.map(|(id, name)| (name.clone(), json!(id))).collect();
    put("id2label", Value::Object(id2label));
    put("label2id", Value::Object(label2id));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_labels_agree_with_any_output_names() {
        let check = |first: &[&str], other: &[&str], expected: bool| {
            let [first, other] =
                [first, other].map(|names| names.iter().map(|&name| name.to_owned()).collect());
            let (first, other): (Vec<String>, Vec<String>) = (first, other);
            assert_eq!(agree(&first, &other), expected, "{first:?} {other:?}");
            assert_eq!(agree(&other, &first), expected, "{other:?} {first:?}");
        };
        check(&["help", "verb"], &["help", "verb"], true);
        check(&["help", "verb"], &["verb", "help"], false);
        check(&["help"], &["help", "verb"], false);
        check(&[REWARD], &["LABEL_0"], true);
        check(&["help", "verb"], &["LABEL_0", "LABEL_1"], true);
        check(&["help", "verb"], &["LABEL_1", "LABEL_0"], false);
    }
}
