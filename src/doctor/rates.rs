//! Memory throughput of a device's memory-bound kernels, and the device's peak rates.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use serde::Serialize;

use crate::model::gradients::Gradients;
use crate::model::packed::{BlockType, Packed};
use crate::ops::cuda::device::facts;
use crate::ops::norm::{residual_norm, rms_norm_in};
use crate::ops::unpack::Unpack;
use crate::ops::{Rotary, embed, rope, swiglu};
use crate::optim::Param;
use crate::optim::adamw::{AdamW, Hyper, is_decayed};

/// The rate of one kernel.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rate {
    /// Its name.
    pub kernel: &'static str,
    /// Minimum number of bytes that it must read and write; see the floors in `docs/gpu.md`.
    pub bytes: f64,
    /// Seconds, the best of ten.
    pub seconds: f64,
}

/// Sizes of Llama 3 8B, or small ones for the CPU.
struct Sizes {
    tokens: usize,
    width: usize,
    inner: usize,
    heads: usize,
    vocab: usize,
    parameters: usize,
    /// Type of matrix products.
    dtype: DType,
}

/// Bytes per parameter: master, gradient, two moments, and a bf16 copy.
const PARAMETER: u64 = 18;

impl Sizes {
    /// For a GPU with `free` bytes: parameters take at most an eighth of them.
    fn of(device: &Device, free: u64) -> Self {
        if device.is_cpu() {
            let (tokens, width, inner, heads) = (64, 64, 96, 2);
            let (vocab, parameters, dtype) = (256, 1 << 12, DType::F32);
            return Self { tokens, width, inner, heads, vocab, parameters, dtype };
        }
        let tokens = if free >= 16 << 30 { 4096 } else { 256 };
        let parameters = 1 << (free / 8 / PARAMETER).max(1).ilog2().min(28);
        let (width, inner, heads, vocab) = (4096, 14336, 32, 32768);
        Self { tokens, width, inner, heads, vocab, parameters, dtype: DType::BF16 }
    }
}

/// Measures the kernels.
///
/// # Errors
/// A device error.
pub fn run(device: &Device) -> Result<Vec<Rate>> {
    let free = facts(device).map_err(candle_core::Error::wrap)?.map_or(0, |facts| facts.free);
    let sizes = Sizes::of(device, free);
    let mut rates = of_rows(device, &sizes)?;
    rates.push(of_the_optimizer(device, &sizes)?);
    rates.extend(of_packed(device, &sizes)?);
    Ok(rates)
}

/// Dequantization: reads the quantized matrix, writes the dense one.
fn of_packed(device: &Device, sizes: &Sizes) -> Result<[Rate; 2]> {
    let (i, o) = (sizes.width, sizes.inner);
    let weight = Tensor::zeros((o, i), DType::F32, &Device::Cpu)?;
    let wrap = candle_core::Error::wrap;
    let nf4 = Packed::nf4(&weight).map_err(wrap)?;
    let blocks = Packed::rounded(&weight, BlockType::Q4_1).map_err(wrap)?;
    let rate = |kernel, packed: &Packed| -> Result<Rate> {
        let bytes = (packed.bytes() + i * o * sizes.dtype.size_in_bytes()) as f64;
        Ok(Rate { kernel, bytes, seconds: best(device, || packed.tensor(device, sizes.dtype))? })
    };
    Ok([rate("nf4 made dense", &nf4)?, rate("q4_1 made dense", &blocks)?])
}

fn of_rows(device: &Device, sizes: &Sizes) -> Result<Vec<Rate>> {
    let Sizes { tokens: t, width: d, inner: f, heads: h, vocab, dtype, .. } = *sizes;
    let zeros = |shape: (usize, usize), dtype| Tensor::zeros(shape, dtype, device);
    let (x, y) = (zeros((t, d), DType::F32)?, zeros((t, d), DType::F32)?);
    let weight = Tensor::ones(d, DType::F32, device)?;
    let (gate, up, table) =
        (zeros((t, f), dtype)?, zeros((t, f), dtype)?, zeros((vocab, d), dtype)?);
    let heads = zeros((t, d), dtype)?.reshape((t, h, d / h))?;
    let positions: Vec<u32> = (0..t as u32).collect();
    let frequencies = vec![0.5_f32; d / h / 2];
    let rotary = Rotary::new(&frequencies, &positions);
    let ids: Vec<u32> = positions.iter().map(|at| at * 7 % vocab as u32).collect();
    let (wide, narrow) = (4.0, dtype.size_in_bytes() as f64);
    let (of_width, of_inner) = ((t * d) as f64, (t * f) as f64);
    let rate = |kernel, bytes, seconds: Result<f64>| Ok(Rate { kernel, bytes, seconds: seconds? });
    [
        rate(
            "rms_norm",
            of_width * (wide + narrow),
            best(device, || rms_norm_in(&x, &weight, 1e-5, dtype)),
        ),
        rate(
            "rms_norm after a residual sum",
            of_width * (3.0 * wide + narrow),
            best(device, || residual_norm((&x, &y), &weight, 1e-5, dtype)),
        ),
        rate("rope", of_width * 2.0 * narrow, best(device, || rope(&heads, &rotary))),
        rate("swiglu", of_inner * 3.0 * narrow, best(device, || swiglu(&gate, &up))),
        rate("embedding", of_width * (wide + narrow), best(device, || embed::embed(&table, &ids))),
    ]
    .into_iter()
    .collect()
}

