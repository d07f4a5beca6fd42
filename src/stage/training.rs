//! Shared by the three training stages: load the initial model, turn rows into trees, fit, save. Knows no methods.

use std::sync::{Arc, Mutex, PoisonError};

use super::StageContext;
use super::adapt::{Adapt, Trainee};
use super::start::Start;
use crate::data::examples::Examples;
use crate::data::mix::take;
use crate::data::pipeline::Pipeline;
use crate::data::prepare::{OnBadRow, PrepareReport, Rule, Skipped};
use crate::data::read::read;
use crate::data::record::Row;
use crate::data::stored::Stored;
use crate::data::stream::Origin;
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::generate::local::LocalModel;
use crate::generate::sampling::Sampling;
use crate::generate::teacher::{Asked, Teacher};
use crate::loss::Objective;
use crate::model::bases::Bases;
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::model::run_dir;
use crate::model::{Architecture, Config};
use crate::recipe::plan::Dataset;
use crate::report::record::Metrics;
use crate::train::{self, Data, Follower, Job, Learner, Settings};

/// Loads a checkpoint and replaces its chat template, if one is given.
pub fn load(context: &StageContext<'_>, model: &str, chat_template: &str) -> Result<Checkpoint> {
    let mut checkpoint = Checkpoint::load(model, &context.device, &LoadOptions::default())?;
    set_template(&mut checkpoint, chat_template)?;
    Ok(checkpoint)
}

