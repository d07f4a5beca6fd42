//! Reward modelling (Llama 3, section 4.1.2): the base model with a score head learns which responses people prefer,
//! how people rate them, or which answers and steps are right.

use serde_json::Value;

use super::adapt::Adapt;
use super::start::Start;
use super::training::{self, Work};
use super::{Metrics, StageContext};
use crate::data::pipeline::{Source, first_rows};
use crate::data::prepare::Rule;
use crate::error::Result;
use crate::loss::Objective;
use crate::loss::reward::{Correctness, Regression, Reward};
use crate::model::Architecture;
use crate::model::bases::Bases;
use crate::model::checkpoint::Checkpoint;
use crate::model::labels::{self, PLAIN_TEXT, PROMPT_FORMAT};
use crate::recipe::plan::{self, Head};

/// Trains a score head and the model under it. Input: a checkpoint (the paper uses the pre-trained one) and rows that
/// match the head. Output: `checkpoint/`, a `LlamaForSequenceClassification`, or for steps a
/// `LlamaForTokenClassification`.
pub fn run(context: &StageContext<'_>, spec: &plan::Reward) -> Result<Metrics> {
    let adapt = Adapt::new(context, (&spec.lora, &spec.model_name_or_path), &spec.train);
    let begin = training::base(context, (&adapt, &Bases::default()), &spec.chat_template)?;
    let mut checkpoint = with_head(begin.checkpoint, spec, context.seed)?;
    let rule = spec.rule(context.seed);
    // Scorers must format prompts as in this training, which may differ from that of the initial model.
    let facts = &mut checkpoint.config.other;
    facts.retain(|key, _| key != PROMPT_FORMAT);
    if of_plain_text(context, &spec.datasets, &rule)? {
        facts.insert(PROMPT_FORMAT.to_owned(), Value::String(PLAIN_TEXT.to_owned()));
    }
    let begin = Start { checkpoint, ..begin };
    let start = &begin.checkpoint;
    let train = training::data(context, start, (&spec.datasets, &rule), &spec.train)?;
    let held_out = training::examples(context, start, &spec.eval_datasets, &rule)?;
    let objective = objective(spec);
    let work = Work {
        trainee: adapt.trainee(begin)?,
        objective: objective.as_ref(),
        train: &train,
        eval: (objective.as_ref(), held_out.as_ref()),
        follower: None,
        samples: &[],
        settings: &spec.train,
    };
    training::fit(context, &work)
}

/// Whether the first rows are plain text, which is trained on without the chat template.
fn of_plain_text(
    context: &StageContext<'_>,
    datasets: &[plan::Dataset],
    rule: &Rule,
) -> Result<bool> {
    const LOOKED_AT: usize = 16;
    let sources: Vec<Source> =
        datasets.iter().map(|dataset| dataset.source(rule.on_bad_row())).collect();
    let rows = first_rows(&sources, context.seed, LOOKED_AT)?;
    Ok(!rows.is_empty() && rows.iter().all(|row| row.record.is_plain_text()))
}

fn with_head(start: Checkpoint, spec: &plan::Reward, seed: u64) -> Result<Checkpoint> {
    match spec.head {
        Head::BradleyTerry | Head::Outcome => start.into_reward_model(seed),
        Head::Regression => {
            start.into_scorer(Architecture::SequenceClassification, &spec.attributes, seed)
        }
        Head::Process => {
            let architecture = Architecture::TokenClassification;
            let mut model = start.into_scorer(architecture, &labels::STEP, seed)?;
            // Scorers must split answers into steps as in training.
            let separator = Value::String(spec.step_separator.clone());
            model.config.other.insert(labels::STEP_SEPARATOR.to_owned(), separator);
            Ok(model)
        }
    }
}

/// The objective for training and evaluation with these settings.
pub(super) fn objective(spec: &plan::Reward) -> Box<dyn Objective> {
    match spec.head {
        Head::BradleyTerry => Box::new(Reward {
            ranking: spec.ranking,
            use_margin: spec.use_margin,
            center_coefficient: spec.center_rewards_coefficient,
        }),
        Head::Regression => Box::new(Regression { attributes: spec.attributes.clone() }),
        Head::Process => Box::new(Correctness { outputs: labels::STEP.len() }),
        Head::Outcome => Box::new(Correctness { outputs: 1 }),
    }
}
