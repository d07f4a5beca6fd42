//! Kernels for NVIDIA GPUs, in CUDA C++, one `.cu` file per op.
//!
//! With the feature `cuda` they are compiled to PTX and launched on Candle's stream. Tests need neither a GPU nor the
//! toolkit: the same sources are compiled for the host, see `tests/host.rs` and `host.h`, and compared with the CPU
//! ops.

#[cfg(feature = "cuda")]
mod arguments;
#[cfg(any(feature = "cuda", all(test, unix)))]
pub(super) mod attention;
#[cfg(any(feature = "cuda", all(test, unix)))]
pub(super) mod cached;
pub mod device;
#[cfg(feature = "cuda")]
pub(super) mod head_launch;
#[cfg(feature = "cuda")]
pub(crate) mod launch;
#[cfg(any(feature = "cuda", test))]
mod limits;
#[cfg(feature = "cuda")]
mod nvrtc;
#[cfg(feature = "cuda")]
mod pool;
#[cfg(feature = "cuda")]
mod ptx;

#[cfg(test)]
#[cfg(unix)]
mod tests;
