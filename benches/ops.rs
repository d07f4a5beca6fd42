//! Each op of a block, forward and backward, against its twin in plain Candle, at SmolLM2-135M's sizes.
//!
//!     cargo bench --bench ops
//!
//! Bytes a second count what must pass through memory once each way: inputs, outputs and their gradients. `limit` is what
//! this machine's memory does, and the first line what its registers do.

#![expect(clippy::unwrap_used, reason = "a benchmark; a failure here is a mistake in it")]
#![expect(clippy::print_stdout, reason = "the limit is printed beside divan's table")]

use std::sync::Arc;

use arriero::data::forest::{Forest, Target};
use arriero::data::tree::{Role, Tree};
use arriero::model::gradients::Gradients;
use arriero::ops::residual::vjp_root;
use arriero::ops::{self, AttentionPlan, Rotary, attention, head, norm, rope, swiglu};
use arriero::optim::Param;
use arriero::optim::adamw::{AdamW, Hyper, is_decayed};
use arriero::rng::Stream;
use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use divan::Bencher;
use divan::counter::BytesCount;
use rayon::prelude::*;

/// Tokens, in rows of [`ROW`].
const T: usize = 2048;
const ROW: usize = 512;
const WIDTH: usize = 576;
const FEED_FORWARD: usize = 1536;
const HEADS: usize = 9;
const GROUPS: usize = 3;
const HEAD_WIDTH: usize = 64;
const VOCAB: usize = 49152;
/// Rows of the head: one chunk's.
const HEAD_ROWS: usize = 256;
/// Elements of the optimizer's parameter.
const PARAMETERS: usize = 4 << 20;

fn main() {
    // Test runners ask for a list of names and read whatever is printed as one.
    if std::env::args().any(|argument| argument == "--bench") {
        let peak = arriero::ops::cpu::peak::register_peak::<f32>() / 1e9;
        println!("{peak:.0} GFLOP/s of f32 multiply-adds between registers");
    }
    // One of rayon's own threads, as in the program.
    rayon::scope(|_| divan::main());
}

fn random(index: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let values = Stream::new(1, "ops").normal(index, shape.elem_count(), 0.1);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Times value and gradients of `f`. All tensors are f32; each passes once, and so does its gradient.
fn both(bencher: Bencher<'_, '_>, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let vars: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
    let inputs: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let d_out = random(99, f(&inputs).unwrap().shape());
    let elements: usize = inputs.iter().map(Tensor::elem_count).sum();
    bencher.counter(BytesCount::new(8 * (elements + d_out.elem_count()))).bench_local(|| {
        let out = f(&inputs).unwrap();
        vjp_root(&out, &d_out).unwrap().backward().unwrap()
    });
}

#[divan::bench_group(sample_count = 10)]
mod rms_norm {
    use super::{Bencher, T, WIDTH, both, norm, ops, random};

    #[divan::bench]
    fn ours(bencher: Bencher<'_, '_>) {
        both(bencher, &[random(1, (T, WIDTH)), random(2, WIDTH)], |x| {
            ops::rms_norm(&x[0], &x[1], 1e-5)
        });
    }

    #[divan::bench]
    fn candle(bencher: Bencher<'_, '_>) {
        both(bencher, &[random(1, (T, WIDTH)), random(2, WIDTH)], |x| {
            norm::plain(&x[0], &x[1], 1e-5)
        });
    }
}

#[divan::bench_group(sample_count = 10)]
mod rotary {
    use super::{Bencher, HEAD_WIDTH, HEADS, ROW, Rotary, T, both, ops, random, rope};

    fn table() -> Rotary {
        let half = HEAD_WIDTH / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| 1e4_f32.powf(-(i as f32) / half as f32)).collect();
        let positions: Vec<u32> = (0..T).map(|token| (token % ROW) as u32).collect();
        Rotary::new(&frequencies, &positions)
    }

    #[divan::bench]
    fn ours(bencher: Bencher<'_, '_>) {
        let table = table();
        both(bencher, &[random(1, (T, HEADS, HEAD_WIDTH))], |x| ops::rope(&x[0], &table));
    }

    #[divan::bench]
    fn candle(bencher: Bencher<'_, '_>) {
        let table = table();
        both(bencher, &[random(1, (T, HEADS, HEAD_WIDTH))], |x| rope::plain(&x[0], &table));
    }
}

