//! `arriero score`: scores the completions in a file and writes its rows with `score` and `why` added.
//!
//! Rows are read twice: once to find every mistake before a model is loaded, once to score them. Consecutive rows with
//! the same prompt are scored in one call, so that a reward model reads the prompt once. Scored groups go to a file in
//! a directory next to the output, one per line, where a later call resumes; the output appears atomically.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::thread;

use candle_core::Device;
use indexmap::IndexMap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::generation;
use super::inputs::Hashes;
use super::judgeable::Readers;
use crate::data::columns::Unseen;
use crate::data::paths;
use crate::data::read::{self, objects};
use crate::data::record::{self, Message, Side, kind};
use crate::error::{Context, Error, Result};
use crate::generate::openai::Account;
use crate::model::bases::Bases;
use crate::recipe::plan::check_scorers;
use crate::report::record::Events;
use crate::score::{Panel, Question, Verdict};
use crate::store::{self, JsonlWriter, RunLock};

/// Maximum number of completions per call.
const GROUP: usize = 64;
/// Groups of verifier work between two writes, per core.
const AT_ONCE: usize = 16;
/// Raised when the same work would write different rows.
const VERSION: u32 = 4;

/// The rows to score, and the scorers.
#[derive(Clone, Debug)]
pub struct Scoring {
    /// The rows: a file, a directory or a glob.
    pub data: String,
    /// The output file.
    pub out: PathBuf,
    /// Whether to replace an existing `out`.
    pub replace: bool,
    /// The scorers, as in a recipe.
    pub scorers: Vec<Value>,
    /// Column names of this file: canonical name → its name here.
    pub columns: IndexMap<String, String>,
    /// Device of reward models.
    pub device: Device,
}

/// The summary of a scoring.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Scored {
    /// Number of rows.
    pub rows: usize,
    /// Completions of all rows.
    pub completions: usize,
    /// Mean score of the completions.
    pub mean_score: f64,
    /// Completions that every verifier accepts; absent without verifiers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passed: Option<usize>,
    /// Servers used as judges and their usage, by scorer name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub judges: BTreeMap<String, Account>,
}

/// Reads one scorer or a list of scorers from JSON; a string names a verifier.
///
/// # Errors
/// Invalid JSON; scorers that a recipe would refuse.
pub fn scorers(text: &str) -> Result<Vec<Value>> {
    let value: Value = serde_json::from_str(text)
        .map_err(|error| Error::usage(format!("`--scorers` is not valid JSON: {error}")))?;
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
        return Err(Error::usage("`--scorers` is empty"));
    }
    check_scorers(&scorers)?;
    Ok(scorers)
}

/// Scores every row.
///
/// # Errors
/// A row that cannot be scored, by file and line; errors of the scorers. Finished rows are kept for the next call.
pub fn score(work: &Scoring, events: &dyn Events) -> Result<Scored> {
    check_scorers(&work.scorers)?;
    refuse_tokens(&work.scorers)?;
    refuse_own_input(work)?;
    refuse_taken(work)?;
    let total = check_rows(work)?;
    let folder = Folder::open(work)?;
    let path = folder.rows();
    let done = judged(&path)?;
    if done < total {
        let panel = Panel::among(&work.scorers, &work.device, &Bases::default(), events)?;
        let judged = judge_rest(work, (&path, &panel), (done, total), events);
        generation::accounted(&folder.path, &panel, judged)?;
    }
    let mut scored = finish(&path, &work.out, total)?;
    // Unjudged completions do not pass either, but without a verifier there is nothing to count.
    scored.passed = scored.passed.filter(|_| work.scorers.iter().any(verifies));
    scored.judges = generation::judges(&folder.path)?;
    folder.remove()?;
    Ok(scored)
}

/// Number of rows, after checking that each can be read and scored and that every name in `columns` exists.
fn check_rows(work: &Scoring) -> Result<u64> {
    let mut unseen = Unseen::new(&work.columns);
    let readers = Readers::among(&work.scorers)?;
    let mut total = 0_u64;
    for row in rows(work)? {
        let row = row?;
        unseen.see(row.columns.keys());
        if !row.completions.is_empty() {
            readers.check(&row.question())?;
        }
        total += 1;
    }
    if total == 0 {
        return Err(Error::run(format!("{}: no rows", work.data)));
    }
    unseen.check("no row").at(&work.data)?;
    Ok(total)
}

