//! The head's products, by cuBLAS.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut};
use candle_core::{CudaDevice, Result};

use super::Number;
use crate::ops::cuda::limits;

/// One factor of a product.
pub(super) struct Matrix<'a, E> {
    of: &'a CudaView<'a, E>,
    /// Whether it is stored transposed.
    turned: bool,
}

impl<'a, E> Matrix<'a, E> {
    pub(super) fn plain(of: &'a CudaView<'a, E>) -> Self {
        Self { of, turned: false }
    }

    pub(super) fn turned(of: &'a CudaView<'a, E>) -> Self {
        Self { of, turned: true }
    }
}

/// `out[m, n] = a[m, k] · b[k, n]`, or adds it to `out`, in f32.
pub(super) fn product<E: Number>(
    device: &CudaDevice,
    (a, b): (Matrix<'_, E>, Matrix<'_, E>),
    out: &mut CudaViewMut<'_, f32>,
    [m, n, k]: [usize; 3],
    add: bool,
) -> Result<()> {
    use sys::cublasOperation_t::{CUBLAS_OP_N as PLAIN, CUBLAS_OP_T as TURNED};
    if a.of.len() != m * k || b.of.len() != k * n || out.len() != m * n {
        candle_core::bail!("a product of {m} x {k} and {k} x {n} does not fit its factors");
    }
    let [rows, columns, inner] = limits::sizes("head", [m, n, k])?;
    let (alpha, beta) = (1.0_f32, if add { 1.0_f32 } else { 0.0 });
    let stream = device.cuda_stream();
    // cuBLAS is column-major: it sees each of our matrices as its transpose, and outᵀ = bᵀ aᵀ.
    let (b_op, b_lead) = if b.turned { (TURNED, inner) } else { (PLAIN, columns) };
    let (a_op, a_lead) = if a.turned { (TURNED, rows) } else { (PLAIN, inner) };
    let (a, _a) = a.of.device_ptr(&stream);
    let (b, _b) = b.of.device_ptr(&stream);
    let (c, _c) = out.device_ptr_mut(&stream);
    // SAFETY: the three lie on the device with the sizes that were checked; both factors are on the host.
    unsafe {
        gemm_ex(
            *device.cublas_handle().handle(),
            b_op,
            a_op,
            columns,
            rows,
            inner,
            (&raw const alpha).cast(),
            b as *const _,
            E::TYPE,
            b_lead,
            a as *const _,
            E::TYPE,
            a_lead,
            (&raw const beta).cast(),
            c as *mut _,
            sys::cudaDataType_t::CUDA_R_32F,
            columns,
            E::compute(),
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .w()
}
