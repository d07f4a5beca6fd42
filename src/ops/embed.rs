//! Token embedding: rows of a table, and the sparse gradient into it.

use candle_core::{DType, Result, Tensor};

use super::cpu;

/// Rows of `table` for each token, in f32: the initial residual stream.
///
/// # Shapes
/// - `table`: `[V, D]`, `tokens`: `T` ids  →  `[T, D]`
///
/// # Errors
/// An id that is not a row of the table.
pub fn embed(table: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    let (vocab, _) = table.dims2()?;
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab) {
        candle_core::bail!("token id {id} is beyond the vocabulary of {vocab}");
    }
    #[cfg(feature = "cuda")]
    if table.device().is_cuda() && !tokens.is_empty() {
        return super::cuda::launch::embed::on_cuda(table, tokens);
    }
    let ids = Tensor::from_slice(tokens, tokens.len(), table.device())?;
    table.detach().index_select(&ids, 0)?.to_dtype(DType::F32)
}

/// Adds the embedding's gradient into `d_table`: row `tokens[t]` gains row `t` of `d_x`. Returns the sum.
///
/// On the CPU and on CUDA `d_table` is updated in place, in token order; elsewhere a new tensor is created.
///
/// # Shapes
/// - `d_table`: `[V, D]`, `d_x`: `[T, D]`  →  `[V, D]`
pub fn embed_grad(d_table: Tensor, tokens: &[u32], d_x: &Tensor) -> Result<Tensor> {
    if d_table.device().is_cpu() {
        let (width, d_x) = (d_x.dim(1)?, d_x.contiguous()?);
        cpu::with_slice_mut(&d_table, |table| {
            cpu::with_slice(&d_x, |d_x: &[f32]| {
                for (&row, d_x) in tokens.iter().zip(d_x.chunks_exact(width)) {
                    cpu::simd::axpy(&mut table[row as usize * width..][..width], 1.0, d_x);
                }
            })
        })??;
        return Ok(d_table);
    }
    #[cfg(feature = "cuda")]
    if d_table.device().is_cuda() {
        super::cuda::launch::embed::add_rows(&d_table, tokens, d_x)?;
        return Ok(d_table);
    }
    let ids = Tensor::from_slice(tokens, tokens.len(), d_table.device())?;
    d_table.index_add(&ids, d_x, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn gradients_of_repeated_tokens_add_up() {
        let zeros = Tensor::zeros((4, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let d_x = Tensor::new(&[[1_f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu).unwrap();
        let grad = embed_grad(zeros, &[2, 0, 2], &d_x).unwrap();
        assert_eq!(
            grad.to_vec2::<f32>().unwrap(),
            [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [0.0, 0.0]]
        );
        assert!(
            embed(&grad, &[4])
                .unwrap_err()
                .to_string()
                .contains("token id 4 is beyond the vocabulary of 4")
        );
    }
}
