//! The settings of rejection sampling: which policy draws candidates for which prompts (`sample`), and the selection
//! (`select`).

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::keys::{self, Known, suggestion};
use super::plan::Dataset;
use super::refs::Scope;
use super::shape::{inputs, shaped};
use crate::error::{Context, Error, Result};
use crate::generate::sampling::Sampling;
use crate::score::select::{AnswerReader, PairStrategy, Rules, SftStrategy};

/// `sample`: K scored candidates per prompt. Writes `data.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// The policy.
    pub model_name_or_path: String,
    /// The prompts.
    pub datasets: Vec<Dataset>,
    /// Sampling settings; `num_samples` is K.
    pub sampling: Sampling,
    /// The scorers.
    pub scorers: Vec<Value>,
    /// `data.jsonl` of earlier rounds, whose best candidate per prompt joins this round's.
    pub earlier: Vec<String>,
    /// Whether a row's own answer is also a candidate.
    pub include_reference: bool,
    /// System message prepended to every prompt while sampling; empty is none.
    pub system: String,
    /// Whether output rows keep that system message.
    pub keep_system: bool,
    /// Other policies for some of the prompts; the first that matches a row samples for it.
    pub policies: Vec<Policy>,
}

/// The policy for the rows that match its conditions, with every setting resolved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Its name in the origin of its candidates.
    pub name: String,
    /// All of these must hold.
    #[serde(rename = "where")]
    pub conditions: Vec<Condition>,
    /// The model.
    pub model_name_or_path: String,
    /// System message; empty is none.
    pub system: String,
    /// Sampling settings.
    pub sampling: Sampling,
}

/// Requires a row's column to have one of several values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    /// The column.
    pub column: String,
    /// The values.
    pub values: Vec<Value>,
}

impl Condition {
    /// Whether a row with these columns satisfies it. For a column that is a list, one matching element is enough.
    pub fn holds(&self, columns: &Map<String, Value>) -> bool {
        match columns.get(&self.column) {
            None => false,
            Some(Value::Array(list)) => list.iter().any(|value| self.values.contains(value)),
            Some(value) => self.values.contains(value),
        }
    }
}

impl Sample {
    /// Refuses invalid settings.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn check(&self) -> Result<()> {
        self.sampling.check()?;
        for (at, policy) in self.policies.iter().enumerate() {
            let place = format!("`policies`[{at}]");
            if policy.conditions.is_empty() {
                return Err(Error::usage("`where` is missing").at(place).hint(
                    "where = {capability = \"code\"}: the stage's own keys are for all other rows",
                ));
            }
            policy.sampling.check().at(place)?;
        }
        Ok(())
    }

    /// Index of the policy that samples for a row with these columns; `None` is the stage's own.
    pub fn policy_of(&self, columns: &Map<String, Value>) -> Option<usize> {
        let fits = |policy: &Policy| policy.conditions.iter().all(|one| one.holds(columns));
        self.policies.iter().position(fits)
    }
}

/// Keys of a policy that are not sampling keys.
const POLICY_KEYS: [&str; 4] = ["name", "where", "model_name_or_path", "system"];

/// Brings the policies as written to the plan's form: keys that a policy omits come from the stage.
///
/// # Errors
/// An unknown key, a wrong type, a missing model.
pub(super) fn fill_policies(
    stage: &mut Value,
    known: &indexmap::IndexMap<String, Known>,
    scope: &Scope<'_>,
) -> Result<()> {
    let Some(written) = stage["policies"].as_array().cloned() else { return Ok(()) };
    let mut filled = Vec::new();
    for (at, policy) in written.iter().enumerate() {
        let place = || format!("`policies`[{at}]");
        let Value::Object(table) = policy else {
            return Err(Error::usage(format!("{policy}, expected a table"))
                .at(place())
                .hint("policies = [{where = {capability = \"code\"}, temperature = 0.6}]"));
        };
        filled.push(fill(table, stage, known, scope).at(place())?);
    }
    stage["policies"] = Value::Array(filled);
    Ok(())
}

