//! The recipe as written: entries with their lines, before any resolution.
//!
//! Knows TOML, overrides and which keys are names of one another, but not what the keys mean.

use std::path::{Path, PathBuf};

use serde_json::{Map, Number, Value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::written;
use crate::error::{Error, Result};
use crate::store;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line of the recipe, counted from 1.
    Line(usize),
    /// An override on the command line, as given.
    Argument(String),
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// As written.
    pub key: String,
    /// As written.
    pub value: Value,
    /// Where it was written.
    pub place: Place,
}

/// One `[[stage]]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageTable {
    /// Its entries, including `name` and `kind`.
    pub entries: Vec<Entry>,
    /// Line of its header.
    pub line: usize,
}

impl StageTable {
    /// The value of `key`, if it is text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|entry| entry.key == key)?.value.as_str()
    }

    /// The stage's name: `name`, else its kind.
    pub fn name(&self) -> &str {
        self.text("name").or_else(|| self.text("kind")).unwrap_or_default()
    }
}

/// A recipe as written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecipeFile {
    /// The path, for messages.
    pub path: PathBuf,
    /// Top-level keys.
    pub top: Vec<Entry>,
    /// Keys of `[defaults]`.
    pub defaults: Vec<Entry>,
    /// The stages in order.
    pub stages: Vec<StageTable>,
    /// The whole text.
    pub text: String,
}

impl RecipeFile {
    /// Reads a recipe.
    ///
    /// # Errors
    /// No such file, or not TOML; names the line and a hint.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::usage(format!("no recipe `{}`", path.display()))
                .hint("`arriero ls` lists the recipes; `arriero cp <recipe> my.toml` writes one"));
        }
        Self::parse(&store::read_text(path)?, path)
    }

    /// Parses the text of the recipe at `path`.
    ///
    /// ```
    /// use arriero::recipe::file::RecipeFile;
    /// let recipe = RecipeFile::parse("seed = 7\n[[stage]]\nkind = 'sft'\n", "r.toml".as_ref())?;
    /// assert_eq!(recipe.stages[0].name(), "sft");
    /// # Ok::<(), arriero::Error>(())
    /// ```
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let line = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
        let table = DeTable::parse(text).map_err(|error| {
            let at = error.span().map_or(1, |span| line(span.start));
            Error::usage(error.message().replace('\n', ", "))
                .at(format_args!("{}:{at}", path.display()))
                .hint("a recipe is a TOML file")
        })?;
        let mut recipe =
            Self { path: path.to_path_buf(), text: text.to_owned(), ..Self::default() };
        for (key, value) in table.into_inner() {
            let at = line(key.span().start);
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("defaults", DeValue::Table(defaults)) => {
                    recipe.defaults = entries(defaults, &line);
                }
                ("stage" | "stages", DeValue::Array(stages)) => {
                    for stage in stages {
                        recipe.stages.push(recipe.stage(stage, &line)?);
                    }
                }
                ("defaults" | "stage" | "stages", other) => {
                    let key = key.get_ref();
                    let expected = if key == "defaults" { "[defaults]" } else { "[[stage]]" };
                    return Err(Error::usage(format!(
                        "`{key}` is {}, expected {expected}",
                        other.type_str()
                    ))
                    .at(format_args!("{}:{at}", path.display()))
                    .hint("each stage is a block of its own, opened by [[stage]]"));
                }
                (name, _) => recipe.top.push(Entry {
                    key: name.to_owned(),
                    value: json(value.get_ref()),
                    place: Place::Line(at),
                }),
            }
        }
        Ok(recipe)
    }

    fn stage(
        &self,
        stage: &Spanned<DeValue<'_>>,
        line: &impl Fn(usize) -> usize,
    ) -> Result<StageTable> {
        let at = line(stage.span().start);
        match stage.get_ref() {
            DeValue::Table(table) => Ok(StageTable { entries: entries(table, line), line: at }),
            other => {
                Err(Error::usage(format!("a stage is {}, expected a table", other.type_str()))
                    .at(format_args!("{}:{at}", self.path.display()))
                    .hint("open each stage with [[stage]]"))
            }
        }
    }

    /// A recipe of one stage, from the command line: `arriero sft model_name_or_path=…`.
    pub fn of_one_stage(kind: &str) -> Self {
        let entry = Entry {
            key: "kind".to_owned(),
            value: Value::String(kind.to_owned()),
            place: Place::Argument(kind.to_owned()),
        };
        Self {
            path: PathBuf::from(kind),
            stages: vec![StageTable { entries: vec![entry], line: 0 }],
            ..Self::default()
        }
    }

    /// How error messages name `place`.
    pub fn describe(&self, place: &Place) -> String {
        match place {
            Place::Line(0) => self.path.display().to_string(),
            Place::Line(line) => format!("{}:{line}", self.path.display()),
            Place::Argument(argument) => format!("`{argument}`"),
        }
    }

    /// Applies `key=value` overrides in order; later ones win. `dpo.beta=0.2` sets a key of the stages named `dpo`, or
    /// else of that kind; `rounds=1` sets a top-level key; in a one-stage recipe any other key is that stage's.
    ///
    /// # Errors
    /// Not `key=value`, or an unknown stage.
    pub fn apply(&mut self, overrides: &[String]) -> Result<()> {
        for argument in overrides {
            self.apply_one(argument)?;
        }
        Ok(())
    }

    fn apply_one(&mut self, argument: &str) -> Result<()> {
        let Some((key, value)) = argument.split_once('=') else {
            return Err(Error::usage(format!("`{argument}`, expected key=value"))
                .hint("for example dpo.beta=0.2 or rounds=1"));
        };
        let key = key.trim_start_matches("--");
        let entry = |key: &str| Entry {
            key: key.to_owned(),
            value: argument_value(value),
            place: Place::Argument(argument.to_owned()),
        };
        let Some((stage, key)) = key.split_once('.') else {
            let target = match &mut self.stages[..] {
                [only] if only.line == 0 && !super::top::TOP_KEYS.contains(&key) => {
                    &mut only.entries
                }
                _ => &mut self.top,
            };
            set(target, entry(key));
            return Ok(());
        };
        if stage == "defaults" {
            set(&mut self.defaults, entry(key));
            return Ok(());
        }
        let named = self.stages.iter().any(|table| table.name() == stage);
        let mut found = false;
        for table in &mut self.stages {
            let matches =
                if named { table.name() == stage } else { table.text("kind") == Some(stage) };
            if matches {
                set(&mut table.entries, entry(key));
                found = true;
            }
        }
        if found {
            return Ok(());
        }
        let names: Vec<&str> = self.stages.iter().map(StageTable::name).collect();
        Err(Error::usage(format!("`{argument}` names a stage `{stage}` that the recipe lacks"))
            .hint(super::keys::suggestion(stage, &names)))
    }
}

