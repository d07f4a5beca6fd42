//! Numbers that the host computes when the stream gets there: the driver calls it, and whoever launches goes on.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, HostSlice, sys};
use candle_core::{CudaDevice, Result, Tensor};

use super::host::{Lent, part};
use super::{cuda, tensor, together, view};

/// Makes numbers of what came from the device: of each input its numbers.
pub(in crate::ops::cuda) type Compute = Box<dyn FnOnce(&[&[f32]]) -> Vec<f32> + Send>;

/// What the driver is told to call: where the inputs will be, where the output goes, and how it is made.
struct Job {
    inputs: Vec<(*const f32, usize)>,
    output: (*mut f32, usize),
    compute: Compute,
}

/// As many numbers as the output has room for; NaN where `compute` panics or makes another number of them, as there is
/// nobody to tell: whoever reads the same inputs afterwards is told.
unsafe extern "C" fn run(job: *mut c_void) {
    // SAFETY: made of a box by `by_host`, and called once.
    let Job { inputs, output: (to, room), compute } = *unsafe { Box::from_raw(job.cast::<Job>()) };
    // SAFETY: page-locked memory of so many elements, which this stream alone uses until the events behind this call.
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

/// `len` numbers that `compute` makes of the inputs. It must not call the device.
pub(in crate::ops::cuda) fn by_host(
    device: &CudaDevice,
    inputs: &[CudaView<'_, f32>],
    len: usize,
    compute: Compute,
) -> Result<CudaSlice<f32>> {
    let stream = device.cuda_stream();
    let mut came = Vec::with_capacity(inputs.len());
    for input in inputs {
        let mut memory = Lent::new(device, input.len())?;
        stream.memcpy_dtoh(input, &mut part(memory.memory()?, input.len())?).w()?;
        came.push((memory, input.len()));
    }
    let mut output = Lent::<f32>::new(device, len)?;
    {
        // Until these go, at the end of the block, the memory counts as used by the stream.
        let mut used = Vec::with_capacity(came.len() + 1);
        let mut places = Vec::with_capacity(came.len());
        for (memory, count) in &mut came {
            // SAFETY: read by this stream's call alone.
            let (numbers, guard) = unsafe { memory.memory()?.stream_synced_slice(&stream) };
            places.push((numbers.as_ptr(), *count));
            used.push(guard);
        }
        // SAFETY: written by this stream's call alone.
        let (numbers, guard) = unsafe { output.memory()?.stream_synced_mut_slice(&stream) };
        used.push(guard);
        let job = Job { inputs: places, output: (numbers.as_mut_ptr(), len), compute };
        let job = Box::into_raw(Box::new(job));
        // SAFETY: `run` takes what the pointer is of; the memory outlives it, as its events are recorded behind it.
        let launched = unsafe { sys::cuLaunchHostFunc(stream.cu_stream(), Some(run), job.cast()) };
        if let Err(error) = launched.result() {
            // SAFETY: nobody else will take it.
            drop(unsafe { Box::from_raw(job) });
            return Err(error).w();
        }
    }
    // SAFETY: written whole by the copy.
    let mut there = unsafe { device.alloc::<f32>(len) }?;
    stream.memcpy_htod(&part(output.memory()?, len)?, &mut there).w()?;
    Ok(there)
}

/// A tensor of the shape of `x`, f32, that `compute` makes of its values.
pub(crate) fn of_tensor(x: &Tensor, compute: crate::ops::by_host::Compute) -> Result<Tensor> {
    together("numbers by the host", [x])?;
    let (x, device) = (x.contiguous()?, x.device().as_cuda_device()?);
    let (storage, layout) = x.storage_and_layout();
    let values = view::<f32>(cuda(&storage)?, layout)?;
    let len = values.len();
    let made = by_host(device, &[values], len, Box::new(move |inputs| compute(inputs[0])))?;
    Ok(tensor(device, made, x.shape().clone()))
}
