//! Host callbacks within the stream: the driver runs them in stream order, without blocking the launching thread.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, sys};
use candle_core::{CudaDevice, Result, Tensor};

use super::host::Lent;
use super::{cuda, tensor, together, view};

/// Computes values from device data, given one slice per input.
pub(in crate::ops::cuda) type Compute = Box<dyn FnOnce(&[&[f32]]) -> Vec<f32> + Send>;

/// Data of a callback: buffers of the inputs, the output buffer, and the computation.
struct Job {
    inputs: Vec<(*const f32, usize)>,
    output: (*mut f32, usize),
    compute: Compute,
}

/// Fills the output; with NaN if `compute` panics or returns another number of values, since there is no way to report
/// an error: consumers of the same inputs report it later.
unsafe extern "C" fn run(job: *mut c_void) {
    // SAFETY: made of a box by `by_host`, and called once.
    let Job { inputs, output: (to, room), compute } = *unsafe { Box::from_raw(job.cast::<Job>()) };
    // SAFETY: page-locked memory of so many elements, which this stream alone uses until it is behind this call.
    let (inputs, output) = unsafe {
        let inputs: Vec<&[f32]> =
            inputs.iter().map(|&(at, len)| std::slice::from_raw_parts(at, len)).collect();
        (inputs, std::slice::from_raw_parts_mut(to, room))
    };
    match catch_unwind(AssertUnwindSafe(|| compute(&inputs))) {
        Ok(numbers) if numbers.len() == room => output.copy_from_slice(&numbers),
        _ => output.fill(f32::NAN),
    }
}

/// Computes `len` values from the inputs. `compute` must not call the device.
pub(in crate::ops::cuda) fn by_host(
    device: &CudaDevice,
    inputs: &[CudaView<'_, f32>],
    len: usize,
    compute: Compute,
) -> Result<CudaSlice<f32>> {
    let stream = device.cuda_stream();
    let mut came = Vec::with_capacity(inputs.len());
    let mut places = Vec::with_capacity(inputs.len());
    for input in inputs {
        let mut memory = Lent::new(device, input.len())?;
        memory.memory()?.fetch(input, &stream)?;
        places.push((memory.memory()?.place(&stream)?.cast_const(), input.len()));
        came.push(memory);
    }
    let mut output = Lent::<f32>::new(device, len)?;
    let place = output.memory()?.place(&stream)?;
    let job = Box::into_raw(Box::new(Job { inputs: places, output: (place, len), compute }));
    // SAFETY: `run` takes what the pointer is of; the memory is in use until the stream is behind it, as is noted below.
    let launched = unsafe { sys::cuLaunchHostFunc(stream.cu_stream(), Some(run), job.cast()) };
    if let Err(error) = launched.result() {
        // SAFETY: nobody else will take it.
        drop(unsafe { Box::from_raw(job) });
        return Err(error).w();
    }
    for memory in came.iter_mut().chain([&mut output]) {
        memory.memory()?.in_use(&stream)?;
    }
    // SAFETY: written whole by the copy.
    let mut there = unsafe { device.alloc::<f32>(len) }?;
    output.memory()?.send(&mut there, &stream)?;
    Ok(there)
}

/// An f32 tensor of the shape of `x`, computed from its values.
pub(crate) fn of_tensor(x: &Tensor, compute: crate::ops::by_host::Compute) -> Result<Tensor> {
    together("numbers by the host", [x])?;
    let (x, device) = (x.contiguous()?, x.device().as_cuda_device()?);
    let (storage, layout) = x.storage_and_layout();
    let values = view::<f32>(cuda(&storage)?, layout)?;
    let len = values.len();
    let made = by_host(device, &[values], len, Box::new(move |inputs| compute(inputs[0])))?;
    Ok(tensor(device, made, x.shape().clone()))
}
