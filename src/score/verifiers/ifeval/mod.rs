//! `ifeval`: verifiable instructions (Zhou et al., 2023, "Instruction-Following Evaluation for Large Language Models"),
//! with rows in the format of google/IFEval: `instruction_id_list` and `kwargs`.
//!
//! The 25 types follow the published program, including its quirks. Its libraries are replaced: sentences by
//! `text::sentences` (NLTK's punkt there), words in capitals by splitting at spaces and punctuation (NLTK tokens),
//! language detection by `language` (langdetect).

mod kwargs;
mod text;
mod types;

use serde_json::Value;

use super::{Rule, column, judged};
use crate::error::{Context, Error, Result};
use crate::score::{Question, Score, ScorerSpec};
use kwargs::Kwargs;

/// All instructions of the row are followed.
pub(super) struct Ifeval {
    loose: bool,
}

impl Ifeval {
    pub(super) fn new(spec: &ScorerSpec) -> Self {
        Self { loose: spec.loose }
    }
}

impl Rule for Ifeval {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let variants = if self.loose { loosened(text) } else { vec![text.to_owned()] };
        let instructions = instructions(question)?;
        let mut broken = Vec::new();
        for (index, &(id, kwargs)) in instructions.iter().enumerate() {
            let mut followed = false;
            for variant in variants.iter().filter(|variant| !variant.trim().is_empty()) {
                followed = followed
                    || types::follows(id, kwargs, variant)
                        .at(format_args!("instruction {index} (`{id}`)"))?;
            }
            if !followed {
                broken.push(id);
            }
        }
        let (all, count) = (instructions.len(), instructions.len() - broken.len());
        let why = match broken.as_slice() {
            [] => format!("{count}/{all}"),
            broken => format!("{count}/{all}, not {}", broken.join(", ")),
        };
        Ok(judged(broken.is_empty(), why))
    }
}

/// The row's instructions with their settings.
fn instructions<'a>(question: &Question<'a>) -> Result<Vec<(&'a str, Kwargs<'a>)>> {
    let missing = |name: &str| {
        Error::run(format!("the row has no list `{name}`"))
            .hint("rows for `ifeval` have `instruction_id_list` and `kwargs`, as google/IFEval")
    };
    let list = |name: &str| column(question, name)?.as_array();
    let ids = list("instruction_id_list").ok_or_else(|| missing("instruction_id_list"))?;
    let kwargs = list("kwargs").ok_or_else(|| missing("kwargs"))?;
    if ids.len() != kwargs.len() {
        return Err(Error::run(format!("{} instructions and {} kwargs", ids.len(), kwargs.len())));
    }
    let pair = |(id, kwargs): (&'a Value, &'a Value)| {
        let id = id.as_str().ok_or_else(|| Error::run(format!("an instruction is {id}")))?;
        Ok((id, Kwargs::new(kwargs)?))
    };
    ids.iter().zip(kwargs).map(pair).collect()
}

/// The text; without its first line, last line, or both; and each of these without asterisks: the published loose
/// variants.
fn loosened(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.split('\n').collect();
    let last = lines.len() - 1;
    let joined = |from: usize, to: usize| {
        lines.get(from..to).map_or_else(String::new, |lines| lines.join("\n").trim().to_owned())
    };
    let cut = [text.to_owned(), joined(1, last + 1), joined(0, last), joined(1, last)];
    let plain = cut.iter().map(|text| text.replace('*', "")).collect::<Vec<_>>();
    cut.into_iter().chain(plain).collect()
}

#[cfg(test)]
mod tests;
