//! Resolves the recipe as written into the plan: canonicalizes names, fills in defaults, replaces references by paths,
//! unrolls rounds, and checks every value.

use std::path::Path;

use indexmap::IndexMap;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::dpo::{dependent_defaults, replaced_by_defaults};
use super::file::{Entry, Place, RecipeFile, StageTable};
use super::keys::{self, INERT, Known, suggestion};
use super::plan::{AverageMethod, Kind, Plan, Spec, Step};
use super::refs::{Done, Scope};
use super::shape::{beside, expand, inputs, shaped};
use super::top::Top;
use crate::error::{Context, Error, Result};

/// Keys of every stage kind.
const STAGE_KEYS: [&str; 4] = ["name", "kind", "once", "seed"];

/// A plan, and notes for the user about how it was resolved.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The plan.
    pub plan: Plan,
    /// Notes on keys that were accepted without effect.
    pub notes: Vec<String>,
}

/// Resolves a recipe. `output_dir` overrides the recipe's.
///
/// # Errors
/// Unknown keys, wrong types, invalid values, dangling references: each with its line and a hint.
pub fn resolve(file: &RecipeFile, output_dir: Option<&Path>) -> Result<Resolved> {
    let top = Top::read(file)?;
    let mut notes = Vec::new();
    let stages = file
        .stages
        .iter()
        .map(|table| Stage::read(file, table, &mut notes))
        .collect::<Result<Vec<_>>>()?;
    check_names(file, &stages)?;
    check_defaults(file)?;
    let output_dir = output_dir.map_or(top.output_dir, Path::to_path_buf);
    let names: Vec<(String, Kind)> =
        stages.iter().map(|stage| (stage.name.clone(), stage.kind)).collect();
    let home = file.path.parent().unwrap_or(Path::new(""));

    let mut steps: Vec<Step> = Vec::new();
    let mut done: Vec<Done> = Vec::new();
    let mut base: Option<String> = None;
    for round in 1..=top.rounds {
        for stage in stages.iter().filter(|stage| round == 1 || !stage.once) {
            let scope = Scope { stages: &names, done: &done, round, base: base.as_deref(), home };
            let seed = derive_seed(stage.seed.unwrap_or(top.seed), &stage.name, round);
            let spec = stage.spec(file, &scope, seed)?;
            if base.is_none() {
                base = spec.policy().map(str::to_owned);
            }
            let at = &stage.name;
            notes.extend(spec.notes().into_iter().map(|note| format!("stage `{at}`: {note}")));
            let suffix = if round > 1 { format!("-r{round}") } else { String::new() };
            let id = format!("{:02}-{}{suffix}", steps.len() + 1, stage.name);
            done.push(Done {
                name: stage.name.clone(),
                kind: stage.kind,
                dir: output_dir.join("stages").join(&id),
            });
            steps.push(Step { id, name: stage.name.clone(), round, seed, spec });
        }
    }
    let plan = Plan {
        name: top.name,
        seed: top.seed,
        rounds: top.rounds,
        device: top.device,
        output_dir,
        steps,
    };
    notes.sort();
    notes.dedup();
    Ok(Resolved { plan, notes })
}

/// The seed of a stage in a round: 53 bits of a hash, so that every JSON reader preserves it.
fn derive_seed(seed: u64, name: &str, round: u32) -> u64 {
    let digest = Sha256::digest(format!("{seed}/{name}/{round}"));
    digest[..8].iter().fold(0, |value, &byte| value << 8 | u64::from(byte)) >> 11
}

/// A stage with canonical keys.
struct Stage {
    name: String,
    kind: Kind,
    once: bool,
    seed: Option<u64>,
    line: Place,
    keys: IndexMap<String, Known>,
    values: IndexMap<String, (Value, Place)>,
}

impl Stage {
    fn read(file: &RecipeFile, table: &StageTable, notes: &mut Vec<String>) -> Result<Self> {
        let line = Place::Line(table.line);
        let at = file.describe(&line);
        let kinds: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        let Some(kind) = table.text("kind") else {
            return Err(Error::usage("the stage has no `kind`")
                .at(at)
                .hint(format!("kinds are: {}", kinds.join(", "))));
        };
        let Some(kind) = Kind::ALL.into_iter().find(|known| known.name() == kind) else {
            return Err(Error::usage(format!("unknown stage kind `{kind}`"))
                .at(at)
                .hint(suggestion(kind, &kinds)));
        };
        let mut stage = Self {
            name: table.name().to_owned(),
            kind,
            once: false,
            seed: None,
            line,
            keys: keys::known(kind)?,
            values: IndexMap::new(),
        };
        // Errors of `expand` begin with the key.
        let entries = expand(&table.entries).map_err(|error| {
            let text = error.to_string();
            let key = text.split('`').nth(1);
            let at = table.entries.iter().find(|entry| Some(entry.key.as_str()) == key);
            stage.locate(file, at.map_or(&stage.line, |entry| &entry.place), error)
        })?;
        for entry in entries {
            stage.set(&entry, notes).map_err(|error| stage.locate(file, &entry.place, error))?;
        }
        let own = stage.values.len();
        let defaults = beside(&table.entries, &file.defaults);
        for entry in expand(&defaults).map_err(|error| error.at("[defaults]"))? {
            // `seed` is a key of every stage, and in some kinds also a setting, which is derived rather than set.
            let is_said = match keys::canonical(&entry.key, &stage.keys) {
                _ if entry.key == "seed" => stage.seed.is_some(),
                Some(key) => stage.values.contains_key(key),
                None => continue,
            };
            if !is_said {
                stage
                    .set(&entry, notes)
                    .map_err(|error| stage.locate(file, &entry.place, error))?;
            }
        }
        notes.extend(stage.unused_adapter_keys(file, own)?);
        notes.extend(stage.replaced_preset(own));
        notes.extend(stage.keys_of_other_methods(file, own)?);
        Ok(stage)
    }

