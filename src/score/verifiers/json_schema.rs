//! `json_schema`: the text is JSON that a schema accepts. A schema refers to no other file and no address.

use jsonschema::Validator;
use serde_json::Value;

use super::{Rule, after_thoughts, column, judged};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// Validates against the recipe's schema, or else the row's.
pub(super) struct JsonSchema(Option<Validator>);

impl JsonSchema {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        spec.schema.as_ref().map(compiled).transpose().map(Self)
    }

    /// Judges by the schema, which is compiled here where it is the row's.
    fn by_schema<T>(
        &self,
        question: &Question<'_>,
        judge: impl FnOnce(&Validator) -> T,
    ) -> Result<T> {
        match &self.0 {
            Some(schema) => Ok(judge(schema)),
            None => Ok(judge(&of_row(question)?)),
        }
    }
}

fn compiled(schema: &Value) -> Result<Validator> {
    jsonschema::validator_for(schema)
        .map_err(|error| Error::usage(format!("`schema` is no JSON schema: {error}")))
}

/// The schema of a row: an object, or its text.
fn of_row(question: &Question<'_>) -> Result<Validator> {
    let schema = column(question, "schema").ok_or_else(|| {
        Error::run("neither the scorer nor the row has a `schema`").hint(
            "write schema = {type = \"object\"} or map the column with columns = {schema = \"…\"}",
        )
    })?;
    match schema {
        Value::String(text) => compiled(
            &serde_json::from_str(text)
                .map_err(|error| Error::run(format!("the row's `schema` is no JSON: {error}")))?,
        ),
        schema => compiled(schema),
    }
}

/// The text without a fence around it.
fn unfenced(text: &str) -> &str {
    let text = text.trim();
    let Some(inner) = text.strip_prefix("```").and_then(|text| text.strip_suffix("```")) else {
        return text;
    };
    inner.split_once('\n').map_or(inner, |(_, inner)| inner).trim()
}

fn accepted(schema: &Validator, text: &str) -> Score {
    let value: Value = match serde_json::from_str(unfenced(after_thoughts(text))) {
        Ok(value) => value,
        Err(error) => return judged(false, format!("no JSON: {error}")),
    };
    let failed = schema.iter_errors(&value).next();
    let why = failed.map(|error| {
        let place = error.instance_path().to_string();
        if place.is_empty() { error.to_string() } else { format!("{place}: {error}") }
    });
    judged(why.is_none(), why.unwrap_or_default())
}

impl Rule for JsonSchema {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        self.by_schema(question, |schema| accepted(schema, text))
    }

    fn verify_all(&self, question: &Question<'_>, texts: &[&str]) -> Result<Vec<Score>> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        self.by_schema(question, |schema| texts.iter().map(|text| accepted(schema, text)).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Verifier;
    use super::super::testing::{check, score, verifier};
    use crate::score::ScorerSpec;

    #[test]
    fn json_is_judged_by_the_schema_of_the_recipe_or_the_row() {
        let spec = r#"{"verifier": "json_schema", "schema": {"type": "object", "required": ["a"],
            "properties": {"a": {"type": "integer"}}}}"#;
        let cases = [
            (r#"{"a": 1}"#, true),
            ("```json\n{\"a\": 1}\n```", true),
            (r#"{"a": "1"}"#, false),
            ("{}", false),
            ("a: 1", false),
        ];
        check(spec, None, &cases);
        let verifier = verifier(r#"{"verifier": "json_schema"}"#);
        for schema in [json!({"type": "array"}), json!("{\"type\": \"array\"}")] {
            let Value::Object(row) = json!({"schema": schema}) else { panic!() };
            assert!(score(&verifier, None, Some(&row), "[1]").unwrap().value > 0.5);
            let wrong = score(&verifier, None, Some(&row), "{}").unwrap();
            assert_eq!(wrong.why, "{} is not of type \"array\"");
        }
        assert!(score(&verifier, None, None, "[1]").unwrap_err().to_string().contains("`schema`"));
    }

    #[test]
    fn a_schema_that_is_none_or_points_elsewhere_is_refused() {
        for schema in
            [json!({"type": "no such type"}), json!({"$ref": "http://example.org/x.json"})]
        {
            let spec = json!({"verifier": "json_schema", "schema": schema});
            let spec: ScorerSpec = serde_json::from_value(spec).unwrap();
            let error = Verifier::new(spec.verifier.unwrap(), &spec).err().unwrap().to_string();
            assert!(error.starts_with("`schema` is no JSON schema"), "{error}");
        }
    }
}
