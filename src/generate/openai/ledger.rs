//! What a server has answered, line by line, so that a killed run asks for nothing twice.
//!
//! A stage's own ledger has one line a prompt, written when all its answers are there and judged. Here every request
//! has its line as soon as it is answered: of a prompt with thirty requests under way none is lost that came back. A
//! request is known by the SHA-256 of its body (model, messages, how to sample, how many answers) and its seed. What the
//! server can do decides what bodies look like, so what the first process saw of it is kept beside the file ([`Seen`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Context, Error, Result};
use crate::generate::engine::Answer;
use crate::store::{self, JsonlWriter};

/// One request's line.
#[derive(Debug, Deserialize, Serialize)]
struct Line {
    key: String,
    seed: u64,
    /// How often it was sent.
    attempts: u64,
    /// Tokens of prompt and answers.
    tokens: u64,
    answers: Vec<Answer>,
}

/// The same without the answers: what is read of every line.
#[derive(Deserialize)]
struct Head {
    key: String,
    seed: u64,
    attempts: u64,
    tokens: u64,
}

/// What earlier processes and this one have used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Requests that were sent.
    pub requests: u64,
    /// Tokens of prompts and answers.
    pub tokens: u64,
}

/// What a server was seen to do that decides what requests look like, or what was said of it to people: a later process
/// goes by it, as by another day's word it would recognise no request that was recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Of which model.
    pub model: String,
    /// As in [`Probe`](super::probe::Probe): several answers to one request.
    pub n: Option<bool>,
    /// Answers held to a JSON schema.
    pub json_schema: Option<bool>,
    /// Equal answers for equal seeds.
    pub seed: Option<bool>,
}

/// Where [`Seen`] lies beside a ledger.
///
/// ```
/// use arriero::generate::openai::ledger::seen_beside;
/// use std::path::Path;
/// assert_eq!(seen_beside(Path::new("a/requests.jsonl")), Path::new("a/requests.seen.json"));
/// ```
pub fn seen_beside(ledger: &Path) -> PathBuf {
    ledger.with_extension("seen.json")
}

/// A file of answered requests.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    writer: JsonlWriter,
    /// Where the line of each request lies that an earlier process had answered; only the places, however long the file.
    known: BTreeMap<(String, u64), (u64, usize)>,
}

impl Ledger {
    /// Opens `path`, creating it if needed. Returns what was used so far.
    ///
    /// # Errors
    /// A line that is none of a ledger.
    pub fn open(path: &Path) -> Result<(Self, Spent)> {
        let writer = JsonlWriter::open(path)?;
        let mut ledger = Self { path: path.to_path_buf(), writer, known: BTreeMap::new() };
        let (mut spent, mut known) = (Spent::default(), BTreeMap::new());
        ledger.each_line(|head, place| {
            spent.requests += head.attempts;
            spent.tokens += head.tokens;
            known.insert((head.key, head.seed), place);
        })?;
        ledger.known = known;
        Ok((ledger, spent))
    }

    /// What earlier processes have seen `model` do; nothing of another model.
    ///
    /// # Errors
    /// A file that is none of these.
    pub fn seen(&self, model: &str) -> Result<Seen> {
        let path = seen_beside(&self.path);
        let nothing = Seen { model: model.to_owned(), ..Seen::default() };
        if !path.exists() {
            return Ok(nothing);
        }
        let seen: Seen =
            store::read_json(&path).hint("remove it to find out again what the server can do")?;
        Ok(if seen.model == model { seen } else { nothing })
    }

    /// Keeps what the server was seen to do.
    ///
    /// # Errors
    /// A full disk.
    pub fn see(&self, seen: &Seen) -> Result<()> {
        store::write_json(&seen_beside(&self.path), seen)
    }

