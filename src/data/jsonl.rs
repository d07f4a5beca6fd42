//! JSON lines, gzipped or not, and files that are one JSON array.

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::read::Raw;
use crate::error::{Context, Error, Result};

/// The rows of one file, each with its place and, where it is not JSON, the error.
pub(super) fn values(file: &Path) -> Result<Vec<Raw>> {
    let text = text(file).at(file.display())?;
    let name = file.display();
    let start = text.trim_start();
    let array = file.extension().is_some_and(|extension| extension == "json");
    if start.starts_with('[') && (array || start.lines().next().is_some_and(|line| line == "[")) {
        let rows: Vec<Value> = serde_json::from_str(&text)
            .map_err(|error| bad_json(&error))
            .at(format!("{name}:{}", line_of(&text)))?;
        return Ok(rows
            .into_iter()
            .enumerate()
            .map(|(index, value)| (format!("{name}[{index}]"), Ok(value)))
            .collect());
    }
    if array && let Ok(value) = serde_json::from_str::<Value>(&text) {
        return Ok(object_rows(value, &name.to_string()));
    }
    Ok(text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(number, line)| {
            let value = serde_json::from_str(line).map_err(|error| bad_json(&error));
            (format!("{name}:{}", number + 1), value)
        })
        .collect())
}

/// A file that is one object: the rows are its one list of objects, or itself.
fn object_rows(value: Value, name: &str) -> Vec<Raw> {
    let list = value.as_object().and_then(|object| {
        ["data", "rows", "train", "instances"]
            .iter()
            .find_map(|key| object.get(*key).and_then(Value::as_array))
    });
    match list {
        Some(rows) => {
            let place = |index| format!("{name}[{index}]");
            rows.iter().enumerate().map(|(index, row)| (place(index), Ok(row.clone()))).collect()
        }
        None => vec![(format!("{name}:1"), Ok(value))],
    }
}

fn line_of(text: &str) -> usize {
    serde_json::from_str::<Value>(text).err().map_or(1, |error| error.line())
}

fn bad_json(error: &serde_json::Error) -> Error {
    let what = match error.classify() {
        serde_json::error::Category::Eof => "the JSON ends too early".to_owned(),
        _ => format!("not JSON: {error}"),
    };
    Error::run(what)
        .hint("each line must be one JSON object; on_bad_row = \"skip\" leaves bad lines out")
}

fn text(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file)?;
    let bytes = if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut unpacked = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes.as_slice())
            .read_to_end(&mut unpacked)
            .map_err(|error| Error::run(format!("broken gzip data: {error}")))?;
        unpacked
    } else {
        bytes
    };
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + String::from_utf8_lossy(valid).matches('\n').count();
        Error::run(format!("line {line} is not UTF-8")).hint("save the file as UTF-8")
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}
