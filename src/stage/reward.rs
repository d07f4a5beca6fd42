//! Reward modelling (Llama 3, section 4.1.2): the base model with a score head learns which response people prefer.

use super::training::{self, Work};
use super::{Metrics, StageContext};
use crate::data::prepare::Rule;
use crate::error::Result;
use crate::loss::reward::Reward;
use crate::recipe::plan;

/// Trains a score head and the model under it on ranked responses. Input: a checkpoint (the paper takes the
/// pre-trained one) and preferences. Output: `checkpoint/`, a `LlamaForSequenceClassification`.
pub fn run(context: &StageContext<'_>, spec: &plan::Reward) -> Result<Metrics> {
    let start = training::load(context, &spec.model_name_or_path, &spec.chat_template)?;
    let start = start.into_reward_model(context.seed)?;
    let rule = Rule::Pairs(spec.data.clone());
    let train = training::data(context, &start, (&spec.datasets, &rule), &spec.train)?;
    let held_out = training::examples(context, &start, &spec.eval_datasets, &rule)?;
    let objective = Reward { center_coefficient: spec.center_rewards_coefficient };
    let work = Work {
        start,
        objective: &objective,
        train: &train,
        eval: (&objective, held_out.as_ref()),
        follower: None,
        samples: &[],
        settings: &spec.train,
    };
    training::fit(context, work)
}
