//! What the three training stages share: load the start, read rows into trees, fit, save. No method is known here.

use candle_core::DType;
use sha2::{Digest, Sha256};

use super::StageContext;
use crate::data::mix::take;
use crate::data::prepare::{OnBadRow, PrepareReport, Prepared};
use crate::data::read::{ReadOptions, read};
use crate::data::record::Row;
use crate::data::tokenizer::ChatTokenizer;
use crate::data::tree::Tree;
use crate::error::{Context, Error, Result};
use crate::generate::local::{Asked, LocalModel, Teacher};
use crate::generate::sampling::Sampling;
use crate::loss::Objective;
use crate::model::Weights;
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::model::save::SaveOptions;
use crate::recipe::plan::Dataset;
use crate::report::record::Metrics;
use crate::train::{self, Job, Learner, Settings};

/// Loads a checkpoint and, where one is named, gives its tokenizer another chat template.
pub fn load(context: &StageContext<'_>, model: &str, chat_template: &str) -> Result<Checkpoint> {
    let mut checkpoint = Checkpoint::load(model, &context.device, &LoadOptions::default())?;
    set_template(&mut checkpoint, chat_template)?;
    Ok(checkpoint)
}

/// A model of random weights from a directory that has a configuration and a tokenizer.
pub fn random(context: &StageContext<'_>, dir: &str, chat_template: &str) -> Result<Checkpoint> {
    let dir = std::path::Path::new(dir);
    let config = crate::model::checkpoint::load_config(dir)?;
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

/// Reads and joins datasets, in their own order: training shuffles examples anew each epoch.
pub fn rows(
    context: &StageContext<'_>,
    datasets: &[Dataset],
    on_bad_row: OnBadRow,
) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    for (index, dataset) in datasets.iter().enumerate() {
        let options = ReadOptions {
            columns: dataset.columns.clone().into_iter().collect(),
            split: Some(dataset.split.clone()),
            format: dataset.format,
            on_bad_row,
        };
        let mut found = read(&dataset.path, &options)?;
        note_skipped(context, &dataset.path, &found.skipped);
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

/// Says what preparation left out and refuses rows that the model has no positions for.
pub fn checked(
    context: &StageContext<'_>,
    prepared: Prepared,
    rows: &[Row],
    start: &Checkpoint,
) -> Result<Vec<Tree>> {
    let PrepareReport { skipped, truncated, .. } = &prepared.report;
    note_skipped(context, "preparation", skipped);
    if *truncated > 0 {
        context.events.note(&format!("{truncated} rows were cut to max_length"));
    }
    let positions = start.config.max_position_embeddings;
    for tree in &prepared.trees {
        let longest =
            |leaf| tree.path(leaf).iter().map(|&segment| tree.segments[segment].tokens.len()).sum();
        let longest: usize = tree.leaves().into_iter().map(longest).max().unwrap_or(0);
        if longest > positions {
            let place = rows.get(tree.source).map_or("a row", |row| row.place.as_str());
            return Err(Error::run(format!(
                "{longest} tokens, the model has {positions} positions"
            ))
            .at(place)
            .hint(format!("set max_length = {positions} or less")));
        }
    }
    Ok(prepared.trees)
}

/// The trees that pass `check`. Others stop the stage or are left out and counted, as `on_bad_row` says.
pub fn usable(
    context: &StageContext<'_>,
    trees: Vec<Tree>,
    (rows, on_bad_row): (&[Row], OnBadRow),
    check: &dyn Fn(&Tree) -> Result<()>,
) -> Result<Vec<Tree>> {
    let (mut kept, mut skipped) = (Vec::with_capacity(trees.len()), Vec::new());
    for tree in trees {
        let place = rows.get(tree.source).map_or("a row", |row| row.place.as_str());
        match check(&tree) {
            Ok(()) => kept.push(tree),
            Err(error) if on_bad_row == OnBadRow::Skip => {
                skipped.push((place.to_owned(), error.to_string()));
            }
            Err(error) => {
                return Err(error.at(place).hint("on_bad_row = \"skip\" leaves such rows out"));
            }
        }
    }
    note_skipped(context, "preparation", &skipped);
    if kept.is_empty() {
        return Err(Error::run(format!("none of {} rows can be used", rows.len())));
    }
    Ok(kept)
}

fn note_skipped(context: &StageContext<'_>, what: &str, skipped: &[(String, String)]) {
    const SHOWN: usize = 5;
    if skipped.is_empty() {
        return;
    }
    let rows: Vec<String> =
        skipped.iter().take(SHOWN).map(|(place, why)| format!("  {place}: {why}")).collect();
    let more = if skipped.len() > SHOWN { "\n  …" } else { "" };
    context.events.note(&format!(
        "{what}: {} rows were skipped\n{}{more}",
        skipped.len(),
        rows.join("\n")
    ));
}

/// What a stage trains, and on what.
pub struct Work<'a> {
    /// The start; its configuration and tokenizer are saved with the result.
    pub start: &'a Checkpoint,
    /// What to minimise.
    pub objective: &'a dyn Objective,
    /// Training examples.
    pub train: &'a [Tree],
    /// Held-out examples and their objective.
    pub eval: (&'a dyn Objective, &'a [Tree]),
    /// Prompts to answer at each evaluation, for people to read.
    pub samples: &'a [Row],
    /// How to train.
    pub settings: &'a Settings,
}

/// Trains and writes `checkpoint/`.
pub fn fit(context: &StageContext<'_>, work: &Work<'_>) -> Result<Metrics> {
    let learner = Learner::new(&work.start.config, &work.start.weights)?;
    let checkpoint = |learner: &Learner| Checkpoint {
        config: work.start.config.clone(),
        weights: learner.weights(),
        tokenizer: work.start.tokenizer.clone(),
    };
    let save = |learner: &Learner, dir: &std::path::Path| {
        checkpoint(learner).write_into(dir, &SaveOptions::new(DType::F32))
    };
    let samples = |learner: &Learner| answers(&checkpoint(learner), work.samples);
    let job = Job {
        objective: work.objective,
        train: work.train,
        eval: work.eval,
        settings: work.settings,
        seed: context.seed,
        dir: &context.dir,
        save: &save,
        samples: (!work.samples.is_empty()).then_some(&samples),
        events: context.events,
    };
    let mut metrics = train::fit(&learner, &job)?;
    metrics.insert("examples".to_owned(), work.train.len() as f64);
    let target = context.dir.join("checkpoint");
    crate::store::remove(&target)?;
    checkpoint(&learner).save(&target, &SaveOptions::new(work.settings.save_dtype.dtype()))?;
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

/// SHA-256 over names and elements of all weights.
pub fn weights_sha256(weights: &Weights) -> Result<String> {
    let mut hasher = Sha256::new();
    for (name, tensor) in weights {
        hasher.update(name);
        for value in tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
            hasher.update(value.to_le_bytes());
        }
    }
    Ok(crate::store::hex(&hasher.finalize()))
}

/// Preference rows as trees: a prompt with its responses, best first.
pub fn preferences(
    context: &StageContext<'_>,
    start: &Checkpoint,
    datasets: &[Dataset],
    options: &crate::data::prepare::PairOptions,
) -> Result<Vec<Tree>> {
    if datasets.is_empty() {
        return Ok(Vec::new());
    }
    let rows = rows(context, datasets, options.on_bad_row)?;
    let prepared = crate::data::prepare::pair_trees(&rows, start.tokenizer()?, options)?;
    checked(context, prepared, &rows, start)
}
