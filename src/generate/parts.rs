//! A causal language model's weights in forward-pass order: dense, packed or block-quantised.

use std::cell::{OnceCell, RefCell};
use std::sync::Arc;

use candle_core::Tensor;

use super::adaptation::Place;
use crate::error::{Error, Result};
use crate::model::packed::{BlockType, block_matrix};
use crate::model::params::{EMBEDDING, HEAD};
use crate::model::{Architecture, Config, Weights};
use crate::ops::cpu::blocks::{BlockMatrix, RoundedRows, products};
use crate::ops::cpu::packed::PackedWeight;
use crate::ops::cpu::{self, Element};
use crate::ops::linear;

/// A matrix `[O, I]`.
#[derive(Clone, Debug)]
pub(super) enum Matrix {
    /// In the compute dtype.
    Dense(Tensor),
    /// In the CPU kernels' packed layout, same dtype.
    Packed(Arc<PackedWeight>),
    /// Block-quantised; CPU only.
    Blocks(Arc<BlockMatrix>),
}

impl Matrix {
    /// The dense matrix.
    ///
    /// # Errors
    /// A packed or quantised matrix; only the CPU can compute with those.
    pub(super) fn dense(&self) -> Result<&Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor),
            Self::Packed(_) | Self::Blocks(_) => {
                Err(Error::run("weights in this format are CPU-only"))
            }
        }
    }
}

/// Rows `[T, I]` multiplied by several matrices; quantised once for all block matrices.
pub(super) struct Input<'a, E> {
    x: &'a [E],
    rounded: OnceCell<RoundedRows>,
}

impl<'a, E: Element> Input<'a, E> {
    pub(super) fn new(x: &'a [E]) -> Self {
        Self { x, rounded: OnceCell::new() }
    }

    /// `x · Wᵀ` for each of the matrices, in f32.
    pub(super) fn times<const N: usize>(&self, matrices: [&Matrix; N]) -> Result<[Vec<f32>; N]> {
        let mut results = [const { Vec::new() }; N];
        let (mut packed, mut blocks) = (Vec::with_capacity(N), Vec::with_capacity(N));
        for (matrix, result) in matrices.iter().zip(&mut results) {
            match matrix {
                Matrix::Dense(weight) => *result = linear::forward(self.x, weight, None)?,
                Matrix::Packed(weight) => packed.push((&**weight, result)),
                Matrix::Blocks(weight) => blocks.push((&**weight, result)),
            }
        }
        // One parallel pass over all matrices: no thread waits for one product to end before the next.
        if !packed.is_empty() {
            let weights: Vec<&PackedWeight> = packed.iter().map(|(weight, _)| *weight).collect();
            let computed = PackedWeight::times(self.x, &weights)?;
            packed.into_iter().zip(computed).for_each(|((_, result), y)| *result = y);
        }
        if let Some((first, _)) = blocks.first() {
            let (_, inner) = first.shape();
            let rounded = self.rounded.get_or_init(|| {
                let mut scratch = Vec::new();
                RoundedRows::new(E::widen(self.x, &mut scratch), inner)
            });
            let weights: Vec<&BlockMatrix> = blocks.iter().map(|(weight, _)| *weight).collect();
            let computed = products(rounded, &weights);
            blocks.into_iter().zip(computed).for_each(|((_, result), y)| *result = y);
        }
        Ok(results)
    }
}

/// One transformer block's weights.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) input_norm: Tensor,
    pub(super) qkv: [Matrix; 3],
    pub(super) qkv_bias: [Option<Tensor>; 3],
    pub(super) o: Matrix,
    pub(super) o_bias: Option<Tensor>,
    pub(super) post_norm: Tensor,
    pub(super) gate: Matrix,
    pub(super) up: Matrix,
    pub(super) down: Matrix,
}

impl Layer {
    /// A projection's matrix.
    pub(super) fn matrix(&self, place: Place) -> &Matrix {
        let [q, k, v] = &self.qkv;
        match place {
            Place::Q => q,
            Place::K => k,
            Place::V => v,
            Place::O => &self.o,
            Place::Gate => &self.gate,
            Place::Up => &self.up,
            Place::Down => &self.down,
        }
    }

    /// A projection's bias.
    pub(super) fn bias(&self, place: Place) -> Option<&Tensor> {
        let [q, k, v] = &self.qkv_bias;
        match place {
            Place::Q => q.as_ref(),
            Place::K => k.as_ref(),
            Place::V => v.as_ref(),
            Place::O => self.o_bias.as_ref(),
            Place::Gate | Place::Up | Place::Down => None,
        }
    }
}

/// The weights of a causal language model. Dense ones are shared, not copied.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub(super) config: Config,
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) head: Matrix,
    pub(super) frequencies: Vec<f32>,
}

