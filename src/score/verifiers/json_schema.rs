//! `json_schema`: the text is JSON that validates against a schema. Schemas may not reference files or URLs.

use jsonschema::Validator;
use serde_json::Value;

use super::{Rule, after_thoughts, column, judged};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// Validates against the recipe's schema, otherwise the row's.
pub(super) struct JsonSchema(Option<Validator>);

impl JsonSchema {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        spec.schema.as_ref().map(compiled).transpose().map(Self)
    }

    /// Judges by the schema; a row's schema is compiled here.
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
        .map_err(|error| Error::usage(format!("`schema` is not a JSON schema: {error}")))
}

/// A row's schema: an object, or its text.
fn of_row(question: &Question<'_>) -> Result<Validator> {
    let schema = column(question, "schema").ok_or_else(|| {
        Error::run("neither the scorer nor the row has a `schema`").hint(
            "write schema = {type = \"object\"} or map the column with columns = {schema = \"…\"}",
        )
    })?;
    match schema {
        Value::String(text) => compiled(&serde_json::from_str(text).map_err(|error| {
            Error::run(format!("the row's `schema` is not valid JSON: {error}"))
        })?),
        schema => compiled(schema),
    }
}

/// The text without a code fence around it.
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
    fn invalid_or_external_schemas_are_refused_without_fetching() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let here = format!("http://{}/x.json", listener.local_addr().unwrap());
        let file = concat!("file://", env!("CARGO_MANIFEST_DIR"), "/data/tiny/student/config.json");
        let row = verifier(r#"{"verifier": "json_schema"}"#);
        for schema in [
            json!({"type": "no such type"}),
            json!({"$ref": here}),
            json!({"properties": {"a": {"items": {"$ref": format!("{here}#/a")}}}}),
            json!({"$ref": file}),
            json!({"$schema": here}),
        ] {
            let spec = json!({"verifier": "json_schema", "schema": schema});
            let spec: ScorerSpec = serde_json::from_value(spec).unwrap();
            let error = Verifier::new(spec.verifier.unwrap(), &spec).err().unwrap().to_string();
            assert!(error.starts_with("`schema` is not a JSON schema"), "{schema}: {error}");
            let Value::Object(columns) = json!({"schema": schema}) else { panic!() };
            assert!(score(&row, None, Some(&columns), "{}").is_err(), "{schema}");
        }
        assert!(listener.accept().is_err(), "somebody came to fetch a schema");
    }

    #[test]
    fn deep_values_and_recursive_schemas_terminate() {
        let tree =
            r##"{"verifier": "json_schema", "schema": {"type": "array", "items": {"$ref": "#"}}}"##;
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        check(tree, None, &[(&nested(100), true), ("[[1]]", false), (&nested(100_000), false)]);
        for schema in [json!({"$ref": "#"}), json!({"allOf": [{"$ref": "#"}]})] {
            let spec = json!({"verifier": "json_schema", "schema": schema}).to_string();
            assert!(score(&verifier(&spec), None, None, "1").is_ok(), "{schema}");
        }
        let backtracks =
            r#"{"verifier": "json_schema", "schema": {"pattern": "^(?=(a+)+b)(a|aa)+$"}}"#;
        check(backtracks, None, &[(&format!("\"{}\"", "a".repeat(10_000)), false)]);
    }
}
