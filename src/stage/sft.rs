//! Supervised fine-tuning (Llama 3, section 4.1.3): cross-entropy on the response tokens of a dataset.

use std::collections::BTreeMap;

use super::training::{self, Work};
use super::{Metrics, StageContext};
use crate::data::prepare::sft_trees;
use crate::data::record::Row;
use crate::data::tree::Tree;
use crate::error::{Context, Result};
use crate::loss::sft::Sft;
use crate::model::checkpoint::Checkpoint;
use crate::recipe::plan;

/// Trains the start on the dataset. Input: a checkpoint and rows. Output: `checkpoint/`.
pub fn run(context: &StageContext<'_>, spec: &plan::Sft) -> Result<Metrics> {
    let mut start = if spec.random_init {
        training::random(context, &spec.model_name_or_path, &spec.chat_template)?
    } else {
        training::load(context, &spec.model_name_or_path, &spec.chat_template)?
    };
    if !spec.added_tokens.is_empty() {
        start.add_tokens(&spec.added_tokens).at("`added_tokens`")?;
    }
    let (rows, train) = trees(context, &start, spec, &spec.datasets)?;
    let (held_out_rows, held_out) = trees(context, &start, spec, &spec.eval_datasets)?;
    let (objective, held_out_objective) =
        (objective(spec, &rows)?, objective(spec, &held_out_rows)?);
    let samples = &held_out_rows[..spec.train.eval_samples.min(held_out_rows.len())];
    let work = Work {
        start: &start,
        objective: &objective,
        train: &train,
        eval: (&held_out_objective, &held_out),
        samples,
        settings: &spec.train,
    };
    training::fit(context, &work)
}

/// The loss that the recipe names, with the rows' weights.
fn objective(spec: &plan::Sft, rows: &[Row]) -> Result<Sft> {
    let mut row_weights = BTreeMap::new();
    if !spec.row_weight_column.is_empty() {
        for (index, row) in rows.iter().enumerate() {
            row_weights.insert(index, row.weight(&spec.row_weight_column).at(&row.place)?);
        }
    }
    Ok(Sft { loss: spec.loss_type, normalization: spec.loss_normalization, row_weights })
}

fn trees(
    context: &StageContext<'_>,
    start: &Checkpoint,
    spec: &plan::Sft,
    datasets: &[plan::Dataset],
) -> Result<(Vec<Row>, Vec<Tree>)> {
    if datasets.is_empty() {
        return Ok(Default::default());
    }
    let rows = training::rows(context, datasets, spec.data.on_bad_row)?;
    let prepared = sft_trees(&rows, start.tokenizer()?, &spec.data)?;
    let trees = training::checked(context, prepared, &rows, start)?;
    Ok((rows, trees))
}
