//! Parts of a step in isolation: the vocabulary head, attention, and a reward model's forward pass.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use half::bf16;

use super::{Figures, Options, median, tokens};
use crate::data::forest::{Forest, Target};
use crate::data::tree::{Role, Tree};
use crate::error::{Error, Result};
use crate::model::Precision;
use crate::model::checkpoint::Checkpoint;
use crate::model::config::Config;
use crate::model::transformer::Transformer;
use crate::ops::cpu::Element;
use crate::ops::cpu::attention::{self, Inputs};
use crate::ops::{self, AttentionPlan, head, residual};
use crate::rng::Stream;
use crate::stage::memory::Extra;

/// The head over `batch · seq` rows, each with one target: log-probabilities and both gradients, as in SFT.
pub(super) fn head(config: &Config, options: &Options) -> Result<Figures> {
    let rows = options.batch * options.seq;
    let device = &options.device;
    let hidden = random(1, (rows, config.hidden_size), device)?;
    let weight = random(2, (config.vocab_size, config.hidden_size), device)?
        .to_dtype(options.dtype.dtype())?;
    let ids = tokens(config.vocab_size, 0, rows).into_iter().enumerate();
    let target =
        |(row, id): (usize, u32)| Target { row: row as u32, id, leaf: 0, role: Role::Content };
    let targets: Vec<Target> = ids.map(target).collect();
    let d_logps = vec![1.0 / rows as f32; rows];
    repeat(options, || {
        let asked = head::Asked { d_weight: true, ..Default::default() };
        let out = head::backward(&hidden, &weight, &targets, d_logps.as_slice().into(), asked)?;
        out.readings.wait()?;
        Ok(())
    })
}

/// Attention of one block over `batch` rows of `seq` tokens: output and gradients of queries, keys and values.
pub(super) fn attention(config: &Config, options: &Options) -> Result<Figures> {
    if !options.device.is_cpu() {
        return attention_on_device(config, options);
    }
    match options.dtype {
        Precision::Bf16 => attention_in::<bf16>(config, options),
        _ => attention_in::<f32>(config, options),
    }
}

/// The same through the op's own backward pass.
fn attention_on_device(config: &Config, options: &Options) -> Result<Figures> {
    let row = Tree::sequence(vec![0; options.seq], vec![Role::Content; options.seq], 0);
    let forest = Forest::pack(std::iter::repeat_n(&row, options.batch))?;
    let plan = Arc::new(AttentionPlan::new(&forest));
    let width = config.head_dim;
    let values = |index, heads: usize| -> Result<Tensor> {
        let shape = (forest.len(), heads, width);
        let x = Tensor::from_vec(numbers(index, shape.0 * heads * width), shape, &options.device)?;
        Ok(x.to_dtype(options.dtype.dtype())?)
    };
    let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
    let d_out = values(4, heads)?;
    let [q, k, v] =
        [(1, heads), (2, groups), (3, groups)].map(|(index, heads)| values(index, heads));
    let [q, k, v] = [q, k, v].map(|x| Ok::<_, Error>(Var::from_tensor(&x?)?));
    let (q, k, v) = (q?, k?, v?);
    repeat(options, || {
        let out = ops::attention(&q, &k, &v, &plan)?;
        residual::vjp_root(&out, &d_out)?.backward()?;
        Ok(())
    })
}

fn attention_in<E: Element>(config: &Config, options: &Options) -> Result<Figures> {
    let row = Tree::sequence(vec![0; options.seq], vec![Role::Content; options.seq], 0);
    let forest = Forest::pack(std::iter::repeat_n(&row, options.batch))?;
    let plan = AttentionPlan::new(&forest);
    let width = config.head_dim;
    let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
    let values = |index, heads| numbers(index, forest.len() * heads * width);
    let (q, d_out) = (E::rounded(values(1, heads)), values(4, heads));
    let (k, v) = (E::rounded(values(2, groups)), E::rounded(values(3, groups)));
    let inputs = Inputs { plan: &plan, heads, groups, width, q: &q, k: &k, v: &v };
    repeat(options, || {
        let (out, log_sum_exp) = attention::forward(&inputs);
        attention::backward(&inputs, &log_sum_exp, &out, &d_out);
        Ok(())
    })
}

fn numbers(index: u64, len: usize) -> Vec<f32> {
    Stream::new(1, "bench").normal(index, len, 0.1)
}

fn random(index: u64, shape: (usize, usize), device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_vec(numbers(index, shape.0 * shape.1), shape, device)?)
}

/// Times `work`, once as a warm-up and then `steps` times.
fn repeat(options: &Options, work: impl Fn() -> Result<()>) -> Result<Figures> {
    let extra = Extra::begin();
    let mut steps_s = Vec::with_capacity(options.steps);
    for step in 0..=options.steps {
        let began = Instant::now();
        work()?;
        super::finished(&options.device)?;
        if step > 0 {
            steps_s.push(began.elapsed().as_secs_f64());
        }
    }
    let step_s = median(&steps_s);
    Ok(Figures {
        tokens_per_s: (options.batch * options.seq) as f64 / step_s,
        step_s,
        steps_s,
        extra_peak_bytes: extra.peak_bytes(),
        ..Figures::default()
    })
}

/// A reward model's scores of `batch` responses to one prompt, computed as in `score`: the prompt is read once.
pub(super) fn score(start: Checkpoint, options: &Options) -> Result<Figures> {
    let vocab = start.config.vocab_size;
    let start = start.computed_in(options.dtype)?;
    let model = Transformer::new(&start.config, &start.weights)?;
    let len = options.seq - options.prompt;
    let response = |index| (tokens(vocab, 1 + index, len), vec![Role::Content; len]);
    let responses = (0..options.batch).map(response).collect();
    let forest = Forest::pack([&Tree::siblings(tokens(vocab, 0, options.prompt), responses, 0)])?;
    repeat(options, || {
        let scores = model.scores(&model.hidden(&forest)?, &forest.ends)?;
        if scores.len() == options.batch {
            return Ok(());
        }
        Err(Error::run(format!("{} scores of {} responses", scores.len(), options.batch)))
    })
}
