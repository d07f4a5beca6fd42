//! The kernels as PTX: from the build, or compiled by NVIDIA's run-time compiler from the same sources, which the
//! program embeds.
//!
//! PTX of one architecture also runs on all newer ones; the driver compiles it to machine code when loading.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaStream};
use candle_core::{Result, bail};

use super::arguments::{self, Entries, Launch, Parameter};
use super::device::{OLD_DRIVER, is_lost};
use super::nvrtc;

/// A kernel file known to the build.
struct Module {
    /// `norm` for `norm.cu`.
    name: &'static str,
    source: &'static str,
    /// One per [`Architecture`]; empty if the build had no compiler.
    ptx: [&'static str; 2],
}

// `MODULES`, and `HEADERS` as (name, text): written by build.rs.
include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// Compilation target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Architecture {
    /// A100 and later.
    Sm80,
    /// H100 and later.
    Sm90,
}

impl Architecture {
    #[cfg(test)]
    const ALL: [Self; 2] = [Self::Sm80, Self::Sm90];

    /// The newest one supported by a GPU of this compute capability.
    fn of((major, _): (i32, i32)) -> Option<Self> {
        match major {
            9.. => Some(Self::Sm90),
            8 => Some(Self::Sm80),
            _ => None,
        }
    }

    /// Its name for compilers.
    fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "compute_80",
            Self::Sm90 => "compute_90",
        }
    }
}

/// A kernel that can be launched on its device's stream.
pub(super) struct CudaFunc {
    function: CudaFunction,
    stream: Arc<CudaStream>,
    name: String,
    parameters: Arc<[Parameter]>,
}

impl CudaFunc {
    /// A launch; arguments are added in the kernel's order.
    pub(super) fn builder(&self) -> Launch<'_> {
        let arguments = self.stream.launch_builder(&self.function);
        Launch::new(&self.name, &self.parameters, arguments)
    }
}

impl Deref for CudaFunc {
    type Target = CudaFunction;

    fn deref(&self) -> &CudaFunction {
        &self.function
    }
}

/// The entry `function` of the kernel file `module` (`norm` for `norm.cu`), loaded onto the device on first use.
///
/// # Errors
/// A GPU or driver that is too old; neither embedded PTX nor a run-time compiler; no such entry.
pub(super) fn kernel(device: &CudaDevice, module: &str, function: &str) -> Result<CudaFunc> {
    type Found = BTreeMap<(usize, String), (CudaFunction, Arc<[Parameter]>)>;
    static FOUND: Mutex<Found> = Mutex::new(BTreeMap::new());
    let stream = device.cuda_stream();
    // Functions are identified by their context's address, so the cached function keeps its context alive.
    let key = (Arc::as_ptr(stream.context()) as usize, function.to_owned());
    let mut known = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((function, parameters)) = known.get(&key).cloned() {
        return Ok(CudaFunc { function, stream, name: key.1, parameters });
    }
    let capability = stream.context().compute_capability().map_err(candle_core::Error::wrap)?;
    let Some(architecture) = Architecture::of(capability) else {
        let (major, minor) = capability;
        bail!("no kernels, and no bf16, for sm_{major}{minor}: they begin with sm_80");
    };
    let Some(found) = MODULES.iter().find(|found| found.name == module) else {
        bail!("this program has no kernel file {module}.cu");
    };
    let (text, entries) = found.text(architecture)?;
    let Some(parameters) = entries.get(function).cloned() else {
        return Err(refused(module, function, "no such entry"));
    };
    let loaded = device.get_or_load_custom_func(function, found.name, &text);
    let loaded = loaded.map_err(|error| refused(module, function, &error.to_string()))?;
    let (name, function) = (key.1.clone(), loaded.into_cuda_function());
    known.insert(key, (function.clone(), parameters.clone()));
    Ok(CudaFunc { function, stream, name, parameters })
}

/// A driver's error about a kernel, in words.
fn refused(module: &str, function: &str, error: &str) -> candle_core::Error {
    let reason = if error.contains("UNSUPPORTED_PTX_VERSION") {
        format!("{OLD_DRIVER} ({error})")
    } else if is_lost(error) {
        return candle_core::Error::msg(format!(
            "an earlier kernel failed, as was seen when `{function}` of {module}.cu was asked for: {error}; with \
             CUDA_LAUNCH_BLOCKING=1 in the environment the error is that kernel's own"
        ));
    } else {
        error.to_owned()
    };
    candle_core::Error::msg(format!("kernel `{function}` of {module}.cu: {reason}"))
}

