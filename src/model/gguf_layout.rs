//! Mapping between GGUF and Hugging Face: tensor names, and the order of rotary rows.
//!
//! Files of arch `llama` store the rows of q and k as interleaved rotary pairs, Hugging Face as two halves.

use candle_core::Tensor;

use super::config::{Config, Family};
use super::params;
use crate::error::Result;

/// Llama 3.1's frequency factors: part of the configuration, not a parameter.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Tensors of the whole model: (GGUF, Hugging Face).
const WHOLE: [(&str, &str); 3] = [
    ("token_embd.weight", params::EMBEDDING),
    ("output_norm.weight", params::FINAL_NORM),
    ("output.weight", params::HEAD),
];

/// Tensors of a block: (GGUF, Hugging Face).
const PARTS: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Maps `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`, and so on.
pub(super) fn hugging_face_name(name: &str) -> Option<String> {
    if let Some((_, theirs)) = WHOLE.iter().find(|(gguf, _)| *gguf == name) {
        return Some((*theirs).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let (_, part) = PARTS.iter().find(|(gguf, _)| *gguf == part)?;
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// The inverse; `None` for names that a language model does not have.
pub(super) fn gguf_name(name: &str) -> Option<String> {
    if let Some((gguf, _)) = WHOLE.iter().find(|(_, theirs)| *theirs == name) {
        return Some((*gguf).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let (part, _) = PARTS.iter().find(|(_, theirs)| *theirs == part)?;
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// Number of heads in a parameter whose rows are stored in another order.
pub(super) fn rotary_heads(name: &str, config: &Config) -> Option<usize> {
    if config.family != Family::Llama {
        return None;
    }
    if name.contains(".q_proj.") {
        Some(config.num_attention_heads)
    } else if name.contains(".k_proj.") {
        Some(config.num_key_value_heads)
    } else {
        None
    }
}

/// Reorders rows of each head from (pair, side) to (side, pair); the first dimension is `heads · head_dim`.
pub(super) fn half_split(tensor: &Tensor, heads: usize, head_dim: usize) -> Result<Tensor> {
    swapped(tensor, (heads, head_dim / 2, 2))
}

/// Reorders rows of each head from (side, pair) to (pair, side): the inverse of [`half_split`].
pub(super) fn interleaved(tensor: &Tensor, heads: usize, head_dim: usize) -> Result<Tensor> {
    swapped(tensor, (heads, 2, head_dim / 2))
}

fn swapped(tensor: &Tensor, (heads, one, two): (usize, usize, usize)) -> Result<Tensor> {
    let dims = tensor.dims().to_vec();
    let rest: usize = dims.iter().skip(1).product();
    let rows = tensor.reshape((heads, one, two, rest))?;
    Ok(rows.transpose(1, 2)?.contiguous()?.reshape(dims)?)
}

/// [`half_split`] for rows of bytes.
pub(super) fn half_split_rows(bytes: &[u8], row: usize, head_dim: usize) -> Vec<u8> {
    let heads = bytes.chunks_exact(row * head_dim);
    heads
        .flat_map(|head| {
            (0..head_dim)
                .map(move |i| (i % (head_dim / 2)) * 2 + i / (head_dim / 2))
                .map(move |old| &head[old * row..][..row])
        })
        .flatten()
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn names_and_row_orders_round_trip() {
        let names = ["model.norm.weight", "lm_head.weight", "model.layers.12.mlp.up_proj.weight"];
        for name in names {
            assert_eq!(hugging_face_name(&gguf_name(name).unwrap()).as_deref(), Some(name));
        }
        assert_eq!(gguf_name(names[2]).as_deref(), Some("blk.12.ffn_up.weight"));
        assert_eq!(gguf_name("score.weight"), None);
        // Two heads of four rows; the pairs of each are (0, 2) and (1, 3).
        let halves = Tensor::arange(0_u32, 8, &Device::Cpu).unwrap();
        let pairs = interleaved(&halves, 2, 4).unwrap();
        assert_eq!(pairs.to_vec1::<u32>().unwrap(), [0, 2, 1, 3, 4, 6, 5, 7]);
        let back = half_split(&pairs, 2, 4).unwrap();
        assert_eq!(back.to_vec1::<u32>().unwrap(), halves.to_vec1::<u32>().unwrap());
    }
}
