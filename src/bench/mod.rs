//! Step speed on this machine: the trainer's own step and the generator's own loop on synthetic tokens.
//!
//! Tokens are random: the cost of a step depends on their number, not on their values.

pub mod ceiling;
mod parts;
pub mod prepare;

use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use serde::Serialize;

use crate::data::tree::{Role, Tree};
use crate::error::{Error, Result};
use crate::generate::engine::Prompt;
use crate::generate::local::LocalModel;
use crate::generate::sampling::{Sampling, WeightFormat};
use crate::loss::Objective;
use crate::loss::preference::Preference;
use crate::loss::reward::Reward;
use crate::loss::sft::Sft;
use crate::model::Precision;
use crate::model::checkpoint::{self, Checkpoint, LoadOptions};
use crate::model::config::Config;
use crate::model::lora::Lora;
use crate::model::source::{self, Source};
use crate::model::transformer::Transformer;
use crate::ops::cpu::peak::read_rate;
use crate::optim::adamw::AdamW;
use crate::report::record::Silent;
use crate::rng::Stream;
use crate::stage::adapt::Adapt;
use crate::train::reference::{Request, reference_logps};
use crate::train::step::StepOptions;
use crate::train::update::{Pace, update};
use crate::train::{Order, Recompute, Settings};

/// The benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Steps of supervised fine-tuning on rows of `seq` tokens, all trained.
    Sft,
    /// Steps of DPO on pairs of `prompt` shared tokens and two responses of `seq − prompt`.
    Dpo,
    /// Steps of a reward model on the same pairs.
    Reward,
    /// The vocabulary head alone, forward and backward, over `batch · seq` rows with one target each.
    Head,
    /// One block's attention alone, forward and backward, over `batch` rows of `seq` tokens.
    Attention,
    /// `batch` samples of one prompt of `prompt` tokens, `seq − prompt` new tokens each.
    Generate,
    /// A reward model's scores of `batch` responses of `seq − prompt` tokens to one prompt of `prompt` tokens.
    Score,
}

impl Method {
    fn has_pairs(self) -> bool {
        matches!(self, Self::Dpo | Self::Reward)
    }
}

/// Size of the measurement.
#[derive(Clone, Debug)]
pub struct Options {
    /// A checkpoint directory, a GGUF file or a hub id.
    pub model: String,
    /// The device to measure.
    pub device: Device,
    /// Rows, pairs or samples per step.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq: usize,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// SFT on rows of 60 to 400 tokens whose first third is a masked prompt, instead of `seq` tokens.
    pub chat: bool,
    /// Number of steps, after one warm-up step.
    pub steps: usize,
    /// Recompute blocks in the backward pass.
    pub recompute: bool,
    /// Recompute as many blocks as this memory budget requires, such as "5GiB"; empty: as `recompute` says.
    pub memory_budget: String,
    /// Compute type.
    pub dtype: Precision,
    /// Train adapters of all projections instead of the whole model.
    pub lora: Lora,
    /// Prompts to sample at once, with `batch` answers each.
    pub prompts: usize,
    /// Weight format of the generating model.
    pub weights: WeightFormat,
}

/// Token budget of a micro-batch.
const MAX_TOKENS: usize = 4096;

impl Options {
    fn settings(&self) -> Settings {
        Settings {
            per_device_train_batch_size: self.batch,
            max_tokens_per_micro_batch: MAX_TOKENS,
            dtype: self.dtype,
            gradient_checkpointing: match (self.recompute, self.memory_budget.is_empty()) {
                (_, false) => Recompute::Auto,
                (true, true) => Recompute::Block,
                (false, true) => Recompute::None,
            },
            memory_budget: self.memory_budget.clone(),
            ..Settings::default()
        }
    }

