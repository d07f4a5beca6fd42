//! The share of matrix products in a training step: every shape in a step, measured alone, against a whole step in the
//! same minutes.
//!
//! The sum of the products alone is a lower bound of the step: the rest is norms, rotations, attention, the softmax,
//! the optimizer and memory traffic. Attention's own small products are not included.

use std::time::{Duration, Instant};

use half::bf16;
use serde::Serialize;

use super::{MAX_TOKENS, Method, Options, load, median, train, trees};
use crate::data::forest::micro_batches;
use crate::data::tree::Tree;
use crate::error::Result;
use crate::model::Precision;
use crate::model::config::Config;
use crate::ops::cpu::Element;
use crate::ops::cpu::matmul::{Mat, Threads, matmul_into};
use crate::ops::cpu::peak::register_peak;
use crate::ops::head;

/// A product is repeated for at least this long.
const WINDOW: Duration = Duration::from_millis(300);

/// Memory layout of the operands of `[M, K] · [K, N]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Layout {
    /// `x · Wᵀ`: the right matrix is `[N, K]`.
    #[serde(rename = "NT")]
    Forward,
    /// `dy · W`: both row-major.
    #[serde(rename = "NN")]
    InputGradient,
    /// `dyᵀ · x`: the left matrix is `[K, M]`.
    #[serde(rename = "TN")]
    WeightGradient,
}

/// One product shape, and how often a step computes it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Product {
    /// The projections it belongs to, as in `q_proj, o_proj dX`.
    pub name: String,
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Inner dimension.
    pub k: usize,
    /// Layout of the operands.
    pub layout: Layout,
    /// Whether it accumulates into the result.
    pub add: bool,
    /// Number of times per step.
    pub count: usize,
    /// Seconds for one, the median of several; 0 before it is measured.
    pub seconds: f64,
    /// Its rate in 10⁹ floating-point operations per second, counting two per multiply-add.
    pub gflops: f64,
}

impl Product {
    fn flop(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }
}

/// A step compared with its products.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ceiling {
    /// Tokens per step.
    pub tokens: usize,
    /// Number of elements in the matrices that tokens are multiplied with: projections and head.
    pub parameters: usize,
    /// Seconds of the median step.
    pub step_s: f64,
    /// Seconds of each step.
    pub steps_s: Vec<f64>,
    /// Seconds of all products of a step, alone: a lower bound of the step.
    pub products_s: f64,
    /// `products_s / step_s`. Above 1 if other programs ran meanwhile.
    pub share: f64,
    /// 6 · parameters · tokens, in floating-point operations: a step without recomputation or attention.
    pub flop: f64,
    /// `flop / step_s`, in 10⁹ per second.
    pub gflops: f64,
    /// Peak rate of register-only multiply-adds in the step's type on all threads, in 10⁹ floating-point operations per
    /// second.
    pub register_peak_gflops: f64,
    /// Every shape.
    pub products: Vec<Product>,
}

/// Measures the products of one SFT step, then whole steps.
///
/// # Errors
/// As [`run`](super::run); products are measured in f32 only.
pub fn run(options: &Options) -> Result<Ceiling> {
    options.check(Method::Sft)?;
    let start = load(options)?;
    let config = start.config.clone();
    let trees = trees(Method::Sft, options, config.vocab_size, 0);
    let mut products = products(&config, &trees);
    let register_peak = match options.dtype {
        Precision::Bf16 => register_peak::<bf16>(),
        _ => register_peak::<f32>(),
    };
    for product in &mut products {
        product.seconds = match options.dtype {
            Precision::Bf16 => seconds::<bf16>(product, options.steps),
            _ => seconds::<f32>(product, options.steps),
        };
        product.gflops = product.flop() / product.seconds / 1e9;
    }
    let products_s = products.iter().map(|p| p.seconds * p.count as f64).sum();
    let figures = train(start, Method::Sft, options)?;
    let tokens = trees.iter().map(Tree::tokens).sum();
    let parameters = parameters(&config);
    let flop = 6.0 * parameters as f64 * tokens as f64;
    Ok(Ceiling {
        tokens,
        parameters,
        step_s: figures.step_s,
        steps_s: figures.steps_s,
        products_s,
        share: products_s / figures.step_s,
        flop,
        gflops: flop / figures.step_s / 1e9,
        register_peak_gflops: register_peak / 1e9,
        products,
    })
}

