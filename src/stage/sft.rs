//! Supervised fine-tuning (Llama 3, section 4.1.3): cross-entropy on the response tokens of a dataset.

use std::collections::BTreeMap;

use super::adapt::Adapt;
use super::training::{self, Work};
use super::{Metrics, StageContext};
use crate::data::pipeline::first_rows;
use crate::data::prepare::{Rule, SftOptions};
use crate::error::{Context, Error, Result};
use crate::loss::sft::Sft;
use crate::model::bases::Bases;
use crate::recipe::plan;
use crate::train::anchor;

/// Trains the initial model on the dataset. Input: a checkpoint and rows. Output: `checkpoint/`.
pub fn run(context: &StageContext<'_>, spec: &plan::Sft) -> Result<Metrics> {
    let adapt = Adapt::new(context, (&spec.lora, &spec.model_name_or_path), &spec.train);
    let mut begin = if spec.random_init {
        training::random(context, &spec.model_name_or_path, &spec.chat_template)?.into()
    } else {
        training::start(context, (&adapt, &Bases::default()), &spec.chat_template)?
    };
    let start = &mut begin.checkpoint;
    let rows = start.config.vocab_size;
    if !spec.added_tokens.is_empty() {
        start.add_tokens(&spec.added_tokens).at("`added_tokens`")?;
    }
    if spec.lora.use_peft && start.config.vocab_size > rows {
        return Err(Error::usage(
            "`added_tokens` with `use_peft`: an adapter has no rows for them",
        )
        .hint("add them in a stage that trains the whole model"));
    }
    let weighed = SftOptions { weight_column: spec.row_weight_column.clone(), ..spec.data.clone() };
    let train = training::data(context, start, (&spec.datasets, &Rule::Sft(weighed)), &spec.train)?;
    let rule = Rule::Sft(spec.data.clone());
    let held_out = training::examples(context, start, &spec.eval_datasets, &rule)?;
    let sources: Vec<_> =
        spec.eval_datasets.iter().map(|dataset| dataset.source(rule.on_bad_row())).collect();
    let samples = first_rows(&sources, context.seed, spec.train.eval_samples)?;
    let mut objective = objective(context, spec, (&spec.datasets, true))?;
    let mut held_out_objective = self::objective(context, spec, (&spec.eval_datasets, false))?;
    let trainee = adapt.trainee(begin)?;
    if objective.needs_reference() {
        let reference = anchor(&trainee.learner)?;
        held_out_objective.reference = Some(reference.clone());
        objective.reference = Some(reference);
    }
    let work = Work {
        trainee,
        objective: &objective,
        train: &train,
        eval: (&held_out_objective, held_out.as_ref()),
        follower: None,
        samples: &samples,
        settings: &spec.train,
    };
    training::fit(context, &work)
}

/// The loss named in the recipe, with the rows' weights. Training rows with a missing or bad weight were refused or
/// skipped during preparation; held-out rows need none.
fn objective(
    context: &StageContext<'_>,
    spec: &plan::Sft,
    (datasets, learned): (&[plan::Dataset], bool),
) -> Result<Sft> {
    let mut row_weights = BTreeMap::new();
    if !spec.row_weight_column.is_empty() && !datasets.is_empty() {
        let rows = training::rows(context, datasets, spec.data.on_bad_row)?;
        for (index, row) in rows.iter().enumerate() {
            let has_weight = row.extra.contains_key(&spec.row_weight_column);
            match row.weight(&spec.row_weight_column) {
                Ok(weight) => _ = row_weights.insert(index, weight),
                Err(error) if has_weight && !learned => return Err(error.at(&row.place)),
                Err(_) => {}
            }
        }
    }
    Ok(Sft { row_weights, ..spec.loss() })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::stage::recipe_tests;

    /// The divergence is trained down: a larger weight leaves the policy closer to where it began.
    #[test]
    fn asft_keeps_the_policy_near_its_start() {
        let row = |n: usize| json!({"prompt": format!("{n} + 2 = ?"), "completion": format!("{} apples", n + 2)});
        let rows: Vec<Value> = (0..4).map(row).collect();
        let adapters = [("use_peft", json!(true)), ("lora_r", json!(4))];
        for (what, method) in [
            ("full", &[][..]),
            ("adapters", &adapters),
            (
                "in bf16",
                &[
                    ("dtype", json!("bf16")),
                    ("optimizer_in_backward", json!(true)),
                    ("max_grad_norm", json!(0.0)),
                ],
            ),
        ] {
            let apart = [0.01, 30.0].map(|alpha| {
                let dir = tempfile::tempdir().unwrap();
                let path = recipe_tests::written(dir.path(), &rows);
                let keys = [
                    ("loss_type", json!("asft")),
                    ("asft_alpha", json!(alpha)),
                    ("max_steps", json!(12)),
                    ("learning_rate", json!(2e-3)),
                    ("eval_datasets", json!([path])),
                ];
                let metrics = recipe_tests::run(dir.path(), "sft", &[&keys, method].concat());
                assert_eq!(metrics["first_loss/kl"].to_bits(), 0, "{what}");
                let loss = metrics["eval_loss/dft"] + alpha * metrics["eval_loss/kl"];
                let apart = (metrics["eval_loss"] - loss).abs();
                assert!(apart < 1e-9 * loss, "{what}: {metrics:?}");
                metrics["eval_loss/kl"]
            });
            assert!(apart[1] < 0.3 * apart[0], "{what}: {apart:?}");
        }
    }
}
