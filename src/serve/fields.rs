//! A request's JSON object, consumed field by field: unknown fields are an error.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::problem::{Problem, nearest};

/// Fields of OpenAI's API that never affect an answer here: they identify the caller or concern billing.
const WITHOUT_EFFECT: [&str; 7] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
];

/// The unconsumed fields of a request.
#[derive(Debug)]
pub(super) struct Fields {
    left: Map<String, Value>,
    known: Vec<&'static str>,
}

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// Not a JSON object.
    pub(super) fn parse(body: &[u8]) -> Result<Self, Problem> {
        let value: Value = serde_json::from_slice(body)
            .map_err(|error| Problem::invalid(format!("the body is not valid JSON: {error}")))?;
        let Value::Object(mut left) = value else {
            return Err(Problem::invalid("the body is not a JSON object"));
        };
        left.retain(|name, _| !WITHOUT_EFFECT.contains(&name.as_str()));
        Ok(Self { left, known: Vec::new() })
    }

    /// Takes a field's value; `None` if absent or null.
    ///
    /// # Errors
    /// A value of another type, with its location.
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<T>, Problem> {
        self.known.push(name);
        let value = match self.left.shift_remove(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        serde_path_to_error::deserialize(value).map(Some).map_err(|error| {
            let place = match error.path().to_string() {
                path if path == "." => name.to_owned(),
                path => format!("{name}.{path}"),
            };
            Problem::invalid(format!("`{place}`: {}", error.inner())).on(place)
        })
    }

    /// Takes a required field.
    ///
    /// # Errors
    /// As [`take`](Self::take), or an absent field.
    pub(super) fn need<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<T, Problem> {
        let missing = || Problem::invalid(format!("`{name}` is missing")).on(name);
        self.take(name)?.ok_or_else(missing)
    }

    /// Rejects unconsumed fields.
    ///
    /// # Errors
    /// Names the first unknown field.
    pub(super) fn finish(self) -> Result<(), Problem> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(name) => {
                let message = format!("unknown field `{name}`; {}", nearest(name, &self.known));
                Err(Problem::invalid(message).on(name).code("unknown_parameter"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: &Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    fn message(problem: &Problem) -> String {
        let error = &problem.body()["error"];
        format!("{} [{}]", error["message"].as_str().unwrap(), error["param"])
    }

    #[test]
    fn unknown_fields_are_refused_unless_they_never_matter() {
        let mut good = fields(&json!({"n": 3, "seed": null, "user": "me", "metadata": {"a": 1}}));
        assert_eq!(good.take::<usize>("n").unwrap(), Some(3));
        assert_eq!(good.take::<i64>("seed").unwrap(), None);
        good.finish().unwrap();

        let mut bad = fields(&json!({"temprature": 1}));
        assert_eq!(bad.take::<f64>("temperature").unwrap(), None);
        let problem = bad.finish().unwrap_err();
        assert_eq!(
            message(&problem),
            "unknown field `temprature`; did you mean `temperature`? [\"temprature\"]"
        );
    }

    #[test]
    fn wrong_types_name_their_location_and_bad_json_is_refused() {
        let problem = fields(&json!({"n": "three"})).take::<usize>("n").unwrap_err();
        assert!(message(&problem).starts_with("`n`: invalid type: string"), "{problem:?}");
        let problem = fields(&json!({"stop": ["a", 2]})).take::<Vec<String>>("stop").unwrap_err();
        assert!(message(&problem).starts_with("`stop.[1]`: "), "{problem:?}");
        assert!(
            message(&fields(&json!({})).need::<String>("prompt").unwrap_err()).contains("missing")
        );
        for body in ["{", "[1]", ""] {
            assert!(Fields::parse(body.as_bytes()).is_err(), "{body}");
        }
    }
}