    /// The answers of an earlier process to a request.
    ///
    /// # Errors
    /// The file has changed underneath.
    pub fn take(&mut self, key: &str, seed: u64) -> Result<Option<Vec<Answer>>> {
        let Some((start, length)) = self.known.remove(&(key.to_owned(), seed)) else {
            return Ok(None);
        };
        let mut line = vec![0; length];
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(&mut line)
        });
        read.map_err(|error| store::io_error(&self.path, error))?;
        let line: Line = serde_json::from_slice(&line).at(self.path.display())?;
        Ok(Some(line.answers))
    }

    /// Records a request's answers.
    ///
    /// # Errors
    /// A full disk.
    pub fn record(
        &mut self,
        (key, seed): (&str, u64),
        used: Spent,
        answers: &[Answer],
    ) -> Result<()> {
        self.writer.write(&Line {
            key: key.to_owned(),
            seed,
            attempts: used.requests,
            tokens: used.tokens,
            answers: answers.to_vec(),
        })
    }

    /// Calls `each` with every line's head and its place: first byte and length.
    fn each_line(&self, mut each: impl FnMut(Head, (u64, usize))) -> Result<()> {
        let failed = |error| store::io_error(&self.path, error);
        let mut reader = BufReader::new(File::open(&self.path).map_err(failed)?);
        let (mut start, mut number, mut line) = (0, 0, Vec::new());
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line).map_err(failed)?;
            if length == 0 {
                return Ok(());
            }
            number += 1;
            let head: Head = serde_json::from_slice(&line)
                .at(format_args!("{}:{number}", self.path.display()))
                .map_err(|error: Error| error.hint("remove the file to ask everything again"))?;
            each(head, (start, length));
            start += length as u64;
        }
    }
}

/// The name of a request, its seed apart.
pub(super) fn key(body: &Map<String, Value>) -> String {
    // A map of JSON values can always be written.
    store::sha256_bytes(serde_json::to_string(body).unwrap_or_default().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> Answer {
        Answer { logprobs: vec![-0.5], ..Answer::said(text) }
    }

    #[test]
    fn what_was_recorded_is_found_again_after_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        let used = Spent { requests: 2, tokens: 10 };
        let (mut ledger, spent) = Ledger::open(&path).unwrap();
        assert_eq!(spent, Spent::default());
        ledger.record(("a", 1), used, &[answer("one"), answer("zwei ü")]).unwrap();
        ledger.record(("a", 2), used, &[answer("three")]).unwrap();
        ledger.record(("b", 1), used, &[answer("four")]).unwrap();
        drop(ledger);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.truncate(bytes.len() - 4);
        store::write_atomic(&path, &bytes).unwrap();

        let (mut ledger, spent) = Ledger::open(&path).unwrap();
        assert_eq!(spent, Spent { requests: 4, tokens: 20 });
        assert_eq!(ledger.take("a", 1).unwrap().unwrap(), [answer("one"), answer("zwei ü")]);
        assert_eq!(ledger.take("a", 2).unwrap().unwrap(), [answer("three")]);
        assert_eq!(ledger.take("a", 2).unwrap(), None);
        assert_eq!(ledger.take("b", 1).unwrap(), None);
    }

    #[test]
    fn what_a_model_was_seen_to_do_is_found_again_for_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        let (ledger, _) = Ledger::open(&path).unwrap();
        let nothing = |model: &str| Seen { model: model.to_owned(), ..Seen::default() };
        assert_eq!(ledger.seen("m").unwrap(), nothing("m"));
        let seen = Seen { n: Some(false), seed: Some(true), ..nothing("m") };
        ledger.see(&seen).unwrap();
        assert_eq!(Ledger::open(&path).unwrap().0.seen("m").unwrap(), seen);
        assert_eq!(ledger.seen("other").unwrap(), nothing("other"));
        store::write_atomic(&seen_beside(&path), b"{").unwrap();
        let error = format!("{:?}", ledger.seen("m").unwrap_err());
        assert!(error.contains("requests.seen.json") && error.contains("hint: remove"), "{error}");
    }
}