#[divan::bench_group(sample_count = 10)]
mod gated {
    use super::{Bencher, FEED_FORWARD, T, Tensor, both, ops, random, swiglu};

    fn inputs() -> [Tensor; 2] {
        [random(1, (T, FEED_FORWARD)), random(2, (T, FEED_FORWARD))]
    }

    #[divan::bench]
    fn ours(bencher: Bencher<'_, '_>) {
        both(bencher, &inputs(), |x| ops::swiglu(&x[0], &x[1]));
    }

    #[divan::bench]
    fn candle(bencher: Bencher<'_, '_>) {
        both(bencher, &inputs(), |x| swiglu::plain(&x[0], &x[1]));
    }
}

#[divan::bench_group(sample_count = 5)]
mod attend {
    use super::{
        Arc, AttentionPlan, Bencher, Forest, GROUPS, HEAD_WIDTH, HEADS, ROW, Role, T, Tensor, Tree,
        attention, both, ops, random,
    };

    fn plan() -> Arc<AttentionPlan> {
        let row = Tree::sequence(vec![0; ROW], vec![Role::Content; ROW], 0);
        let forest = Forest::pack(std::iter::repeat_n(&row, T / ROW)).unwrap();
        Arc::new(AttentionPlan::new(&forest))
    }

    fn inputs() -> [Tensor; 3] {
        let heads = |index, count| random(index, (T, count, HEAD_WIDTH));
        [heads(1, HEADS), heads(2, GROUPS), heads(3, GROUPS)]
    }

    #[divan::bench]
    fn ours(bencher: Bencher<'_, '_>) {
        let plan = plan();
        both(bencher, &inputs(), |x| ops::attention(&x[0], &x[1], &x[2], &plan));
    }

    /// Scores of all tokens with all tokens, and a mask: what a graph of Candle's ops has to do.
    #[divan::bench]
    fn candle(bencher: Bencher<'_, '_>) {
        let plan = plan();
        both(bencher, &inputs(), |x| attention::plain(&x[0], &x[1], &x[2], &plan));
    }
}

#[divan::bench_group(sample_count = 5)]
mod vocabulary {
    use super::{
        Bencher, Device, HEAD_ROWS, Role, Target, Tensor, VOCAB, Var, WIDTH, head, random,
    };

    fn inputs() -> (Tensor, Tensor, Vec<u32>) {
        let ids = (0..HEAD_ROWS).map(|row| (row * 7919 % VOCAB) as u32).collect();
        (random(1, (HEAD_ROWS, WIDTH)), random(2, (VOCAB, WIDTH)), ids)
    }

    #[divan::bench]
    fn ours(bencher: Bencher<'_, '_>) {
        let (hidden, weight, ids) = inputs();
        let target = |(row, &id): (usize, &u32)| Target {
            row: row as u32,
            id,
            leaf: 0,
            role: Role::Content,
        };
        let targets: Vec<Target> = ids.iter().enumerate().map(target).collect();
        let d_logps = vec![-1.0 / HEAD_ROWS as f32; HEAD_ROWS];
        let asked = head::Asked { d_weight: true, ..Default::default() };
        bencher.bench_local(|| {
            head::backward(&hidden, &weight, &targets, d_logps.as_slice().into(), asked).unwrap()
        });
    }