/// Loads the policy that a stage trains, like [`base`].
///
/// # Errors
/// As [`Adapt::start`] and [`check_writes`].
pub fn start(
    context: &StageContext<'_>,
    (adapt, bases): (&Adapt<'_>, &Bases),
    chat_template: &str,
) -> Result<Start> {
    let start = base(context, (adapt, bases), chat_template)?;
    check_writes(adapt.base, &start.checkpoint.config)?;
    Ok(start)
}

/// Refuses a reward model where a policy is trained or queried: its score head would be taken for the vocabulary
/// projection.
///
/// # Errors
/// Names the model and its head.
pub fn check_writes(name: &str, model: &Config) -> Result<()> {
    if model.architecture == Architecture::CausalLm {
        return Ok(());
    }
    Err(Error::usage(format!(
        "a reward model ({:?} of {}), expected a causal language model",
        model.architecture,
        model.labels.join(", ")
    ))
    .at(name)
    .hint("name the model that it was trained from, or the checkpoint of an `sft` or `dpo` stage"))
}

/// Loads the model that a stage trains, with any head, as in [`Adapt::start`], and sets the template.
///
/// # Errors
/// As [`Adapt::start`].
pub fn base(
    context: &StageContext<'_>,
    (adapt, bases): (&Adapt<'_>, &Bases),
    chat_template: &str,
) -> Result<Start> {
    let mut start = adapt.start(bases, &context.device)?;
    set_template(&mut start.checkpoint, chat_template)?;
    Ok(start)
}

/// A randomly initialized model from a directory with a configuration and a tokenizer.
pub fn random(context: &StageContext<'_>, dir: &str, chat_template: &str) -> Result<Checkpoint> {
    let dir = &run_dir::model(std::path::Path::new(dir))?;
    let config = crate::model::checkpoint::load_config(dir)?;
    check_writes(&dir.display().to_string(), &config)?;
    let weights = crate::model::init::random(&config, context.seed, &context.device)?;
    let mut checkpoint =
        Checkpoint { config, weights, tokenizer: Some(ChatTokenizer::from_dir(dir)?) };
    set_template(&mut checkpoint, chat_template)?;
    Ok(checkpoint)
}

fn set_template(checkpoint: &mut Checkpoint, chat_template: &str) -> Result<()> {
    if !chat_template.is_empty() {
        checkpoint.tokenizer =
            Some(checkpoint.tokenizer()?.with_template(chat_template).at("chat_template")?);
    }
    Ok(())
}

/// Reads and joins datasets into memory, in order: prompts of the sampling stages.
pub fn rows(
    context: &StageContext<'_>,
    datasets: &[Dataset],
    on_bad_row: OnBadRow,
) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    for (index, dataset) in datasets.iter().enumerate() {
        let mut found = read(&dataset.path, &dataset.source(on_bad_row).read)?;
        let mut skipped = Skipped::default();
        found.skipped.into_iter().for_each(|(place, why)| skipped.add(&place, why, 1));
        note_skipped(context, &dataset.path, &skipped);
        if dataset.limit > 0 {
            found.rows.truncate(dataset.limit);
        }
        all.extend(take(&found.rows, dataset.fraction, index, context.seed)?);
    }
    if all.is_empty() {
        let paths: Vec<&str> = datasets.iter().map(|dataset| dataset.path.as_str()).collect();
        return Err(Error::run("no rows")
            .at(paths.join(", "))
            .hint("raise `fraction`, or look at the file"));
    }
    Ok(all)
}

/// Directory of a training stage's prepared examples, until it is finished.
pub const PREPARED: &str = "prepared";

/// The examples of the datasets, joined in order: training reshuffles them each epoch. They are stored in a file in the
/// stage's directory, which a resumed stage reuses if it is intact and was made from the same data and settings.
///
/// # Errors
/// As [`Pipeline::write`].
pub fn examples(
    context: &StageContext<'_>,
    start: &Checkpoint,
    datasets: &[Dataset],
    rule: &Rule,
) -> Result<Box<dyn Examples>> {
    if datasets.is_empty() {
        return Ok(Box::new(Vec::new()));
    }
    let stored = stored(context, &pipeline(context, start, datasets, rule)?)?;
    note_report(context, stored.report());
    Ok(Box::new(stored))
}

/// A stage's training data: the examples of its datasets, or with `streaming` a stream of them.
///
/// # Errors
/// As [`examples`]; for a stream, none at this point.
pub fn data(
    context: &StageContext<'_>,
    start: &Checkpoint,
    (datasets, rule): (&[Dataset], &Rule),
    settings: &Settings,
) -> Result<Data> {
    if !settings.streaming {
        return Ok(Data::Set(examples(context, start, datasets, rule)?));
    }
    Ok(Data::Stream(Arc::new(Origin {
        pipeline: pipeline(context, start, datasets, rule)?,
        window: if settings.shuffle { settings.shuffle_buffer_size } else { 0 },
        report: Mutex::default(),
    })))
}

fn pipeline(
    context: &StageContext<'_>,
    start: &Checkpoint,
    datasets: &[Dataset],
    rule: &Rule,
) -> Result<Pipeline> {
    Ok(Pipeline {
        sources: datasets.iter().map(|dataset| dataset.source(rule.on_bad_row())).collect(),
        rule: rule.clone(),
        tokenizer: start.tokenizer()?.clone(),
        seed: context.seed,
        positions: start.config.max_position_embeddings,
    })
}

/// The file of a pipeline's examples, rewritten if it is missing or invalid.
fn stored(context: &StageContext<'_>, pipeline: &Pipeline) -> Result<Stored> {
    let hash = pipeline.hash()?;
    let name = format!("{}.trees", &crate::store::hex(&hash)[..16]);
    let path = context.dir.join(PREPARED).join(name);
    if path.exists() {
        match Stored::open(&path, &hash) {
            Ok(stored) => return Ok(stored),
            Err(error) => context.events.note(&format!("{error}; preparing the rows again")),
        }
    }
    let mut watch = |rows: usize| {
        context.events.progress("rows", rows as u64, 0);
        context.events.check_interrupt()
    };
    crate::store::write_atomic_with(&path, |out| pipeline.write(out, (&path, &hash), &mut watch))?;
    Stored::open(&path, &hash)
}

/// Notes what preparation skipped.
pub fn note_report(context: &StageContext<'_>, report: &PrepareReport) {
    for (path, unread) in &report.unread {
        note_skipped(context, path, unread);
    }
    note_skipped(context, "preparation", &report.skipped);
    if report.truncated > 0 {
        context.events.note(&format!("{} rows were cut to max_length", report.truncated));
    }
}

fn note_skipped(context: &StageContext<'_>, what: &str, skipped: &Skipped) {
    if skipped.count == 0 {
        return;
    }
    let rows: Vec<String> =
        skipped.first.iter().map(|(place, why)| format!("  {place}: {why}")).collect();
    let more = if skipped.count > Skipped::SHOWN { "\n  …" } else { "" };
    context.events.note(&format!(
        "{what}: {} rows were skipped\n{}{more}",
        skipped.count,
        rows.join("\n")
    ));
}

/// The model of a training stage, and its data.
pub struct Work<'a> {
    /// The model; its configuration and tokenizer are saved with the result.
    pub trainee: Trainee,
    /// The objective to minimize.
    pub objective: &'a dyn Objective,
    /// Training examples.
    pub train: &'a Data,
    /// Held-out examples and their objective.
    pub eval: (&'a dyn Objective, &'a dyn Examples),
    /// A reference that follows the policy.
    pub follower: Option<&'a Follower>,
    /// Prompts to answer at each evaluation, for people to read.
    pub samples: &'a [Row],
    /// Training settings.
    pub settings: &'a Settings,
}

