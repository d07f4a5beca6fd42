//! Kernels for NVIDIA GPUs, in CUDA C++, one `.cu` file an op.
//!
//! With the feature `cuda` they are compiled to PTX and launched on Candle's stream. Tests need neither a GPU nor the
//! toolkit: the same sources are compiled for the host, see `host.rs` and `host.h`, and held against the CPU's ops.

#[cfg(any(feature = "cuda", all(test, unix)))]
pub(super) mod attention;
pub mod device;
#[cfg(feature = "cuda")]
pub(super) mod head_launch;
#[cfg(feature = "cuda")]
pub(crate) mod launch;
#[cfg(feature = "cuda")]
mod nvrtc;
#[cfg(feature = "cuda")]
mod ptx;

#[cfg(test)]
#[cfg(unix)]
mod adamw;
#[cfg(test)]
#[cfg(unix)]
mod embed;
#[cfg(test)]
#[cfg(unix)]
mod head;
#[cfg(test)]
#[cfg(unix)]
mod host;
#[cfg(test)]
#[cfg(unix)]
mod host_tests;
#[cfg(test)]
#[cfg(unix)]
mod norm;
#[cfg(test)]
#[cfg(unix)]
mod reduce;
#[cfg(test)]
#[cfg(unix)]
mod rope;
#[cfg(test)]
#[cfg(unix)]
mod sample;
#[cfg(test)]
#[cfg(unix)]
mod swiglu;