    /// A note on the values of the stage's own preset that `[defaults]` replace. `own`: how many of the values are
    /// the stage's own.
    fn replaced_preset(&self, own: usize) -> Option<String> {
        let (at, _, (preset, _)) = self.values.get_full("preset")?;
        let defaults = self.values.iter().skip(own).map(|(key, (value, _))| (key.as_str(), value));
        let note = replaced_by_defaults(preset, defaults).filter(|_| at < own)?;
        Some(format!("stage `{}`: {note}", self.name))
    }

    /// Keys of an `average` stage that only another `method` reads: returns a note if they are in `[defaults]` and no stage
    /// reads them. `own`: how many of the values are the stage's own.
    ///
    /// # Errors
    /// Keys of the stage itself.
    fn keys_of_other_methods(&self, file: &RecipeFile, own: usize) -> Result<Option<String>> {
        if self.kind != Kind::Average {
            return Ok(None);
        }
        let written = self.values.get("method").map(|(value, _)| value.clone());
        let method = written.map_or(Ok(AverageMethod::default()), serde_json::from_value);
        // An unknown method is refused with the types.
        let Ok(method) = method else { return Ok(None) };
        let mut unused = Vec::new();
        for (at, (key, (value, place))) in self.values.iter().enumerate() {
            let known = &self.keys[key];
            let reader = AverageMethod::reader(key, known.section.as_deref());
            let Some(reader) = reader.filter(|reader| *reader != method) else { continue };
            if is_off(value) && *value == known.default {
                continue;
            }
            if at < own {
                let (name, reader) = (method.name(), reader.name());
                let error = Error::usage(format!(
                    "`{key}` is {value} with method = \"{name}\", which does not read it"
                ))
                .hint(format!("leave it out, or set method = \"{reader}\", which does"));
                return Err(self.locate(file, place, error));
            }
            if !read_elsewhere(file, key)? {
                unused.push(format!("`{key}`"));
            }
        }
        let note = || {
            let (keys, method) = (unused.join(", "), method.name());
            format!("stage `{}`: no effect with method = \"{method}\": {keys}", self.name)
        };
        Ok((!unused.is_empty()).then(note))
    }

    /// Adapter keys in a stage that trains the whole model: returns a note if that is explicit or if the keys are in
    /// `[defaults]` for other stages. `own`: how many of the values are the stage's own.
    ///
    /// # Errors
    /// Keys of the stage itself, if nothing says that the whole model is meant.
    fn unused_adapter_keys(&self, file: &RecipeFile, own: usize) -> Result<Option<String>> {
        let use_peft = self.values.get("use_peft").map(|(value, _)| value);
        if use_peft == Some(&Value::Bool(true)) {
            return Ok(None);
        }
        let mut unused = Vec::new();
        for (at, (key, (value, place))) in self.values.iter().enumerate() {
            let is_adapters = self.keys[key].section.as_deref() == Some("lora");
            // `quantization` is refused everywhere, once its value is known.
            if !is_adapters || key == "use_peft" || key == "quantization" || is_off(value) {
                continue;
            }
            if at < own && use_peft.is_none() {
                return Err(Error::usage(format!(
                    "`{key}` is {value} without `use_peft`: the whole model would be trained"
                ))
                .hint("set use_peft = true to train adapters, or false to train the whole model"))
                .map_err(|error| self.locate(file, place, error));
            }
            unused.push(format!("`{key}`"));
        }
        let note = || {
            let keys = unused.join(", ");
            format!("stage `{}`: no effect without `use_peft`: {keys}", self.name)
        };
        Ok((!unused.is_empty()).then(note))
    }

    fn locate(&self, file: &RecipeFile, place: &Place, error: Error) -> Error {
        error.at(format_args!("stage `{}`", self.name)).at(file.describe(place))
    }

    fn set(&mut self, entry: &Entry, notes: &mut Vec<String>) -> Result<()> {
        let wrong = |expected: &str| {
            Error::usage(format!("`{}` is {}, expected {expected}", entry.key, entry.value))
        };
        match entry.key.as_str() {
            "kind" => return Ok(()),
            "name" => {
                let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                return match entry.value.as_str() {
                    Some(name) if !name.is_empty() && name.chars().all(fits) => Ok(()),
                    _ => Err(wrong("letters, digits, - and _")),
                };
            }
            "once" => {
                self.once = entry.value.as_bool().ok_or_else(|| wrong("true or false"))?;
                return Ok(());
            }
            "seed" => {
                let seed = entry.value.as_u64();
                self.seed = Some(seed.ok_or_else(|| wrong("a whole number, 0 or more"))?);
                return Ok(());
            }
            _ => {}
        }
        let Some(key) = keys::canonical(&entry.key, &self.keys) else {
            return self.inert(entry, notes);
        };
        let value = shaped(key, entry.value.clone(), &self.keys[key].default);
        if let Some(expected) = keys::wrong_type(&value, &self.keys[key].default)
            && !value.is_null()
            // A teacher may be a server, given as a table.
            && !(key == "teacher" && value.is_object())
        {
            return Err(wrong(expected));
        }
        let key = key.to_owned();
        if let Some((_, earlier)) = self.values.insert(key.clone(), (value, entry.place.clone()))
            && matches!((earlier, &entry.place), (Place::Line(_), Place::Line(_)))
        {
            return Err(Error::usage(format!("`{}` sets `{key}` again", entry.key))
                .hint("keep one of the two"));
        }
        Ok(())
    }

