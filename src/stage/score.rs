//! `arriero score`: judges the completions in a file and writes its rows with `score` and `why` added.
//!
//! Rows are read twice: once to find every mistake before a model is loaded, once to be judged. Consecutive rows of one
//! prompt are judged in one call, so that a reward model reads the prompt once. Judged rows go to a file in a directory
//! beside the output, which a later call continues; the output appears whole.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use candle_core::Device;
use indexmap::IndexMap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::data::read::objects;
use crate::data::record::{Message, Side, kind};
use crate::error::{Context, Error, Result};
use crate::recipe::plan::check_scorers;
use crate::report::record::Events;
use crate::score::{Panel, Question, Verdict};
use crate::store::{self, JsonlWriter, RunLock};

/// Most completions of one call.
const GROUP: usize = 64;
/// Groups of verifiers' work between two writes, for each core.
const AT_ONCE: usize = 16;
/// Raised when the same work would write other rows.
const VERSION: u32 = 1;

/// What to judge, and by whom.
#[derive(Clone, Debug)]
pub struct Scoring {
    /// The rows: a file, a directory or a glob.
    pub data: String,
    /// Where they go with their scores.
    pub out: PathBuf,
    /// The judges, as in a recipe.
    pub scorers: Vec<Value>,
    /// Column names of this file: canonical name → its name here.
    pub columns: IndexMap<String, String>,
    /// Where reward models compute.
    pub device: Device,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Scored {
    /// Rows.
    pub rows: usize,
    /// Completions of all rows.
    pub completions: usize,
    /// Mean of their scores.
    pub mean_score: f64,
    /// Completions that every verifier accepts; absent where none judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passed: Option<usize>,
}

/// Reads a list of judges, or one, written as JSON; a text names a verifier.
///
/// # Errors
/// No JSON; judges that a recipe would refuse.
pub fn scorers(text: &str) -> Result<Vec<Value>> {
    let value: Value = serde_json::from_str(text)
        .map_err(|error| Error::usage(format!("`--scorers` is no JSON: {error}")))?;
    let list = match value {
        Value::Array(list) => list,
        one => vec![one],
    };
    let named = |scorer| match scorer {
        Value::String(name) => json!({"verifier": name}),
        other => other,
    };
    let scorers: Vec<Value> = list.into_iter().map(named).collect();
    if scorers.is_empty() {
        return Err(Error::usage("`--scorers` names nobody"));
    }
    check_scorers(&scorers)?;
    Ok(scorers)
}

/// Judges every row.
///
/// # Errors
/// A row that cannot be judged, by file and line; what a judge can fail with. Finished rows are kept for the next call.
pub fn score(work: &Scoring, events: &dyn Events) -> Result<Scored> {
    check_scorers(&work.scorers)?;
    refuse_own_input(work)?;
    let mut total = 0_u64;
    for row in rows(work)? {
        row?;
        total += 1;
    }
    if total == 0 {
        return Err(Error::run(format!("{}: no rows", work.data)));
    }
    let folder = Folder::open(work)?;
    let path = folder.rows();
    let mut done = lines(&path)?;
    if done < total {
        events.progress("rows", done, total);
        let panel = Panel::new(&work.scorers, &work.device)?;
        let mut ledger = JsonlWriter::open(&path)?;
        let mut groups = Groups { rows: rows(work)?.skip(done as usize).peekable(), panel: &panel };
        let at_once =
            if panel.only_verifies() { AT_ONCE * rayon::current_num_threads() } else { 1 };
        loop {
            events.check_interrupt()?;
            let batch = groups.by_ref().take(at_once).collect::<Result<Vec<_>>>()?;
            if batch.is_empty() {
                break;
            }
            for row in judge_all(&panel, batch)? {
                ledger.write(&row)?;
                done += 1;
            }
            events.progress("rows", done, total);
        }
        ledger.sync()?;
    }
    let scored = finish(&path, &work.out, total)?;
    folder.remove()?;
    Ok(scored)
}

fn refuse_own_input(work: &Scoring) -> Result<()> {
    let same = |a: &Path, b: &Path| match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    };
    if same(Path::new(&work.data), &work.out) {
        return Err(Error::usage(format!("{} is read and cannot be written", work.data))
            .hint("give --out another name"));
    }
    if work.out.is_dir() {
        return Err(Error::usage(format!("{} is a directory", work.out.display()))
            .hint("give --out the name of a file"));
    }
    Ok(())
}

