//! Shared by the generating stages: the policy, the questions, the ledger that survives a kill, the scoring.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::judgeable::Readers;
use super::{Metrics, StageContext, training};
use crate::data::prepare::OnBadRow;
use crate::data::record::Row;
use crate::error::{Context, Error, Kind, Result};
use crate::generate::engine::Answer;
use crate::generate::local::LocalModel;
use crate::generate::openai::spec::ServerSpec;
use crate::generate::openai::{Account, Server};
use crate::generate::sampling::Sampling;
use crate::generate::teacher::{Asked, Teacher, TeacherSpec};
use crate::model::Precision;
use crate::model::bases::{Bases, Form, Model};
use crate::recipe::plan::Dataset;
use crate::score::candidates::{Candidate, Candidates};
use crate::score::curve::{CURVE, Curve};
use crate::score::statistics::Estimate;
use crate::score::{Panel, Question, Verdict};
use crate::store::{self, JsonlWriter};

/// Finished prompts, each with its answers and their scores.
pub const LEDGER: &str = "ledger.jsonl";
/// A server's responses, request by request, next to the ledger of finished prompts.
pub const REQUESTS: &str = "requests.jsonl";
/// Servers used as judges and their usage, by scorer name.
const JUDGES: &str = "judges.json";

/// Loads a generating model in the weight format of the sampling settings.
pub fn load(context: &StageContext<'_>, model: &str, sampling: &Sampling) -> Result<LocalModel> {
    let form = Form::dense(&context.device, Precision::F32);
    let read = Bases::default().model(model, &form)?;
    written_by(context, (model, read), sampling)
}

/// [`load`] for a model that was read together with others. From here on its matrices are its own: an adapter's are
/// merged, and on the CPU all are laid out anew.
pub fn written_by(
    context: &StageContext<'_>,
    (name, read): (&str, Model),
    sampling: &Sampling,
) -> Result<LocalModel> {
    let checkpoint = read.checkpoint()?;
    drop(read);
    let checkpoint = checkpoint.computed_in(sampling.dtype)?;
    let model = LocalModel::held(checkpoint, sampling.quantization).at(name)?;
    model.guessing_as(sampling, |assistant| training::load(context, assistant, ""))
}

/// A teacher: a model loaded into this process, or the client of a server, which records what it receives in the
/// stage's directory.
pub fn teacher<'a>(
    context: &StageContext<'a>,
    spec: &TeacherSpec,
    sampling: &Sampling,
) -> Result<AnyTeacher<'a>> {
    Ok(match spec {
        TeacherSpec::Local(model) => AnyTeacher::Local(Box::new(load(context, model, sampling)?)),
        TeacherSpec::Server(spec) => {
            let ledger = context.dir.join(REQUESTS);
            let skip_refused = spec.skip_refused || sampling.skip_refused;
            let spec = ServerSpec { skip_refused, ..(**spec).clone() };
            AnyTeacher::Remote(Box::new(Server::new(&spec, Some(&ledger), context.events)?))
        }
    })
}

/// A local or remote teacher.
pub enum AnyTeacher<'a> {
    /// In this process.
    Local(Box<LocalModel>),
    /// Behind a server.
    Remote(Box<Server<'a>>),
}

impl AnyTeacher<'_> {
    /// Writes which server answered and its usage, if the teacher is a server.
    pub fn write_account(&self, context: &StageContext<'_>) -> Result<()> {
        match self.served_by() {
            None => Ok(()),
            Some(account) => store::write_json(&context.dir.join("teacher.json"), &account),
        }
    }
}

impl Teacher for AnyTeacher<'_> {
    fn served_by(&self) -> Option<Account> {
        match self {
            Self::Local(_) => None,
            Self::Remote(server) => server.served_by(),
        }
    }

    fn on_gpu(&self) -> bool {
        match self {
            Self::Local(model) => model.on_gpu(),
            Self::Remote(_) => false,
        }
    }

    fn answer(
        &self,
        asked: &[Asked],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::Local(model) => model.answer(asked, sampling, done),
            Self::Remote(server) => server.answer(asked, sampling, done),
        }
    }
}

/// Reads the rows whose prompts are to be answered and scored by `scorers`. Call before loading a model.
///
/// # Errors
/// A row that cannot be read, or that lacks what one of the verifiers needs.
pub fn rows(
    context: &StageContext<'_>,
    datasets: &[Dataset],
    scorers: &[Value],
) -> Result<Vec<Row>> {
    let rows = training::rows(context, datasets, OnBadRow::Error)?;
    Readers::among(scorers)?.check_rows(&rows)?;
    Ok(rows)
}