    fn inert(&self, entry: &Entry, notes: &mut Vec<String>) -> Result<()> {
        let Some(inert) = INERT.iter().find(|inert| inert.key == entry.key) else {
            let known: Vec<&str> = self.keys.keys().map(String::as_str).chain(STAGE_KEYS).collect();
            return Err(Error::usage(format!("unknown key `{}`", entry.key)).hint(
                match crate::error::did_you_mean(&entry.key, known.iter().copied()) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("a {} stage has: {}", self.kind.name(), known.join(", ")),
                },
            ));
        };
        if !inert.values.is_empty() && !inert.values.contains(&entry.value.to_string().as_str()) {
            return Err(Error::usage(format!(
                "`{}` is {}, which is not implemented",
                entry.key, entry.value
            ))
            .hint(inert.why));
        }
        notes.push(format!("`{}` has no effect: {}", entry.key, inert.why));
        Ok(())
    }

    /// The typed settings of this stage in one round.
    fn spec(&self, file: &RecipeFile, scope: &Scope<'_>, seed: u64) -> Result<Spec> {
        let mut object = keys::default_spec(self.kind)?;
        if self.kind == Kind::Dpo {
            dependent_defaults(&mut object, |key| self.values.get(key).map(|(value, _)| value))
                .map_err(|error| {
                    let place = self.values.get("preset").map_or(&self.line, |(_, place)| place);
                    self.locate(file, place, error)
                })?;
        }
        for (key, (value, place)) in &self.values {
            let value = inputs(key, value.clone(), scope)
                .map_err(|error| self.locate(file, place, error.at(format_args!("`{key}`"))))?;
            match &self.keys[key].section {
                Some(section) => {
                    object[section.as_str()][key.as_str()] = value;
                }
                None => {
                    object[key.as_str()] = value;
                }
            }
        }
        if self.keys.get("num_samples").is_some_and(|key| key.section.is_some()) {
            object["sampling"]["seed"] = Value::from(seed);
        }
        if self.kind == Kind::Sample {
            let place = self.values.get("policies").map_or(&self.line, |(_, place)| place);
            super::rejection::fill_policies(&mut object, &self.keys, scope)
                .map_err(|error| self.locate(file, place, error))?;
        }
        let spec = self.typed(&object).map_err(|(path, error)| {
            let key = path.split(['.', '[']).find(|part| self.values.contains_key(*part));
            let place = key.map_or(&self.line, |key| &self.values[key].1);
            self.locate(file, place, error)
        })?;
        spec.check().map_err(|error| {
            // Errors of a check start with the key.
            let text = error.to_string();
            let place = text
                .split('`')
                .nth(1)
                .and_then(|key| self.values.get(key))
                .map_or(&self.line, |(_, place)| place);
            self.locate(file, place, error)
        })?;
        Ok(match spec {
            Spec::Dpo(dpo) => Spec::Dpo(dpo.without_none()),
            other => other,
        })
    }

    fn typed(&self, object: &Value) -> Result<Spec, (String, Error)> {
        Ok(match self.kind {
            Kind::Synth => Spec::Synth(typed(object)?),
            Kind::Sft => Spec::Sft(typed(object)?),
            Kind::Reward => Spec::Reward(typed(object)?),
            Kind::Sample => Spec::Sample(typed(object)?),
            Kind::Select => Spec::Select(typed(object)?),
            Kind::Dpo => Spec::Dpo(typed(object)?),
            Kind::Average => Spec::Average(typed(object)?),
            Kind::Eval => Spec::Eval(typed(object)?),
        })
    }
}

/// Whether a value requests nothing.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => ["", "none", "default"].contains(&text.as_str()),
        Value::Array(list) => list.is_empty(),
        Value::Bool(true) | Value::Object(_) => false,
    }
}

fn typed<T: DeserializeOwned>(object: &Value) -> Result<T, (String, Error)> {
    serde_path_to_error::deserialize(object).map_err(|error| {
        let path = error.path().to_string();
        let mut key = path.as_str();
        for section in keys::SECTIONS {
            key = key.strip_prefix(section).and_then(|key| key.strip_prefix('.')).unwrap_or(key);
        }
        let failed = misread(&error.inner().to_string()).at(format_args!("`{key}`"));
        (path.clone(), failed)
    })
}

/// Converts serde's message to an error, with a suggestion if a name is unknown.
pub(super) fn misread(message: &str) -> Error {
    let failed = Error::usage(message);
    match near_miss(message) {
        Some(near) => failed.hint(format!("did you mean `{near}`?")),
        None => failed,
    }
}