/// Replaces what `entry` writes, under any of its names. A loss also replaces the weights that the file gives to its own.
fn set(entries: &mut Vec<Entry>, entry: Entry) {
    let written_key = written(&entry.key);
    let of_old_losses = |old: &Entry| {
        written_key == "loss_type"
            && old.key == "loss_weights"
            && matches!(old.place, Place::Line(_))
    };
    entries.retain(|old| written(&old.key) != written_key && !of_old_losses(old));
    entries.push(entry);
}

/// Parses a command-line value as TOML if possible, else as text.
pub(crate) fn argument_value(text: &str) -> Value {
    let line = format!("v = {text}");
    match DeTable::parse(&line) {
        Ok(table) if table.get_ref().len() == 1 => table
            .into_inner()
            .into_iter()
            .next()
            .map_or(Value::Null, |(_, value)| json(value.get_ref())),
        _ => Value::String(text.to_owned()),
    }
}

fn entries(table: &DeTable<'_>, line: &impl Fn(usize) -> usize) -> Vec<Entry> {
    table
        .iter()
        .map(|(key, value)| Entry {
            key: key.get_ref().to_string(),
            value: json(value.get_ref()),
            place: Place::Line(line(key.span().start)),
        })
        .collect()
}

fn json(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Boolean(flag) => Value::Bool(*flag),
        DeValue::Integer(number) => {
            let parsed = i64::from_str_radix(number.as_str(), number.radix());
            // Beyond 64 bits only the digits can be kept; the type check refuses them.
            parsed.map_or_else(|_| Value::String(number.to_string()), Value::from)
        }
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .ok()
            .and_then(Number::from_f64)
            .map_or_else(|| Value::String(number.to_string()), Value::Number),
        DeValue::Datetime(date) => Value::String(date.to_string()),
        DeValue::Array(list) => list.iter().map(|value| json(value.get_ref())).collect(),
        DeValue::Table(table) => {
            let mut object = Map::new();
            for (key, value) in table {
                object.insert(key.get_ref().to_string(), json(value.get_ref()));
            }
            Value::Object(object)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(text: &str) -> RecipeFile {
        RecipeFile::parse(text, Path::new("r.toml")).unwrap()
    }

    const TWO: &str = "rounds = 2\n[defaults]\nseed = 1\n[[stage]]\nkind = 'sft'\n\n[[stage]]\nname = 'prefer'\nkind = 'dpo'\nbeta = 0.1\n";

    #[test]
    fn every_entry_records_its_line() {
        let recipe = parse(TWO);
        assert_eq!(recipe.top[0].place, Place::Line(1));
        assert_eq!(recipe.defaults[0].place, Place::Line(3));
        assert_eq!(recipe.stages[1].name(), "prefer");
        let beta = recipe.stages[1].entries.last().unwrap();
        assert_eq!(
            (&beta.key[..], &beta.value, &beta.place),
            ("beta", &json!(0.1), &Place::Line(10))
        );
    }

    #[test]
    fn broken_toml_is_refused_with_its_line() {
        let error = RecipeFile::parse("seed = 1\nrounds = = 2\n", Path::new("r.toml")).unwrap_err();
        assert!(error.to_string().starts_with("r.toml:2: "), "{error}");
        let error = RecipeFile::parse("stage = 3\n", Path::new("r.toml")).unwrap_err();
        assert_eq!(error.to_string(), "r.toml:1: `stage` is integer, expected [[stage]]");
    }

    #[test]
    fn overrides_find_stages_by_name_then_by_kind() {
        for (argument, stage) in [("prefer.beta=0.5", 1), ("dpo.beta=0.5", 1), ("sft.beta=0.5", 0)]
        {
            let mut recipe = parse(TWO);
            recipe.apply(&[argument.to_owned()]).unwrap();
            let beta = recipe.stages[stage].entries.last().unwrap();
            assert_eq!((&beta.key[..], &beta.value), ("beta", &json!(0.5)), "{argument}");
        }
        let mut recipe = parse(TWO);
        recipe.apply(&["rounds=1".to_owned(), "defaults.seed=9".to_owned()]).unwrap();
        assert_eq!((&recipe.top[0].value, &recipe.defaults[0].value), (&json!(1), &json!(9)));
        let error = recipe.apply(&["preferr.beta=1".to_owned()]).unwrap_err();
        assert_eq!(error.hint_text(), Some("did you mean `prefer`?"));
        assert!(recipe.apply(&["beta".to_owned()]).is_err());
    }

    #[test]
    fn an_override_replaces_what_is_written_under_another_name() {
        for (written, argument) in [
            ("pref_loss = ['sft', 'hinge']", "dpo.loss_type=ipo"),
            ("adapter = 'qlora'", "dpo.finetuning_type=lora"),
            ("lr = 1e-4", "dpo.learning_rate=1e-5"),
        ] {
            let mut recipe = parse(&format!("[[stage]]\nkind = 'dpo'\n{written}\n"));
            recipe.apply(&[argument.to_owned()]).unwrap();
            let keys: Vec<&str> =
                recipe.stages[0].entries.iter().map(|entry| entry.key.as_str()).collect();
            let (key, _) = argument["dpo.".len()..].split_once('=').unwrap();
            assert_eq!(keys, ["kind", key], "{argument}");
        }
    }

    #[test]
    fn argument_values_parse_as_toml_or_fall_back_to_text() {
        for (text, value) in [
            ("1", json!(1)),
            ("2e-4", json!(2e-4)),
            ("true", json!(true)),
            ("[\"a\", \"b\"]", json!(["a", "b"])),
            ("data/x.jsonl", json!("data/x.jsonl")),
            ("cuda:0", json!("cuda:0")),
            ("\"1\"", json!("1")),
            ("", json!("")),
        ] {
            assert_eq!(argument_value(text), value, "{text}");
        }
    }
}
