//! Page-locked host memory for asynchronous copies to and from the device, on Candle's stream.
//!
//! Copies on the stream are ordered with launches, so only reading received data or overwriting sent data waits. All
//! copies must be made by the launching thread, since Candle's stream belongs to it. Any thread may write the data to
//! be copied.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, HostSlice,
    PinnedHostSlice, SyncOnDrop, ValidAsZeroBits,
};
use candle_core::{CudaDevice, Device, Result, Shape, Tensor, bail};
use half::bf16;

use super::{Number, cuda, tensor, together, view, with_view_mut};

/// Elements per piece of a parameter in transfer: 32 MiB of gradient.
const PIECE: usize = 8 << 20;
/// No driver flags: the host both writes and reads.
const PLAIN: u32 = 0;

/// Page-locked memory, with an event for the last use by a stream.
///
/// It has its own event: the driver crate's memory has one too, but records it only if the program creates streams, and
/// Candle uses an existing one.
pub(crate) struct Locked<E> {
    memory: PinnedHostSlice<E>,
    used: CudaEvent,
}

impl<E: DeviceRepr + ValidAsZeroBits> Locked<E> {
    /// Zeroed, so that uninitialised memory is never read.
    fn new(device: &CudaDevice, len: usize) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let used = context.new_event(Some(CU_EVENT_BLOCKING_SYNC)).w()?;
        // SAFETY: written whole below, before anybody reads it.
        let memory = unsafe { context.alloc_pinned_with_flags::<E>(len.max(1), PLAIN) };
        // Not the driver's message, which would suggest a full GPU.
        let full = |_| {
            candle_core::Error::msg(format!(
                "the host could not page-lock {} KiB: it is out of memory, or may not lock as much (ulimit -l)",
                (len * size_of::<E>()).div_ceil(1024)
            ))
        };
        let memory = memory.map_err(full)?;
        let mut locked = Self { memory, used };
        let start = locked.memory.as_mut_ptr().w()?;
        // SAFETY: the allocation holds so many elements, for which zero bits are a value.
        unsafe { std::ptr::write_bytes(start, 0, len.max(1)) };
        Ok(locked)
    }

    /// Its elements, after the stream is done with them.
    fn numbers(&self) -> Result<&[E]> {
        self.used.synchronize().w()?;
        self.memory.as_slice().w()
    }

    /// As [`numbers`](Self::numbers), for writing.
    fn numbers_mut(&mut self) -> Result<&mut [E]> {
        self.used.synchronize().w()?;
        self.memory.as_mut_slice().w()
    }

    /// Enqueues a copy from the device to its beginning on `stream`.
    pub(super) fn fetch(
        &mut self,
        from: &impl DevicePtr<E>,
        stream: &Arc<CudaStream>,
    ) -> Result<()> {
        stream.wait(&self.used).w()?;
        let len = from.len();
        let copied = stream.memcpy_dtoh(from, &mut part(&mut self.memory, len)?).w();
        copied.and(self.in_use(stream))
    }

    /// Enqueues a copy of its beginning, as much as the destination holds, on `stream`.
    pub(super) fn send(
        &mut self,
        to: &mut impl DevicePtrMut<E>,
        stream: &Arc<CudaStream>,
    ) -> Result<()> {
        stream.wait(&self.used).w()?;
        let len = to.len();
        let copied = stream.memcpy_htod(&part(&mut self.memory, len)?, to).w();
        copied.and(self.in_use(stream))
    }

    /// Its address, for the next work on `stream`; must be followed by [`in_use`](Self::in_use).
    pub(super) fn place(&mut self, stream: &Arc<CudaStream>) -> Result<*mut E> {
        stream.wait(&self.used).w()?;
        // SAFETY: the address alone is taken.
        let (numbers, _) = unsafe { self.memory.stream_synced_mut_slice(stream) };
        Ok(numbers.as_mut_ptr())
    }

    /// Records that work enqueued on `stream` so far may use it; if that fails, synchronises.
    pub(super) fn in_use(&self, stream: &Arc<CudaStream>) -> Result<()> {
        self.used.record(stream).or_else(|_| stream.synchronize()).w()
    }
}

impl<E> Locked<E> {
    fn len(&self) -> usize {
        self.memory.len()
    }
}

impl<E> Drop for Locked<E> {
    fn drop(&mut self) {
        // Otherwise the device could write to memory that has been reused. Device errors will surface elsewhere too.
        let _ = self.used.synchronize();
    }
}

/// The first elements of a page-locked buffer.
struct Part<'a, E> {
    whole: &'a mut PinnedHostSlice<E>,
    len: usize,
}

