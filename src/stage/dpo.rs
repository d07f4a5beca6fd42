//! Direct Preference Optimization in the form of Llama 3 (section 4.1.4): formatting tokens masked on both sides, and
//! the negative log-likelihood of the chosen response with a small weight.

use super::training::{self, Work};
use super::{Metrics, StageContext};
use crate::data::examples::Examples;
use crate::data::prepare::Rule;
use crate::error::{Error, Result};
use crate::loss::preference::Dpo;
use crate::model::Transformer;
use crate::recipe::plan;
use crate::train::reference::{Request, reference_logps};
use crate::train::{Data, Order};

/// Trains the policy on pairs against a frozen reference, by default its own start. Input: a checkpoint and pairs.
/// Output: `checkpoint/`.
pub fn run(context: &StageContext<'_>, spec: &plan::Dpo) -> Result<Metrics> {
    if spec.loss_type != "sigmoid" {
        return Err(Error::usage(format!("loss_type `{}` is not built yet", spec.loss_type))
            .hint("use `sigmoid`"));
    }
    let start = training::load(context, &spec.model_name_or_path, &spec.chat_template)?;
    let rule = Rule::Pairs(spec.data.clone());
    let train = training::data(context, &start, (&spec.datasets, &rule), &spec.train)?;
    let Data::Set(pairs) = &train else {
        return Err(Error::usage("DPO cannot train on a stream").hint("leave `streaming` out"));
    };
    let held_out = training::examples(context, &start, &spec.eval_datasets, &rule)?;

    let reference = match spec.ref_model_name_or_path.as_str() {
        "" => start.clone(),
        other => training::load(context, other, &spec.chat_template)?,
    };
    let weights_hash = training::weights_sha256(&reference.weights)?;
    // Plain tensors: no graph, no optimizer. Computed in the policy's type, so that equal weights give equal numbers.
    let reference = reference.computed_in(spec.train.dtype)?;
    let reference = Transformer::new(&reference.config, &reference.weights)?;
    let objective = against(context, spec, (&reference, &weights_hash), pairs.as_ref())?;
    let held_out_objective =
        against(context, spec, (&reference, &weights_hash), held_out.as_ref())?;
    drop(reference);

    let work = Work {
        start,
        objective: &objective,
        train: &train,
        eval: (&held_out_objective, held_out.as_ref()),
        samples: &[],
        settings: &spec.train,
    };
    training::fit(context, work)
}

/// The objective with the reference's log-probabilities of these pairs.
fn against(
    context: &StageContext<'_>,
    spec: &plan::Dpo,
    (model, weights_hash): (&Transformer, &str),
    pairs: &dyn Examples,
) -> Result<Dpo> {
    let mut objective = Dpo {
        beta: spec.beta,
        label_smoothing: spec.label_smoothing,
        sft_weight: spec.sft_loss_weight,
        mask_formatting_tokens: spec.mask_formatting_tokens,
        reference: std::collections::BTreeMap::new(),
    };
    if pairs.is_empty() {
        return Ok(objective);
    }
    let request = Request {
        model,
        weights_hash,
        pairs,
        order: &Order::new(context.seed, pairs.len(), &spec.train),
        settings: &spec.train,
        dir: &context.dir,
        events: context.events,
    };
    objective.reference = reference_logps(&request, &objective)?;
    Ok(objective)
}
