//! Opens GPUs, and explains driver errors.
//!
//! Errors are identified by their names in the driver's messages, so that a build without CUDA can explain and test
//! them too.

use candle_core::Device;
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError};
use serde::Serialize;

#[cfg(feature = "cuda")]
use super::pool;
use crate::error::{Error, Result};

/// Explanation if the driver cannot read the kernels.
pub(super) const OLD_DRIVER: &str = "the NVIDIA driver is older than this program's kernels: they are CUDA 13.0's, which driver \
                                     580 and newer can read";

/// GPU number `index`, counted from 0.
///
/// # Errors
/// No responding driver, an outdated driver, no such GPU, an unsupported GPU, or one in exclusive use.
#[cfg(feature = "cuda")]
pub fn open(index: usize) -> Result<Device> {
    let found = CudaContext::device_count().map_err(|error| explain(&error.to_string()))?;
    if let Some(version) = driver_version().filter(|version| *version < NEEDED) {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(old_driver(&format!("it reads CUDA {major}.{minor}")));
    }
    check_index(index, found as usize)?;
    let said = |error: DriverError| explain(&error.to_string());
    // Before the libraries opened by Candle allocate memory.
    let context = CudaContext::new(index).map_err(said)?;
    let capability = context.compute_capability().map_err(said)?;
    check_capability(capability, &context.name().map_err(said)?)?;
    // Optional: not every driver supports such pools.
    let _ = pool::keep(&context);
    let device = Device::new_cuda(index).map_err(|error| explain(&error.to_string()))?;
    if let Device::Cuda(device) = &device {
        settle(device).map_err(|error| explain(&error.to_string()))?;
    }
    Ok(device)
}

/// Settings left to the caller by Candle: bf16 products accumulate in f32 throughout, even when cuBLAS splits a sum;
/// and allocations create no events, since each thread uses only its own stream.
#[cfg(feature = "cuda")]
#[expect(
    unsafe_code,
    reason = "a setting that cudarc has no safe form of, and one that it leaves to its callers"
)]
fn settle(device: &candle_core::CudaDevice) -> candle_core::Result<()> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::cublas::sys;
    let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle is open.
    unsafe { sys::cublasSetMathMode(*device.cublas_handle().handle(), mode) }.result().w()?;
    // SAFETY: whoever hands memory to another thread waits for the stream first; page-locked memory has events of its own.
    unsafe { device.disable_event_tracking() };
    Ok(())
}

/// Makes a GPU's context current on this thread, which is required for freeing memory there.
///
/// # Errors
/// A driver error.
pub fn bind(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let bound = device.cuda_stream().context().bind_to_thread();
        return bound.map_err(|error| explain(&error.to_string()));
    }
    let _ = device;
    Ok(())
}

/// GPU properties for `doctor` and reports.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// The driver's name for it.
    pub name: String,
    /// `(9, 0)` for an H100.
    pub capability: (i32, i32),
    /// Free memory in bytes.
    pub free: u64,
    /// Total memory in bytes.
    pub total: u64,
    /// CUDA version supported by the driver; 13000 for 13.0.
    pub driver: Option<i32>,
}

/// Properties of an open GPU; `None` for another device.
///
/// # Errors
/// A driver error.
#[cfg(not(feature = "cuda"))]
pub fn facts(_: &Device) -> Result<Option<Facts>> {
    Ok(None)
}

/// Properties of an open GPU; `None` for another device.
///
/// # Errors
/// A driver error.
#[cfg(feature = "cuda")]
pub fn facts(device: &Device) -> Result<Option<Facts>> {
    let Device::Cuda(device) = device else { return Ok(None) };
    let stream = device.cuda_stream();
    let context = stream.context();
    let said = |error: DriverError| explain(&error.to_string());
    let (free, total) = context.mem_get_info().map_err(said)?;
    let spare = pool::spare(context).unwrap_or_default();
    Ok(Some(Facts {
        name: context.name().map_err(said)?,
        capability: context.compute_capability().map_err(said)?,
        free: free as u64 + spare,
        total: total as u64,
        driver: driver_version(),
    }))
}

/// Whether this is a GPU with bf16 kernels.
#[cfg(feature = "cuda")]
pub(crate) fn has_bf16(device: &Device) -> bool {
    let Device::Cuda(device) = device else { return false };
    let capability = device.cuda_stream().context().compute_capability();
    capability.is_ok_and(|(major, _)| major >= 8)
}

/// Whether this is a GPU with bf16 kernels.
#[cfg(not(feature = "cuda"))]
pub(crate) fn has_bf16(_: &Device) -> bool {
    false
}