impl<E> HostSlice<E> for Part<'_, E> {
    fn len(&self) -> usize {
        self.len
    }

    unsafe fn stream_synced_slice<'a>(
        &'a self,
        stream: &'a CudaStream,
    ) -> (&'a [E], SyncOnDrop<'a>) {
        // SAFETY: asked of the caller.
        let (all, sync) = unsafe { self.whole.stream_synced_slice(stream) };
        (&all[..self.len], sync)
    }

    unsafe fn stream_synced_mut_slice<'a>(
        &'a mut self,
        stream: &'a CudaStream,
    ) -> (&'a mut [E], SyncOnDrop<'a>) {
        // SAFETY: asked of the caller.
        let (all, sync) = unsafe { self.whole.stream_synced_mut_slice(stream) };
        (&mut all[..self.len], sync)
    }
}

fn part<E>(whole: &mut PinnedHostSlice<E>, len: usize) -> Result<Part<'_, E>> {
    if len > whole.len() {
        bail!("a part of {len} elements of page-locked memory of {}", whole.len());
    }
    Ok(Part { whole, len })
}

/// Streams gradients to the host and weights back, in pieces, double-buffered each way.
pub(crate) struct Pipe {
    device: CudaDevice,
    down: [Locked<f32>; 2],
    up: Up,
}

/// Buffers for weights to be uploaded, one per dtype, allocated on first use.
#[derive(Default)]
struct Up {
    f32: Option<[Locked<f32>; 2]>,
    bf16: Option<[Locked<bf16>; 2]>,
}

/// Dtypes of weights.
pub(crate) trait Weight: Number + ValidAsZeroBits {
    #[expect(private_interfaces, reason = "nobody else has such memory")]
    fn of(up: &mut Up) -> &mut Option<[Locked<Self>; 2]>;
}

impl Weight for f32 {
    #[expect(private_interfaces, reason = "nobody else has such memory")]
    fn of(up: &mut Up) -> &mut Option<[Locked<Self>; 2]> {
        &mut up.f32
    }
}

impl Weight for bf16 {
    #[expect(private_interfaces, reason = "nobody else has such memory")]
    fn of(up: &mut Up) -> &mut Option<[Locked<Self>; 2]> {
        &mut up.bf16
    }
}

impl std::fmt::Debug for Pipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pipe").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Pipe {
    /// Allocates the page-locked memory.
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let down = [Locked::new(&device, PIECE)?, Locked::new(&device, PIECE)?];
        Ok(Self { down, up: Up::default(), device })
    }

    /// Calls `act` with each piece of a gradient and the buffer for the same piece of the weight, to be filled.
    /// Meanwhile the next piece is received and the last one sent.
    ///
    /// # Shapes
    /// - `grad`: f32, `weight`: dtype `E`, contiguous, with as many elements
    pub(crate) fn pass<E: Weight>(
        &mut self,
        grad: &Tensor,
        weight: &Tensor,
        mut act: impl FnMut(Range<usize>, &[f32], &mut [E]),
    ) -> Result<()> {
        let count = weight.elem_count();
        if grad.elem_count() != count {
            bail!("a gradient of {:?} for a weight of {:?}", grad.shape(), weight.shape());
        }
        together("an update in host memory", [grad, weight])?;
        let Self { device, down, up } = self;
        let up = match E::of(up) {
            Some(up) => up,
            none => none.insert([Locked::new(device, PIECE)?, Locked::new(device, PIECE)?]),
        };
        let grad = grad.contiguous()?;
        let (grad, layout) = grad.storage_and_layout();
        let grad = view::<f32>(cuda(&grad)?, layout)?;
        let stream = device.cuda_stream();
        let fetch = |down: &mut Locked<f32>, piece: &Range<usize>| {
            down.fetch(&grad.slice(piece.clone()), &stream)
        };
        let pieces: Vec<Range<usize>> =
            (0..count).step_by(PIECE).map(|at| at..(at + PIECE).min(count)).collect();
        with_view_mut::<E, _>(weight, |mut weight| {
            if let Some(first) = pieces.first() {
                fetch(&mut down[0], first)?;
            }
            for (turn, piece) in pieces.iter().enumerate() {
                if let Some(next) = pieces.get(turn + 1) {
                    // Its previous contents were read in the turn before.
                    fetch(&mut down[(turn + 1) % 2], next)?;
                }
                let (down, up) = (&down[turn % 2], &mut up[turn % 2]);
                // Each waits for the last copy that used it.
                let (from, to) = (down.numbers()?, up.numbers_mut()?);
                act(piece.clone(), &from[..piece.len()], &mut to[..piece.len()]);
                up.send(&mut weight.slice_mut(piece.clone()), &stream)?;
            }
            Ok(())
        })
    }
}

/// Element types with reusable buffers.
pub(crate) trait Spare: Copy + DeviceRepr + ValidAsZeroBits + 'static {
    /// Unused page-locked memory: locking takes longer than filling it.
    fn spare() -> &'static Mutex<Vec<Locked<Self>>>;
}