/// Name, outputs and inputs of each projection in a block, and whether the gradient of its input accumulates.
fn projections(config: &Config) -> [(&'static str, usize, usize, bool); 7] {
    let (d, f) = (config.hidden_size, config.intermediate_size);
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    [
        ("q_proj", q, d, false),
        ("k_proj", kv, d, true),
        ("v_proj", kv, d, true),
        ("o_proj", d, q, false),
        ("gate_proj", f, d, false),
        ("up_proj", f, d, true),
        ("down_proj", d, f, false),
    ]
}

fn parameters(config: &Config) -> usize {
    let block: usize = projections(config).iter().map(|(_, outer, inner, _)| outer * inner).sum();
    config.num_hidden_layers * block + config.vocab_size * config.hidden_size
}

/// Every product of one SFT step on these trees, equal ones merged, in order of first occurrence.
fn products(config: &Config, trees: &[Tree]) -> Vec<Product> {
    let borrowed: Vec<&Tree> = trees.iter().collect();
    let mut list = List::default();
    for (index, range) in micro_batches(&borrowed, MAX_TOKENS).into_iter().enumerate() {
        let trees = &trees[range];
        let t: usize = trees.iter().map(Tree::tokens).sum();
        for (name, outer, inner, adds) in projections(config) {
            let layers = config.num_hidden_layers;
            list.push(name, [t, outer, inner], Layout::Forward, (false, layers));
            list.push(name, [t, inner, outer], Layout::InputGradient, (adds, layers));
            list.push(name, [outer, inner, t], Layout::WeightGradient, (index > 0, layers));
        }
        let rows = targeted_rows(trees);
        let (vocab, d) = (config.vocab_size, config.hidden_size);
        let chunk = head::rows_at_once(vocab);
        for first in (0..rows).step_by(chunk) {
            let rows = chunk.min(rows - first);
            list.push("head", [rows, vocab, d], Layout::Forward, (false, 1));
            list.push("head", [rows, d, vocab], Layout::InputGradient, (false, 1));
            list.push("head", [vocab, d, rows], Layout::WeightGradient, (true, 1));
        }
    }
    list.0
}

/// Rows that predict a trained token: nothing predicts a sequence's first token.
fn targeted_rows(trees: &[Tree]) -> usize {
    let roles = trees.iter().flat_map(|tree| tree.segments[0].roles.iter().skip(1));
    roles.filter(|role| role.trained()).count()
}

#[derive(Default)]
struct List(Vec<Product>);

impl List {
    fn push(
        &mut self,
        name: &str,
        [m, n, k]: [usize; 3],
        layout: Layout,
        (add, count): (bool, usize),
    ) {
        let name = match layout {
            Layout::Forward => name.to_owned(),
            Layout::InputGradient => format!("{name} dX"),
            Layout::WeightGradient => format!("{name} dW"),
        };
        let same = |p: &&mut Product| (p.m, p.n, p.k, p.layout, p.add) == (m, n, k, layout, add);
        if let Some(known) = self.0.iter_mut().find(same) {
            known.count += count;
            if !known.name.split(", ").any(|known| known == name) {
                known.name = format!("{}, {name}", known.name);
            }
            return;
        }
        self.0.push(Product { name, m, n, k, layout, add, count, seconds: 0.0, gflops: 0.0 });
    }
}

/// The median time of one product, after one warm-up.
fn seconds<E: Element>(product: &Product, at_least: usize) -> f64 {
    let Product { m, n, k, layout, add, .. } = *product;
    let (a, b) = (E::rounded(values(m * k)), E::rounded(values(n * k)));
    let mut out = vec![0.0; m * n];
    let (a, b) = match layout {
        Layout::Forward => (Mat::new(&a, m, k), Mat::new(&b, n, k).t()),
        Layout::InputGradient => (Mat::new(&a, m, k), Mat::new(&b, k, n)),
        Layout::WeightGradient => (Mat::new(&a, k, m).t(), Mat::new(&b, k, n)),
    };
    let mut times = Vec::new();
    let began = Instant::now();
    while times.len() <= at_least || began.elapsed() < WINDOW {
        let began = Instant::now();
        matmul_into(&mut out, a, b, add, Threads::All);
        times.push(began.elapsed().as_secs_f64());
    }
    median(&times[1..])
}

/// Unordered numbers between -1 and 1; drawing normal ones would take longer than the product.
fn values(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 16) as f32 / 32_768.0 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::options;
    use super::super::{Options, config, trees};
    use super::*;

    #[test]
    fn step_products_take_six_operations_per_parameter_and_token() {
        let config = config(&options().model).unwrap();
        // More tokens than fit in a micro-batch, and chats of several lengths.
        for options in [
            options(),
            Options { batch: 70, seq: 64, ..options() },
            Options { batch: 30, chat: true, ..options() },
        ] {
            let trees = trees(Method::Sft, &options, config.vocab_size, 0);
            let products = products(&config, &trees);
            let flop: f64 = products.iter().map(|p| p.flop() * p.count as f64).sum();
            let tokens: usize = trees.iter().map(Tree::tokens).sum();
            // Rows without a target skip the head.
            let skipped = tokens - targeted_rows(&trees);
            let head = config.vocab_size * config.hidden_size;
            let expected = 6.0 * (parameters(&config) * tokens - skipped * head) as f64;
            assert!((flop - expected).abs() < 1.0, "{flop}, not {expected}");
        }
    }

    #[test]
    fn a_step_is_measured_against_its_products() {
        let ceiling = run(&options()).unwrap();
        assert!(ceiling.products.iter().all(|p| p.seconds > 0.0 && p.gflops > 0.0));
        assert!(ceiling.share > 0.0 && ceiling.register_peak_gflops > 0.0);
        let bf16 = Options { dtype: Precision::Bf16, ..options() };
        assert!(run(&bf16).unwrap().share > 0.0);
    }
}