/// Scores the rows after the first `done`, and appends them.
fn judge_rest(
    work: &Scoring,
    (path, panel): (&Path, &Panel<'_>),
    (mut done, total): (u64, u64),
    events: &dyn Events,
) -> Result<()> {
    events.progress("rows", done, total);
    let mut ledger = JsonlWriter::open(path)?;
    let mut groups = Groups { rows: rows(work)?.skip(done as usize).peekable(), panel };
    let at_once = match (panel.is_light(), panel.waits()) {
        (true, _) => AT_ONCE * rayon::current_num_threads(),
        (false, true) => panel.at_once(),
        (false, false) => 1,
    };
    loop {
        events.check_interrupt()?;
        let batch = groups.by_ref().take(at_once).collect::<Result<Vec<_>>>()?;
        if batch.is_empty() {
            return ledger.sync();
        }
        for group in judge_all(panel, batch)? {
            ledger.write(&group)?;
            done += group.len() as u64;
        }
        events.progress("rows", done, total);
    }
}

/// Whether a scorer can declare answers wrong.
fn verifies(scorer: &Value) -> bool {
    scorer.get("verifier").is_some() || scorer["form"] == "code"
}

/// Refuses a length penalty in tokens: rows are text, which no tokenizer has produced.
fn refuse_tokens(scorers: &[Value]) -> Result<()> {
    let counts = |scorer: &&Value| {
        scorer["length_penalty"].as_f64().is_some_and(|penalty| penalty != 0.0)
            && scorer["length_unit"] != "characters"
    };
    match scorers.iter().find(counts) {
        None => Ok(()),
        Some(_) => Err(Error::usage("`length_penalty` for tokens, which rows of text do not have")
            .hint("write length_unit = \"characters\"")),
    }
}

/// Refuses to overwrite an existing file without consent.
fn refuse_taken(work: &Scoring) -> Result<()> {
    if work.out.exists() && !work.replace {
        return Err(Error::usage(format!("`{}` is already there", work.out.display()))
            .hint("choose another name, or --force to replace it"));
    }
    Ok(())
}

fn refuse_own_input(work: &Scoring) -> Result<()> {
    if work.out.is_dir() {
        return Err(Error::usage(format!("{} is a directory", work.out.display()))
            .hint("give --out the name of a file"));
    }
    let absolute = |path: &Path| match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            parent.canonicalize().map(|parent| parent.join(name)).ok()
        }
        _ => None,
    };
    let Some(out) = absolute(&work.out) else { return Ok(()) };
    let unfinished = unfinished(&out);
    let within = Path::new(&work.data).canonicalize().is_ok_and(|data| out.starts_with(data));
    let reads = |file: &PathBuf| {
        let file = file.canonicalize().unwrap_or_default();
        file == out || file.starts_with(&unfinished)
    };
    // A hub id refers to no files here.
    let files = paths::files(&work.data, None).unwrap_or_default();
    if within || files.iter().any(reads) {
        let (out, data) = (work.out.display(), &work.data);
        return Err(Error::usage(format!("{out} would be read and written: the rows are {data}"))
            .hint("give --out a name outside of them"));
    }
    Ok(())
}

/// One row to score.
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

impl Asked {
    fn question(&self) -> Question<'_> {
        Question {
            place: &self.place,
            prompt: &self.prompt,
            tools: self.tools.as_ref(),
            answer: self.answer.as_deref(),
            extra: Some(&self.extra),
        }
    }
}