/// How a matrix is stored if not dense; called with its name and the dense matrix.
type Hold<'a> = dyn Fn(&str, &Tensor) -> Result<Option<Matrix>> + 'a;

impl Parts {
    /// All matrices dense, shared with `weights`.
    pub(super) fn new(config: &Config, weights: &Weights) -> Result<Self> {
        Self::held(config, weights.clone(), &|_, _| Ok(None))
    }

    /// Converts the matrices with `hold` one at a time; those only `weights` owns are freed on the way.
    fn held(config: &Config, weights: Weights, hold: &Hold<'_>) -> Result<Self> {
        if config.architecture != Architecture::CausalLm {
            return Err(Error::usage("a reward model cannot write text")
                .hint("give a causal language model here"));
        }
        let weights = RefCell::new(weights);
        let get = |name: &str| -> Result<Tensor> {
            let tensor = weights.borrow_mut().remove(name);
            let tensor = tensor.ok_or_else(|| Error::run("missing from the weights").at(name))?;
            Ok(tensor.detach().contiguous()?)
        };
        let matrix = |name: &str| -> Result<Matrix> {
            let dense = get(name)?;
            Ok(hold(name, &dense)?.unwrap_or(Matrix::Dense(dense)))
        };
        let layer = |index: usize| -> Result<Layer> {
            let at = |name: &str| format!("model.layers.{index}.{name}");
            let bias = |name: &str, is_there: bool| {
                is_there.then(|| get(&at(&format!("self_attn.{name}.bias")))).transpose()
            };
            let projection = |name: &str| matrix(&at(&format!("self_attn.{name}.weight")));
            Ok(Layer {
                input_norm: get(&at("input_layernorm.weight"))?,
                qkv: [projection("q_proj")?, projection("k_proj")?, projection("v_proj")?],
                qkv_bias: [
                    bias("q_proj", config.qkv_bias)?,
                    bias("k_proj", config.qkv_bias)?,
                    bias("v_proj", config.qkv_bias)?,
                ],
                o: projection("o_proj")?,
                o_bias: bias("o_proj", config.output_bias)?,
                post_norm: get(&at("post_attention_layernorm.weight"))?,
                gate: matrix(&at("mlp.gate_proj.weight"))?,
                up: matrix(&at("mlp.up_proj.weight"))?,
                down: matrix(&at("mlp.down_proj.weight"))?,
            })
        };
        let embedding = matrix(EMBEDDING)?;
        let head = if config.tie_word_embeddings { embedding.clone() } else { matrix(HEAD)? };
        Ok(Self {
            embedding,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: get("model.norm.weight")?,
            head,
            frequencies: config.rope.inverse_frequencies(config.head_dim),
            config: config.clone(),
        })
    }

    /// Quantises every matrix to one block type, except embedding and head, which keep 8 bits as in llama.cpp's files.
    ///
    /// # Errors
    /// Rows that are not a whole number of blocks.
    pub(super) fn rounded(config: &Config, weights: Weights, kind: BlockType) -> Result<Self> {
        Self::held(config, weights, &|name, dense| {
            let kind = if name == EMBEDDING || name == HEAD { BlockType::Q8_0 } else { kind };
            let blocks = block_matrix(dense, kind).map_err(|error| error.at(name))?;
            Ok(Some(Matrix::Blocks(Arc::new(blocks))))
        })
    }

    /// Packs every matrix that is multiplied with rows for the CPU kernels.
    pub(super) fn packed(config: &Config, weights: Weights) -> Result<Self> {
        let looked_up = !config.tie_word_embeddings;
        Self::held(config, weights, &|name, dense| match name {
            EMBEDDING if looked_up => Ok(None),
            _ => {
                let packed =
                    PackedWeight::new(dense).map_err(|error| Error::from(error).at(name))?;
                Ok(Some(Matrix::Packed(Arc::new(packed))))
            }
        })
    }

    /// Rejects token ids outside the embedding.
    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let size = self.config.vocab_size;
        match tokens.iter().find(|&&token| token as usize >= size) {
            Some(token) => Err(Error::run(format!("token {token}, the model has {size}"))
                .hint("this tokenizer does not belong to this model")),
            None => Ok(()),
        }
    }

    /// Appends the embeddings of tokens to the rows `x`.
    pub(super) fn embed<E: Element>(&self, tokens: &[u32], x: &mut Vec<f32>) -> Result<()> {
        let width = self.config.hidden_size;
        match &self.embedding {
            Matrix::Dense(table) => cpu::with_slice::<E, _>(table, |table| {
                for &token in tokens {
                    let row = &table[token as usize * width..][..width];
                    x.extend(row.iter().map(|x| x.widened()));
                }
            })?,
            Matrix::Packed(table) => tokens.iter().for_each(|&token| table.row(token as usize, x)),
            Matrix::Blocks(table) => tokens.iter().for_each(|&token| table.row(token as usize, x)),
        }
        Ok(())
    }
}