/// One row to judge.
struct Asked {
    place: String,
    columns: Map<String, Value>,
    prompt: Vec<Message>,
    tools: Option<Value>,
    answer: Option<String>,
    /// Whether the row has a list of completions.
    several: bool,
    completions: Vec<String>,
    extra: Map<String, Value>,
}

fn rows(work: &Scoring) -> Result<impl Iterator<Item = Result<Asked>>> {
    let needs_prompt = work.scorers.iter().any(|scorer| scorer.get("reward_model").is_some());
    let columns = work.columns.clone();
    Ok(objects(&work.data)?.map(move |row| {
        let (place, row) = row?;
        let asked = asked(&place, row, &columns).at(&place)?;
        if needs_prompt && asked.prompt.is_empty() {
            return Err(Error::run("no prompt, which a reward model needs").at(&place));
        }
        Ok(asked)
    }))
}

fn asked(
    place: &str,
    columns: Map<String, Value>,
    names: &IndexMap<String, String>,
) -> Result<Asked> {
    let mut extra = columns.clone();
    for (canonical, actual) in names {
        if let Some(value) = extra.shift_remove(actual) {
            extra.insert(canonical.clone(), value);
        }
    }
    extra.retain(|_, value| !value.is_null());
    let mut prompt = match (extra.shift_remove("prompt"), extra.shift_remove("messages")) {
        (Some(prompt), _) => Side::from_value(prompt).at("`prompt`")?.into_messages("user"),
        (None, Some(messages)) => {
            Side::from_value(messages).at("`messages`")?.into_messages("user")
        }
        (None, None) => Vec::new(),
    };
    let several = extra.contains_key("completions");
    let one = extra.shift_remove("completion").or_else(|| extra.shift_remove("response"));
    let completions = match (one, extra.shift_remove("completions")) {
        (Some(one), None) => vec![text(one).at("`completion`")?],
        (None, Some(Value::Array(list))) => list
            .into_iter()
            .enumerate()
            .map(|(index, one)| text(one).at(format_args!("completions[{index}]")))
            .collect::<Result<_>>()?,
        (None, Some(other)) => {
            return Err(Error::run(format!("`completions` is {}, expected a list", kind(&other))));
        }
        (Some(_), Some(_)) => return Err(Error::run("both `completion` and `completions`")),
        (None, None) => match prompt.pop_if(|message| message.role() == "assistant") {
            Some(last) => vec![last.text()],
            None => return Err(nothing_to_judge(&extra)),
        },
    };
    let answer = match extra.get("answer") {
        Some(Value::String(text)) => Some(text.clone()),
        other => other.map(Value::to_string),
    };
    let tools = extra.shift_remove("tools");
    let place = place.to_owned();
    Ok(Asked { place, columns, prompt, tools, answer, several, completions, extra })
}

fn nothing_to_judge(found: &Map<String, Value>) -> Error {
    let found: Vec<&str> = found.keys().map(String::as_str).collect();
    Error::run("no `completion` or `completions`, and no `messages` that end with an answer")
        .hint(format!("found: {}; name yours with --column completion=…", found.join(", ")))
}

/// The text of a completion: of several messages, the last.
fn text(value: Value) -> Result<String> {
    let messages = Side::from_value(value)?.into_messages("assistant");
    let last = messages.last().ok_or_else(|| Error::run("an empty list of messages"))?;
    Ok(last.text())
}