fn fill(
    written: &Map<String, Value>,
    stage: &Value,
    known: &indexmap::IndexMap<String, Known>,
    scope: &Scope<'_>,
) -> Result<Value> {
    let mut policy = serde_json::json!({
        "name": "",
        "where": [],
        "model_name_or_path": stage["model_name_or_path"],
        "system": stage["system"],
        "sampling": stage["sampling"],
    });
    for (key, value) in written {
        let canonical = keys::canonical(key, known).unwrap_or(key);
        let sampled =
            known.get(canonical).filter(|known| known.section.as_deref() == Some("sampling"));
        let default = match (canonical, sampled) {
            ("where", _) => {
                policy["where"] = conditions(value)?;
                continue;
            }
            (_, Some(known)) => &known.default,
            (key, None) if POLICY_KEYS.contains(&key) => &Value::String(String::new()),
            (key, None) => return Err(unknown(key, known)),
        };
        let value = shaped(canonical, value.clone(), default);
        if let Some(expected) = keys::wrong_type(&value, default) {
            return Err(Error::usage(format!("`{key}` is {value}, expected {expected}")));
        }
        let value = inputs(canonical, value, scope).at(format_args!("`{key}`"))?;
        match (canonical, sampled) {
            (_, Some(_)) => policy["sampling"][canonical] = value,
            // An optional reference that resolves to nothing yet leaves the stage's model.
            ("model_name_or_path", None) if value == "" => {}
            (_, None) => policy[canonical] = value,
        }
    }
    if policy["name"] == "" {
        policy["name"] = default_name(&policy["where"]);
    }
    Ok(policy)
}

fn unknown(key: &str, known: &indexmap::IndexMap<String, Known>) -> Error {
    let sampling = known.iter().filter(|(_, known)| known.section.is_some());
    let names: Vec<&str> =
        POLICY_KEYS.into_iter().chain(sampling.map(|(name, _)| name.as_str())).collect();
    Error::usage(format!("unknown key `{key}`")).hint(suggestion(key, &names))
}

/// Converts `{column = value}` or `{column = [values]}` to a list of conditions.
fn conditions(written: &Value) -> Result<Value> {
    let Value::Object(table) = written else {
        return Err(Error::usage(format!("`where` is {written}, expected a table"))
            .hint("where = {capability = \"code\"} or {source = [\"a\", \"b\"]}"));
    };
    let condition = |(column, value): (&String, &Value)| Condition {
        column: column.clone(),
        values: value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]),
    };
    Ok(serde_json::to_value(table.iter().map(condition).collect::<Vec<_>>())?)
}

/// An unnamed policy is named after the values of its first condition.
fn default_name(conditions: &Value) -> Value {
    let values = conditions[0]["values"].as_array().map(Vec::as_slice).unwrap_or_default();
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    Value::String(values.iter().map(word).collect::<Vec<_>>().join("+"))
}

/// `select`: chooses training rows and preference pairs. Writes `sft.jsonl` and `pairs.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Select {
    /// `data.jsonl` of `sample` stages.
    pub datasets: Vec<Dataset>,
    /// Which candidates become pairs.
    pub strategy: PairStrategy,
    /// Which candidates become training rows.
    pub sft_strategy: SftStrategy,
    /// Minimum score of a training row.
    pub min_score: f64,
    /// Minimum score difference of a pair.
    pub min_margin: f64,
    /// Number of best candidates per prompt that become training rows.
    pub best_of: usize,
    /// Number of pairs per prompt.
    pub pairs_per_prompt: usize,
    /// Share of all candidates kept by `sft_strategy = "top_quantile"`.
    pub top_quantile: f64,
    /// Share of votes that an answer needs for `sft_strategy = "majority"`.
    pub min_agreement: f64,
    /// Pattern of the final answer that `majority` votes on; empty takes the last `\boxed{…}` or number.
    pub answer_pattern: String,
}

impl Default for Select {
    fn default() -> Self {
        let rules = Rules::default();
        Self {
            datasets: Vec::new(),
            strategy: rules.pairs,
            sft_strategy: rules.sft,
            min_score: rules.min_score,
            min_margin: rules.min_margin,
            best_of: rules.best_of,
            pairs_per_prompt: rules.pairs_per_prompt,
            top_quantile: rules.top_quantile,
            min_agreement: rules.min_agreement,
            answer_pattern: String::new(),
        }
    }
}