/// The questions of the rows `wanted`.
pub fn questions(rows: &[Row], wanted: &[usize]) -> Result<Vec<Asked>> {
    wanted.iter().map(|&index| Asked::from_row(index, &rows[index])).collect()
}

#[derive(Deserialize, Serialize)]
struct Entry<T> {
    index: usize,
    result: T,
}

/// Receives one result: its index and the result.
pub type Keep<'a, T> = dyn FnMut(usize, T) -> Result<()> + 'a;

/// Runs `count` work items, each once: those that an earlier, killed process finished are in the ledger. `work` gets
/// the indices of the remaining items and reports each finished one. Returns all results by index.
///
/// # Errors
/// Errors of `work`; [`Error::interrupted`] between two items.
pub fn once_each<T: Serialize + DeserializeOwned>(
    context: &StageContext<'_>,
    count: usize,
    work: impl FnOnce(&[usize], &mut Keep<'_, T>) -> Result<()>,
) -> Result<Vec<T>> {
    let path = context.dir.join(LEDGER);
    let mut is_done = vec![false; count];
    for entry in store::read_ledger::<Entry<serde_json::Value>>(&path)? {
        if let Some(done) = is_done.get_mut(entry.index) {
            *done = true;
        }
    }
    let left: Vec<usize> = (0..count).filter(|&index| !is_done[index]).collect();
    if !left.is_empty() {
        let mut done = count - left.len();
        let mut ledger = JsonlWriter::open(&path)?;
        context.events.progress("prompts", done as u64, count as u64);
        context.events.check_interrupt()?;
        work(&left, &mut |index, result| {
            ledger.write(&Entry { index, result })?;
            done += 1;
            context.events.progress("prompts", done as u64, count as u64);
            context.events.check_interrupt()
        })?;
        ledger.sync()?;
    }
    // Read back even new results, so that numbers take the same path through text whichever process computed them.
    let mut entries: Vec<Entry<T>> = store::read_ledger(&path)?;
    entries.sort_by_key(|entry| entry.index);
    entries.dedup_by_key(|entry| entry.index);
    if entries.len() != count {
        return Err(Error::run(format!("{} results, expected {count}", entries.len()))
            .at(path.display())
            .hint("remove the stage's directory and run again"));
    }
    Ok(entries.into_iter().map(|entry| entry.result).collect())
}

/// Polling interval for results while waiting for a free judge.
const TICK: Duration = Duration::from_millis(20);
/// Maximum number of skipped prompts listed.
const NAMED: usize = 20;

/// Answers every question, scores every answer with `judge`, and keeps every result, in any order. If a judge is a
/// server or runs programs, many prompts are judged concurrently with generation; one at a time, each would wait for
/// the judge, and the model for all of them.
///
/// # Errors
/// The first error; results judged before it are kept.
pub fn answer_and_judge<T: Send>(
    (teacher, asked, sampling): (&dyn Teacher, &[Asked], &Sampling),
    panel: &Panel<'_>,
    judge: &(dyn Fn(usize, &[Answer]) -> Result<T> + Sync),
    keep: &mut Keep<'_, T>,
) -> Result<()> {
    if !panel.waits() {
        let asks = (teacher, asked, sampling);
        return answers(asks, &mut |place, answers| keep(place, judge(place, &answers)?));
    }
    // Queued answers are drawn again after a kill, so queue no more than keeps the judges busy.
    let (work, waiting) = mpsc::sync_channel::<(usize, Vec<Answer>)>(panel.at_once());
    // The channel closes when the last receiver ends.
    let (waiting, ending) = (Arc::new(Mutex::new(waiting)), AtomicBool::new(false));
    thread::scope(|scope| {
        let (judged, results) = mpsc::channel();
        for _ in 0..panel.at_once().min(asked.len()) {
            let (judged, waiting, ending) = (judged.clone(), Arc::clone(&waiting), &ending);
            scope.spawn(move || {
                loop {
                    let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((place, answers)) = next else { return };
                    if !ending.load(Ordering::Relaxed) {
                        let result = judge(place, &answers);
                        if result.as_ref().is_err_and(|error| error.kind() == Kind::Interrupted) {
                            ending.store(true, Ordering::Relaxed);
                        }
                        // After an error the receiver is gone.
                        let _ = judged.send((place, result));
                    }
                }
            });
        }
        // The results end with the last thread.
        drop((judged, waiting));
        let mut settle = |(place, result): (usize, Result<T>)| {
            let done = result.and_then(|result| keep(place, result));
            ending.fetch_or(done.is_err(), Ordering::Relaxed);
            done
        };
        let mut kept = answers((teacher, asked, sampling), &mut |place, answers| {
            let mut next = (place, answers);
            loop {
                // Keep results immediately, even while all judges are busy.
                results.try_iter().try_for_each(&mut settle)?;
                match work.try_send(next) {
                    Ok(()) => return Ok(()),
                    Err(TrySendError::Disconnected(_)) => {
                        return Err(Error::run("the judges have ended"));
                    }
                    Err(TrySendError::Full(back)) => next = back,
                }
                if let Ok(one) = results.recv_timeout(TICK) {
                    settle(one)?;
                }
            }
        });
        if kept.as_ref().is_err_and(|error| error.kind() == Kind::Interrupted) {
            ending.store(true, Ordering::Relaxed);
        }
        drop(work);
        for one in results {
            kept = kept.and(settle(one));
        }
        kept
    })
}

/// Returns `judged` after recording in `dir` which servers judged and their usage, even on failure, since the requests
/// were made. Call once per process; it adds to what earlier processes recorded.
///
/// # Errors
/// Errors of the work; a full disk.
pub fn accounted<T>(dir: &Path, panel: &Panel<'_>, judged: Result<T>) -> Result<T> {
    let written = add_judges(dir, panel);
    let judged = judged?;
    written.map(|()| judged)
}

fn add_judges(dir: &Path, panel: &Panel<'_>) -> Result<()> {
    let served = panel.served_by();
    if served.is_empty() {
        return Ok(());
    }
    let mut all = judges(dir)?;
    for (label, account) in served {
        let account = match all.remove(&label) {
            Some(earlier) => account.after(earlier),
            None => account,
        };
        all.insert(label, account);
    }
    store::write_json(&dir.join(JUDGES), &all)
}

/// The servers that judged for the work in `dir`, by scorer name.
///
/// # Errors
/// An invalid file.
pub fn judges(dir: &Path) -> Result<BTreeMap<String, Account>> {
    let path = dir.join(JUDGES);
    if path.exists() { store::read_json(&path) } else { Ok(BTreeMap::new()) }
}

/// Deletes that record, because other work starts in `dir`.
///
/// # Errors
/// A directory that is not writable.
pub fn forget_judges(dir: &Path) -> Result<()> {
    store::remove(&dir.join(JUDGES))
}

/// Asks the teacher. For a prompt that is too long, the teacher's own error carries the hint.
fn answers(
    (teacher, asked, sampling): (&dyn Teacher, &[Asked], &Sampling),
    done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
) -> Result<()> {
    let mut is_ours = false;
    let answered = teacher.answer(asked, sampling, &mut |place, answers| {
        let done = done(place, answers);
        is_ours |= done.is_err();
        done
    });
    match answered {
        Err(error) if !is_ours && !sampling.skip_refused => {
            Err(error.hint("skip_refused = true skips prompts that are too long or refused"))
        }
        other => other,
    }
}

/// Notes which prompts went unanswered, and records their number.
pub fn name_skipped<'a>(
    context: &StageContext<'_>,
    metrics: &mut Metrics,
    skipped: impl Iterator<Item = &'a Row>,
) {
    let places: Vec<&str> = skipped.map(|row| row.place.as_str()).collect();
    if places.is_empty() {
        return;
    }
    let named = places[..places.len().min(NAMED)].join(", ");
    let more = if places.len() > NAMED { ", …" } else { "" };
    let count = places.len();
    context.events.note(&format!(
        "{count} prompts are too long for the model or were refused, and were skipped: {named}{more}"
    ));
    metrics.insert("skipped".to_owned(), count as f64);
}