/// Trains and writes `checkpoint/`.
pub fn fit(context: &StageContext<'_>, work: &Work<'_>) -> Result<Metrics> {
    let trainee = &work.trainee;
    let save = |_: &Learner, dir: &std::path::Path| trainee.write(dir);
    let samples = |learner: &Learner| {
        let now = trainee.checkpoint(learner)?.on(&context.device)?;
        answers(&now.computed_in(work.settings.dtype)?, work.samples)
    };
    let job = Job {
        objective: work.objective,
        train: work.train,
        eval: work.eval,
        settings: work.settings,
        seed: context.seed,
        dir: &context.dir,
        save: &save,
        follower: work.follower,
        samples: (!work.samples.is_empty()).then_some(&samples),
        events: context.events,
    };
    let mut metrics = train::fit(&trainee.learner, &job)?;
    match work.train {
        Data::Set(examples) => {
            metrics.insert("examples".to_owned(), examples.len() as f64);
        }
        Data::Stream(origin) => {
            let report = origin.report.lock().unwrap_or_else(PoisonError::into_inner);
            note_report(context, &report);
        }
    }
    let target = context.dir.join("checkpoint");
    crate::store::remove(&target)?;
    trainee.save(&target, work.settings.save_dtype)?;
    Ok(metrics)
}

