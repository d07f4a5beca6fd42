//! The Llama transformer over a packed forest, and its block-by-block backward (design idea 3).

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use super::block::{Block, Layout};
use super::gradients::Gradients;
use super::params::{EMBEDDING, FINAL_NORM, HEAD, SCORE};
use super::{Architecture, Config, Weights};
use crate::data::forest::Forest;
use crate::error::{Error, Result};
use crate::ops::{self, AttentionPlan, Rotary};

/// A model ready to run. Its tensors are those of the given weights: where they are variables, the model is trained.
#[derive(Clone, Debug)]
pub struct Transformer {
    config: Config,
    frequencies: Vec<f32>,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Tensor,
}

/// What a forward pass keeps for its backward.
#[derive(Debug)]
pub struct Trace {
    layout: Layout,
    /// Input of each block, then of the final norm: leaves of each block's own graph.
    inputs: Vec<Var>,
    /// Output of each block with its graph; empty where blocks are recomputed.
    outputs: Vec<Tensor>,
    /// Final hidden states, `[T, D]`, without a graph.
    pub hidden: Tensor,
}

impl Transformer {
    /// Assembles a model.
    ///
    /// # Errors
    /// Names the tensor that is missing.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let get = |name: &str| {
            weights
                .get(name)
                .cloned()
                .ok_or_else(|| Error::run("missing from the weights").at(name))
        };
        let head = match config.architecture {
            Architecture::CausalLm if config.tie_word_embeddings => get(EMBEDDING)?,
            Architecture::CausalLm => get(HEAD)?,
            Architecture::SequenceClassification => get(SCORE)?,
        };
        let blocks = (0..config.num_hidden_layers).map(|index| Block::new(config, weights, index));
        Ok(Self {
            frequencies: config.rope.inverse_frequencies(config.head_dim),
            embedding: get(EMBEDDING)?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: get(FINAL_NORM)?,
            head,
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

    /// The head's weight: `[V, D]`, or `[1, D]` for a reward model.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// The parameter's name whose gradient the head's weight gets.
    pub fn head_name(&self) -> &'static str {
        match self.config.architecture {
            Architecture::CausalLm if self.config.tie_word_embeddings => EMBEDDING,
            Architecture::CausalLm => HEAD,
            Architecture::SequenceClassification => SCORE,
        }
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Rotary angles of the given positions.
    pub fn rotary(&self, positions: &[u32]) -> Rotary {
        Rotary::new(&self.frequencies, positions)
    }

    /// What all blocks share for this forest.
    ///
    /// # Errors
    /// A sequence longer than the model's positions.
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
        Ok(Layout { rotary: self.rotary(&forest.positions), attention })
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
        let layout = self.layout(forest)?;
        let mut x = self.embed(&forest.tokens)?;
        for block in &self.blocks {
            x = block.forward(&x, &layout)?.detach();
        }
        Ok(self.final_norm(&x)?.detach())
    }

    /// Forward pass for training: each block has its own graph, cut at its input. With `recompute`, no graph is kept
    /// and the backward runs each block again.
    pub fn trace(&self, forest: &Forest, recompute: bool) -> Result<Trace> {
        let layout = self.layout(forest)?;
        let mut inputs = vec![Var::from_tensor(&self.embed(&forest.tokens)?)?];
        let mut outputs = Vec::new();
        for block in &self.blocks {
            let input = &inputs[inputs.len() - 1];
            let output = if recompute {
                block.forward(&input.as_tensor().detach(), &layout)?
            } else {
                block.forward(input, &layout)?
            };
            inputs.push(Var::from_tensor(&output.detach())?);
            if !recompute {
                outputs.push(output);
            }
        }
        let hidden = self.final_norm(&inputs[inputs.len() - 1].as_tensor().detach())?.detach();
        Ok(Trace { layout, inputs, outputs, hidden })
    }

    /// Backward pass: from the gradient of the hidden states `[T, D]` to every trained parameter, last block first.
    /// Each block's graph is freed as soon as its gradients are taken.
    pub fn backward(
        &self,
        forest: &Forest,
        trace: Trace,
        d_hidden: &Tensor,
        grads: &mut Gradients,
    ) -> Result<()> {
        let Trace { layout, mut inputs, mut outputs, hidden } = trace;
        drop(hidden);
        let mut pop_input =
            || inputs.pop().ok_or_else(|| Error::run("a trace without the block's input"));
        let input = pop_input()?;
        let output = ops::rms_norm(&input, &self.norm, self.config.rms_norm_eps)?;
        let norm = [(FINAL_NORM.to_owned(), self.norm.clone())];
        let trained = if self.norm.is_variable() { &norm[..] } else { &[] };
        let mut d_x = vector_jacobian(&input, &output, d_hidden, trained, grads)?;
        for block in self.blocks.iter().rev() {
            let input = pop_input()?;
            let output = match outputs.pop() {
                Some(output) => output,
                None => block.forward(&input, &layout)?,
            };
            d_x = vector_jacobian(&input, &output, &d_x, block.trained(), grads)?;
        }
        if self.embedding.is_variable() {
            grads.add_rows(EMBEDDING, self.embedding.shape(), &forest.tokens, &d_x)?;
        }
        Ok(())
    }
}

/// One block's vector-Jacobian product: adds the gradients of its trained tensors, returns that of its input.
fn vector_jacobian(
    input: &Var,
    output: &Tensor,
    d_output: &Tensor,
    trained: &[(String, Tensor)],
    grads: &mut Gradients,
) -> Result<Tensor> {
    let mut store = ops::residual::vjp_root(output, d_output)?.backward()?;
    for (name, tensor) in trained {
        let grad = store
            .remove(tensor)
            .ok_or_else(|| Error::run("got no gradient: its path to the loss is cut").at(name))?;
        grads.add(name, grad)?;
    }
    store.remove(input).ok_or_else(|| Error::run("a block's input got no gradient"))
}
