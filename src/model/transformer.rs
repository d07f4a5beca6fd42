//! The Llama transformer over a packed forest, with block-by-block backward (design idea 3).

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::backward::Backward;
use super::block::{Block, Layout};
use super::block_cpu::Kept;
use super::gradients::Gradients;
use super::lora::Masks;
use super::params::{EMBEDDING, FINAL_NORM, HEAD, SCORE, SCORE_BIAS};
use super::{Architecture, Config, Tensors, Weights, heads};
use crate::data::forest::{End, Forest};
use crate::error::{Error, Result};
use crate::ops::host::HostCopy;
use crate::ops::{self, AttentionPlan, Rotary};

/// A runnable model. It shares the given weights; those that are variables are trained.
#[derive(Clone, Debug)]
pub struct Transformer {
    config: Config,
    frequencies: Vec<f32>,
    embedding: Tensor,
    blocks: Vec<Block>,
    pub(super) norm: Tensor,
    head: Tensor,
    /// For a process reward model.
    head_bias: Option<Tensor>,
}

/// State kept by a forward pass for its backward.
#[derive(Debug)]
pub struct Trace {
    pub(super) layout: Layout,
    pub(super) form: Form,
    /// Final hidden states, `[T, D]`, without a graph.
    pub hidden: Tensor,
}

/// What a forward pass should keep.
#[derive(Clone, Debug, Default)]
pub struct Keep {
    /// Number of last blocks (first in the backward pass) that keep their activations; the others keep only their input
    /// and are recomputed.
    pub blocks: usize,
    /// Dropout masks of the adapters.
    pub masks: Option<Masks>,
    /// Whether inputs of recomputed blocks are kept in host memory. Hand-written CPU blocks always do.
    pub inputs_on_host: bool,
}

/// A block's input, kept for its backward.
#[derive(Debug)]
pub(super) enum Input {
    /// A leaf of the block's own graph.
    Here(Var),
    OnHost(HostCopy),
}

impl Input {
    pub(super) fn back(self) -> Result<Var> {
        match self {
            Self::Here(var) => Ok(var),
            Self::OnHost(copy) => Ok(Var::from_tensor(&copy.back()?)?),
        }
    }
}

/// The two implementations of a pass over the blocks.
#[derive(Debug)]
pub(super) enum Form {
    /// Hand-written, on the CPU.
    Cpu {
        /// Input of each block, then of the final norm, `[T, D]` each.
        inputs: Vec<Vec<f32>>,
        /// Activations kept by the last blocks; the others are recomputed.
        kept: Vec<Kept>,
    },
    /// Candle's graph, one per block.
    Graph {
        /// Input of each block, then of the final norm.
        inputs: Vec<Input>,
        /// Outputs of the last blocks with their graphs; the others are recomputed.
        outputs: Vec<Tensor>,
    },
}