/// Consecutive rows that one call can judge.
struct Groups<'a, I: Iterator<Item = Result<Asked>>> {
    rows: std::iter::Peekable<I>,
    panel: &'a Panel,
}

impl<I: Iterator<Item = Result<Asked>>> Iterator for Groups<'_, I> {
    type Item = Result<Vec<Asked>>;

    fn next(&mut self) -> Option<Self::Item> {
        let first = match self.rows.next()? {
            Ok(first) => first,
            Err(error) => return Some(Err(error)),
        };
        let mut size = first.completions.len();
        let mut group = vec![first];
        // A verifier sees a row's other columns: rows that differ in them have questions of their own.
        let whole_row = self.panel.verifies();
        while size < GROUP
            && let Some(row) = self.rows.next_if(|row| {
                let Ok(row) = row else { return false };
                let first = &group[0];
                (&row.prompt, &row.tools) == (&first.prompt, &first.tools)
                    && (!whole_row || row.extra == first.extra)
            })
        {
            let Ok(row) = row else { break };
            size += row.completions.len();
            group.push(row);
        }
        Some(Ok(group))
    }
}

fn judge_all(panel: &Panel, batch: Vec<Vec<Asked>>) -> Result<Vec<Map<String, Value>>> {
    // One after the other where a model judges: it uses all cores by itself.
    let judged: Vec<Vec<Map<String, Value>>> = match batch.len() {
        1 => batch.into_iter().map(|group| judge(panel, group)).collect::<Result<_>>()?,
        _ => batch.into_par_iter().map(|group| judge(panel, group)).collect::<Result<_>>()?,
    };
    Ok(judged.into_iter().flatten().collect())
}

fn judge(panel: &Panel, group: Vec<Asked>) -> Result<Vec<Map<String, Value>>> {
    let texts: Vec<&str> =
        group.iter().flat_map(|row| row.completions.iter().map(String::as_str)).collect();
    let first = &group[0];
    let question = Question {
        place: &first.place,
        prompt: &first.prompt,
        tools: first.tools.as_ref(),
        answer: first.answer.as_deref(),
        extra: Some(&first.extra),
    };
    let verdicts =
        if texts.is_empty() { Vec::new() } else { panel.judge(&question, &texts, &[])? };
    let mut verdicts = verdicts.into_iter();
    let row = |row: Asked| {
        let own: Vec<Verdict> = verdicts.by_ref().take(row.completions.len()).collect();
        with_scores(row, &own)
    };
    Ok(group.into_iter().map(row).collect())
}

/// The row with `score` and `why`, `passed` where a verifier judged and `scores` where several did; lists of them where
/// it has a list of completions.
fn with_scores(row: Asked, verdicts: &[Verdict]) -> Map<String, Value> {
    let mut columns = row.columns;
    let mut add = |name: &str, value: &dyn Fn(&Verdict) -> Value| {
        let mut values: Vec<Value> = verdicts.iter().map(value).collect();
        let value =
            if row.several { Value::Array(values) } else { values.pop().unwrap_or_default() };
        columns.insert(name.to_owned(), value);
    };
    add("score", &|verdict| json!(verdict.score));
    add("why", &|verdict| json!(verdict.explanation()));
    if verdicts.iter().any(|verdict| verdict.passed.is_some()) {
        add("passed", &|verdict| json!(verdict.passed));
    }
    if verdicts.iter().any(|verdict| verdict.scores.len() > 1) {
        add("scores", &|verdict| json!(verdict.scores));
    }
    columns
}

