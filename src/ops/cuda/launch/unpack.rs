//! Quantised frozen matrices on a GPU, dequantised by `unpack.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, PushKernelArg};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

use super::{Number, by_type, grid_over, tensor};
use crate::ops::cpu::blocks::Bits;
use crate::ops::cuda::ptx::kernel;
use crate::ops::unpack::Parts;

const OP: &str = "an unpacked matrix";

/// A quantised matrix in GPU memory.
#[derive(Debug)]
pub(crate) struct Resident {
    shape: (usize, usize),
    /// Number of the GPU.
    gpu: usize,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Nf4 {
        levels: CudaSlice<u8>,
        scales: CudaSlice<u8>,
        scale_of_scales: CudaSlice<f32>,
        offset: f32,
        tables: CudaSlice<f32>,
    },
    Blocks {
        bytes: CudaSlice<u8>,
        bits: u32,
        minimum: u32,
    },
}

impl Resident {
    /// Uploads the parts and waits until they have arrived, since other threads have their own streams.
    pub(crate) fn new(
        parts: Parts<'_>,
        shape: (usize, usize),
        device: &CudaDevice,
    ) -> Result<Self> {
        let form = match parts {
            Parts::Nf4 { levels, scales, scale_of_scales, offset, tables } => Form::Nf4 {
                levels: device.clone_htod(levels)?,
                scales: device.clone_htod(scales)?,
                scale_of_scales: device.clone_htod(scale_of_scales)?,
                offset,
                tables: device.clone_htod(&[tables.0.as_slice(), tables.1].concat())?,
            },
            Parts::Blocks { bytes, bits, minimum } => Form::Blocks {
                bytes: device.clone_htod(bytes)?,
                bits: match bits {
                    Bits::Four => 4,
                    Bits::Eight => 8,
                },
                minimum: u32::from(minimum),
            },
        };
        device.cuda_stream().synchronize().w()?;
        Ok(Self { shape, gpu: number(device), form })
    }

    /// The dense matrix, `[O, I]`.
    ///
    /// # Errors
    /// A dtype other than f32 and bf16; a GPU other than the one holding it.
    pub(crate) fn dense(&self, device: &CudaDevice, dtype: DType) -> Result<Tensor> {
        if self.gpu != number(device) {
            bail!("{OP} is on cuda:{}, what it meets on cuda:{}", self.gpu, number(device));
        }
        by_type!(dtype, "an unpacked matrix", E => self.unpack::<E>(device))
    }

    fn unpack<E: Number>(&self, device: &CudaDevice) -> Result<Tensor> {
        let count = self.shape.0 * self.shape.1;
        // SAFETY: the kernel writes it whole.
        let mut out = unsafe { device.alloc::<E>(count) }?;
        let (config, long_count) = (grid_over(OP, count)?, count as u64);
        match &self.form {
            Form::Nf4 { levels, scales, scale_of_scales, offset, tables } => {
                let function = kernel(device, "unpack", &format!("unpack_nf4_{}", E::NAME))?;
                let mut launch = function.builder();
                launch.arg(levels).arg(scales).arg(scale_of_scales).arg(offset).arg(tables);
                launch.arg(&mut out).arg(&long_count);
                // SAFETY: the kernel's arguments, for `count` numbers.
                unsafe { launch.launch(config) }.w()?;
            }
            Form::Blocks { bytes, bits, minimum } => {
                let function = kernel(device, "unpack", &format!("unpack_blocks_{}", E::NAME))?;
                let mut launch = function.builder();
                launch.arg(bytes).arg(bits).arg(minimum).arg(&mut out).arg(&long_count);
                // SAFETY: the kernel's arguments, for `count` numbers in whole blocks.
                unsafe { launch.launch(config) }.w()?;
            }
        }
        Ok(tensor(device, out, self.shape))
    }
}

fn number(device: &CudaDevice) -> usize {
    device.cuda_stream().context().ordinal()
}
