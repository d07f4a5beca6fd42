//! Token embedding: rows of a table, and the sparse gradient into it.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor};

use super::cpu;

/// Rows of `table` for each token.
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
    let ids = Tensor::from_slice(tokens, tokens.len(), table.device())?;
    table.detach().index_select(&ids, 0)
}

/// Adds the embedding's gradient into `d_table`: row `tokens[t]` gains row `t` of `d_x`. Returns the sum.
///
/// On the CPU `d_table` itself changes, in the order of the tokens; elsewhere a new tensor is made.
///
/// # Shapes
/// - `d_table`: `[V, D]`, `d_x`: `[T, D]`  →  `[V, D]`
pub fn embed_grad(d_table: Tensor, tokens: &[u32], d_x: &Tensor) -> Result<Tensor> {
    if d_table.device().is_cpu() {
        d_table.inplace_op2(&d_x.contiguous()?, &AddRows { rows: tokens })?;
        return Ok(d_table);
    }
    let ids = Tensor::from_slice(tokens, tokens.len(), d_table.device())?;
    d_table.index_add(&ids, d_x, 0)
}

struct AddRows<'a> {
    rows: &'a [u32],
}

impl InplaceOp2 for AddRows<'_> {
    fn name(&self) -> &'static str {
        "add-rows"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let width = x_layout.shape().dims2()?.1;
        let x = cpu::slice(x, x_layout)?;
        let out = cpu::slice_mut(out, out_layout)?;
        for (&row, x) in self.rows.iter().zip(x.chunks_exact(width)) {
            cpu::simd::axpy(&mut out[row as usize * width..][..width], 1.0, x);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn repeated_tokens_add_up() {
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