/// The known name closest to the unknown one in serde's "unknown variant `a`, expected one of `b`, `c`".
fn near_miss(message: &str) -> Option<String> {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let found = quoted.next()?;
    let known: Vec<&str> = quoted.collect();
    crate::error::did_you_mean(found, known).map(str::to_owned)
}

fn check_names(file: &RecipeFile, stages: &[Stage]) -> Result<()> {
    for (at, stage) in stages.iter().enumerate() {
        if stages[..at].iter().any(|earlier| earlier.name == stage.name) {
            return Err(Error::usage(format!("a second stage named `{}`", stage.name))
                .at(file.describe(&stage.line))
                .hint("give one of them a `name` of its own"));
        }
    }
    Ok(())
}

fn check_defaults(file: &RecipeFile) -> Result<()> {
    let all: Vec<_> = Kind::ALL.iter().map(|&kind| keys::known(kind)).collect::<Result<_>>()?;
    for entry in expand(&file.defaults).map_err(|error| error.at("[defaults]"))? {
        if all.iter().any(|known| keys::canonical(&entry.key, known).is_some())
            || INERT.iter().any(|inert| inert.key == entry.key)
        {
            continue;
        }
        let known: Vec<&str> =
            all.iter().flat_map(|keys| keys.keys()).map(String::as_str).collect();
        let near = crate::error::did_you_mean(&entry.key, known);
        return Err(Error::usage(format!("unknown key `{}`", entry.key)).hint(match near {
            Some(near) => format!("did you mean `{near}`?"),
            None => "no stage kind has it".to_owned(),
        }))
        .at(file.describe(&entry.place));
    }
    Ok(())
}

