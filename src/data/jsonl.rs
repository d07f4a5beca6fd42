//! JSON Lines, optionally gzipped, and files that contain a single JSON value.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use serde_json::Value;

use super::read::{Content, Raw, RawRows};
use crate::error::{Context, Error, Result};

/// The rows of one file, each with its location. Lines are read lazily; a single JSON array or object is read whole.
pub(super) fn rows(file: &Path) -> Result<RawRows> {
    let mut lines = Lines::open(file)?;
    let Some(first) = lines.next().transpose()? else { return Ok(Box::new(std::iter::empty())) };
    let json = file.extension().is_some_and(|extension| extension == "json");
    let start = first.text.trim_start();
    if start.starts_with('[') && (json || start == "[") {
        return array(&lines.whole([first])?, &lines.name);
    }
    if !json {
        return Ok(lines.after([first]));
    }
    match lines.next().transpose()? {
        // A second row after a complete first one: JSON Lines, whatever the file's extension.
        Some(second) if parse(&first.text).is_ok() => Ok(lines.after([first, second])),
        second => {
            let text = lines.whole(std::iter::once(first).chain(second))?;
            Ok(match serde_json::from_str(&text) {
                Ok(value) => object_rows(value, &lines.name),
                Err(_) => Lines { source: Box::new(std::io::Cursor::new(text)), ..lines }.after([]),
            })
        }
    }
}

/// Parses one line as JSON.
pub(super) fn parse(line: &str) -> Result<Value> {
    serde_json::from_str(line).map_err(|error| bad_json(&error))
}

/// A non-blank line.
struct Line {
    /// Line number, counted from 1.
    number: usize,
    text: String,
}

/// Iterator over the non-blank lines of a file.
struct Lines {
    source: Box<dyn BufRead>,
    name: String,
    /// Number of lines read so far.
    number: usize,
    gzip: bool,
}

impl Lines {
    fn open(file: &Path) -> Result<Self> {
        let name = file.display().to_string();
        let mut source = BufReader::with_capacity(1 << 16, File::open(file).at(&name)?);
        let gzip = source.fill_buf().at(&name)?.starts_with(&[0x1f, 0x8b]);
        let source: Box<dyn BufRead> = if gzip {
            Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(source)))
        } else {
            Box::new(source)
        };
        Ok(Self { source, name, number: 0, gzip })
    }

    /// The next line, blank or not, without its line ending; `None` at the end of the file.
    fn line(&mut self) -> Result<Option<Line>> {
        let mut bytes = Vec::new();
        let read = self.source.read_until(b'\n', &mut bytes).map_err(|error| {
            if self.gzip {
                Error::run(format!("broken gzip data: {error}")).because(error).at(&self.name)
            } else {
                Error::from(error).at(&self.name)
            }
        })?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        let mut text = String::from_utf8(bytes).map_err(|_| {
            Error::run(format!("line {} is not UTF-8", self.number))
                .at(&self.name)
                .hint("save the file as UTF-8")
        })?;
        let end = text
            .strip_suffix('\n')
            .map_or(text.len(), |line| line.strip_suffix('\r').unwrap_or(line).len());
        text.truncate(end);
        if self.number == 1 && text.starts_with('\u{feff}') {
            text.drain(..'\u{feff}'.len_utf8());
        }
        Ok(Some(Line { number: self.number, text }))
    }

    /// The whole text, of which `lines` have already been read. Blank lines keep their numbers.
    fn whole(&mut self, lines: impl IntoIterator<Item = Line>) -> Result<String> {
        let (mut text, mut number) = (String::new(), 0);
        let mut push = |line: Line| {
            text.extend(std::iter::repeat_n('\n', line.number - number - 1));
            text.push_str(&line.text);
            text.push('\n');
            number = line.number;
        };
        lines.into_iter().for_each(&mut push);
        while let Some(line) = self.line()? {
            push(line);
        }
        self.number = 0;
        Ok(text)
    }

    /// The rows of the lines already read, followed by the remaining ones.
    fn after<const N: usize>(self, lines: [Line; N]) -> RawRows {
        let name = self.name.clone();
        let rows = lines.into_iter().map(Ok).chain(self);
        Box::new(rows.map(move |line| {
            let Line { number, text } = line?;
            Ok(Raw { place: format!("{name}:{number}"), content: Content::Line(text) })
        }))
    }
}

impl Iterator for Lines {
    type Item = Result<Line>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.line().transpose()? {
                Ok(line) if line.text.trim().is_empty() => {}
                other => return Some(other),
            }
        }
    }
}

fn array(text: &str, name: &str) -> Result<RawRows> {
    let rows: Vec<Value> = serde_json::from_str(text)
        .map_err(|error| bad_json(&error).at(format!("{name}:{}", error.line())))?;
    Ok(in_place(rows, name))
}

/// A file with a single object: its rows are its only list of objects, or else the object itself.
fn object_rows(value: Value, name: &str) -> RawRows {
    let list = value.as_object().and_then(|object| {
        ["data", "rows", "train", "instances"]
            .iter()
            .find_map(|key| object.get(*key).and_then(Value::as_array))
    });
    if let Some(rows) = list {
        return in_place(rows.clone(), name);
    }
    let place = format!("{name}:1");
    Box::new(std::iter::once(Ok(Raw { place, content: Content::Value(value) })))
}

fn in_place(rows: Vec<Value>, name: &str) -> RawRows {
    let name = name.to_owned();
    Box::new(rows.into_iter().enumerate().map(move |(index, value)| {
        Ok(Raw { place: format!("{name}[{index}]"), content: Content::Value(value) })
    }))
}

fn bad_json(error: &serde_json::Error) -> Error {
    let what = match error.classify() {
        serde_json::error::Category::Eof => "the JSON ends too early".to_owned(),
        _ => format!("not JSON: {error}"),
    };
    Error::run(what)
        .hint("each line must be one JSON object; on_bad_row = \"skip\" leaves bad lines out")
}
