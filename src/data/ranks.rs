//! The columns `ranks` and `margin`, which relate a row's responses to each other.

use serde_json::Value;

use super::read::wrong_type;
use super::record::{Record, Row};
use crate::error::{Error, Result};

/// A number, or a list of numbers.
fn numbers(column: &str, value: &Value) -> Result<Vec<f64>> {
    let list = match value {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    let number = |value: &Value| {
        let finite = value.as_f64().filter(|number| number.is_finite());
        finite.ok_or_else(|| wrong_type(column, value, "a number"))
    };
    list.iter().map(number).collect()
}

/// Sorts a row's responses by rank, smallest first.
pub(super) fn rank(row: &mut Row, value: &Value) -> Result<()> {
    let ranks = numbers("ranks", value)?;
    let Record::Preference { responses, .. } = &mut row.record else { return Ok(()) };
    if ranks.len() != responses.len() {
        let (ranks, responses) = (ranks.len(), responses.len());
        return Err(Error::run(format!("`ranks` has {ranks} numbers for {responses} responses"))
            .hint(
                "give each response its rank, the best the smallest; equal ones are not compared",
            ));
    }
    if ranks.windows(2).all(|two| two[0].total_cmp(&two[1]).is_eq()) {
        return Err(Error::run("all `ranks` are equal: there is nothing to compare"));
    }
    let mut order: Vec<usize> = (0..ranks.len()).collect();
    order.sort_by(|&a, &b| ranks[a].total_cmp(&ranks[b]));
    *responses = order.iter().map(|&at| responses[at].clone()).collect();
    row.ranks = order.into_iter().map(|at| ranks[at]).collect();
    Ok(())
}

/// Margins: one number for a pair, or a list with one number per response and the next ranked one.
pub(super) fn margins(value: &Value, row: &Row) -> Result<Vec<f64>> {
    let margins = numbers("margin", value)?;
    if !row.ranks.is_empty() {
        return Err(Error::run("`margin` and `ranks` in one row")
            .hint("a margin is of responses in the order that they stand in; leave out `ranks`"));
    }
    match &row.record {
        Record::Preference { responses, .. } if margins.len() + 1 != responses.len() => {
            let (margins, responses) = (margins.len(), responses.len());
            Err(Error::run(format!("`margin` has {margins} numbers for {responses} responses"))
                .hint("a list says by how much each response is better than the next"))
        }
        _ => Ok(margins),
    }
}