impl Transformer {
    /// Assembles a model.
    ///
    /// # Errors
    /// Names the missing tensor.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        Self::of(config, &Tensors::dense(weights.clone()))
    }

    /// Assembles a model with quantised weights or adapters.
    ///
    /// # Errors
    /// Names the missing tensor, or two tensors on different devices.
    pub fn of(config: &Config, tensors: &Tensors) -> Result<Self> {
        tensors.check_one_device()?;
        let get = |name: &str| tensors.get(name);
        let head = match config.architecture {
            Architecture::CausalLm if config.tie_word_embeddings => get(EMBEDDING)?,
            Architecture::CausalLm => get(HEAD)?,
            Architecture::SequenceClassification | Architecture::TokenClassification => get(SCORE)?,
        };
        let has_bias = config.architecture == Architecture::TokenClassification;
        let blocks = (0..config.num_hidden_layers).map(|index| Block::new(config, tensors, index));
        Ok(Self {
            frequencies: config.rope.inverse_frequencies(config.head_dim),
            embedding: get(EMBEDDING)?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: get(FINAL_NORM)?,
            head,
            head_bias: has_bias.then(|| get(SCORE_BIAS)).transpose()?,
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The blocks, first to last.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The embedding, `[V, D]`.
    pub(super) fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    /// The head's weight: `[V, D]`, or `[L, D]` for a reward model.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Name of the parameter that the head's gradient belongs to.
    pub fn head_name(&self) -> &'static str {
        match self.config.architecture {
            Architecture::CausalLm if self.config.tie_word_embeddings => EMBEDDING,
            Architecture::CausalLm => HEAD,
            Architecture::SequenceClassification | Architecture::TokenClassification => SCORE,
        }
    }

    /// Scores at the given ends, `L` per end, `[E, L]` flattened. `hidden`: `[T, D]`.
    ///
    /// # Errors
    /// A device error.
    pub fn scores(&self, hidden: &Tensor, ends: &[End]) -> Result<Vec<f32>> {
        Ok(self.scores_of(hidden, ends)?.flatten_all()?.to_vec1()?)
    }

    /// As [`scores`](Self::scores), left on the model's device, `[E, L]`. `hidden`: `[T, D]`.
    ///
    /// # Errors
    /// A device error.
    pub fn scores_of(&self, hidden: &Tensor, ends: &[End]) -> Result<Tensor> {
        heads::scores(hidden, (&self.head, self.head_bias.as_ref()), ends)
    }

    /// Gradient of `Σ d_scores · scores` with respect to the hidden states, `[T, D]`, given `d_scores`, `[E, L]`; that
    /// of the head is added to `grads`.
    ///
    /// # Errors
    /// A device error.
    pub fn scores_backward(
        &self,
        hidden: &Tensor,
        ends: &[End],
        d_scores: &Tensor,
        grads: &mut Gradients,
    ) -> Result<Tensor> {
        if self.head.is_variable() {
            grads.add(SCORE, &heads::d_weight(hidden, ends, d_scores)?)?;
        }
        if self.head_bias.as_ref().is_some_and(Tensor::is_variable) {
            grads.add(SCORE_BIAS, &d_scores.sum(0)?)?;
        }
        heads::d_hidden(hidden, &self.head, ends, d_scores)
    }

    /// Device of the weights.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Dtype of its dense matrices.
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// RoPE angles of the given positions.
    pub fn rotary(&self, positions: &[u32]) -> Rotary {
        Rotary::new(&self.frequencies, positions)
    }

    /// State shared by all blocks for this forest.
    ///
    /// # Errors
    /// A sequence longer than the model's maximum positions.
    pub fn layout(&self, forest: &Forest) -> Result<Layout> {
        let longest = forest.spans.iter().map(|span| span.position + span.len).max().unwrap_or(0);
        let limit = self.config.max_position_embeddings;
        if longest > limit {
            return Err(Error::run(format!(
                "a sequence of {longest} tokens, the model has {limit} positions"
            ))
            .hint("set max_length to at most the model's max_position_embeddings"));
        }
        let attention = Arc::new(AttentionPlan::new(forest));
        Ok(Layout { rotary: self.rotary(&forest.positions), attention, masks: None })
    }

    /// Embedding rows of the tokens. Shape: `[T, D]`.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        Ok(ops::embed::embed(&self.embedding, tokens)?)
    }

    /// The final norm. Shapes: `[T, D] -> [T, D]`.
    pub fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::rms_norm(x, &self.norm, self.config.rms_norm_eps)?)
    }

    /// Hidden states after the final norm, without a graph. Shape: `[T, D]`.
    pub fn hidden(&self, forest: &Forest) -> Result<Tensor> {
        self.hidden_in(forest, &self.layout(forest)?)
    }

    /// As [`hidden`](Self::hidden), with a given layout.
    pub fn hidden_in(&self, forest: &Forest, layout: &Layout) -> Result<Tensor> {
        let mut x = self.embed(&forest.tokens)?;
        if self.is_by_hand() {
            let mut rows = x.flatten_all()?.to_vec1::<f32>()?;
            for block in &self.blocks {
                rows = block.forward_cpu(&rows, layout)?.0;
            }
            x = Tensor::from_vec(rows, x.shape(), self.device())?;
        } else {
            for block in &self.blocks {
                x = block.forward(&x, layout)?.detach();
            }
        }
        Ok(self.final_norm(&x)?.detach())
    }

    /// Whether blocks use the hand-written form of [`block_cpu`](super::block_cpu).
    fn is_by_hand(&self) -> bool {
        self.device().is_cpu() && matches!(self.embedding.dtype(), DType::F32 | DType::BF16)
    }

    /// Forward pass for training; the last `keep` blocks keep activations for their backward.
    pub fn trace(&self, forest: &Forest, keep: usize) -> Result<Trace> {
        let keep = Keep { blocks: keep, ..Keep::default() };
        self.trace_embedded(&self.layout(forest)?, &self.embed(&forest.tokens)?, keep)
    }

    /// As [`trace`](Self::trace), from token embeddings `x`, `[T, D]`, possibly modified by the caller.
    pub fn trace_embedded(&self, layout: &Layout, x: &Tensor, keep: Keep) -> Result<Trace> {
        let Keep { blocks, masks, inputs_on_host } = keep;
        let layout = Layout { masks: masks.map(Arc::new), ..layout.clone() };
        let (form, last) = if self.is_by_hand() {
            self.trace_by_hand(x, &layout, blocks)?
        } else {
            self.trace_graphs(x, &layout, (blocks, inputs_on_host))?
        };
        let hidden = self.final_norm(&last)?.detach();
        Ok(Trace { layout, form, hidden })
    }

    fn trace_by_hand(&self, x: &Tensor, layout: &Layout, keep: usize) -> Result<(Form, Tensor)> {
        let first_kept = self.blocks.len().saturating_sub(keep);
        let mut inputs = vec![x.flatten_all()?.to_vec1::<f32>()?];
        let mut kept = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let (output, activations) = block.forward_cpu(&inputs[index], layout)?;
            inputs.push(output);
            if index >= first_kept {
                kept.push(activations);
            }
        }
        let last = Tensor::from_slice(&inputs[self.blocks.len()], x.shape(), self.device())?;
        Ok((Form::Cpu { inputs, kept }, last))
    }

    fn trace_graphs(
        &self,
        x: &Tensor,
        layout: &Layout,
        (keep, inputs_on_host): (usize, bool),
    ) -> Result<(Form, Tensor)> {
        let first_kept = self.blocks.len().saturating_sub(keep);
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        let mut x = Var::from_tensor(x)?;
        for (index, block) in self.blocks.iter().enumerate() {
            let output = if index < first_kept {
                block.forward(&x.as_tensor().detach(), layout)?
            } else {
                block.forward(&x, layout)?
            };
            let input = std::mem::replace(&mut x, Var::from_tensor(&output.detach())?);
            inputs.push(if inputs_on_host && index < first_kept {
                Input::OnHost(HostCopy::of(&input)?)
            } else {
                Input::Here(input)
            });
            if index >= first_kept {
                outputs.push(output);
            }
        }
        let last = x.as_tensor().detach();
        inputs.push(Input::Here(x));
        Ok((Form::Graph { inputs, outputs }, last))
    }

    /// Backward pass, last block first: from the gradient of the hidden states `[T, D]` to every trained parameter. A
    /// block's kept state is freed as soon as its gradients are computed.
    ///
    /// # Errors
    /// A device error; a parameter that no gradient reaches.
    pub fn backward(
        &self,
        forest: &Forest,
        trace: Trace,
        d_hidden: &Tensor,
        grads: &mut Gradients,
    ) -> Result<()> {
        let mut backward = self.backward_from(forest, trace, d_hidden, grads)?;
        while backward.next_block(grads)?.is_some() {}
        Ok(())
    }

    /// As [`backward`](Self::backward), block by block.
    ///
    /// # Errors
    /// A device error.
    pub fn backward_from<'a>(
        &'a self,
        forest: &'a Forest,
        trace: Trace,
        d_hidden: &Tensor,
        grads: &mut Gradients,
    ) -> Result<Backward<'a>> {
        Backward::begin(self, forest, trace, d_hidden, grads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::{Role, Tree};
    use crate::model::lora::{Adapter, Dora, Lora};
    use crate::model::packed::Packed;
    use crate::model::{Precision, init};
    use crate::ops::linear::tests::{distance, random};

    /// Which parts of the model below are trained.
    #[derive(Clone, Copy, PartialEq)]
    enum Trained {
        All,
        Adapters { dora: bool, packed: bool },
    }

    /// Grouped-query heads, biases on queries, keys and values, and no size that is a multiple of a tile.
    fn model(precision: Precision, trained: Trained) -> Transformer {
        let config = Config::from_json(
            r#"{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 60, "num_hidden_layers": 2,
            "intermediate_size": 77, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 50,
            "tie_word_embeddings": false, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "hidden_act": "silu"}"#,
        )
        .unwrap();
        let weights = init::random(&config, 3, &Device::Cpu).unwrap();
        let weights = weights.iter().map(|(name, tensor)| {
            // Biases are initialised to zero; perturb them so that their effect is visible.
            let moved = (tensor + (random(7, tensor.shape()) * 0.05).unwrap()).unwrap();
            let computed = moved.to_dtype(precision.of(name, &moved)).unwrap();
            match trained {
                Trained::All => (name.clone(), Var::from_tensor(&computed).unwrap().into_inner()),
                Trained::Adapters { .. } => (name.clone(), computed),
            }
        });
        let mut tensors = Tensors::dense(weights.collect());
        if let Trained::Adapters { dora, packed } = trained {
            if packed {
                for name in
                    ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
                {
                    let weight =
                        tensors.weights.remove(name).unwrap().to_dtype(DType::F32).unwrap();
                    tensors.packed.insert(name.to_owned(), Arc::new(Packed::nf4(&weight).unwrap()));
                }
            }
            let modules = Lora::default().modules(&config).unwrap();
            tensors.adapters = modules
                .into_iter()
                .map(|module| {
                    let matrix = tensors.matrix(&module).unwrap();
                    let (outer, inner) = matrix.shape();
                    let factor = |seed, shape: (usize, usize)| {
                        let factor =
                            (random(seed, shape) * 0.1).unwrap().to_dtype(precision.dtype());
                        Var::from_tensor(&factor.unwrap()).unwrap().into_inner()
                    };
                    let magnitude = (random(31, outer).abs().unwrap() + 0.5).unwrap();
                    let dora = dora.then(|| Dora {
                        magnitude: Var::from_tensor(&magnitude).unwrap().into_inner(),
                        squares: matrix.row_squares().unwrap(),
                    });
                    let (a, b) = (factor(21, (3, inner)), factor(22, (outer, 3)));
                    (module.clone(), Adapter { module, a, b, scale: 0.7, dora })
                })
                .collect();
        }
        Transformer::of(&config, &tensors).unwrap()
    }

    fn forest() -> Forest {
        let tokens =
            |len: u32, step: u32| (0..len).map(|i| (i * step + 3) % 50).collect::<Vec<_>>();
        let response = |len, step| (tokens(len, step), vec![Role::Content; len as usize]);
        let trees = [
            Tree::siblings(tokens(9, 7), vec![response(5, 3), response(70, 11)], 0),
            Tree::sequence(tokens(13, 5), vec![Role::Content; 13], 1),
        ];
        Forest::pack(&trees).unwrap()
    }

    #[test]
    fn hand_written_backward_matches_the_graph() {
        let all = 2 * 12 + 2;
        by_hand_is_the_graph((Precision::F32, Trained::All), 1e-5, all);
        for (dora, packed, count) in
            [(false, false, 2 * 14), (true, false, 2 * 21), (true, true, 2 * 21)]
        {
            by_hand_is_the_graph((Precision::F32, Trained::Adapters { dora, packed }), 1e-5, count);
        }
    }

    /// The graph rounds differently: product outputs to bf16, input gradients not at all.
    #[test]
    fn bf16_backward_matches_the_graph_up_to_rounding() {
        by_hand_is_the_graph((Precision::Bf16, Trained::All), 2e-2, 2 * 12 + 2);
        let adapters = Trained::Adapters { dora: false, packed: true };
        by_hand_is_the_graph((Precision::Bf16, adapters), 2e-2, 2 * 14);
    }

    fn by_hand_is_the_graph(
        (precision, trained): (Precision, Trained),
        tolerance: f64,
        count: usize,
    ) {
        let (model, forest) = (model(precision, trained), forest());
        let layout = model.layout(&forest).unwrap();
        let x = model.embed(&forest.tokens).unwrap();
        let d_hidden = random(11, (forest.len(), 60));
        let run = |form: Form| {
            let mut grads = Gradients::new(&Device::Cpu);
            let trace = Trace { layout: layout.clone(), form, hidden: x.clone() };
            let mut back = model.backward_from(&forest, trace, &d_hidden, &mut grads).unwrap();
            while back.next_block(&mut grads).unwrap().is_some() {}
            (back.d_input().unwrap(), grads)
        };
        let (graph, expected_last) = model.trace_graphs(&x, &layout, (2, false)).unwrap();
        let (expected_d_x, expected) = run(graph);
        for keep in [2, 1, 0] {
            let (form, last) = model.trace_graphs(&x, &layout, (keep, true)).unwrap();
            assert!(distance(&last, &expected_last) == 0.0);
            let (d_x, grads) = run(form);
            assert!(distance(&d_x, &expected_d_x) == 0.0, "{keep} kept");
            for (name, grad) in expected.iter() {
                assert!(distance(grads.get(name).unwrap(), grad) == 0.0, "{name}, {keep} kept");
            }
        }
        for keep in [2, 1, 0] {
            let (form, last) = model.trace_by_hand(&x, &layout, keep).unwrap();
            assert!(distance(&last, &expected_last) < 0.5 * tolerance);
            let (d_x, grads) = run(form);
            assert!(distance(&d_x, &expected_d_x) < tolerance);
            let names = |grads: &Gradients| {
                grads.iter().map(|(name, _)| name.to_owned()).collect::<Vec<_>>()
            };
            assert_eq!(names(&grads), names(&expected));
            assert_eq!(grads.iter().count(), count);
            for (name, grad) in grads.iter() {
                let distance = distance(grad, expected.get(name).unwrap());
                assert!(distance < tolerance, "{name}: {distance}");
            }
        }
    }
}