/// Writes one of the stage's row files atomically.
///
/// # Errors
/// A full disk.
pub fn write_rows<T: Serialize>(context: &StageContext<'_>, name: &str, rows: &[T]) -> Result<()> {
    let mut text = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut text, row)?;
        text.push(b'\n');
    }
    store::write_atomic(&context.dir.join(name), &text)
}

/// Scores the answers to one row; `tokens` are their lengths.
pub fn judge(
    panel: &Panel<'_>,
    asked: &Asked,
    row: &Row,
    (texts, tokens): (&[&str], &[usize]),
) -> Result<Vec<Verdict>> {
    // The prompt was skipped.
    if texts.is_empty() {
        return Ok(Vec::new());
    }
    let answer = row.answer();
    let question = Question {
        place: &asked.place,
        prompt: &asked.messages,
        tools: asked.tools.as_ref(),
        answer: answer.as_deref(),
        extra: Some(&row.extra),
    };
    panel.judge(&question, texts, tokens)
}

/// One row's answers with their scores; `others`, from elsewhere, are scored as well.
pub fn candidates(
    panel: &Panel<'_>,
    asked: &Asked,
    row: &Row,
    (answers, origin): (&[Answer], &str),
    others: &[Candidate],
) -> Result<(Candidates, Vec<Verdict>)> {
    let drawn = answers.iter().enumerate().map(|(sample, answer)| Candidate {
        text: answer.text.clone(),
        tokens: answer.tokens,
        finish: answer.finish,
        logprob_sum: answer.logprob_sum(),
        scores: indexmap::IndexMap::new(),
        score: 0.0,
        passed: None,
        origin: format!("{origin}/{sample}"),
        why: indexmap::IndexMap::new(),
        streams: None,
    });
    let mut candidates: Vec<Candidate> = drawn.chain(others.iter().cloned()).collect();
    let texts: Vec<&str> = candidates.iter().map(|candidate| candidate.text.as_str()).collect();
    let tokens: Vec<usize> = candidates.iter().map(|candidate| candidate.tokens).collect();
    let verdicts = judge(panel, asked, row, (&texts, &tokens))?;
    for (candidate, verdict) in candidates.iter_mut().zip(&verdicts) {
        candidate.scores.clone_from(&verdict.scores);
        candidate.why.clone_from(&verdict.why);
        candidate.streams.clone_from(&verdict.streams);
        candidate.score = verdict.score;
        candidate.passed = verdict.passed;
    }
    let row = Candidates {
        prompt: asked.messages.clone(),
        answer: row.answer().unwrap_or_default(),
        tools: asked.tools.clone(),
        candidates,
        unanswered: answers.is_empty(),
    };
    Ok((row, verdicts))
}