    fn check(&self, method: Method) -> Result<()> {
        let has_prompt = method.has_pairs() || matches!(method, Method::Generate | Method::Score);
        if self.steps == 0 || self.batch == 0 || self.seq < 2 {
            return Err(Error::usage("nothing to measure")
                .hint("--steps and --batch begin at 1, --seq at 2"));
        }
        if has_prompt && !(1..self.seq).contains(&self.prompt) {
            let (prompt, seq) = (self.prompt, self.seq);
            return Err(Error::usage(format!("a prompt of {prompt} in sequences of {seq} tokens"))
                .hint("--prompt is 1 or more and less than --seq"));
        }
        let writes = self.prompts > 1 || self.weights != WeightFormat::None;
        if writes && method != Method::Generate {
            return Err(Error::usage(
                "--prompts or blocks of 4 or 8 bits, which only `generate` takes",
            )
            .hint("--quantization nf4 or gguf with --lora trains on packed projections"));
        }
        if self.chat && method != Method::Sft {
            return Err(Error::usage("--chat asks for chat rows, which only `sft` takes")
                .hint("leave it out, or measure `sft`"));
        }
        self.lora.check()?;
        self.settings().check()
    }
}

/// The measurements. Rates are those of the median step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Tokens per second; those of a shared prompt count once per sequence, as other programs compute them. Generation
    /// counts new tokens.
    pub tokens_per_s: f64,
    /// Pairs per second, if there are pairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs_per_s: Option<f64>,
    /// Seconds of the median step.
    pub step_s: f64,
    /// Seconds of each step.
    pub steps_s: Vec<f64>,
    /// Loss and gradient norm of each step, if steps train: another device has to reproduce them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub losses: Vec<[f64; 2]>,
    /// Seconds for the reference's log-probabilities of one step, if there is a reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_s: Option<f64>,
    /// Increase in memory over what was held before, in bytes, if a part of a step was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extra_peak_bytes: Option<u64>,
    /// Bytes of weights read per second when one sequence is generated with dense weights: each token needs all of
    /// them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights_read_per_s: Option<f64>,
    /// Memory read bandwidth in bytes per second, measured between the steps: the limit of `weights_read_per_s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_read_per_s: Option<f64>,
    /// The median over steps of the share of that bandwidth used for reading weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_read_share: Option<f64>,
}

/// Measures one method.
///
/// # Errors
/// No such model, no steps, or a prompt that leaves no response.
pub fn run(method: Method, options: &Options) -> Result<Figures> {
    options.check(method)?;
    match method {
        Method::Head => parts::head(&config(&options.model)?, options),
        Method::Attention => parts::attention(&config(&options.model)?, options),
        Method::Generate => generate(load(options)?, options),
        Method::Score => parts::score(load(options)?.into_reward_model(1)?, options),
        Method::Reward => train(load(options)?.into_reward_model(1)?, method, options),
        Method::Sft | Method::Dpo => train(load(options)?, method, options),
    }
}

fn load(options: &Options) -> Result<Checkpoint> {
    Checkpoint::load(&options.model, &options.device, &LoadOptions::default())
}

