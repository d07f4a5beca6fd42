//! One transformer block: attention and a SwiGLU MLP, each with a pre-RMSNorm and a residual connection.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use super::lora::Masks;
use super::params::EMBEDDING;
use super::projection::Projection;
use super::{Config, Tensors};
use crate::ops::{self, AttentionPlan, Rotary, norm};

/// State shared by all blocks for one forest: positions and the attention mask.
#[derive(Clone, Debug)]
pub struct Layout {
    /// RoPE angles of each token.
    pub rotary: Rotary,
    /// The attention plan.
    pub attention: Arc<AttentionPlan>,
    /// Dropout masks of adapter inputs, in training with dropout.
    pub masks: Option<Arc<Masks>>,
}

#[cfg(feature = "cuda")]
impl Layout {
    /// Copies the parts a GPU will be sent into page-locked memory; may run on any thread. A no-op for other devices.
    ///
    /// # Errors
    /// A driver error.
    pub fn stage(&self, config: &Config, device: &candle_core::Device) -> Result<()> {
        let candle_core::Device::Cuda(device) = device else { return Ok(()) };
        let share = config.num_attention_heads / config.num_key_value_heads;
        self.rotary.stage(device)?;
        self.attention.stage(share, device)
    }
}

/// One block's weights. Cheap to clone: tensors are shared.
#[derive(Clone, Debug)]
pub struct Block {
    /// Prefix of its parameter names.
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
    /// Compute dtype of its products.
    pub(super) dtype: DType,
    /// Its trained tensors, by name.
    trained: Vec<(String, Tensor)>,
}

impl Block {
    /// Takes block `index` from the weights.
    ///
    /// # Errors
    /// Names the missing tensor.
    pub fn new(config: &Config, tensors: &Tensors, index: usize) -> crate::Result<Self> {
        let prefix = format!("model.layers.{index}.");
        let get = |name: &str| tensors.get(&format!("{prefix}{name}"));
        let projection = |name: &str, bias: bool| -> crate::Result<Projection> {
            let bias = if bias { Some(get(&format!("{name}.bias"))?) } else { None };
            let module = format!("{prefix}{name}");
            Ok(Projection {
                name: format!("{module}.weight"),
                weight: tensors.matrix(&module)?,
                bias,
                adapter: tensors.adapters.get(&module).cloned(),
            })
        };
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
            dtype: tensors.get(EMBEDDING)?.dtype(),
            trained: tensors.trained(&prefix),
            prefix,
        })
    }

    /// The block over a packed forest, as a graph of ops. Shapes: `[T, D] -> [T, D]`.
    ///
    /// The residual stream is f32. On a GPU all product inputs are in the weights' dtype, as on the CPU. On the CPU
    /// this form is the reference for the hand-written one, and rounds only within products.
    pub fn forward(&self, x: &Tensor, layout: &Layout) -> Result<Tensor> {
        let masks = layout.masks.as_deref();
        let inner = if x.device().is_cuda() { self.dtype } else { x.dtype() };
        let normed = norm::rms_norm_in(x, &self.input_norm, self.eps, inner)?;
        let heads = |y: Tensor| -> Result<Tensor> {
            let (t, width) = y.dims2()?;
            y.reshape((t, width / self.head_dim, self.head_dim))
        };
        let turned = |y: Tensor| ops::rope::rope_in_place(&heads(y)?, &layout.rotary);
        let q = turned(self.q.forward(&normed, masks, self.dtype)?)?;
        let k = turned(self.k.forward(&normed, masks, self.dtype)?)?;
        let v = heads(self.v.forward(&normed, masks, self.dtype)?)?;
        let seen = ops::attention(&q, &k, &v, &layout.attention)?;
        let seen = self.o.forward(&seen.flatten_from(1)?, masks, self.dtype)?;
        let [x, normed] = norm::residual_norm((x, &seen), &self.post_norm, self.eps, inner)?;
        let gate = self.gate.forward(&normed, masks, self.dtype)?;
        let hidden = ops::swiglu(&gate, &self.up.forward(&normed, masks, self.dtype)?)?;
        ops::residual(&x, &self.down.forward(&hidden, masks, self.dtype)?)
    }

    /// Prefix of its parameter names, such as `model.layers.3.`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Trained tensors by name, in name order.
    pub fn trained(&self) -> &[(String, Tensor)] {
        &self.trained
    }
}
