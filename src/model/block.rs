//! One transformer block: attention and a SwiGLU feed-forward, each behind an RMSNorm and a residual.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{Config, Weights};
use crate::error::Error;
use crate::ops::{self, AttentionPlan, Rotary};

/// What all blocks share for one forest: positions and who sees whom.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Rotary angles of each token.
    pub rotary: Rotary,
    /// Attention's plan.
    pub attention: Arc<AttentionPlan>,
}

/// A weight matrix `[O, I]` with an optional bias `[O]`.
#[derive(Clone, Debug)]
pub struct Projection {
    /// The weight's name among the model's parameters.
    pub name: String,
    /// `[O, I]`.
    pub weight: Tensor,
    /// `[O]`.
    pub bias: Option<Tensor>,
}

impl Projection {
    /// The bias's name among the model's parameters.
    pub fn bias_name(&self) -> String {
        format!("{}.bias", self.name.trim_end_matches(".weight"))
    }

    /// `x · Wᵀ + b`. Shapes: `[T, I] -> [T, O]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, self.bias.as_ref())
    }
}

/// One block's weights. Cheap to clone: tensors are shared.
#[derive(Clone, Debug)]
pub struct Block {
    /// What its parameters' names begin with.
    pub(super) prefix: String,
    pub(super) input_norm: Tensor,
    pub(super) q: Projection,
    pub(super) k: Projection,
    pub(super) v: Projection,
    pub(super) o: Projection,
    pub(super) post_norm: Tensor,
    pub(super) gate: Projection,
    pub(super) up: Projection,
    pub(super) down: Projection,
    pub(super) head_dim: usize,
    pub(super) eps: f64,
    /// The tensors above that are trained, by name.
    trained: Vec<(String, Tensor)>,
}

impl Block {
    /// Takes block `index` out of the weights.
    ///
    /// # Errors
    /// Names the missing tensor.
    pub fn new(config: &Config, weights: &Weights, index: usize) -> crate::Result<Self> {
        let prefix = format!("model.layers.{index}.");
        let get = |name: &str| -> crate::Result<Tensor> {
            let name = format!("{prefix}{name}");
            weights
                .get(&name)
                .cloned()
                .ok_or_else(|| Error::run("missing from the weights").at(name))
        };
        let projection = |name: &str, bias: bool| -> crate::Result<Projection> {
            let bias = if bias { Some(get(&format!("{name}.bias"))?) } else { None };
            let weight = get(&format!("{name}.weight"))?;
            Ok(Projection { name: format!("{prefix}{name}.weight"), weight, bias })
        };
        let trained = weights
            .range(prefix.clone()..)
            .take_while(|(name, _)| name.starts_with(&prefix))
            .filter(|(_, tensor)| tensor.is_variable())
            .map(|(name, tensor)| (name.clone(), tensor.clone()))
            .collect();
        Ok(Self {
            input_norm: get("input_layernorm.weight")?,
            q: projection("self_attn.q_proj", config.qkv_bias)?,
            k: projection("self_attn.k_proj", config.qkv_bias)?,
            v: projection("self_attn.v_proj", config.qkv_bias)?,
            o: projection("self_attn.o_proj", config.output_bias)?,
            post_norm: get("post_attention_layernorm.weight")?,
            gate: projection("mlp.gate_proj", false)?,
            up: projection("mlp.up_proj", false)?,
            down: projection("mlp.down_proj", false)?,
            head_dim: config.head_dim,
            eps: config.rms_norm_eps,
            trained,
            prefix,
        })
    }

    /// The block over a packed forest, as a graph of ops. Shapes: `[T, D] -> [T, D]`.
    pub fn forward(&self, x: &Tensor, layout: &Layout) -> Result<Tensor> {
        let normed = ops::rms_norm(x, &self.input_norm, self.eps)?;
        let heads = |y: Tensor| -> Result<Tensor> {
            let (t, width) = y.dims2()?;
            y.reshape((t, width / self.head_dim, self.head_dim))
        };
        let q = ops::rope(&heads(self.q.forward(&normed)?)?, &layout.rotary)?;
        let k = ops::rope(&heads(self.k.forward(&normed)?)?, &layout.rotary)?;
        let v = heads(self.v.forward(&normed)?)?;
        let seen = ops::attention(&q, &k, &v, &layout.attention)?;
        let x = ops::residual(x, &self.o.forward(&seen.flatten_from(1)?)?)?;
        let normed = ops::rms_norm(&x, &self.post_norm, self.eps)?;
        let hidden = ops::swiglu(&self.gate.forward(&normed)?, &self.up.forward(&normed)?)?;
        ops::residual(&x, &self.down.forward(&hidden)?)
    }

    /// What its parameters' names begin with, such as `model.layers.3.`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Trained tensors by name, in name order.
    pub fn trained(&self) -> &[(String, Tensor)] {
        &self.trained
    }
}