/// CUDA version of the kernels' PTX, in the driver's numbering.
#[cfg(feature = "cuda")]
const NEEDED: i32 = 13_000;

#[cfg(feature = "cuda")]
fn driver_version() -> Option<i32> {
    use candle_core::cuda_backend::cudarc::driver::sys;
    let mut version = 0;
    // SAFETY: the number is written to; the call is allowed at any time.
    #[expect(unsafe_code, reason = "a question to the driver that cudarc has no safe form of")]
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    (status == sys::CUresult::CUDA_SUCCESS && version > 0).then_some(version)
}

/// # Errors
/// Fewer GPUs than the index requires.
#[cfg(any(test, feature = "cuda"))]
fn check_index(index: usize, found: usize) -> Result<()> {
    if index < found {
        return Ok(());
    }
    let there = match found {
        0 => "there is none".to_owned(),
        1 => "there is one, number 0".to_owned(),
        _ => format!("there are {found}, numbers 0 to {}", found - 1),
    };
    Err(Error::usage(format!("no GPU number {index}: {there}"))
        .hint("`nvidia-smi` lists them; CUDA_VISIBLE_DEVICES hides and renumbers them"))
}

/// # Errors
/// A GPU without the required compute capability.
#[cfg(any(test, feature = "cuda"))]
fn check_capability((major, minor): (i32, i32), gpu: &str) -> Result<()> {
    if major >= 8 {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{gpu} is of compute capability {major}.{minor} (sm_{major}{minor}), the kernels and bf16 need 8.0 (sm_80) or newer"
    ))
    .hint("an A100, an RTX 30 or what followed them; device = \"cpu\" works without"))
}

fn old_driver(how: &str) -> Error {
    Error::run(format!("{OLD_DRIVER}; {how}"))
        .hint("update the driver; `nvidia-smi` shows its version")
}

/// Explains a driver error, with a hint. Any other text is kept as is.
pub fn explain(said: &str) -> Error {
    let is = |name: &str| said.contains(&format!("CUDA_ERROR_{name}"));
    if is("NO_DEVICE") {
        return Error::run("no CUDA device: the driver answers, but it sees no GPU")
            .hint("`nvidia-smi` lists the GPUs, CUDA_VISIBLE_DEVICES hides them; device = \"cpu\" works without");
    }
    if is("UNSUPPORTED_PTX_VERSION")
        || is("NO_BINARY_FOR_GPU")
        || said.contains("INSUFFICIENT_DRIVER")
    {
        return old_driver(&format!("it said {said}"));
    }
    if is("SYSTEM_DRIVER_MISMATCH") || is("NOT_INITIALIZED") || is("STUB_LIBRARY") {
        return Error::run(format!("the NVIDIA driver's kernel module and library do not match: {said}")).hint(
            "a driver was updated without a restart, or a stand-in libcuda.so.1 is in LD_LIBRARY_PATH",
        );
    }
    if is("INVALID_DEVICE") || is("INVALID_ORDINAL") {
        return Error::usage(format!("no such GPU: {said}")).hint("`nvidia-smi` lists the GPUs");
    }
    if is("DEVICE_UNAVAILABLE") {
        return Error::run(format!("the GPU is taken by another process: {said}"))
            .hint("its compute mode allows one process: `nvidia-smi` shows which");
    }
    if is_out_of_memory(said) {
        return Error::run("the GPU is out of memory")
            .hint("`nvidia-smi` shows who holds it; a smaller model, or device = \"cpu\"");
    }
    Error::run(said)
}

/// Extends an out-of-memory error with the operation `what`, the memory of its `parts` in bytes, largest first, and
/// `ways` to reduce it. Other errors, and already extended ones, are returned unchanged.
pub fn out_of_memory<const N: usize>(
    error: Error,
    what: &str,
    mut parts: [(&str, u64); N],
    ways: &str,
) -> Error {
    if !is_out_of_memory(&error.to_string()) {
        return error;
    }
    parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let parts = parts.map(|(name, bytes)| format!("{name} {} MiB", bytes >> 20)).join(", ");
    Error::run(format!("the GPU is out of memory {what}: {parts}")).hint(ways).because(error)
}

/// Whether a message says that a GPU ran out of memory.
pub fn is_out_of_memory(said: &str) -> bool {
    said.contains("CUDA_ERROR_OUT_OF_MEMORY") || said.contains("CUBLAS_STATUS_ALLOC_FAILED")
}

