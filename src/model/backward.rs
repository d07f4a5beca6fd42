//! The backward pass, one block at a time (design idea 3): the caller may use and free a block's gradients before the
//! next block's exist.

use candle_core::{Tensor, Var};

use super::block::{Block, Layout};
use super::block_cpu::Kept;
use super::gradients::Gradients;
use super::params::{EMBEDDING, FINAL_NORM};
use super::transformer::{Form, Input, Trace, Transformer};
use crate::data::forest::Forest;
use crate::error::{Error, Result};
use crate::ops::{self, cpu, norm};

/// A backward pass in progress.
#[derive(Debug)]
pub struct Backward<'a> {
    model: &'a Transformer,
    forest: &'a Forest,
    layout: Layout,
    form: Under,
    /// Blocks still to be processed, and whether the embedding is.
    left: usize,
    embedding_left: bool,
}

/// The rest of a trace, and the gradient of the last block's output not yet processed, `[T, D]`.
#[derive(Debug)]
enum Under {
    Cpu { inputs: Vec<Vec<f32>>, kept: Vec<Kept>, d_x: Vec<f32> },
    Graph { inputs: Vec<Input>, outputs: Vec<Tensor>, d_x: Tensor },
}

impl<'a> Backward<'a> {
    /// Backward of the final norm. `d_hidden`: `[T, D]`.
    pub(super) fn begin(
        model: &'a Transformer,
        forest: &'a Forest,
        trace: Trace,
        d_hidden: &Tensor,
        grads: &mut Gradients,
    ) -> Result<Self> {
        let Trace { layout, form, hidden } = trace;
        drop(hidden);
        let weight = &model.norm;
        let form = match form {
            Form::Cpu { mut inputs, kept } => {
                let last = inputs.pop().ok_or_else(no_input)?;
                let (d_hidden, eps) = (d_hidden.contiguous()?, model.config().rms_norm_eps as f32);
                let (d_x, d_norm) = cpu::with_slice(weight, |weight| {
                    cpu::with_slice(&d_hidden, |d| norm::gradients(&last, weight, d, eps))
                })??;
                if weight.is_variable() {
                    let d_norm = Tensor::from_vec(d_norm, weight.shape(), model.device())?;
                    grads.add(FINAL_NORM, &d_norm)?;
                }
                Under::Cpu { inputs, kept, d_x }
            }
            Form::Graph { mut inputs, outputs } => {
                let input = inputs.pop().ok_or_else(no_input)?.back()?;
                let output = ops::rms_norm(&input, weight, model.config().rms_norm_eps)?;
                let norm = [(FINAL_NORM.to_owned(), weight.clone())];
                let trained = if weight.is_variable() { &norm[..] } else { &[] };
                let d_x = vector_jacobian((&input, &output), d_hidden, trained, grads)?;
                Under::Graph { inputs, outputs, d_x }
            }
        };
        let left = model.blocks().len();
        Ok(Self { model, forest, layout, form, left, embedding_left: true })
    }

    /// Runs the next block's backward, last block first, and returns the block: its gradients are now complete, unless
    /// another micro-batch adds to them. After the first block comes the embedding, and then `None`.
    ///
    /// # Errors
    /// A device error; a parameter that no gradient reaches.
    pub fn next_block(&mut self, grads: &mut Gradients) -> Result<Option<&'a Block>> {
        if self.left == 0 {
            if std::mem::take(&mut self.embedding_left) {
                self.embedding(grads)?;
            }
            return Ok(None);
        }
        self.left -= 1;
        let block = &self.model.blocks()[self.left];
        match &mut self.form {
            Under::Cpu { inputs, kept, d_x } => {
                let input = inputs.pop().ok_or_else(no_input)?;
                let kept = match kept.pop() {
                    Some(kept) => kept,
                    None => block.forward_cpu(&input, &self.layout)?.1,
                };
                let d_y = std::mem::take(d_x);
                *d_x = block.backward_cpu((&input, kept), d_y, &self.layout, grads)?;
            }
            Under::Graph { inputs, outputs, d_x } => {
                let input = inputs.pop().ok_or_else(no_input)?.back()?;
                let output = match outputs.pop() {
                    Some(output) => output,
                    None => block.forward(&input, &self.layout)?,
                };
                *d_x = vector_jacobian((&input, &output), d_x, block.trained(), grads)?;
            }
        }
        Ok(Some(block))
    }

    fn embedding(&self, grads: &mut Gradients) -> Result<()> {
        let table = self.model.embedding();
        if !table.is_variable() {
            return Ok(());
        }
        grads.add_rows(EMBEDDING, table.shape(), &self.forest.tokens, &self.d_input()?)
    }

    /// Gradient of the next block's output; at the end, of the token embeddings. `[T, D]`.
    pub(super) fn d_input(&self) -> Result<Tensor> {
        match &self.form {
            Under::Cpu { d_x, .. } => {
                let shape = (self.forest.len(), self.model.config().hidden_size);
                Ok(Tensor::from_slice(d_x, shape, self.model.device())?)
            }
            Under::Graph { d_x, .. } => Ok(d_x.clone()),
        }
    }
}

fn no_input() -> Error {
    Error::run("a trace without the block's input")
}

/// One block's vector-Jacobian product: adds the gradients of its trained tensors, returns its input's.
fn vector_jacobian(
    (input, output): (&Var, &Tensor),
    d_output: &Tensor,
    trained: &[(String, Tensor)],
    grads: &mut Gradients,
) -> Result<Tensor> {
    let mut store = ops::residual::vjp_root(output, d_output)?.backward()?;
    for (name, tensor) in trained {
        let grad = store
            .remove(tensor)
            .ok_or_else(|| Error::run("got no gradient: its path to the loss is cut").at(name))?;
        grads.add(name, &grad)?;
    }
    store.remove(input).ok_or_else(|| Error::run("a block's input got no gradient"))
}
