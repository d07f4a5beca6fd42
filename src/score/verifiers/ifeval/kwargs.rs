//! The settings of one instruction.

use serde_json::{Map, Value};

use crate::data::record::kind;
use crate::error::{Error, Result};

/// A row's settings; nulls count as absent, since the published rows list every key of every type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kwargs<'a>(Option<&'a Map<String, Value>>);

impl<'a> Kwargs<'a> {
    pub(super) fn new(value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self(Some(map))),
            Value::Null => Ok(Self(None)),
            other => Err(Error::run(format!("kwargs are {}, expected an object", kind(other)))),
        }
    }

    fn get(self, name: &str) -> Result<&'a Value> {
        let value = self.0.and_then(|map| map.get(name)).filter(|value| !value.is_null());
        value.ok_or_else(|| Error::run(format!("no `{name}` in its kwargs")))
    }

    pub(super) fn text(self, name: &str) -> Result<&'a str> {
        let value = self.get(name)?;
        let text = value.as_str();
        text.ok_or_else(|| Error::run(format!("`{name}` is {}, expected text", kind(value))))
    }

    /// A whole number; Parquet or pandas may have turned 3 into 3.0.
    pub(super) fn count(self, name: &str) -> Result<usize> {
        let value = self.get(name)?;
        let number = value.as_u64().or_else(|| {
            value.as_f64().filter(|x| *x >= 0.0 && x.fract().abs() < f64::EPSILON).map(|x| x as u64)
        });
        let number = number
            .ok_or_else(|| Error::run(format!("`{name}` is {value}, expected a whole number")))?;
        Ok(usize::try_from(number)?)
    }

    pub(super) fn texts(self, name: &str) -> Result<Vec<&'a str>> {
        let value = self.get(name)?;
        let texts = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        texts.ok_or_else(|| Error::run(format!("`{name}` is {value}, expected a list of texts")))
    }

    /// Compares `found` with the setting `count` by the operator in the setting `relation`.
    pub(super) fn compare(self, found: usize, count: &str, relation: &str) -> Result<bool> {
        let count = self.count(count)?;
        match self.text(relation)? {
            "less than" => Ok(found < count),
            "at least" => Ok(found >= count),
            other => Err(Error::run(format!(
                "`{relation}` is `{other}`, expected `less than` or `at least`"
            ))),
        }
    }
}