/// Whether a stage of another kind than `average` has the key.
fn read_elsewhere(file: &RecipeFile, key: &str) -> Result<bool> {
    for table in &file.stages {
        let kind = table
            .text("kind")
            .and_then(|name| Kind::ALL.into_iter().find(|kind| kind.name() == name));
        if let Some(kind) = kind.filter(|kind| *kind != Kind::Average)
            && keys::known(kind)?.contains_key(key)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::teacher::TeacherSpec;

    fn plan(text: &str) -> Result<Resolved> {
        resolve(&RecipeFile::parse(text, Path::new("r.toml"))?, None)
    }

    #[track_caller]
    fn refuses(text: &str, expected: &str) {
        assert_eq!(format!("{:?}", plan(text).unwrap_err()), expected);
    }

    /// `src` and `src/lib.rs` stand in for a model and a dataset: tests run in the package's directory.
    const SFT: &str =
        "[[stage]]\nkind = 'sft'\nmodel_name_or_path = 'src'\ndatasets = 'src/lib.rs'\n";

    #[test]
    fn plan_applies_defaults_and_unrolls_the_rounds() {
        let resolved = plan(&format!(
            "seed = 7\nrounds = 2\n[defaults]\nlr = 2e-4\nbeta = 0.3\n{SFT}sample_packing = true\n[[stage]]\nkind = 'dpo'\nonce = true\nmodel_name_or_path = ['@dpo?', '@sft']\ndatasets = ['src/lib.rs']\n"
        ))
        .unwrap();
        let ids: Vec<&str> = resolved.plan.steps.iter().map(|step| step.id.as_str()).collect();
        assert_eq!(ids, ["01-sft", "02-dpo", "03-sft-r2"]);
        assert_eq!(resolved.plan.output_dir, Path::new("runs/r"));
        let Spec::Dpo(dpo) = &resolved.plan.steps[1].spec else { panic!("not dpo") };
        assert_eq!(dpo.model_name_or_path, "runs/r/stages/01-sft/checkpoint");
        assert_eq!(
            (dpo.beta.to_bits(), dpo.train.learning_rate.to_bits()),
            (0.3_f64.to_bits(), 2e-4_f64.to_bits())
        );
        assert_ne!(resolved.plan.steps[0].seed, resolved.plan.steps[2].seed);
        assert_eq!(
            resolved.notes,
            ["`sample_packing` has no effect: rows are always packed, without padding"]
        );
    }

    #[test]
    fn evaluation_keys_without_effect_are_noted() {
        let check = |stage: &str, expected: &[&str]| {
            let start = "model_name_or_path = 'src'\ndatasets = 'src/lib.rs'\n";
            let text = format!("[[stage]]\n{start}{stage}");
            assert_eq!(plan(&text).unwrap().notes, expected, "{stage}");
        };
        let held_out = "eval_datasets = 'src/lib.rs'\neval_steps = 5\n";
        let keys = "eval_samples = 2\nload_best_model_at_end = true\n";
        check(&format!("kind = 'sft'\n{keys}{held_out}"), &[]);
        let no_samples =
            "`eval_samples` has no effect: only `sft` stages write answers while they train";
        for kind in ["reward", "dpo"] {
            let note = format!("stage `{kind}`: {no_samples}");
            check(&format!("kind = '{kind}'\n{keys}{held_out}"), &[note.as_str()]);
        }
        check(
            &format!("kind = 'sft'\n{keys}eval_steps = 5\n"),
            &[
                "stage `sft`: `eval_samples` has no effect: without `eval_datasets` there are no prompts",
                "stage `sft`: `eval_steps` has no effect: without `eval_datasets` nothing is evaluated",
                "stage `sft`: `load_best_model_at_end` has no effect: without `eval_datasets` no weights are the best",
            ],
        );
        check(
            "kind = 'sft'\neval_datasets = 'src/lib.rs'\nload_best_model_at_end = true\n",
            &[
                "stage `sft`: `load_best_model_at_end` has no effect: without `eval_steps` the end is all that is evaluated",
            ],
        );
        // They may come from [defaults], for another stage.
        let both = format!(
            "[defaults]\neval_samples = 2\n{SFT}eval_datasets = 'src/lib.rs'\n[[stage]]\nkind = 'dpo'\nmodel_name_or_path = 'src'\ndatasets = 'src/lib.rs'\n"
        );
        assert_eq!(plan(&both).unwrap().notes, [format!("stage `dpo`: {no_samples}")]);
    }

    #[test]
    fn default_seed_applies_to_every_stage_without_its_own() {
        let sample =
            "[[stage]]\nkind = 'sample'\nmodel_name_or_path = '@sft'\ndatasets = 'src/lib.rs'\n";
        let seeds = |defaults: &str, of_sft: &str, of_sample: &str| {
            let text = format!("{defaults}{SFT}{of_sft}\n{sample}{of_sample}\n");
            let steps = plan(&text).unwrap().plan.steps;
            let Spec::Sample(sample) = &steps[1].spec else { panic!("not sample") };
            assert_eq!(sample.sampling.seed, steps[1].seed);
            [steps[0].seed, steps[1].seed]
        };
        let own = seeds("", "seed = 5", "seed = 5");
        assert_eq!(seeds("[defaults]\nseed = 5\n", "", ""), own);
        assert_eq!(seeds("seed = 5\n", "", ""), own);
        assert_eq!(seeds("[defaults]\nseed = 6\n", "seed = 5", "seed = 5"), own);
        assert_eq!(seeds("seed = 7\n[defaults]\nseed = 5\n", "", ""), own);
    }

    #[test]
    fn bf16_key_sets_the_dtype_and_conflicts_with_another() {
        let dtype = |defaults: &str, own: &str| {
            let plan = plan(&format!("{defaults}{SFT}{own}\n")).unwrap().plan;
            let Spec::Sft(sft) = &plan.steps[0].spec else { panic!("not sft") };
            sft.train.dtype.dtype().as_str()
        };
        for (defaults, own, expected) in [
            ("", "bf16 = true", "bf16"),
            ("", "bf16 = false", "f32"),
            ("", "bf16 = true\ntorch_dtype = 'bfloat16'", "bf16"),
            ("", "bf16 = false\ndtype = 'f32'", "f32"),
            ("[defaults]\nbf16 = true\n", "", "bf16"),
            ("[defaults]\nbf16 = true\n", "bf16 = false", "f32"),
            ("[defaults]\nbf16 = true\n", "dtype = 'f32'", "f32"),
            ("[defaults]\ndtype = 'f32'\n", "bf16 = true", "bf16"),
        ] {
            assert_eq!(dtype(defaults, own), expected, "{defaults} {own}");
        }
        refuses(
            &format!("{SFT}bf16 = true\ndtype = 'f32'\n"),
            "r.toml:5: stage `sft`: `bf16` is true and `dtype` is \"f32\" (hint: keep one of the two)",
        );
        refuses(
            &format!("{SFT}bf16 = false\ndtype = 'bf16'\n"),
            "r.toml:5: stage `sft`: `bf16` is false and `dtype` is \"bf16\" (hint: keep one of the two)",
        );
        refuses(
            &format!("{SFT}bf16 = 'auto'\n"),
            "r.toml:5: stage `sft`: `bf16` is \"auto\", expected true or false (hint: true is dtype = \"bf16\")",
        );
        // The command line overrides the recipe, under either name.
        for (written, argument, expected) in
            [("bf16 = true", "sft.dtype=f32", "f32"), ("dtype = 'f32'", "sft.bf16=true", "bf16")]
        {
            let text = format!("{SFT}{written}\n");
            let mut file = RecipeFile::parse(&text, Path::new("r.toml")).unwrap();
            file.apply(&[argument.to_owned()]).unwrap();
            let plan = resolve(&file, None).unwrap().plan;
            let Spec::Sft(sft) = &plan.steps[0].spec else { panic!("not sft") };
            assert_eq!(sft.train.dtype.dtype().as_str(), expected, "{argument}");
        }
    }

    #[test]
    fn key_names_of_other_trainers_are_accepted() {
        let resolved = plan("[[stage]]\nkind = 'dpo'\nbase_model = 'src'\ndataset_name = 'src/lib.rs'\nmicro_batch_size = 3\nloss_type = ['sigmoid', 'sft']\nloss_weights = [1.0, 0.5]\nlr_scheduler = 'constant_with_warmup'\nepochs = 2\nrl_beta = 0.2\n").unwrap();
        let Spec::Dpo(dpo) = &resolved.plan.steps[0].spec else { panic!("not dpo") };
        let shown = (
            dpo.train.per_device_train_batch_size,
            dpo.losses(),
            dpo.sft_loss_weight,
            dpo.beta,
            dpo.train.num_train_epochs,
        );
        assert_eq!(format!("{shown:?}"), "(3, [(Sigmoid, 1.0)], 0.5, 0.2, 2.0)");
    }

    #[test]
    fn mistakes_are_reported_with_line_value_and_hint() {
        refuses(
            &format!("{SFT}learning_rat = 1e-5\n"),
            "r.toml:5: stage `sft`: unknown key `learning_rat` (hint: did you mean `learning_rate`?)",
        );
        refuses(
            &format!("{SFT}learning_rate = '1e-5'\n"),
            "r.toml:5: stage `sft`: `learning_rate` is \"1e-5\", expected a number",
        );
        refuses(
            &format!("{SFT}max_steps = 1.5\n"),
            "r.toml:5: stage `sft`: `max_steps` is 1.5, expected a whole number, 0 or more",
        );
        refuses(
            &format!("{SFT}lr_scheduler_type = 'cosin'\n"),
            "r.toml:5: stage `sft`: `lr_scheduler_type`: unknown variant `cosin`, expected one of `constant`, `constant_with_warmup`, `linear`, `cosine`, `warmup_stable_decay`, `wsd` (hint: did you mean `cosine`?)",
        );
        refuses(
            &format!("{SFT}learning_rate = -1.0\n"),
            "r.toml:5: stage `sft`: `learning_rate` is -1, expected more than 0",
        );
        refuses(
            &format!("{SFT}learning_rate = 1e-3\nlr = 1e-4\n"),
            "r.toml:6: stage `sft`: `lr` sets `learning_rate` again (hint: keep one of the two)",
        );
        refuses(
            &format!("{SFT}load_in_8bit = true\n"),
            "r.toml:5: stage `sft`: `load_in_8bit` is true, which is not implemented (hint: `quantization` is none, nf4 or gguf)",
        );
        refuses(
            &format!("{SFT}adapter = \"ia3\"\n"),
            "r.toml:5: stage `sft`: `adapter` is ia3, expected full, lora, qlora or dora",
        );
        refuses(
            &format!("{SFT}load_in_4bit = true\n"),
            "r.toml:5: stage `sft`: `quantization` is Nf4 and `use_peft` false: packed weights cannot be trained (hint: set use_peft = true to train adapters on top of them)",
        );
    }

    /// A recipe may keep them in `[defaults]` for some of its stages, and a stage may be tried without adapters.
    #[test]
    fn adapter_keys_need_use_peft_unless_full_training_is_intended() {
        for (key, shown) in [
            ("lora_rank = 16", "`lora_r` is 16"),
            ("use_dora = true", "`use_dora` is true"),
            ("init_lora_weights = 'pissa'", "`init_lora_weights` is \"pissa\""),
            ("modules_to_save = 'norm'", "`lora_modules_to_save` is [\"norm\"]"),
        ] {
            refuses(
                &format!("{SFT}{key}\n"),
                &format!(
                    "r.toml:5: stage `sft`: {shown} without `use_peft`: the whole model would be trained (hint: set \
                     use_peft = true to train adapters, or false to train the whole model)"
                ),
            );
        }
        let notes = |text: &str| plan(text).unwrap().notes;
        for fine in ["use_peft = true\nlora_r = 8", "lora_dropout = 0.0\nuse_rslora = false"] {
            assert_eq!(notes(&format!("{SFT}{fine}\n")), [""; 0]);
        }
        let unused = ["stage `sft`: no effect without `use_peft`: `lora_r`, `use_dora`"];
        let keys = "lora_r = 8\nuse_dora = true\n";
        assert_eq!(notes(&format!("[defaults]\n{keys}{SFT}")), unused);
        assert_eq!(notes(&format!("{SFT}use_peft = false\n{keys}")), unused);
    }

    /// A key that combines several settings gives way as a whole, under any of its names.
    #[test]
    fn a_default_leaves_nothing_behind_in_a_stage_that_writes_its_key() {
        let read = |defaults: &str, own: &str, argument: Option<&str>| {
            let start = "model = 'src'\ndatasets = 'src/lib.rs'\n";
            let text = format!("[defaults]\n{defaults}\n[[stage]]\nkind = 'dpo'\n{start}{own}\n");
            let mut file = RecipeFile::parse(&text, Path::new("r.toml")).unwrap();
            file.apply(&argument.map(str::to_owned).into_iter().collect::<Vec<_>>()).unwrap();
            match resolve(&file, None).unwrap().plan.steps.remove(0).spec {
                Spec::Dpo(dpo) => dpo,
                other => panic!("{other:?}"),
            }
        };
        let loss = |defaults: &str, own: &str, argument: Option<&str>| {
            let dpo = read(defaults, own, argument);
            format!("{:?} {}", dpo.losses(), dpo.sft_loss_weight)
        };
        let both = "loss_type = ['sigmoid', 'sft']";
        assert_eq!(loss(both, "", None), "[(Sigmoid, 1.0)] 1");
        assert_eq!(loss(both, "loss_type = 'ipo'", None), "[(Ipo, 1.0)] 0");
        let weighed = format!("{both}\nloss_weights = [2, 0.5]");
        assert_eq!(loss(&weighed, "", None), "[(Sigmoid, 2.0)] 0.5");
        assert_eq!(loss(&weighed, "pref_loss = 'ipo'", None), "[(Ipo, 1.0)] 0");
        let listed = "pref_loss = ['sft', 'hinge']";
        assert_eq!(loss("", listed, Some("dpo.loss_type=ipo")), "[(Ipo, 1.0)] 0");
        // What is written apart stays.
        assert_eq!(loss("rpo_alpha = 0.3", "loss_type = 'ipo'", None), "[(Ipo, 1.0)] 0.3");
        let lora = |defaults: &str, own: &str, argument: Option<&str>| {
            let lora = read(defaults, own, argument).lora;
            format!("{} {} {:?}", lora.use_peft, lora.use_dora, lora.quantization)
        };
        assert_eq!(lora("finetuning_type = 'qlora'", "", None), "true false Nf4");
        assert_eq!(lora("finetuning_type = 'qlora'", "adapter = 'lora'", None), "true false None");
        assert_eq!(lora("finetuning_type = 'qlora'", "adapter = 'full'", None), "false false None");
        assert_eq!(lora("adapter = 'dora'", "finetuning_type = 'lora'", None), "true false None");
        let argument = Some("dpo.finetuning_type=lora");
        assert_eq!(lora("", "adapter = 'qlora'", argument), "true false None");
    }

    /// A recipe may keep them in `[defaults]` for another stage.
    #[test]
    fn keys_of_other_averaging_methods_are_refused_or_noted() {
        const AVERAGE: &str = "[[stage]]\nkind = 'average'\nmodels = ['src', 'src']\n";
        for (keys, shown, reader) in [
            ("t = 0.3", "`t` is 0.3 with method = \"mean\"", "slerp"),
            ("t = 0.0", "`t` is 0.0 with method = \"mean\"", "slerp"),
            ("lambda = 1", "`lambda` is 1 with method = \"mean\"", "task_arithmetic"),
            (
                "base_model = 'src'",
                "`base_model` is \"src\" with method = \"mean\"",
                "task_arithmetic",
            ),
            ("svd_rank = 4", "`svd_rank` is 4 with method = \"mean\"", "svd"),
            ("head = 'outcome'", "`head` is \"outcome\" with method = \"mean\"", "greedy_soup"),
            ("max_length = 64", "`max_length` is 64 with method = \"mean\"", "greedy_soup"),
            ("svd_rank = 4\nmethod = 'cat'", "`svd_rank` is 4 with method = \"cat\"", "svd"),
        ] {
            refuses(
                &format!("{AVERAGE}{keys}\n"),
                &format!(
                    "r.toml:4: stage `average`: {shown}, which does not read it (hint: leave it out, or set method = \
                     \"{reader}\", which does)"
                ),
            );
        }
        let error = plan(&format!("{AVERAGE}eval_datasets = 'src/lib.rs'\n")).unwrap_err();
        assert!(error.to_string().starts_with("r.toml:4: stage `average`: `eval_datasets` is [{"));
        for fine in ["svd_rank = 0", "method = 'slerp'\nt = 0.3", "method = 'svd'\nsvd_rank = 4"] {
            assert_eq!(plan(&format!("{AVERAGE}{fine}\n")).unwrap().notes, [""; 0]);
        }
        let defaults = "[defaults]\neval_datasets = 'src/lib.rs'\nt = 0.3\n";
        let noted = |stage: &str| plan(&format!("{defaults}{AVERAGE}{stage}\n")).unwrap().notes;
        let start = "stage `average`: no effect with method = ";
        assert_eq!(noted(""), [format!("{start}\"mean\": `eval_datasets`, `t`")]);
        assert_eq!(noted("method = 'slerp'"), [format!("{start}\"slerp\": `eval_datasets`")]);

        let mut file = RecipeFile::of_one_stage("average");
        let arguments = ["models=[\"src\", \"src\"]", "t=0.3"].map(str::to_owned);
        file.apply(&arguments).unwrap();
        let error = resolve(&file, None).unwrap_err().to_string();
        assert!(error.starts_with("`t=0.3`: stage `average`: `t` is 0.3 with"), "{error}");
    }

    #[test]
    fn mistakes_outside_stage_settings_are_reported() {
        refuses(
            &format!("round = 2\n{SFT}"),
            "r.toml:1: unknown key `round` (hint: did you mean `rounds`?)",
        );
        refuses(
            &format!("rounds = 0\n{SFT}"),
            "r.toml:1: `rounds` is 0, expected a whole number from 1 to 1000",
        );
        refuses(
            &format!("device = 'gpu'\n{SFT}"),
            "r.toml:1: `device` is \"gpu\", expected \"cpu\" or \"cuda:N\" (hint: N counts the GPUs from 0)",
        );
        refuses(
            &format!("learning_rate = 1.0\n{SFT}"),
            "r.toml:1: unknown key `learning_rate` (hint: it is a key of stages: write sft.learning_rate = … on the command line, or put it in [defaults] or a [[stage]])",
        );
        refuses(
            &format!("[defaults]\nlerning_rate = 1.0\n{SFT}"),
            "r.toml:2: unknown key `lerning_rate` (hint: did you mean `learning_rate`?)",
        );
        refuses(
            &format!("{SFT}{SFT}"),
            "r.toml:5: a second stage named `sft` (hint: give one of them a `name` of its own)",
        );
        refuses(
            "[[stage]]\nkind = 'stf'\n",
            "r.toml:1: unknown stage kind `stf` (hint: did you mean `sft`?)",
        );
        refuses(
            "seed = 1\n",
            "r.toml: the recipe has no stages (hint: write a [[stage]] block with kind = \"sft\" or another kind)",
        );
        refuses(
            "[[stage]]\nkind = 'sft'\ndatasets = 'src/lib.rs'\n",
            "r.toml:1: stage `sft`: `model_name_or_path` is missing (hint: a directory, a .gguf file, a hub id, or \"@stage\")",
        );
        refuses(
            "[[stage]]\nkind = 'sft'\nmodel_name_or_path = 'src'\ndatasets = '@sample'\n",
            "r.toml:4: stage `sft`: `datasets`: `@sample` names no stage of this recipe (hint: there is: sft)",
        );
        refuses(
            "[[stage]]\nkind = 'sft'\nmodel_name_or_path = 'src'\ndatasets = [{path = 'src/lib.rs', fractoin = 2}]\n",
            "r.toml:4: stage `sft`: `datasets[0].fractoin`: unknown field `fractoin`, expected one of `path`, `split`, `fraction`, `weight`, `columns`, `type`, `limit` (hint: did you mean `fraction`?)",
        );
    }

    #[test]
    fn scorers_are_checked_before_anything_runs() {
        let sample =
            "[[stage]]\nkind = 'sample'\nmodel_name_or_path = 'src'\ndatasets = 'src/lib.rs'\n";
        plan(&format!("{sample}scorers = ['exact', {{reward_model = 'src', weight = 2}}]\n"))
            .unwrap();
        plan(&format!("{sample}verifier = 'number'\n")).unwrap();
        refuses(
            &format!("{sample}verifier = 'nummber'\n"),
            "r.toml:5: stage `sample`: `scorers`[0]: unknown variant `nummber`, expected one of `exact`, `exact_answer`, `exact_match`, `gsm8k`, `number`, `math`, `choice`, `multiple_choice`, `regex`, `format`, `length`, `contains`, `repetition`, `language`, `json_schema`, `ifeval`, `instruction_following`, `code`, `humaneval`, `python` (hint: did you mean `number`?)",
        );
        refuses(
            &format!("{sample}scorers = [{{reward_model = 'src', on_error = 'fial'}}]\n"),
            "r.toml:5: stage `sample`: `scorers`[0]: unknown variant `fial`, expected `error` or `fail` (hint: did you mean `fail`?)",
        );
        refuses(
            &format!("{sample}skip_refuse = true\n"),
            "r.toml:5: stage `sample`: unknown key `skip_refuse` (hint: did you mean `skip_refused`?)",
        );
        refuses(
            &format!("{sample}scorers = [{{weight = 1.0}}]\n"),
            "r.toml:5: stage `sample`: `scorers`[0]: a scorer names neither `verifier` nor `reward_model` nor `judge` (hint: write {verifier = \"exact\"} or {reward_model = \"@reward\"})",
        );
    }

    #[test]
    fn teacher_is_a_model_or_a_server_table() {
        let synth = |teacher: &str| {
            format!("[[stage]]\nkind = 'synth'\ndatasets = 'src/lib.rs'\nteacher = {teacher}\n")
        };
        let spec = |teacher: &str| match plan(&synth(teacher)).unwrap().plan.steps.remove(0).spec {
            Spec::Synth(synth) => synth.teacher,
            other => panic!("{other:?}"),
        };
        assert_eq!(spec("['@synth?', 'src']"), TeacherSpec::Local("src".to_owned()));
        let table = "{kind = 'openai', base_url = ['http://a:1/v1', 'http://b:1/v1/'], model = 'm', max_concurrency = 3}";
        let TeacherSpec::Server(server) = spec(table) else { panic!("no server") };
        assert_eq!(server.base_url, ["http://a:1/v1", "http://b:1/v1"]);
        assert_eq!((server.max_concurrency, server.max_retries), (3, 8));
        for (table, expected) in [
            (
                "{base_url = 'http://a', modle = 'm'}",
                "`teacher`: unknown field `modle`, expected one of `kind`,",
            ),
            ("{base_url = 'http://a', modle = 'm'}", "(hint: did you mean `model`?)"),
            ("{model = 'm'}", "`teacher`: `base_url` is missing"),
            (
                "{base_url = 'http://a', model = 'm', timeout = 'x'}",
                "`teacher`: timeout: invalid type: string \"x\", expected f64",
            ),
            ("3", "`teacher` is 3, expected text"),
            ("''", "`teacher` is missing"),
        ] {
            let error = format!("{:?}", plan(&synth(table)).unwrap_err());
            assert!(
                error.starts_with("r.toml:4: stage `synth`: ") || expected.ends_with("missing"),
                "{error}"
            );
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn output_missing_in_some_round_is_refused_unless_marked_optional() {
        let later = |mark: &str| {
            format!(
                "rounds = 2\n{SFT}[[stage]]\nkind = 'select'\ndatasets = ['src/lib.rs', '@sample{mark}']\n[[stage]]\nkind = 'sample'\nmodel_name_or_path = '@sft'\ndatasets = 'src/lib.rs'\n"
            )
        };
        refuses(
            &later(""),
            "r.toml:8: stage `select`: `datasets`: `@sample`: stage `sample` has not run by then in round 1 (hint: move the stage up, or write \"@sample?\" to go without it until then)",
        );
        let plan = plan(&later("?")).unwrap().plan;
        let paths = |at: usize| match &plan.steps[at].spec {
            Spec::Select(select) => {
                select.datasets.iter().map(|dataset| dataset.path.clone()).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(paths(1), ["src/lib.rs"]);
        assert_eq!(paths(4), ["src/lib.rs", "runs/r/stages/03-sample/data.jsonl"]);
    }
}