/// Sampling speed of this process. The time goes into the stage's record, never into its rows.
pub struct Pace {
    started: Instant,
    samples: usize,
    tokens: usize,
}

impl Pace {
    /// Starts the clock.
    pub fn start() -> Self {
        Self { started: Instant::now(), samples: 0, tokens: 0 }
    }

    /// Adds a prompt's answers and their tokens.
    pub fn add(&mut self, samples: usize, tokens: usize) {
        self.samples += samples;
        self.tokens += tokens;
    }

    /// Samples and tokens per second, including scoring; empty if an earlier process drew them all.
    pub fn metrics(&self) -> Metrics {
        let seconds = self.started.elapsed().as_secs_f64();
        if self.samples == 0 || seconds <= 0.0 {
            return Metrics::new();
        }
        let rate = |count: usize| count as f64 / seconds;
        [("samples_per_second", rate(self.samples)), ("tokens_per_second", rate(self.tokens))]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }
}

/// Writes `curve.json` and returns its headline metrics: `pass@1`, `pass@K` and the score of the best of K, with their
/// intervals. Empty if there is nothing to choose from.
pub fn write_curve(context: &StageContext<'_>, curve: Option<&Curve>) -> Result<Metrics> {
    let mut metrics = Metrics::new();
    let Some(curve) = curve else { return Ok(metrics) };
    store::write_json(&context.dir.join(CURVE), curve)?;
    let (Some(first), Some(last)) = (curve.points.first(), curve.last()) else {
        return Ok(metrics);
    };
    if last.k < 2 {
        return Ok(metrics);
    }
    enter(&mut metrics, "pass@1", first.pass_at_k);
    enter(&mut metrics, &format!("pass@{}", last.k), last.pass_at_k);
    enter(&mut metrics, "best_of_k_score", Some(last.score));
    Ok(metrics)
}

/// Records an estimate as three metrics.
pub fn enter(metrics: &mut Metrics, name: &str, estimate: Option<Estimate>) {
    let Some(Estimate { mean, low, high }) = estimate else { return };
    metrics.insert(name.to_owned(), mean);
    metrics.insert(format!("{name}_low"), low);
    metrics.insert(format!("{name}_high"), high);
}

/// The lowest of the values; 0 if there are none.
pub fn lowest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().reduce(f64::min).unwrap_or(0.0)
}

/// The mean of the values; `None` if there are none.
pub fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0_usize);
    for value in values {
        (sum, count) = (sum + value, count + 1);
    }
    (count > 0).then(|| sum / count as f64)
}
