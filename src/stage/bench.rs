//! How fast this machine takes steps: the trainer's own step and the generator's own loop on made-up tokens.
//!
//! Tokens are drawn at random: what a step costs depends on how many there are, not on which.

use std::path::Path;
use std::time::Instant;

use candle_core::Device;
use serde::Serialize;

use crate::data::tree::{Role, Tree};
use crate::error::{Error, Result};
use crate::generate::engine::Prompt;
use crate::generate::local::LocalModel;
use crate::generate::sampling::Sampling;
use crate::loss::Objective;
use crate::loss::preference::Preference;
use crate::loss::reward::Reward;
use crate::loss::sft::Sft;
use crate::model::Transformer;
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::optim::adamw::AdamW;
use crate::optim::clip_factor;
use crate::report::record::Silent;
use crate::rng::Stream;
use crate::train::reference::{Request, reference_logps};
use crate::train::step::{self, StepOptions};
use crate::train::{Learner, Order, Settings};

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Steps of supervised fine-tuning on rows of `seq` tokens, all trained.
    Sft,
    /// Steps of DPO on pairs of `prompt` shared tokens and two responses of `seq − prompt`.
    Dpo,
    /// Steps of a reward model on the same pairs.
    Reward,
    /// `batch` samples of one prompt of `prompt` tokens, `seq − prompt` new tokens each.
    Generate,
}

/// How much to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// A checkpoint directory, a GGUF file or a hub id.
    pub model: String,
    /// Rows, pairs or samples a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// Steps, after one that is not counted.
    pub steps: usize,
    /// Recompute blocks in the backward pass.
    pub recompute: bool,
}

/// What was measured. Rates are of the median step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Tokens a second; those of a shared prompt count once for each sequence that has it, as other programs compute
    /// them. Generation counts new tokens.
    pub tokens_per_s: f64,
    /// Pairs a second, where there are pairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs_per_s: Option<f64>,
    /// Seconds of the median step.
    pub step_s: f64,
    /// Seconds of each step.
    pub steps_s: Vec<f64>,
    /// Seconds that the reference's log-probabilities of one step took, where there is a reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_s: Option<f64>,
}

/// Measures one method.
///
/// # Errors
/// No such model, no steps, or a prompt that leaves no response.
pub fn run(method: Method, options: &Options) -> Result<Figures> {
    let has_prompt = method != Method::Sft;
    if options.steps == 0 || options.batch == 0 || options.seq < 2 {
        return Err(
            Error::usage("nothing to measure").hint("--steps and --batch begin at 1, --seq at 2")
        );
    }
    if has_prompt && !(1..options.seq).contains(&options.prompt) {
        let (prompt, seq) = (options.prompt, options.seq);
        return Err(Error::usage(format!("a prompt of {prompt} in sequences of {seq} tokens"))
            .hint("--prompt is 1 or more and less than --seq"));
    }
    let start = Checkpoint::load(&options.model, &Device::Cpu, &LoadOptions::default())?;
    match method {
        Method::Generate => generate(&start, options),
        Method::Reward => train(start.into_reward_model(1)?, method, options),
        Method::Sft | Method::Dpo => train(start, method, options),
    }
}

fn tokens(vocab: usize, index: usize, len: usize) -> Vec<u32> {
    let stream = Stream::new(1, "bench");
    stream
        .permutation(index as u64, vocab)
        .into_iter()
        .cycle()
        .take(len)
        .map(|id| id as u32)
        .collect()
}

/// One step's examples.
fn trees(method: Method, options: &Options, vocab: usize) -> Vec<Tree> {
    let Options { batch, seq, prompt, .. } = *options;
    let response = |index: usize| {
        let len = seq - prompt;
        (tokens(vocab, index, len), vec![Role::Content; len])
    };
    (0..batch)
        .map(|index| {
            if method == Method::Sft {
                return Tree::sequence(tokens(vocab, index, seq), vec![Role::Content; seq], index);
            }
            let responses = vec![response(batch + 2 * index), response(batch + 2 * index + 1)];
            Tree::siblings(tokens(vocab, index, prompt), responses, index)
        })
        .collect()
}

