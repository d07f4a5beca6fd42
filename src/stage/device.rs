//! The device that a run requests.
//!
//! A program linked against CUDA does not start without a driver, so there are two (`docs/decisions/0012`): this one
//! computes on the CPU and, if a GPU is requested, continues as `arriero-cuda` from the same folder.

use candle_core::Device;

use crate::error::{Context, Error, Result};

/// Opens the device named by `cpu` or `cuda:N`; `cuda` is the first GPU.
///
/// In a program without CUDA, this does not return if the other program takes over.
///
/// # Errors
/// The GPU program is missing or does not start here, or there is no such GPU.
pub fn open(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let wrong = || Error::usage(format!("`device` is \"{name}\", expected \"cpu\" or \"cuda:N\""));
    let index = match name.strip_prefix("cuda").ok_or_else(wrong)? {
        "" => 0,
        index => index.strip_prefix(':').and_then(|index| index.parse().ok()).ok_or_else(wrong)?,
    };
    gpu(index).at(format!("`device` is \"{name}\""))
}

#[cfg(feature = "cuda")]
fn gpu(index: usize) -> Result<Device> {
    crate::ops::cuda::device::open(index)
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: usize) -> Result<Device> {
    let own = std::env::current_exe()?;
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    Err(other::become_it(&own.with_file_name(other::NAME), &arguments))
}

/// The program built for GPUs.
#[cfg(not(feature = "cuda"))]
mod other {
    use std::ffi::OsString;
    use std::os::unix::process::CommandExt;
    use std::path::Path;
    use std::process::{Command, Stdio};

    use crate::error::Error;

    /// Its name, in this program's folder.
    pub(super) const NAME: &str = "arriero-cuda";

    /// Continues as `program`; returns only if that fails, with the reason.
    pub(super) fn become_it(program: &Path, arguments: &[OsString]) -> Error {
        if !program.is_file() {
            return Error::usage("this program was built for the CPU alone").hint(
                "build the other one with `cargo build --release --features cuda` and put it beside this one as arriero-cuda",
            );
        }
        // With a library missing, it fails before `main`; asking for its version detects that.
        let asked = Command::new(program).arg("--version").stdin(Stdio::null()).output();
        let output = match asked {
            Ok(output) => output,
            Err(error) => return Error::run(error).at(program.display()),
        };
        if !output.status.success() {
            return unstarted(program, &String::from_utf8_lossy(&output.stderr));
        }
        let (own, found) = (own_version(), String::from_utf8_lossy(&output.stdout));
        if found.trim() != own {
            return Error::run(format!("{} is {}, this is {own}", program.display(), found.trim()))
                .hint("install both programs from one build");
        }
        Error::run(Command::new(program).args(arguments).exec()).at(program.display())
    }

    fn own_version() -> String {
        format!("arriero {}", env!("CARGO_PKG_VERSION"))
    }

    /// Explains the system loader's message.
    fn unstarted(program: &Path, said: &str) -> Error {
        let library = said
            .split_once("loading shared libraries: ")
            .and_then(|(_, rest)| rest.split(':').next());
        match library {
            Some(library) if library.starts_with("libcuda.so") => {
                Error::run(format!("this machine has no NVIDIA driver: there is no {library}"))
                    .hint("install driver 580 or newer; device = \"cpu\" works without")
            }
            Some(library) => Error::run(format!("{} needs {library}, which is not here", program.display()))
                .hint("install the libraries of CUDA 13 (cudart, cuBLAS, cuRAND), or name their folder in LD_LIBRARY_PATH"),
            None => Error::run(format!("{} does not start: {}", program.display(), said.trim())),
        }
    }

    #[cfg(test)]
    mod tests {
        use std::os::unix::fs::PermissionsExt;

        use super::*;

        /// The message for a program that consists of this script.
        fn said(script: &str) -> String {
            let folder = tempfile::tempdir().unwrap();
            let program = folder.path().join(NAME);
            crate::store::write_atomic(&program, format!("#!/bin/sh\n{script}\n").as_bytes())
                .unwrap();
            std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
            become_it(&program, &[]).to_string()
        }

        #[test]
        fn a_program_that_does_not_start_says_why() {
            let loader = "error while loading shared libraries:";
            let missing = |library: &str| {
                said(&format!(
                    "echo 'arriero-cuda: {loader} {library}: cannot open shared object file' >&2; exit 127"
                ))
            };
            assert_eq!(
                missing("libcuda.so.1"),
                "this machine has no NVIDIA driver: there is no libcuda.so.1"
            );
            assert!(
                missing("libcublas.so.13")
                    .ends_with("arriero-cuda needs libcublas.so.13, which is not here")
            );
            assert!(
                said("echo broken >&2; exit 1").ends_with("arriero-cuda does not start: broken")
            );
            let other = said("echo arriero 0.0.0");
            assert!(
                other.contains(&format!("is arriero 0.0.0, this is {}", own_version())),
                "{other}"
            );
            let nowhere = become_it(Path::new("nowhere/arriero-cuda"), &[]).to_string();
            assert_eq!(nowhere, "this program was built for the CPU alone");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_parsed_or_refused() {
        assert!(open("cpu").unwrap().is_cpu());
        for name in ["cuda:first", "cuda:", "cuda:-1", "cudas", "gpu", ""] {
            let error = open(name).unwrap_err().to_string();
            assert_eq!(error, format!("`device` is \"{name}\", expected \"cpu\" or \"cuda:N\""));
        }
    }
}