fn of_the_optimizer(device: &Device, sizes: &Sizes) -> Result<Rate> {
    let zeros = Tensor::zeros(sizes.parameters, DType::F32, device)?;
    let param = Param::computed_in(&zeros, sizes.dtype).map_err(candle_core::Error::wrap)?;
    let copy = if sizes.dtype == DType::F32 { 0.0 } else { 2.0 };
    let params = BTreeMap::from([("w.weight".to_owned(), param)]);
    let mut grads = Gradients::new(device);
    grads.add("w.weight", &zeros).map_err(candle_core::Error::wrap)?;
    let hyper =
        Hyper { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decayed: is_decayed };
    let mut adamw = AdamW::new(hyper);
    let seconds =
        best(device, || adamw.step(&params, &grads, 1e-3, 1.0).map_err(candle_core::Error::wrap))?;
    // The gradient is read; master and moments are read and written; the copy is written.
    let bytes = sizes.parameters as f64 * (4.0 + 24.0 + copy);
    Ok(Rate { kernel: "adamw", bytes, seconds })
}

/// A device's measured peak rates.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Peak {
    /// Operations per second of a large product: in bf16, on the CPU in f32.
    pub flops_per_s: f64,
    /// Bytes read and written per second by a kernel that does little else.
    pub bytes_per_s: f64,
}

/// Measures [`Peak`]: the best of ten.
///
/// # Errors
/// A device error.
pub fn peak(device: &Device) -> Result<Peak> {
    // A product of size 8192 keeps an H100 busy for 1.5 ms.
    let (size, dtype, elements) =
        if device.is_cpu() { (256, DType::F32, 1 << 20) } else { (8192, DType::BF16, 1 << 27) };
    let a = Tensor::ones((size, size), dtype, device)?;
    let product = best(device, || a.matmul(&a))?;
    let x = Tensor::zeros(elements, DType::F32, device)?;
    let copy = best(device, || x.affine(1.0, 1.0))?;
    Ok(Peak {
        flops_per_s: 2.0 * (size as f64).powi(3) / product,
        bytes_per_s: 8.0 * elements as f64 / copy,
    })
}

/// Seconds of the fastest of ten calls, after one warm-up.
fn best<T>(device: &Device, mut work: impl FnMut() -> Result<T>) -> Result<f64> {
    let mut seconds = f64::INFINITY;
    for call in 0..11 {
        device.synchronize()?;
        let began = Instant::now();
        drop(work()?);
        device.synchronize()?;
        if call > 0 {
            seconds = seconds.min(began.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_measured() {
        let Peak { flops_per_s, bytes_per_s } = peak(&Device::Cpu).unwrap();
        assert!(flops_per_s > 1e6 && bytes_per_s > 1e6, "{flops_per_s}, {bytes_per_s}");
    }

    #[test]
    fn every_kernel_is_timed_against_its_minimum_bytes() {
        let rates = run(&Device::Cpu).unwrap();
        assert!(rates.iter().all(|rate| rate.seconds > 0.0), "{rates:?}");
        let bytes: Vec<(&str, f64)> = rates.iter().map(|rate| (rate.kernel, rate.bytes)).collect();
        // f32 throughout: 64 rows of 64 or 96; 28 bytes per parameter.
        let rows = 64.0 * 64.0 * 4.0;
        let expected = [
            ("rms_norm", 2.0 * rows),
            ("rms_norm after a residual sum", 4.0 * rows),
            ("rope", 2.0 * rows),
            ("swiglu", 4.5 * rows),
            ("embedding", 2.0 * rows),
            ("adamw", 28.0 * 4096.0),
            // 96 rows of one block of 64: half a byte per number, one byte per block, and one number per up to 256 of
            // these.
            ("nf4 made dense", 1.5 * rows + 3072.0 + 96.0 + 4.0),
            ("q4_1 made dense", 1.5 * rows + 192.0 * 20.0),
        ];
        assert_eq!(bytes, expected);
    }
}
