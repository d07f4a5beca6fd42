//! Lists the recipes in `recipes/`, so that the binary carries every one of them. With the feature `cuda` it also compiles
//! the kernels in `src/ops/cuda/` to PTX, where a compiler is found; without one the program does that when it runs.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

const KERNELS: &str = "src/ops/cuda";

/// Architectures that PTX is made for: each serves its own GPUs and newer ones. `src/ops/cuda/ptx.rs` chooses.
const ARCHITECTURES: [&str; 2] = ["80", "90"];

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?);
    let out = PathBuf::from(env::var("OUT_DIR").map_err(io::Error::other)?);
    list_recipes(&root, &out)?;
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        embed_kernels(&root.join(KERNELS), &out)?;
    }
    Ok(())
}

fn list_recipes(root: &Path, out: &Path) -> io::Result<()> {
    println!("cargo:rerun-if-changed=recipes");
    let mut list = String::from("&[\n");
    for path in files(&root.join("recipes"), "toml")? {
        // Writing to a string cannot fail.
        let _ = writeln!(list, "    ({:?}, {}),", stem(&path), included(&path));
    }
    list.push_str("]\n");
    save(&out.join("recipes.rs"), &list)
}

/// Writes `ptx.rs`: every kernel file with its source and its PTX for each architecture, and every header. A PTX is empty
/// where no compiler was found or where what stands in for one wrote nothing.
fn embed_kernels(folder: &Path, out: &Path) -> io::Result<()> {
    println!("cargo:rerun-if-changed={KERNELS}");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let headers = files(folder, "cuh")?;
    let nvcc = compiler();
    if nvcc.is_none() {
        println!(
            "cargo:warning=no nvcc in NVCC, CUDA_HOME or PATH: the kernels will be compiled by NVRTC when they are first used"
        );
    }
    let mut text = String::from("static MODULES: &[Module] = &[\n");
    for source in files(folder, "cu")? {
        let ptx = ARCHITECTURES.map(|architecture| {
            let name = format!("{}.sm_{architecture}.ptx", stem(&source));
            (architecture, out.join(name))
        });
        for (architecture, ptx) in &ptx {
            if let Some(nvcc) = &nvcc {
                compile(nvcc, (&source, &headers), architecture, ptx)?;
            } else {
                save(ptx, "")?;
                save(&ptx.with_extension("made-of"), "")?;
            }
        }
        let ptx = ptx.map(|(_, ptx)| included(&ptx)).join(", ");
        let (name, source) = (stem(&source), included(&source));
        let _ = writeln!(text, "    Module {{ name: {name:?}, source: {source}, ptx: [{ptx}] }},");
    }
    text.push_str("];\nstatic HEADERS: &[(&str, &str)] = &[\n");
    for path in headers {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let _ = writeln!(text, "    ({name:?}, {}),", included(&path));
    }
    text.push_str("];\n");
    save(&out.join("ptx.rs"), &text)
}

/// `NVCC`, else the one of `CUDA_HOME` or `CUDA_PATH`, else the first on `PATH`.
fn compiler() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Some(nvcc.into());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let homes = homes.map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    homes
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
}

/// Compiles a kernel file, unless the PTX that is there was made of the same texts by the same compiler.
fn compile(
    nvcc: &Path,
    (source, headers): (&Path, &[PathBuf]),
    architecture: &str,
    ptx: &Path,
) -> io::Result<()> {
    let mut made_of = format!("{}\n", nvcc.display());
    for file in std::iter::once(source).chain(headers.iter().map(PathBuf::as_path)) {
        made_of.push_str(&fs::read_to_string(file)?);
    }
    let stamp = ptx.with_extension("made-of");
    if ptx.exists() && fs::read_to_string(&stamp).is_ok_and(|before| before == made_of) {
        return Ok(());
    }
    // Whatever happens from here on, the old PTX is no longer there.
    save(&stamp, "")?;
    let output = Command::new(nvcc)
        .args(["--ptx", "-O3", "-std=c++17", &format!("-arch=compute_{architecture}"), "-o"])
        .args([ptx, source])
        .output()
        .map_err(|error| io::Error::other(format!("cannot run {}: {error}", nvcc.display())))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let (source, said) = (source.display(), String::from_utf8_lossy(&said));
        let message = format!("nvcc refused {source} for compute_{architecture}:\n{said}");
        return Err(io::Error::other(message));
    }
    save(&stamp, &made_of)
}

/// The files of a folder with an extension, by name. A folder that is not there has none.
fn files(folder: &Path, extension: &str) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = match fs::read_dir(folder) {
        Ok(listing) => {
            listing.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?
        }
        Err(_) => Vec::new(),
    };
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    paths.sort();
    Ok(paths)
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn included(path: &Path) -> String {
    format!("include_str!({:?})", path.display().to_string())
}

#[expect(clippy::disallowed_methods, reason = "cargo discards what a failed build script wrote")]
fn save(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)
}
