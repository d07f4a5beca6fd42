//! A line-by-line record of server answers, so that a resumed run repeats no request.
//!
//! A stage's own ledger has one line per prompt, written once all its answers are in and judged. Here each request is
//! recorded as soon as it is answered, so a prompt with thirty requests in flight loses none that returned. A request's
//! key is the SHA-256 of its body (model, messages, sampling, number of answers) and its seed. Since the body depends
//! on the server's abilities, those the first process observed are stored beside the file ([`Seen`]).

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
    /// Number of attempts.
    attempts: u64,
    /// Tokens of prompt and answers.
    tokens: u64,
    answers: Vec<Answer>,
}

/// The line without its answers, as read during the scan.
#[derive(Deserialize)]
struct Head {
    key: String,
    seed: u64,
    attempts: u64,
    tokens: u64,
}

/// Total usage by this and earlier processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Requests sent.
    pub requests: u64,
    /// Tokens in prompts and answers.
    pub tokens: u64,
}

/// Observed server abilities that determine request bodies or were reported to the user. A later process reuses them:
/// with other values it would not recognise recorded requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The model they belong to.
    pub model: String,
    /// The model that its answers named.
    #[serde(default)]
    pub answers_as: Option<String>,
    /// Several answers per request, as in [`Probe`](super::probe::Probe).
    pub n: Option<bool>,
    /// Answers constrained to a JSON schema.
    pub json_schema: Option<bool>,
    /// Equal answers for equal seeds.
    pub seed: Option<bool>,
}

/// Path of [`Seen`] beside a ledger.
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
    /// Offset and length of each line from earlier processes; answers stay on disk, however long the file.
    known: BTreeMap<(String, u64), (u64, usize)>,
}

impl Ledger {
    /// Opens `path`, creating it if needed. Returns the usage so far.
    ///
    /// # Errors
    /// A line that is not a ledger line.
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

    /// Abilities of `model` observed by earlier processes; empty for another model.
    ///
    /// # Errors
    /// A file that is not of this format.
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

    /// Stores observed server abilities.
    ///
    /// # Errors
    /// A full disk.
    pub fn see(&self, seen: &Seen) -> Result<()> {
        store::write_json(&seen_beside(&self.path), seen)
    }

    /// An earlier process's answers to a request.
    ///
    /// # Errors
    /// The file was modified meanwhile.
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

    /// Calls `each` with every line's head and its location (offset, length).
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

/// The key of a request, without its seed.
pub(super) fn key(body: &Map<String, Value>) -> String {
    // A map of JSON values always serialises.
    store::sha256_bytes(serde_json::to_string(body).unwrap_or_default().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> Answer {
        Answer { logprobs: vec![-0.5], ..Answer::said(text) }
    }

    #[test]
    fn ledger_recovers_recorded_answers_after_a_torn_line() {
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
    fn observed_server_behaviour_is_stored_per_model() {
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
