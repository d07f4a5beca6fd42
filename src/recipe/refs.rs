//! References to other stages' outputs: `"@name"`, `"@name.output"`, with `*` for all rounds so far and `?` for
//! "omitted if it does not exist yet".

use std::path::{Path, PathBuf};

use super::keys::suggestion;
use super::plan::{Kind, Output};
use super::shipped;
use crate::error::{Error, Result};

/// A reference as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference<'a> {
    /// The stage.
    pub stage: &'a str,
    /// The output, if one is named.
    pub output: Option<&'a str>,
    /// All rounds so far, oldest first, instead of only the newest.
    pub all: bool,
    /// May be absent.
    pub optional: bool,
}

impl<'a> Reference<'a> {
    /// Parses `"@name.output*?"`; `None` if the text is no reference.
    ///
    /// ```
    /// use arriero::recipe::refs::Reference;
    /// let pairs = Reference::parse("@select.pairs*").unwrap();
    /// assert_eq!((pairs.stage, pairs.output, pairs.all, pairs.optional), ("select", Some("pairs"), true, false));
    /// assert_eq!(Reference::parse("data/x.jsonl"), None);
    /// ```
    pub fn parse(text: &'a str) -> Option<Self> {
        let name = text.strip_prefix('@')?;
        let bare = name.trim_end_matches(['*', '?']);
        let marks = &name[bare.len()..];
        let (stage, output) = match bare.split_once('.') {
            Some((stage, output)) => (stage, Some(output)),
            None => (bare, None),
        };
        Some(Self { stage, output, all: marks.contains('*'), optional: marks.contains('?') })
    }
}

/// A stage that runs before the one whose references are resolved.
#[derive(Clone, Debug)]
pub struct Done {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// Its directory.
    pub dir: PathBuf,
}

/// The scope in which references are resolved.
#[derive(Debug)]
pub struct Scope<'a> {
    /// Names and kinds of all stages of the recipe.
    pub stages: &'a [(String, Kind)],
    /// The stages that run before, oldest first.
    pub done: &'a [Done],
    /// The current round.
    pub round: u32,
    /// The model that the recipe's first policy starts from, once known.
    pub base: Option<&'a str>,
    /// The recipe's directory, searched second for relative paths.
    pub home: &'a Path,
}

impl Scope<'_> {
    /// The paths that `text` stands for. A reference gives the outputs that will exist by then, oldest first; anything
    /// else gives itself, or the same path relative to the recipe if only that exists.
    ///
    /// # Errors
    /// No such stage, output or file; or a stage that has not run by then.
    pub fn paths(&self, text: &str) -> Result<Vec<String>> {
        match Reference::parse(text) {
            Some(reference) => self.outputs(text, &reference),
            None => Ok(vec![self.file(text)?]),
        }
    }

    fn outputs(&self, text: &str, reference: &Reference<'_>) -> Result<Vec<String>> {
        let Some((_, kind)) = self.stages.iter().find(|(name, _)| name == reference.stage) else {
            let names: Vec<&str> = self.stages.iter().map(|(name, _)| name.as_str()).collect();
            return Err(Error::usage(format!("`{text}` names no stage of this recipe"))
                .hint(suggestion(reference.stage, &names)));
        };
        let output = output(text, *kind, reference)?;
        let all: Vec<String> = self
            .done
            .iter()
            .filter(|done| done.name == reference.stage)
            .map(|done| done.dir.join(output.path).display().to_string())
            .collect();
        if all.is_empty() && !reference.optional {
            return Err(Error::usage(format!(
                "`{text}`: stage `{}` has not run by then in round {}",
                reference.stage, self.round
            ))
            .hint(format!("move the stage up, or write \"{text}?\" to go without it until then")));
        }
        let skip = if reference.all { 0 } else { all.len().saturating_sub(1) };
        Ok(all.into_iter().skip(skip).collect())
    }

    fn file(&self, text: &str) -> Result<String> {
        if text.is_empty() {
            return Err(Error::usage("an empty path"));
        }
        let path = Path::new(text);
        if path.exists() {
            return Ok(text.to_owned());
        }
        let beside = self.home.join(path);
        if beside.exists() {
            return Ok(beside.display().to_string());
        }
        if is_hub_id(text) || text.contains(['*', '?']) {
            return Ok(text.to_owned());
        }
        let named = text.trim_end_matches(['*', '?']);
        let hint = if self.stages.iter().any(|(name, _)| named.split('.').next() == Some(name)) {
            format!("an output of a stage is written \"@{text}\"")
        } else {
            shipped::hint(text).unwrap_or_else(|| {
                "paths are relative to the current directory, then to the recipe; a hub id is owner/name"
                    .to_owned()
            })
        };
        Err(Error::usage(format!("`{text}` does not exist")).hint(hint))
    }
}

