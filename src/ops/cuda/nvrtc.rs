//! NVIDIA's run-time compiler, `libnvrtc`, loaded on first use: a program linked against it would not start without it.

#![expect(unsafe_code, reason = "a C library, opened and called through its own functions")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{Result, bail};

/// The release whose PTX our minimum driver can read comes first.
const NAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so"];

type Program = *mut c_void;

/// Its functions, with the types of `nvrtc.h`. The library stays loaded.
struct Nvrtc {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    ptx: Text,
    log: Text,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
}

/// A pair of functions that return a text: its size including the terminating zero, then the text.
struct Text {
    size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
}

/// Version of the loaded library, such as `(13, 0)`.
///
/// # Errors
/// A missing or incomplete library.
pub(super) fn version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both numbers are written to.
    let status = unsafe { (nvrtc()?.version)(&raw mut major, &raw mut minor) };
    if status == 0 { Ok((major, minor)) } else { bail!("nvrtcVersion failed with {status}") }
}

/// Compiles a source, `(name, text)`, to PTX; it may include the given headers by name.
///
/// # Errors
/// No compiler; a compilation error, with its log.
pub(super) fn compile(
    (name, source): (&str, &str),
    headers: &[(&str, &str)],
    architecture: &str,
) -> Result<String> {
    let nvrtc = nvrtc()?;
    let names = headers.iter().map(|(name, _)| c_string(name)).collect::<Result<Vec<_>>>()?;
    let texts = headers.iter().map(|(_, text)| c_string(text)).collect::<Result<Vec<_>>>()?;
    // Without the last one, lambdas would count as host functions, which NVRTC rejects; nvcc infers it from their
    // context.
    let options = [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        "--device-as-default-execution-space".to_owned(),
    ];
    let options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>>>()?;
    let (source, name) = (c_string(source)?, c_string(name)?);

    let mut program: Program = std::ptr::null_mut();
    let (texts, names) = (pointers(&texts), pointers(&names));
    let (source, file) = (source.as_ptr(), name.as_ptr());
    let count = names.len() as c_int;
    // SAFETY: all strings outlive the call, which copies them; the two lists have `count` entries.
    let status = unsafe {
        (nvrtc.create)(&raw mut program, source, file, count, texts.as_ptr(), names.as_ptr())
    };
    if status != 0 {
        bail!("nvrtcCreateProgram failed with {status}");
    }
    let given = pointers(&options);
    // SAFETY: the program was created above, and the list has the entries that are named.
    let status = unsafe { (nvrtc.compile)(program, given.len() as c_int, given.as_ptr()) };
    let text = if status == 0 { nvrtc.ptx.read(program) } else { nvrtc.log.read(program) };
    // SAFETY: the program exists and is not used again.
    unsafe { (nvrtc.destroy)(&raw mut program) };
    match (status, text) {
        (0, Some(ptx)) => Ok(ptx),
        (_, text) => {
            let ((major, minor), said) = (version()?, text.unwrap_or_default());
            bail!("NVRTC {major}.{minor} failed with {status}:\n{}", said.trim())
        }
    }
}

impl Text {
    fn read(&self, program: Program) -> Option<String> {
        let mut size = 0;
        // SAFETY: the program exists; the size is written to.
        if unsafe { (self.size)(program, &raw mut size) } != 0 || size == 0 {
            return None;
        }
        let mut bytes = vec![0_u8; size];
        // SAFETY: the library writes `size` bytes, the last of which is zero.
        if unsafe { (self.get)(program, bytes.as_mut_ptr().cast()) } != 0 {
            return None;
        }
        bytes.pop();
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(candle_core::Error::wrap)
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

/// The library, opened once.
fn nvrtc() -> Result<&'static Nvrtc> {
    static OPENED: OnceLock<std::result::Result<Nvrtc, String>> = OnceLock::new();
    match OPENED.get_or_init(open) {
        Ok(nvrtc) => Ok(nvrtc),
        Err(error) => bail!("{error}"),
    }
}

/// Loads the library from the system's search path, then from `CUDA_HOME`.
fn open() -> std::result::Result<Nvrtc, String> {
    let mut errors = Vec::new();
    for name in NAMES {
        match load(name.as_ref()) {
            Ok(library) => return functions(library),
            Err(error) => errors.push(error),
        }
    }
    let home = std::env::var_os("CUDA_HOME").map(PathBuf::from);
    for folder in home.iter().flat_map(|home| [home.join("lib"), home.join("lib64")]) {
        // The library loads a second one by its bare name, which works if that is already loaded.
        for part in files(&folder, "libnvrtc-builtins.so") {
            let _ = load(&part);
        }
        for file in files(&folder, "libnvrtc.so") {
            match load(&file) {
                Ok(library) => return functions(library),
                Err(error) => errors.push(error),
            }
        }
    }
    Err(format!(
        "libnvrtc.so.13, NVIDIA's run-time compiler, was not found; install CUDA 13's NVRTC or set CUDA_HOME, or build this \
         program where nvcc is ({})",
        errors.join("; ")
    ))
}

fn load(path: &Path) -> std::result::Result<*mut c_void, String> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: a string with its zero; what the library runs when it is loaded is NVIDIA's.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() { Err(last_error()) } else { Ok(library) }
}

/// Files in a folder whose names begin with `start`.
fn files(folder: &Path, start: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    let mut paths: Vec<PathBuf> = named.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn functions(library: *mut c_void) -> std::result::Result<Nvrtc, String> {
    // SAFETY: each field has the type that `nvrtc.h` gives the function of that name.
    unsafe {
        Ok(Nvrtc {
            version: function(library, c"nvrtcVersion")?,
            create: function(library, c"nvrtcCreateProgram")?,
            compile: function(library, c"nvrtcCompileProgram")?,
            ptx: Text {
                size: function(library, c"nvrtcGetPTXSize")?,
                get: function(library, c"nvrtcGetPTX")?,
            },
            log: Text {
                size: function(library, c"nvrtcGetProgramLogSize")?,
                get: function(library, c"nvrtcGetProgramLog")?,
            },
            destroy: function(library, c"nvrtcDestroyProgram")?,
        })
    }
}

/// Looks up a function of the loaded library.
///
/// # Safety
/// `F` is the type of a pointer to that function.
unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> std::result::Result<F, String> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: the library is open, the name ends with zero.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    if address.is_null() {
        return Err(format!("libnvrtc has no {}: {}", name.to_string_lossy(), last_error()));
    }
    // SAFETY: the caller answers for the type; the sizes are equal.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

fn last_error() -> String {
    // SAFETY: the text, where there is one, is the loader's and valid until its next call on this thread.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "no reason given".to_owned();
    }
    // SAFETY: as above; it ends with zero.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