/// Errors after which every driver call of this process fails the same way.
const LOST: [&str; 17] = [
    "ASSERT",
    "CONTAINED",
    "CONTEXT_IS_DESTROYED",
    "DEINITIALIZED",
    "ECC_UNCORRECTABLE",
    "EXTERNAL_DEVICE",
    "HARDWARE_STACK_ERROR",
    "ILLEGAL_ADDRESS",
    "ILLEGAL_INSTRUCTION",
    "INVALID_ADDRESS_SPACE",
    "INVALID_PC",
    "LAUNCH_FAILED",
    "LAUNCH_TIMEOUT",
    "MISALIGNED_ADDRESS",
    "MPS_CLIENT_TERMINATED",
    "NVLINK_UNCORRECTABLE",
    "TENSOR_MEMORY_LEAK",
];

/// Whether a message says that this process has lost its GPU context. Out of memory is not such an error.
pub(super) fn is_lost(said: &str) -> bool {
    LOST.iter().any(|name| said.contains(&format!("CUDA_ERROR_{name}")))
}

/// Fails after an error that has cost the process its GPU context.
///
/// # Errors
/// Includes the driver's message.
pub fn still_works(device: &Device, error: &Error) -> Result<()> {
    let said = error.to_string();
    // cuBLAS reports its own error names, also for minor failures; synchronising returns the driver's.
    let waited = device.synchronize().err().map(|error| error.to_string()).unwrap_or_default();
    let Some(why) = [said, waited].into_iter().find(|said| is_lost(said)) else { return Ok(()) };
    Err(Error::run(format!("the GPU has failed for good: {why}")).hint(
        "only a new process can use it again; where that fails too, `dmesg` (NVRM: Xid) and `nvidia-smi -q` say what it has",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_gpu_is_distinguished_from_a_full_one() {
        for said in [
            "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")",
            "layer 3: DriverError(CUDA_ERROR_ECC_UNCORRECTABLE, \"…\")",
            "DriverError(CUDA_ERROR_LAUNCH_FAILED, \"unspecified launch failure\")",
        ] {
            let error = still_works(&Device::Cpu, &Error::run(said)).unwrap_err();
            assert_eq!(error.to_string(), format!("the GPU has failed for good: {said}"));
            assert!(error.hint_text().is_some() && error.kind() == crate::error::Kind::Run);
        }
        for said in [
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
            "DriverError(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, \"too many resources requested\")",
            "DriverError(CUDA_ERROR_INVALID_VALUE, \"invalid argument\")",
            "CublasError(CUBLAS_STATUS_EXECUTION_FAILED)",
            "the engine lost a request",
        ] {
            assert!(still_works(&Device::Cpu, &Error::run(said)).is_ok(), "{said}");
        }
    }

    #[test]
    fn driver_errors_get_readable_messages() {
        for (said, expected) in [
            ("DriverError(CUDA_ERROR_NO_DEVICE, \"no CUDA-capable device\")", "no CUDA device"),
            ("DriverError(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, \"…\")", OLD_DRIVER),
            ("DriverError(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, \"…\")", "do not match"),
            ("DriverError(CUDA_ERROR_INVALID_DEVICE, \"…\")", "no such GPU"),
            ("DriverError(CUDA_ERROR_DEVICE_UNAVAILABLE, \"…\")", "another process"),
            ("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")", "out of memory"),
        ] {
            let error = explain(said);
            assert!(error.to_string().contains(expected), "{said}: {error}");
            assert!(error.hint_text().is_some(), "{said}");
        }
        assert_eq!(explain("something else").to_string(), "something else");
    }

    #[test]
    fn out_of_memory_error_lists_what_fills_the_gpu_once() {
        let full = Error::run("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        let told =
            |error| out_of_memory(error, "in a test", [("a", 1 << 20), ("b", 3 << 20)], "less");
        let error = told(full);
        assert_eq!(error.to_string(), "the GPU is out of memory in a test: b 3 MiB, a 1 MiB");
        assert_eq!(error.hint_text(), Some("less"));
        // Extending it again changes nothing, and other errors are left alone.
        assert_eq!(told(error).to_string(), "the GPU is out of memory in a test: b 3 MiB, a 1 MiB");
        assert_eq!(told(Error::run("a bad row")).to_string(), "a bad row");
    }

    #[test]
    fn missing_or_too_old_gpu_is_refused() {
        assert!(check_index(1, 2).is_ok() && check_capability((8, 0), "").is_ok());
        for (index, found, expected) in [
            (0, 0, "no GPU number 0: there is none"),
            (1, 1, "no GPU number 1: there is one, number 0"),
            (8, 8, "no GPU number 8: there are 8, numbers 0 to 7"),
        ] {
            assert_eq!(check_index(index, found).unwrap_err().to_string(), expected);
        }
        let error = check_capability((7, 0), "Tesla V100").unwrap_err().to_string();
        assert!(error.starts_with("Tesla V100 is of compute capability 7.0 (sm_70)"), "{error}");
    }
}