macro_rules! spare {
    ($($E:ty),*) => {$(
        impl Spare for $E {
            fn spare() -> &'static Mutex<Vec<Locked<Self>>> {
                static SPARE: Mutex<Vec<Locked<$E>>> = Mutex::new(Vec::new());
                &SPARE
            }
        }
    )*};
}
spare!(f32, f64, u32, u64);

/// Page-locked memory that is returned for reuse.
pub(super) struct Lent<E: Spare>(Option<Locked<E>>);

impl<E: Spare> Lent<E> {
    /// The smallest free buffer that is large enough; otherwise a new one, replacing the largest free one.
    pub(super) fn new(device: &CudaDevice, len: usize) -> Result<Self> {
        let too_small = {
            let mut spare = E::spare().lock().unwrap_or_else(PoisonError::into_inner);
            let stream = device.cuda_stream();
            spare.retain(|one| one.memory.context() == stream.context());
            spare.sort_by_key(Locked::len);
            let free = |one: &Locked<E>| one.used.is_complete();
            if let Some(index) = spare.iter().position(|one| one.len() >= len && free(one)) {
                return Ok(Self(Some(spare.remove(index))));
            }
            let largest = spare.iter().rposition(|one| one.len() < len && free(one));
            largest.map(|index| spare.remove(index))
        };
        // Locking and releasing memory is slow, so do it without holding the mutex.
        drop(too_small);
        Ok(Self(Some(Locked::new(device, len)?)))
    }

    pub(super) fn memory(&mut self) -> Result<&mut Locked<E>> {
        match &mut self.0 {
            Some(memory) => Ok(memory),
            None => bail!("page-locked memory was given back"),
        }
    }
}

impl<E: Spare> Drop for Lent<E> {
    fn drop(&mut self) {
        if let Some(memory) = self.0.take() {
            E::spare().lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        }
    }
}

/// Values to be uploaded, written by any thread.
pub(crate) struct Sendable<E: Spare> {
    memory: Lent<E>,
    len: usize,
}

impl<E: Spare> std::fmt::Debug for Sendable<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sendable").field("len", &self.len).finish_non_exhaustive()
    }
}

impl<E: Spare> Sendable<E> {
    /// Copies the values into page-locked memory whose last upload has finished.
    pub(crate) fn new(device: &CudaDevice, numbers: &[E]) -> Result<Self> {
        let (mut memory, len) = (Lent::new(device, numbers.len())?, numbers.len());
        memory.memory()?.numbers_mut()?[..len].copy_from_slice(numbers);
        Ok(Self { memory, len })
    }

    /// Uploads them; only on the launching thread.
    pub(crate) fn send(mut self, device: &CudaDevice) -> Result<CudaSlice<E>> {
        // SAFETY: written whole by the copy.
        let mut there = unsafe { device.alloc::<E>(self.len) }?;
        self.memory.memory()?.send(&mut there, &device.cuda_stream())?;
        Ok(there)
    }
}

/// Largest upload from pageable memory that does not wait for the stream ("memory copies from host to device of a
/// memory block of 64 KB or less", CUDA C++ Programming Guide, section on asynchronous concurrent execution).
const TAKEN_AT_ONCE: usize = 64 << 10;

/// Uploads a list asynchronously, a long one through page-locked memory. Only on the launching thread.
pub(in crate::ops) fn sent<E: Spare>(device: &CudaDevice, numbers: &[E]) -> Result<CudaSlice<E>> {
    if size_of_val(numbers) <= TAKEN_AT_ONCE {
        return device.clone_htod(numbers);
    }
    Sendable::new(device, numbers)?.send(device)
}

/// An f32 tensor offloaded to page-locked memory.
pub(crate) struct Waiting {
    device: CudaDevice,
    shape: Shape,
    memory: Lent<f32>,
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl Waiting {
    /// Offloads a tensor. Its device memory may be reused by later launches.
    pub(crate) fn new(x: &Tensor) -> Result<Self> {
        let device = x.device().as_cuda_device()?.clone();
        let x = x.contiguous()?;
        let shape = x.shape().clone();
        let (x, layout) = x.storage_and_layout();
        let x = view::<f32>(cuda(&x)?, layout)?;
        let mut memory = Lent::new(&device, x.len())?;
        memory.memory()?.fetch(&x, &device.cuda_stream())?;
        Ok(Self { device, shape, memory })
    }

    /// Restores it.
    pub(crate) fn back(mut self) -> Result<Tensor> {
        let count = self.shape.elem_count();
        // SAFETY: written whole by the copy.
        let mut back = unsafe { self.device.alloc::<f32>(count) }?;
        self.memory.memory()?.send(&mut back, &self.device.cuda_stream())?;
        Ok(tensor(&self.device, back, self.shape.clone()))
    }
}