impl Module {
    /// Its PTX and its entries' parameters. The result of run-time compilation is cached.
    fn text(&self, architecture: Architecture) -> Result<(Arc<str>, Arc<Entries>)> {
        type Compiled = BTreeMap<(&'static str, Architecture), (Arc<str>, Arc<Entries>)>;
        static COMPILED: Mutex<Compiled> = Mutex::new(BTreeMap::new());
        let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = compiled.get(&(self.name, architecture)) {
            return Ok(found.clone());
        }
        let text: Arc<str> = match self.ptx[architecture as usize] {
            "" => self.compile(architecture)?.into(),
            text => text.into(),
        };
        let found = (text.clone(), Arc::new(arguments::entries(&text)?));
        compiled.insert((self.name, architecture), found.clone());
        Ok(found)
    }

    /// Compiles it at run time.
    fn compile(&self, architecture: Architecture) -> Result<String> {
        let file = format!("{}.cu", self.name);
        nvrtc::compile((&file, self.source), HEADERS, architecture.name()).map_err(|error| {
            candle_core::Error::msg(format!(
                "{file} was not compiled when this program was built, and cannot be now: {error}"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries of a PTX, and their parameters.
    fn entries(ptx: &str) -> Entries {
        arguments::entries(ptx).unwrap()
    }

    #[test]
    fn each_gpu_gets_the_newest_ptx_that_it_can_run() {
        for (capability, expected) in [
            ((8, 0), Architecture::Sm80),
            ((8, 9), Architecture::Sm80),
            ((9, 0), Architecture::Sm90),
            ((10, 0), Architecture::Sm90),
            ((12, 1), Architecture::Sm90),
        ] {
            assert_eq!(Architecture::of(capability), Some(expected));
        }
        assert_eq!(Architecture::of((7, 5)), None);
    }

    #[test]
    fn driver_refusals_are_explained() {
        let said = |text: &str| refused("norm", "f", text).to_string();
        assert!(said("CUDA_ERROR_UNSUPPORTED_PTX_VERSION").contains(OLD_DRIVER));
        let late = said("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"…\")");
        assert!(late.starts_with("an earlier kernel failed"), "{late}");
        // The error's location may follow.
        assert!(said("another").contains("kernel `f` of norm.cu: another"));
    }

    /// Applies if the build had a compiler; a stand-in leaves the texts empty.
    #[test]
    fn every_file_has_its_kernels_for_both_architectures() {
        assert!(!MODULES.is_empty() && HEADERS.iter().any(|(name, _)| *name == "common.cuh"));
        for module in MODULES {
            let [old, new] = module.ptx;
            assert_eq!(entries(old), entries(new), "{}", module.name);
            let proof = std::env::var_os(PROOF).is_some();
            assert!(!proof || !old.is_empty(), "{} was not compiled", module.name);
            if !old.is_empty() {
                assert!(!entries(old).is_empty(), "{} has no kernel", module.name);
                assert!(old.contains(".target sm_80") && new.contains(".target sm_90"));
                // ISA 9.0 is CUDA 13.0's; a newer one would need a newer driver than documented.
                assert!(old.contains(".version 9.0"), "{}", module.name);
            }
        }
    }

    /// Set by `scripts/cuda-proof`, where the compiler is required.
    const PROOF: &str = "ARRIERO_CUDA_PROOF";

    #[test]
    fn run_time_compiler_accepts_every_file() {
        if let Err(error) = nvrtc::version() {
            assert!(std::env::var_os(PROOF).is_none(), "{error}");
            println!("NOT RUN: {error}");
            return;
        }
        for module in MODULES {
            for architecture in Architecture::ALL {
                let text = module.compile(architecture).unwrap();
                assert!(!entries(&text).is_empty(), "{}", module.name);
                let built = module.ptx[architecture as usize];
                if !built.is_empty() {
                    assert_eq!(entries(&text), entries(built), "{}", module.name);
                }
            }
        }
    }
}