fn output(text: &str, kind: Kind, reference: &Reference<'_>) -> Result<Output> {
    let outputs = kind.outputs();
    let found = match reference.output {
        Some(name) => outputs.iter().find(|output| output.name == name),
        None => outputs.iter().find(|output| output.main),
    };
    found.copied().ok_or_else(|| {
        let names: Vec<String> =
            outputs.iter().map(|output| format!("@{}.{}", reference.stage, output.name)).collect();
        let what = match reference.output {
            Some(name) => {
                format!("`{text}`: a stage of kind {} has no output `{name}`", kind.name())
            }
            None => format!("`{text}`: a stage of kind {} has several outputs", kind.name()),
        };
        Error::usage(what).hint(format!("write {}", names.join(" or ")))
    })
}

/// Whether `text` can be a hub id: `owner/name`, and not the name of a data file.
pub fn is_hub_id(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let file = [".jsonl", ".json", ".gz", ".parquet", ".gguf", ".toml", ".txt"];
    // A GGUF file of a repository: `owner/name:file.gguf`.
    let id = match text.split_once(':') {
        Some((id, file)) => match Path::new(file).extension() {
            Some(ending) if ending == "gguf" => id,
            _ => return false,
        },
        None => text,
    };
    match id.split_once('/') {
        Some((owner, name)) => {
            part(owner) && part(name) && !file.iter().any(|end| name.ends_with(end))
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_find_the_newest_output_or_all_of_them() {
        let stages = [
            ("sft".to_owned(), Kind::Sft),
            ("pick".to_owned(), Kind::Select),
            ("rm".to_owned(), Kind::Reward),
        ];
        let done =
            |name: &str, kind, dir: &str| Done { name: name.to_owned(), kind, dir: dir.into() };
        let done = [
            done("sft", Kind::Sft, "s/1"),
            done("pick", Kind::Select, "s/2"),
            done("sft", Kind::Sft, "s/3"),
            done("pick", Kind::Select, "s/4"),
        ];
        let scope =
            Scope { stages: &stages, done: &done, round: 2, base: None, home: Path::new("") };
        let check =
            |text: &str, expected: Result<&[&str], &str>| match (scope.paths(text), expected) {
                (Ok(paths), Ok(expected)) => assert_eq!(paths, expected, "{text}"),
                (Err(error), Err(expected)) => {
                    assert_eq!(format!("{error:?}"), expected, "{text}");
                }
                (got, _) => panic!("{text}: {got:?}"),
            };
        check("@sft", Ok(&["s/3/checkpoint"]));
        check("@sft*", Ok(&["s/1/checkpoint", "s/3/checkpoint"]));
        check("@pick.pairs*?", Ok(&["s/2/pairs.jsonl", "s/4/pairs.jsonl"]));
        check("@rm?", Ok(&[]));
        check(
            "@rm",
            Err(
                "`@rm`: stage `rm` has not run by then in round 2 (hint: move the stage up, or write \"@rm?\" to go without it until then)",
            ),
        );
        check("@sfg", Err("`@sfg` names no stage of this recipe (hint: did you mean `sft`?)"));
        check(
            "@pick",
            Err(
                "`@pick`: a stage of kind select has several outputs (hint: write @pick.sft or @pick.pairs)",
            ),
        );
        check(
            "@sft.pairs",
            Err(
                "`@sft.pairs`: a stage of kind sft has no output `pairs` (hint: write @sft.checkpoint)",
            ),
        );
        check("sft", Err("`sft` does not exist (hint: an output of a stage is written \"@sft\")"));
        check("HuggingFaceTB/SmolLM2-135M", Ok(&["HuggingFaceTB/SmolLM2-135M"]));
        check(
            "data/missing.jsonl",
            Err(
                "`data/missing.jsonl` does not exist (hint: paths are relative to the current directory, then to the recipe; a hub id is owner/name)",
            ),
        );
    }
}