fn rows(work: &Scoring) -> Result<impl Iterator<Item = Result<Asked>>> {
    let asks =
        |scorer: &Value| ["reward_model", "judge"].iter().any(|key| scorer.get(key).is_some());
    let needs_prompt = work.scorers.iter().any(asks);
    let columns = work.columns.clone();
    Ok(objects(&work.data)?.map(move |row| {
        let (place, row) = row?;
        let asked = asked(&place, row, &columns).at(&place)?;
        if needs_prompt && asked.prompt.is_empty() {
            return Err(Error::run("no prompt, which a reward model or a judge needs").at(&place));
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
    read::rename(&mut extra, names);
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
    let answer = record::answer(&extra);
    let tools = extra.shift_remove("tools").map(read::tools).transpose()?;
    let place = place.to_owned();
    Ok(Asked { place, columns, prompt, tools, answer, several, completions, extra })
}

fn nothing_to_judge(found: &Map<String, Value>) -> Error {
    let found: Vec<&str> = found.keys().map(String::as_str).collect();
    Error::run("no `completion` or `completions`, and no `messages` that end with an answer")
        .hint(format!("found: {}; name yours with --column completion=…", found.join(", ")))
}

/// The text of a completion; of several messages, the last.
fn text(value: Value) -> Result<String> {
    let messages = Side::from_value(value)?.into_messages("assistant");
    let last = messages.last().ok_or_else(|| Error::run("an empty list of messages"))?;
    Ok(last.text())
}

/// Consecutive rows that one call can score.
struct Groups<'a, I: Iterator<Item = Result<Asked>>> {
    rows: std::iter::Peekable<I>,
    panel: &'a Panel<'a>,
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
        // A verifier sees a row's other columns, so rows that differ in them are separate questions.
        let whole_row = self.panel.verifies();
        while size < GROUP
            && let Some(row) = self.rows.next_if(|row| {
                let Ok(row) = row else { return false };
                let first = &group[0];
                (&row.prompt, &row.tools, &row.answer)
                    == (&first.prompt, &first.tools, &first.answer)
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

fn judge_all(panel: &Panel<'_>, batch: Vec<Vec<Asked>>) -> Result<Vec<Vec<Map<String, Value>>>> {
    // Verifiers alone, including programs, have the cores to themselves: one thread per core is enough.
    if panel.waits() && !panel.is_light() {
        // One thread per question: they wait for the server. Local computation runs one at a time.
        return thread::scope(|scope| {
            let asked: Vec<_> =
                batch.into_iter().map(|group| scope.spawn(|| judge(panel, group))).collect();
            let heard = asked.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|_| Err(Error::run("a judge thread panicked")))
            });
            heard.collect()
        });
    }
    // One at a time if a model scores: it uses all cores by itself.
    match batch.len() {
        1 => batch.into_iter().map(|group| judge(panel, group)).collect(),
        _ => batch.into_par_iter().map(|group| judge(panel, group)).collect(),
    }
}

fn judge(panel: &Panel<'_>, group: Vec<Asked>) -> Result<Vec<Map<String, Value>>> {
    let texts: Vec<&str> =
        group.iter().flat_map(|row| row.completions.iter().map(String::as_str)).collect();
    let question = group[0].question();
    let verdicts =
        if texts.is_empty() { Vec::new() } else { panel.judge(&question, &texts, &[])? };
    let mut verdicts = verdicts.into_iter();
    let row = |row: Asked| {
        let own: Vec<Verdict> = verdicts.by_ref().take(row.completions.len()).collect();
        with_scores(row, &own)
    };
    Ok(group.into_iter().map(row).collect())
}

/// The row with `score` and `why`, `passed` if a verifier judged, `scores` if several scorers did, `stdout` and
/// `stderr` if a program was run; each is a list if the row has a list of completions.
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
    if verdicts.iter().any(|verdict| verdict.streams.is_some()) {
        let streams = |verdict: &Verdict| verdict.streams.clone().unwrap_or_default();
        add("stdout", &|verdict| json!(streams(verdict).stdout));
        add("stderr", &|verdict| json!(streams(verdict).stderr));
    }
    columns
}

/// Directory of unfinished work: `<out>.unfinished`. One process at a time holds it.
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
    /// Opens the folder; rows in it that belong to other work are dropped.
    fn open(work: &Scoring) -> Result<Self> {
        let path = unfinished(&work.out);
        let lock = RunLock::acquire(&path)?;
        let folder = Self { path, lock };
        let manifest = folder.path.join("work.json");
        let here = Work { version: VERSION, sha256: hash(work)? };
        if store::read_json::<Work>(&manifest).ok().as_ref() != Some(&here) {
            store::remove(&folder.rows())?;
            generation::forget_judges(&folder.path)?;
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

/// The directory for the work on `out` until it is finished.
fn unfinished(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(".unfinished");
    out.with_file_name(name)
}

/// Hash of everything the result depends on: the rows, the scorers with their models, the column names.
fn hash(work: &Scoring) -> Result<String> {
    let mut hashes = Hashes::default();
    let judges = hashes.replace("scorers", json!(work.scorers), &mut BTreeMap::new())?;
    let rows = hashes.content("data", &work.data)?;
    Ok(store::sha256_bytes(json!([judges, work.columns, rows]).to_string().as_bytes()))
}

/// Number of rows in the groups of a file, which need not exist.
fn judged(path: &Path) -> Result<u64> {
    if !path.exists() {
        return Ok(0);
    }
    // Truncates a torn last line.
    drop(JsonlWriter::open(path)?);
    groups(path)?.try_fold(0, |rows, group| Ok(rows + group?.len() as u64))
}

/// The groups in a file.
fn groups(path: &Path) -> Result<impl Iterator<Item = Result<Vec<Map<String, Value>>>>> {
    let file = std::fs::File::open(path).map_err(|error| store::read_error(path, error))?;
    Ok(BufReader::new(file).lines().map(move |line| {
        let line = line.map_err(|error| store::read_error(path, error))?;
        serde_json::from_str(&line).at(path.display())
    }))
}

/// Copies the scored rows to their final name and summarizes them.
fn finish(rows: &Path, out: &Path, total: u64) -> Result<Scored> {
    let mut scored = Scored::default();
    let (mut sum, mut passed, mut verified) = (0.0, 0, false);
    store::write_atomic_with(out, |file| {
        for group in groups(rows)? {
            for row in group? {
                let line = serde_json::to_string(&row)?;
                writeln!(file, "{line}").map_err(|error| store::io_error(out, error))?;
                scored.rows += 1;
                for score in each(row.get("score")) {
                    scored.completions += 1;
                    sum += score.as_f64().unwrap_or(0.0);
                }
                for pass in each(row.get("passed")).filter_map(Value::as_bool) {
                    verified = true;
                    passed += usize::from(pass);
                }
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

/// The values of a list, or the single value; null has none.
fn each(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    let (list, one) = match value {
        Some(Value::Array(list)) => (list.as_slice(), None),
        None | Some(Value::Null) => (&[][..], None),
        one => (&[][..], one),
    };
    list.iter().chain(one)
}

#[cfg(test)]
#[path = "score_tests.rs"]
mod tests;
