//! Parts of a step alone: the vocabulary head and attention.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Shape, Tensor, Var};

use super::{Figures, Options, median, tokens};
use crate::data::forest::{Forest, Target};
use crate::data::tree::{Role, Tree};
use crate::error::Result;
use crate::model::config::Config;
use crate::ops::residual::vjp_root;
use crate::ops::{self, AttentionPlan, head};
use crate::rng::Stream;
use crate::stage::memory::Extra;

/// The head over `batch · seq` rows, each with one target: log-probabilities and both gradients, as SFT takes them.
pub(super) fn head(config: &Config, options: &Options) -> Result<Figures> {
    let rows = options.batch * options.seq;
    let hidden = random(1, (rows, config.hidden_size), options)?;
    let weight = random(2, (config.vocab_size, config.hidden_size), options)?;
    let ids = tokens(config.vocab_size, 0, rows).into_iter().enumerate();
    let target =
        |(row, id): (usize, u32)| Target { row: row as u32, id, leaf: 0, role: Role::Content };
    let targets: Vec<Target> = ids.map(target).collect();
    let d_logps = vec![1.0 / rows as f32; rows];
    repeat(options, || {
        head::backward(&hidden, &weight, &targets, &d_logps, true)?;
        Ok(())
    })
}

/// Attention of one block over `batch` rows of `seq` tokens: output and the gradients of queries, keys and values.
pub(super) fn attention(config: &Config, options: &Options) -> Result<Figures> {
    let row = Tree::sequence(vec![0; options.seq], vec![Role::Content; options.seq], 0);
    let forest = Forest::pack(std::iter::repeat_n(&row, options.batch))?;
    let plan = Arc::new(AttentionPlan::new(&forest));
    let (t, width) = (forest.len(), config.head_dim);
    let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
    let q = Var::from_tensor(&random(1, (t, heads, width), options)?)?;
    let k = Var::from_tensor(&random(2, (t, groups, width), options)?)?;
    let v = Var::from_tensor(&random(3, (t, groups, width), options)?)?;
    let d_out = random(4, (t, heads, width), options)?;
    repeat(options, || {
        let out = ops::attention(&q, &k, &v, &plan)?;
        vjp_root(&out, &d_out)?.backward()?;
        Ok(())
    })
}

fn random(index: u64, shape: impl Into<Shape>, options: &Options) -> Result<Tensor> {
    let shape = shape.into();
    let values = Stream::new(1, "bench").normal(index, shape.elem_count(), 0.1);
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(options.dtype.dtype())?)
}

/// Times `work`, once without counting and then `steps` times.
fn repeat(options: &Options, work: impl Fn() -> Result<()>) -> Result<Figures> {
    let extra = Extra::begin();
    let mut steps_s = Vec::with_capacity(options.steps);
    for step in 0..=options.steps {
        let began = Instant::now();
        work()?;
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