fn train(start: Checkpoint, method: Method, options: &Options) -> Result<Figures> {
    let trees = trees(method, options, start.config.vocab_size);
    let settings = Settings {
        per_device_train_batch_size: options.batch,
        max_tokens_per_micro_batch: 4096,
        ..Settings::default()
    };
    let (objective, reference_s): (Box<dyn Objective>, _) = match method {
        Method::Dpo => {
            let began = Instant::now();
            let objective = dpo(&start, &trees, &settings)?;
            (Box::new(objective), Some(began.elapsed().as_secs_f64()))
        }
        Method::Reward => (Box::new(Reward::default()), None),
        _ => (Box::new(Sft::default()), None),
    };
    let learner = Learner::new(&start.config, &start.weights)?;
    drop(start);
    let mut adamw = AdamW::new(settings.hyper());
    let borrowed: Vec<&Tree> = trees.iter().collect();
    let cut = StepOptions {
        max_tokens: settings.max_tokens_per_micro_batch,
        recompute: options.recompute,
    };
    let mut steps_s = Vec::with_capacity(options.steps);
    for step in 0..=options.steps {
        let began = Instant::now();
        let (grads, _) = step::gradients(&learner, objective.as_ref(), &borrowed, cut)?;
        let scale = clip_factor(grads.norm()?, settings.max_grad_norm);
        adamw.step(learner.params(), &grads, 1e-6, scale)?;
        if step > 0 {
            steps_s.push(began.elapsed().as_secs_f64());
        }
    }
    let sequences = if method == Method::Sft { options.batch } else { 2 * options.batch };
    let step_s = median(&steps_s);
    Ok(Figures {
        tokens_per_s: (sequences * options.seq) as f64 / step_s,
        pairs_per_s: (method != Method::Sft).then(|| options.batch as f64 / step_s),
        step_s,
        steps_s,
        reference_s,
    })
}

/// The objective with the start as its reference.
fn dpo(start: &Checkpoint, trees: &[Tree], settings: &Settings) -> Result<Preference> {
    let mut objective = Preference::default();
    let scratch = tempfile::tempdir()?;
    let request = Request {
        model: &Transformer::new(&start.config, &start.weights)?,
        weights_hash: "",
        trees,
        order: &Order::new(1, trees.len(), settings),
        settings,
        dir: Path::new(scratch.path()),
        events: &Silent,
    };
    objective.reference = reference_logps(&request, objective.summing)?;
    Ok(objective)
}

fn generate(start: &Checkpoint, options: &Options) -> Result<Figures> {
    let model = LocalModel::new(start)?;
    let prompts = [Prompt { index: 0, tokens: tokens(start.config.vocab_size, 0, options.prompt) }];
    let sampling = Sampling {
        num_samples: options.batch,
        max_new_tokens: options.seq - options.prompt,
        ..Sampling::default()
    };
    let (mut steps_s, mut rates) = (Vec::new(), Vec::new());
    for step in 0..=options.steps {
        let began = Instant::now();
        let mut drawn = 0;
        model.run(
            &prompts,
            &Sampling { seed: step as u64, ..sampling.clone() },
            &mut |_, answers| {
                drawn += answers.iter().map(|answer| answer.ids.len()).sum::<usize>();
                Ok(())
            },
        )?;
        if step > 0 {
            steps_s.push(began.elapsed().as_secs_f64());
            rates.push(drawn as f64 / began.elapsed().as_secs_f64());
        }
    }
    Ok(Figures {
        tokens_per_s: median(&rates),
        step_s: median(&steps_s),
        steps_s,
        ..Figures::default()
    })
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_measured_and_nonsense_is_refused() {
        let options = Options {
            model: "data/tiny/student".to_owned(),
            batch: 2,
            seq: 12,
            prompt: 5,
            steps: 2,
            recompute: false,
        };
        for method in [Method::Sft, Method::Dpo, Method::Reward, Method::Generate] {
            let figures = run(method, &options).unwrap();
            assert!(figures.tokens_per_s > 0.0 && figures.steps_s.len() == 2, "{method:?}");
            let has_pairs = matches!(method, Method::Dpo | Method::Reward);
            assert_eq!(figures.pairs_per_s.is_some(), has_pairs, "{method:?}");
        }
        assert!(run(Method::Dpo, &Options { prompt: 12, ..options.clone() }).is_err());
        assert!(run(Method::Sft, &Options { steps: 0, ..options }).is_err());
        assert!((median(&[3.0, 1.0, 2.0, 9.0]) - 2.5).abs() < 1e-12);
    }
}