impl Select {
    /// The selection rules, checked.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn rules(&self, seed: u64) -> Result<Rules> {
        // They are read as a `sample` stage wrote them, without options.
        let is_part = |dataset: &&Dataset| {
            **dataset != Dataset { path: dataset.path.clone(), ..Dataset::default() }
        };
        if let Some(dataset) = self.datasets.iter().find(is_part) {
            return Err(Error::usage(format!("`datasets`: a part of `{}`", dataset.path))
                .hint("`select` takes all rows of a `sample` stage, by `path` alone"));
        }
        let rules = Rules {
            pairs: self.strategy,
            sft: self.sft_strategy,
            min_score: self.min_score,
            min_margin: self.min_margin,
            best_of: self.best_of,
            pairs_per_prompt: self.pairs_per_prompt,
            top_quantile: self.top_quantile,
            min_agreement: self.min_agreement,
            answers: AnswerReader::new(&self.answer_pattern)?,
            seed,
        };
        rules.check()?;
        Ok(rules)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::file::RecipeFile;
    use super::super::plan::Spec;
    use super::super::resolve::resolve;
    use super::*;
    use serde_json::json;

    fn sample(policies: &str) -> Result<Sample> {
        let text = format!(
            "[[stage]]\nkind = 'sample'\nmodel_name_or_path = 'src'\ndatasets = 'src/lib.rs'\n\
             temperature = 0.9\nmax_new_tokens = 64\nsystem = 'be brief'\npolicies = {policies}\n"
        );
        let file = RecipeFile::parse(&text, Path::new("r.toml"))?;
        match resolve(&file, None)?.plan.steps.remove(0).spec {
            Spec::Sample(sample) => Ok(sample),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn policy_inherits_stage_settings_except_for_its_own() {
        let spec = sample(
            "[{ where = { capability = ['code', 'sql'] }, model = 'tests', n = 4, stop = 'x' }, \
              { name = 'other', where = { source = 'a', level = 2 }, system = '' }]",
        )
        .unwrap();
        let [code, other] = &spec.policies[..] else { panic!("{spec:?}") };
        assert_eq!((code.name.as_str(), code.model_name_or_path.as_str()), ("code+sql", "tests"));
        assert_eq!((code.sampling.num_samples, code.sampling.max_new_tokens), (4, 64));
        assert_eq!((code.sampling.stop.len(), code.system.as_str()), (1, "be brief"));
        assert_eq!((other.name.as_str(), other.model_name_or_path.as_str()), ("other", "src"));
        assert!(other.system.is_empty() && other.sampling == spec.sampling);
        let fits = |row: Value| spec.policy_of(row.as_object().unwrap());
        assert_eq!(fits(json!({"capability": "code"})), Some(0));
        assert_eq!(fits(json!({"capability": ["chat", "sql"], "source": "a"})), Some(0));
        assert_eq!(fits(json!({"source": "a", "level": 2})), Some(1));
        assert_eq!(fits(json!({"source": "a"})), None);
    }

    #[test]
    fn select_refuses_partial_datasets() {
        let all = Dataset { path: "data.jsonl".to_owned(), ..Dataset::default() };
        let select =
            |dataset: &Dataset| Select { datasets: vec![dataset.clone()], ..Select::default() };
        assert!(select(&all).rules(0).is_ok());
        for part in [Dataset { limit: 3, ..all.clone() }, Dataset { fraction: 0.5, ..all }] {
            let error = select(&part).rules(0).unwrap_err().to_string();
            assert_eq!(error, "`datasets`: a part of `data.jsonl`");
        }
    }

    #[test]
    fn unconditional_or_invalid_policies_are_refused_with_their_location() {
        for (policies, part) in [
            ("[{ temperature = 0.1 }]", "`policies`[0]: `where` is missing"),
            ("[{ where = 'code' }]", "expected a table"),
            ("['code']", "expected a table"),
            ("[{ where = { a = 1 }, temprature = 0.1 }]", "did you mean `temperature`?"),
            ("[{ where = { a = 1 }, temperature = -1 }]", "`temperature` is -1"),
            ("[{ where = { a = 1 }, temperature = 'hot' }]", "expected a number"),
            ("[{ where = { a = 1 }, model = 'not/there/at-all' }]", "does not exist"),
        ] {
            let error = format!("{:?}", sample(policies).unwrap_err());
            assert!(error.starts_with("r.toml:8: ") && error.contains(part), "{error}");
        }
    }
}