    #[divan::bench]
    fn candle(bencher: Bencher<'_, '_>) {
        let (hidden, weight, ids) = inputs();
        let (hidden, weight) =
            (Var::from_tensor(&hidden).unwrap(), Var::from_tensor(&weight).unwrap());
        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        bencher.bench_local(|| {
            let logits = hidden.matmul(&weight.t().unwrap()).unwrap();
            candle_nn::loss::cross_entropy(&logits, &ids).unwrap().backward().unwrap()
        });
    }
}

#[divan::bench_group(sample_count = 10)]
mod embedding_gradient {
    use super::{Bencher, BytesCount, DType, Device, T, Tensor, VOCAB, WIDTH, ops, random};

    fn inputs() -> (Tensor, Vec<u32>, Tensor) {
        let ids = (0..T).map(|token| (token * 7919 % VOCAB) as u32).collect();
        let table = Tensor::zeros((VOCAB, WIDTH), DType::F32, &Device::Cpu).unwrap();
        (table, ids, random(1, (T, WIDTH)))
    }

    #[divan::bench]
    fn ours(bencher: Bencher<'_, '_>) {
        let (table, ids, d_x) = inputs();
        bencher
            .counter(BytesCount::new(12 * T * WIDTH))
            .bench_local(|| ops::embed::embed_grad(table.clone(), &ids, &d_x).unwrap());
    }

    #[divan::bench]
    fn candle(bencher: Bencher<'_, '_>) {
        let (table, ids, d_x) = inputs();
        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        bencher
            .counter(BytesCount::new(12 * T * WIDTH))
            .bench_local(|| table.index_add(&ids, &d_x, 0).unwrap());
    }
}

#[divan::bench_group(sample_count = 10)]
mod adamw {
    use super::{
        AdamW, Bencher, BytesCount, Device, Gradients, Hyper, PARAMETERS, Param, Var, is_decayed,
        random,
    };

    /// Parameter and both moments are read and written, the gradient is read.
    const BYTES: usize = 7 * 4 * PARAMETERS;

    #[divan::bench]
    fn ours(bencher: Bencher<'_, '_>) {
        let param = Param::new(&random(1, PARAMETERS)).unwrap();
        let params = std::collections::BTreeMap::from([("w".to_owned(), param)]);
        let mut grads = Gradients::new(&Device::Cpu);
        grads.add("w", &random(2, PARAMETERS)).unwrap();
        let hyper =
            Hyper { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, decayed: is_decayed };
        let mut adamw = AdamW::new(hyper);
        bencher
            .counter(BytesCount::new(BYTES))
            .bench_local(|| adamw.step(&params, &grads, 1e-6, 1.0).unwrap());
    }

    #[divan::bench]
    #[expect(clippy::disallowed_types, reason = "it is the twin that ours is measured against")]
    fn candle(bencher: Bencher<'_, '_>) {
        use candle_nn::Optimizer;
        let param = Var::from_tensor(&random(1, PARAMETERS)).unwrap();
        let grads = (param.as_tensor() * random(2, PARAMETERS)).unwrap();
        let grads = grads.sum_all().unwrap().backward().unwrap();
        let params = candle_nn::ParamsAdamW { lr: 1e-6, weight_decay: 0.1, ..Default::default() };
        let mut adamw = candle_nn::AdamW::new(vec![param], params).unwrap();
        bencher.counter(BytesCount::new(BYTES)).bench_local(|| adamw.step(&grads).unwrap());
    }
}

/// A copy on all threads, larger than the caches: reads and writes.
#[divan::bench(sample_count = 10)]
fn limit(bencher: Bencher<'_, '_>) {
    const LEN: usize = 16 << 20;
    const CHUNK: usize = 1 << 16;
    let (from, mut to) = (vec![1.0_f32; LEN], vec![0.0_f32; LEN]);
    bencher.counter(BytesCount::new(8 * LEN)).bench_local(|| {
        to.par_chunks_mut(CHUNK)
            .zip(from.par_chunks(CHUNK))
            .for_each(|(to, from)| to.copy_from_slice(from));
    });
}