/// Where unfinished work lies: `<out>.unfinished`. One process at a time has it.
struct Folder {
    path: PathBuf,
    lock: RunLock,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Work {
    version: u32,
    sha256: String,
}

impl Folder {
    /// Opens the folder; rows in it that other work has made are dropped.
    fn open(work: &Scoring) -> Result<Self> {
        let mut name = work.out.file_name().unwrap_or_default().to_os_string();
        name.push(".unfinished");
        let path = work.out.with_file_name(name);
        let lock = RunLock::acquire(&path)?;
        let folder = Self { path, lock };
        let manifest = folder.path.join("work.json");
        let here = Work { version: VERSION, sha256: hash(work)? };
        if store::read_json::<Work>(&manifest).ok().as_ref() != Some(&here) {
            store::remove(&folder.rows())?;
            store::write_json(&manifest, &here)?;
        }
        Ok(folder)
    }

    fn rows(&self) -> PathBuf {
        self.path.join("rows.jsonl")
    }

    fn remove(self) -> Result<()> {
        drop(self.lock);
        store::remove(&self.path)
    }
}

/// Of everything that the result depends on: the rows, the judges with their models, the columns' names.
fn hash(work: &Scoring) -> Result<String> {
    let mut parts = vec![json!([work.scorers, work.columns]).to_string()];
    let models = work.scorers.iter().filter_map(|scorer| {
        ["reward_model", "tokenizer"].iter().find_map(|key| scorer.get(*key)?.as_str())
    });
    for path in models.map(Path::new).filter(|path| path.exists()) {
        parts.push(store::sha256_path(path)?);
    }
    if Path::new(&work.data).exists() {
        parts.push(store::sha256_path(Path::new(&work.data))?);
    } else {
        // Several files, by a pattern.
        for row in objects(&work.data)? {
            let (place, row) = row?;
            parts.push(store::sha256_bytes(serde_json::to_string(&row).at(place)?.as_bytes()));
        }
    }
    Ok(store::sha256_bytes(parts.concat().as_bytes()))
}

/// Whole lines of a file that need not exist.
fn lines(path: &Path) -> Result<u64> {
    if !path.exists() {
        return Ok(0);
    }
    // Cuts off a torn last line.
    drop(JsonlWriter::open(path)?);
    let file = std::fs::File::open(path).map_err(|error| store::io_error(path, error))?;
    Ok(BufReader::new(file).lines().count() as u64)
}

/// Copies the judged rows to their final name and sums them up.
fn finish(rows: &Path, out: &Path, total: u64) -> Result<Scored> {
    let mut scored = Scored::default();
    let (mut sum, mut passed, mut verified) = (0.0, 0, false);
    store::write_atomic_with(out, |file| {
        let source = std::fs::File::open(rows).map_err(|error| store::io_error(rows, error))?;
        for line in BufReader::new(source).lines() {
            let line = line.map_err(|error| store::io_error(rows, error))?;
            writeln!(file, "{line}").map_err(|error| store::io_error(out, error))?;
            let row: Value = serde_json::from_str(&line).at(rows.display())?;
            scored.rows += 1;
            for score in each(&row["score"]) {
                scored.completions += 1;
                sum += score.as_f64().unwrap_or(0.0);
            }
            for pass in each(&row["passed"]).filter_map(Value::as_bool) {
                verified = true;
                passed += usize::from(pass);
            }
        }
        if scored.rows as u64 != total {
            return Err(Error::run(format!("{} judged rows, expected {total}", scored.rows))
                .at(rows.display())
                .hint("remove this directory and run again"));
        }
        Ok(())
    })?;
    scored.mean_score = if scored.completions > 0 { sum / scored.completions as f64 } else { 0.0 };
    scored.passed = verified.then_some(passed);
    Ok(scored)
}

/// The values of a list, or the one value; none of null.
fn each(value: &Value) -> impl Iterator<Item = &Value> {
    let (list, one) = match value {
        Value::Array(list) => (list.as_slice(), None),
        Value::Null => (&[][..], None),
        one => (&[][..], Some(one)),
    };
    list.iter().chain(one)
}

#[cfg(test)]
#[path = "score_tests.rs"]
mod tests;