/// Greedy answers to the sample prompts, one line each.
fn answers(checkpoint: &Checkpoint, rows: &[Row]) -> Result<Vec<String>> {
    let model = LocalModel::new(checkpoint)?;
    let asked = rows.iter().enumerate().map(|(index, row)| Asked::from_row(index, row));
    let asked: Vec<Asked> = asked.collect::<Result<_>>()?;
    let mut lines = vec![String::new(); asked.len()];
    model.answer(&asked, &Sampling::greedy(64), &mut |place, answers| {
        let text = answers.first().map_or("", |answer| answer.text.trim());
        lines[place] = format!("{}: {text}", asked[place].place);
        Ok(())
    })?;
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use candle_core::Device;

    use super::*;
    use crate::data::prepare::SftOptions;
    use crate::data::tree::Tree;
    use crate::loss::sft::TokenLoss;
    use crate::report::record::Events;

    /// Records the notes, and the number of progress reports.
    #[derive(Default)]
    struct Heard {
        notes: Mutex<Vec<String>>,
        batches: Mutex<usize>,
    }

    impl Events for Heard {
        fn progress(&self, _what: &str, _done: u64, _total: u64) {
            *self.batches.lock().unwrap() += 1;
        }
        fn metrics(&self, _step: u64, _values: &Metrics) -> Result<()> {
            Ok(())
        }
        fn resume_after(&self, _step: u64) -> Result<()> {
            Ok(())
        }
        fn note(&self, text: &str) {
            self.notes.lock().unwrap().push(text.to_owned());
        }
        fn interrupted(&self) -> bool {
            false
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the test damages a file on purpose")]
    fn examples_are_prepared_once_and_again_if_their_file_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("a.jsonl");
        let rows = "{\"prompt\": \"1 + 1\", \"completion\": \"2\"}\nnot JSON\n".repeat(3);
        crate::store::write_atomic(&data, rows.as_bytes()).unwrap();
        let datasets = [Dataset { path: data.display().to_string(), ..Dataset::default() }];
        let options = SftOptions { on_bad_row: OnBadRow::Skip, ..SftOptions::default() };
        let start = Checkpoint::load_dir("data/tiny/student".as_ref(), &Device::Cpu).unwrap();
        let prepare = || -> (Vec<Tree>, Vec<String>, usize) {
            let heard = Heard::default();
            let context = StageContext {
                dir: dir.path().join("stage"),
                round: 1,
                seed: 1,
                device: Device::Cpu,
                events: &heard,
            };
            let found = examples(&context, &start, &datasets, &Rule::Sft(options.clone())).unwrap();
            let trees = found.trees().collect::<Result<_>>().unwrap();
            let batches = *heard.batches.lock().unwrap();
            (trees, heard.notes.into_inner().unwrap(), batches)
        };
        let (trees, notes, batches) = prepare();
        assert_eq!((trees.len(), notes.len(), batches), (3, 1, 1));
        assert!(notes[0].contains("a.jsonl: 3 rows were skipped\n"), "{notes:?}");
        // Nothing is read again, and skipped rows are still reported.
        assert_eq!(prepare(), (trees.clone(), notes.clone(), 0));

        let files = crate::store::entries(&dir.path().join("stage").join(PREPARED)).unwrap();
        let [file] = &files[..] else { panic!("{files:?}") };
        let mut bytes = std::fs::read(file).unwrap();
        bytes[60] ^= 1;
        std::fs::write(file, &bytes).unwrap();
        let (again, loud, batches) = prepare();
        assert_eq!((again, batches), (trees.clone(), 1));
        assert!(loud[0].ends_with("the file is damaged; preparing the rows again"), "{loud:?}");
        assert_eq!(prepare(), (trees, notes, 0));
    }
    /// Asks to stop once the given step is done.
    struct StopAfter(u64, AtomicU64);

    impl Events for StopAfter {
        fn progress(&self, _what: &str, done: u64, _total: u64) {
            self.1.store(done, Ordering::Relaxed);
        }
        fn interrupted(&self) -> bool {
            self.1.load(Ordering::Relaxed) == self.0
        }
    }

    #[test]
    fn resumed_training_on_a_stream_ends_with_the_same_bits() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("a.jsonl");
        let row =
            |n: usize| format!("{{\"prompt\": \"{n} + 1\", \"completion\": \"{}\"}}\n", n + 1);
        let rows: String = (0..22).map(row).collect();
        crate::store::write_atomic(&data, rows.as_bytes()).unwrap();
        let path = data.display().to_string();
        let spec = crate::recipe::plan::Sft {
            model_name_or_path: "data/tiny/student".to_owned(),
            datasets: vec![Dataset { path, ..Dataset::default() }],
            train: Settings {
                streaming: true,
                shuffle_buffer_size: 5,
                per_device_train_batch_size: 4,
                // Into the second pass; the first ended in a partial step.
                max_steps: 9,
                learning_rate: 1e-3,
                ..Settings::default()
            },
            ..Default::default()
        };
        let train = |spec: &crate::recipe::plan::Sft, name: &str, stop: u64| {
            let context = StageContext {
                dir: dir.path().join(name),
                round: 1,
                seed: 1,
                device: Device::Cpu,
                events: &StopAfter(stop, AtomicU64::default()),
            };
            let outcome = crate::stage::sft::run(&context, spec);
            let weights = context.dir.join("checkpoint/model.safetensors");
            outcome.map(|metrics| (crate::store::sha256_file(&weights).unwrap(), metrics))
        };
        // ASFT's reference is the initial policy, not the one that the run resumes with.
        let asft = crate::recipe::plan::Sft {
            loss_type: TokenLoss::Asft,
            asft_alpha: 0.5,
            ..spec.clone()
        };
        for (what, spec) in [("nll", spec), ("asft", asft)] {
            let (whole, metrics) = train(&spec, what, u64::MAX).unwrap();
            if what == "asft" {
                assert_eq!(metrics["first_loss/kl"].to_bits(), 0);
                assert!(metrics["loss/kl"] > 1e-6, "{metrics:?}");
            }
            for stop in [2, 6, 8] {
                let name = format!("{what}-stopped-{stop}");
                assert!(train(&spec, &name, stop).is_err(), "{what} ran on after step {stop}");
                let (resumed, _) = train(&spec, &name, u64::MAX).unwrap();
                assert_eq!(resumed, whole, "{what} stopped after step {stop}");
            }
        }
    }
}