/// The model's configuration; its weights are not loaded.
fn config(model: &str) -> Result<Config> {
    let (Source::Directory(path) | Source::Gguf(path)) = source::resolve(model, None)?;
    Ok(checkpoint::peek(&path)?.0)
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

/// The examples of one step. Chat rows differ in length from step to step; everything else repeats.
fn trees(method: Method, options: &Options, vocab: usize, step: usize) -> Vec<Tree> {
    let Options { batch, seq, prompt, .. } = *options;
    let response = |index: usize| {
        let len = seq - prompt;
        (tokens(vocab, index, len), vec![Role::Content; len])
    };
    (0..batch)
        .map(|index| {
            if options.chat {
                return chat(vocab, step * batch + index, index);
            }
            if method == Method::Sft {
                return Tree::sequence(tokens(vocab, index, seq), vec![Role::Content; seq], index);
            }
            let responses = vec![response(batch + 2 * index), response(batch + 2 * index + 1)];
            Tree::siblings(tokens(vocab, index, prompt), responses, index)
        })
        .collect()
}

/// Row `row` of the chats, with the same lengths as in `benches/peers/work.py`.
fn chat(vocab: usize, row: usize, source: usize) -> Tree {
    let len = 60 + row * 137 % 341;
    let mut roles = vec![Role::Content; len];
    roles[..len / 3].fill(Role::Context);
    Tree::sequence(tokens(vocab, row, len), roles, source)
}

fn train(start: Checkpoint, method: Method, options: &Options) -> Result<Figures> {
    let (vocab, settings) = (start.config.vocab_size, options.settings());
    let (objective, reference_s): (Box<dyn Objective>, _) = match method {
        Method::Dpo => {
            let began = Instant::now();
            let objective = dpo(&start, &trees(method, options, vocab, 0), &settings)?;
            (Box::new(objective), Some(began.elapsed().as_secs_f64()))
        }
        Method::Reward => (Box::new(Reward::default()), None),
        _ => (Box::new(Sft::default()), None),
    };
    let (lora, base, dtype) = (&options.lora, &options.model, options.dtype);
    let adapt = Adapt { lora, base, dtype, offloaded: false, seed: 1 };
    let learner = adapt.trainee(start)?.learner;
    let mut adamw = AdamW::new(settings.hyper());
    let cut = StepOptions {
        adapted: learner.adapted_sizes(),
        ..settings.step_options(learner.bytes(), &options.device)?
    };
    let pace = Pace { lr: 1e-6, max_grad_norm: settings.max_grad_norm };
    let (mut steps_s, mut rates, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..=options.steps {
        let trees = trees(method, options, vocab, step);
        let tokens: usize = trees.iter().map(sequence_tokens).sum();
        let borrowed: Vec<&Tree> = trees.iter().collect();
        let began = Instant::now();
        let (report, norm) =
            update(&learner, (objective.as_ref(), &borrowed), cut, &mut adamw, pace)
                .map_err(|error| cut.out_of_memory(learner.model().config(), error))?;
        finished(&options.device)?;
        let seconds = began.elapsed().as_secs_f64();
        losses.push([report.loss, norm]);
        if step > 0 {
            steps_s.push(seconds);
            rates.push(tokens as f64 / seconds);
        }
    }
    let step_s = median(&steps_s);
    Ok(Figures {
        tokens_per_s: median(&rates),
        pairs_per_s: method.has_pairs().then(|| options.batch as f64 / step_s),
        step_s,
        steps_s,
        reference_s,
        losses,
        ..Figures::default()
    })
}

/// Waits for the device, because work is enqueued asynchronously on a GPU.
fn finished(device: &Device) -> Result<()> {
    Ok(device.synchronize()?)
}

/// Tokens of a tree's sequences; shared ones count once per sequence.
fn sequence_tokens(tree: &Tree) -> usize {
    let paths = tree.leaves().into_iter().map(|leaf| tree.path(leaf));
    paths.flatten().map(|segment| tree.segments[segment].tokens.len()).sum()
}

/// The objective with the initial model as its reference.
fn dpo(start: &Checkpoint, trees: &[Tree], settings: &Settings) -> Result<Preference> {
    let mut objective = Preference::default();
    let scratch = tempfile::tempdir()?;
    let request = Request {
        model: &Transformer::new(&start.config, &settings.dtype.cast(start.weights.clone())?)?,
        weights_hash: "",
        pairs: &trees,
        order: &Order::new(1, trees.len(), settings),
        settings,
        dir: Path::new(scratch.path()),
        events: &Silent,
    };
    objective.reference = reference_logps(&request, objective.summing)?;
    Ok(objective)
}

fn generate(start: Checkpoint, options: &Options) -> Result<Figures> {
    let alone = options.batch * options.prompts.max(1) == 1
        && options.weights == WeightFormat::None
        && options.device.is_cpu();
    // If memory bandwidth is not measured, the original weights are freed as soon as they are laid out.
    let read = if alone { read_by_a_token(&start)? } else { Vec::new() };
    let vocab_size = start.config.vocab_size;
    let prompt =
        |index| Prompt { index: index as u64, tokens: tokens(vocab_size, index, options.prompt) };
    let prompts: Vec<Prompt> = (0..options.prompts.max(1)).map(prompt).collect();
    let sampling = Sampling {
        num_samples: options.batch,
        max_new_tokens: options.seq - options.prompt,
        ..Sampling::default()
    };
    let model = LocalModel::held(start.computed_in(options.dtype)?, options.weights)?;
    let (mut steps_s, mut rates, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..=options.steps {
        memory.push(read_rate(&read));
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
    memory.push(read_rate(&read));
    let figures = Figures {
        tokens_per_s: median(&rates),
        step_s: median(&steps_s),
        steps_s,
        ..Figures::default()
    };
    if !alone {
        return Ok(figures);
    }
    let size = options.dtype.dtype().size_in_bytes();
    let bytes: usize = read.iter().map(|x| x.elem_count() * size).sum();
    // Memory bandwidth varies from second to second, so compare each step with the readings before and after it.
    let around: Vec<f64> =
        memory.windows(2).skip(1).map(|ends| ends.iter().sum::<f64>() / 2.0).collect();
    let shares: Vec<f64> =
        rates.iter().zip(&around).map(|(rate, memory)| rate * bytes as f64 / memory).collect();
    Ok(Figures {
        weights_read_per_s: Some(figures.tokens_per_s * bytes as f64),
        memory_read_per_s: Some(median(&around)),
        memory_read_share: Some(median(&shares)),
        ..figures
    })
}

/// The matrices that a one-token forward pass reads in full; only a row is read of an embedding that is not also the
/// head.
fn read_by_a_token(start: &Checkpoint) -> Result<Vec<Tensor>> {
    let whole = |name: &str| start.config.tie_word_embeddings || !name.contains("embed_tokens");
    let matrices = start.weights.iter().filter(|(name, weight)| whole(name) && weight.rank() == 2);
    matrices.map(|(_, weight)| Ok(weight.contiguous()?)).collect()
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

    pub(super) fn options() -> Options {
        Options {
            model: "data/tiny/student".to_owned(),
            device: Device::Cpu,
            batch: 2,
            seq: 12,
            prompt: 5,
            chat: false,
            steps: 2,
            recompute: false,
            memory_budget: String::new(),
            dtype: Precision::F32,
            prompts: 1,
            weights: WeightFormat::None,
            lora: Lora::default(),
        }
    }

    #[test]
    fn every_method_is_measured_and_invalid_options_are_refused() {
        let methods = [Method::Sft, Method::Dpo, Method::Reward, Method::Generate];
        for method in methods.into_iter().chain([Method::Head, Method::Attention, Method::Score]) {
            let figures = run(method, &options()).unwrap();
            assert!(figures.tokens_per_s > 0.0 && figures.steps_s.len() == 2, "{method:?}");
            assert_eq!(figures.pairs_per_s.is_some(), method.has_pairs(), "{method:?}");
        }
        let held = |figures: &Figures| {
            [figures.weights_read_per_s, figures.memory_read_per_s, figures.memory_read_share]
        };
        assert_eq!(held(&run(Method::Generate, &options()).unwrap()), [None; 3]);
        let alone = run(Method::Generate, &Options { batch: 1, ..options() }).unwrap();
        assert!(held(&alone).iter().all(|x| x.is_some_and(|x| x > 0.0 && x.is_finite())));
        assert!(run(Method::Dpo, &Options { prompt: 12, ..options() }).is_err());
        assert!(run(Method::Head, &Options { chat: true, ..options() }).is_err());
        assert!(run(Method::Sft, &Options { steps: 0, ..options() }).is_err());
        assert!((median(&[3.0, 1.0, 2.0, 9.0]) - 2.5).abs() < 1e-12);
    }

    #[test]
    fn chat_lengths_match_those_of_the_peers() {
        let options = Options { chat: true, batch: 3, ..options() };
        let trees = trees(Method::Sft, &options, 40, 1);
        let found: Vec<(usize, usize)> = trees
            .iter()
            .map(|tree| {
                let roles = &tree.segments[0].roles;
                (roles.len(), roles.iter().filter(|role| **role == Role::Context).count())
            })
            .collect();
        // Rows 3, 4 and 5: 60 + (411, 548, 685) mod 341, a third of each masked.
        assert_eq!(found, [(130, 43), (267, 89), (63, 21)]);
        // Rows 0 and 1 have 60 and 197 tokens, which fit the tiny model.
        let options = Options { batch: 1, steps: 1, ..options };
        assert!(run(Method::Sft, &options).unwrap().tokens_per_s > 0.0);
    }

    #[test]
    fn a_shared_prompt_counts_for_both_sides() {
        let trees = trees(Method::Dpo, &options(), 40, 0);
        assert_eq!(trees.iter().map(sequence_tokens).sum::<usize>(), 2 * 2 * 12);
    }
}
