//! Runs the kernels on the host, for tests: each `.cu` is compiled by the system's C++ compiler under `host.h`, which
//! runs a block's threads as fibres, and loaded as a shared library.
//!
//! A test compares a kernel with its CPU op in every [`Manner`]: block size, thread order, and the side of its buffers
//! next to an inaccessible page. [`every_mutant_is_caught`] breaks a kernel on purpose and checks that the same test
//! fails.

#![expect(unsafe_code, reason = "kernels are C functions in a shared library")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr, OsString, c_char, c_int, c_void};
use std::fmt::Debug;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, Mutex, PoisonError};

use half::bf16;
use libloading::Library;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub(in crate::ops::cuda) use crate::ops::cpu::guard::{Guarded, Side};
use crate::rng::Stream;

/// Directory of kernels and headers.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/ops/cuda");

/// `file=library`: replacement kernels for that file in a test under [`every_mutant_is_caught`].
const MUTANT: &str = "ARRIERO_TEST_MUTANT";

/// Additional compiler options, e.g. `-fsanitize=address` with an `LD_PRELOAD` of its library.
pub(in crate::ops::cuda) const FLAGS: &str = "ARRIERO_TEST_KERNEL_FLAGS";

/// CPU seconds after which an endlessly looping mutant counts as caught.
const PATIENCE: libc::rlim_t = 20;

/// Compiler options for kernels. Undefined behaviour aborts the process.
const CHECKED: [&str; 3] = ["-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"];

/// Compiler options for mutants, chosen for speed since there are many. Of the undefined behaviour that the host's
/// processor tolerates, misaligned vector accesses still abort.
const QUICK: [&str; 4] =
    ["-O1", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-DARRIERO_MUTANT"];

/// Block sizes that kernels are tested with.
pub(in crate::ops::cuda) const BLOCKS: [u32; 6] = [32, 64, 128, 256, 512, 1024];

/// Which thread of a block, and which block, runs first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops::cuda) enum Order {
    /// First to last.
    Forward,
    /// Last to first.
    Backward,
    /// A random order with this seed, redrawn after each round.
    Random(u64),
}

impl Order {
    pub(in crate::ops::cuda) const ALL: [Self; 3] =
        [Self::Forward, Self::Backward, Self::Random(7)];
}

/// One way to run a kernel; none may change the result beyond rounding.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops::cuda) struct Manner {
    /// Threads per block.
    pub(in crate::ops::cuda) block: u32,
    /// Scheduling order.
    pub(in crate::ops::cuda) order: Order,
    /// The guarded end of the buffers. With [`Side::Start`] a buffer begins at a page; with [`Side::End`] its alignment
    /// is only that implied by its length.
    pub(in crate::ops::cuda) side: Side,
}

/// Every order and side, for each block size.
pub(in crate::ops::cuda) fn manners(blocks: &[u32]) -> Vec<Manner> {
    let with = |block, order| Side::BOTH.map(|side| Manner { block, order, side });
    let of_block = |&block: &u32| Order::ALL.map(|order| with(block, order));
    blocks.iter().flat_map(of_block).flatten().collect()
}

/// Each block size once, cycling through all pairs of order and side; `turn`, such as a shape's index in a list, shifts
/// the pairs.
pub(in crate::ops::cuda) fn each_block(turn: usize) -> Vec<Manner> {
    let manner = |(place, &block): (usize, &u32)| {
        let at = place + turn;
        Manner { block, order: Order::ALL[at % 3], side: Side::BOTH[at % 2] }
    };
    BLOCKS.iter().enumerate().map(manner).collect()
}

/// Element types with kernel entries.
pub(in crate::ops::cuda) trait Number:
    Copy + Default + Send + Sync + 'static
{
    /// Suffix of its entries.
    const NAME: &'static str;
    /// Largest relative rounding error of this dtype, beyond that of f32.
    const ROUNDING: f32;
    /// Rounds to nearest, ties to even.
    fn narrow(value: f32) -> Self;
    /// Widens without loss.
    fn wide(self) -> f32;
}

impl Number for f32 {
    const NAME: &'static str = "f32";
    const ROUNDING: Self = 0.0;
    fn narrow(value: f32) -> Self {
        value
    }
    fn wide(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    const NAME: &'static str = "bf16";
    const ROUNDING: f32 = 1.0 / 256.0;
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

/// Rounds all values.
pub(in crate::ops::cuda) fn narrow<T: Number>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::narrow(value)).collect()
}

/// Widens all values to f32.
pub(in crate::ops::cuda) fn wide<T: Number>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.wide()).collect()
}

/// Normally distributed values, rounded; reproducible by index.
pub(in crate::ops::cuda) fn random<T: Number>(index: u64, len: usize) -> Vec<T> {
    narrow(&Stream::new(0, "kernels").normal(index, len, 1.0))
}

/// Asserts that values are as expected, within 1e-5 plus one rounding to their dtype. The error is relative to the
/// expected value, or to the root mean square of all if larger, since cancelling sums have no accurate digits.
#[track_caller]
pub(in crate::ops::cuda) fn assert_close<T: Number>(what: &str, found: &[T], expected: &[f32]) {
    assert_within(what, found, expected, 1e-5);
}

/// [`assert_close`] with another tolerance. Records the worst error.
#[track_caller]
pub(in crate::ops::cuda) fn assert_within<T: Number>(
    what: &str,
    found: &[T],
    expected: &[f32],
    tolerance: f32,
) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let finite = expected.iter().filter(|value| value.is_finite()).map(|&value| f64::from(value));
    let scale = (finite.map(|x| x * x).sum::<f64>() / expected.len().max(1) as f64).sqrt() as f32;
    let mut worst = 0.0_f32;
    for (index, (found, &expected)) in found.iter().zip(expected).enumerate() {
        let found = found.wide();
        // Infinities, and identical bits.
        if found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()) {
            continue;
        }
        let size = expected.abs().max(scale);
        let error = (found - expected).abs();
        assert!(
            error <= T::ROUNDING * expected.abs() + tolerance * size,
            "{what}, {}, index {index}: {found}, expected {expected}",
            T::NAME
        );
        worst = worst.max(error / size);
    }
    record(what, T::NAME, worst, T::ROUNDING + tolerance);
}

/// Asserts bit-identical values, and records it.
#[track_caller]
pub(in crate::ops::cuda) fn assert_same<N: PartialEq + Debug>(
    what: &str,
    dtype: &str,
    found: &[N],
    expected: &[N],
) {
    assert!(found == expected, "{what}, {dtype}: {found:?}, expected {expected:?}");
    record(what, dtype, 0.0, 0.0);
}

thread_local! {
    /// Entries run since the last comparison, and whether a comparison followed.
    static RAN: RefCell<(Vec<String>, bool)> = const { RefCell::new((Vec::new(), false)) };
}

/// Prints a passed comparison, once for each entry involved; read by `scripts/shim_table.py`. Every kernel must appear,
/// for each of its dtypes.
pub(in crate::ops::cuda) fn record(what: &str, dtype: &str, error: f32, tolerance: f32) {
    RAN.with_borrow_mut(|(ran, compared)| {
        *compared = true;
        for entry in ran {
            println!("shim | {entry} | {what} | {dtype} | {error:.1e} | {tolerance:.1e}");
        }
    });
}

/// Records that an entry ran. The first one after a comparison starts a new list.
fn note(entry: &str) {
    RAN.with_borrow_mut(|(ran, compared)| {
        if std::mem::take(compared) {
            ran.clear();
        }
        if !ran.iter().any(|known| known == entry) {
            ran.push(entry.to_owned());
        }
    });
}

/// Launch parameters for `host.h`, in the layout of `launch.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Launch {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    order: u32,
    seed: u64,
    first: u32,
}

type Entry =
    unsafe extern "C" fn(*const Launch, *const *const c_void, *const usize, usize) -> c_int;

/// The kernels of one file.
pub(in crate::ops::cuda) struct Kernels {
    library: Library,
    file: String,
    /// The shim runs one launch of a library at a time.
    turn: Mutex<()>,
}

impl Kernels {
    /// The kernels of a file such as `norm.cu`, compiled on first use.
    pub(in crate::ops::cuda) fn of(file: &str) -> &'static Self {
        Self::of_text(file, || read(file))
    }

    /// The kernels of a source text, which may include the files next to the kernels. A name must always have the same
    /// text.
    pub(in crate::ops::cuda) fn of_text(
        file: &str,
        text: impl FnOnce() -> String,
    ) -> &'static Self {
        static ALL: LazyLock<Mutex<BTreeMap<String, &'static Kernels>>> =
            LazyLock::new(Mutex::default);
        // A compilation error fails every test that needs the library, not just the first.
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = all.get(file) {
            return kernels;
        }
        let path = mutant_of(file).unwrap_or_else(|| compiled(file, &text()));
        // SAFETY: a library of ours, whose initialisers do nothing.
        let library = unsafe { Library::new(path) }.unwrap();
        let kernels = Self { library, file: file.to_owned(), turn: Mutex::default() };
        let kernels: &'static Self = Box::leak(Box::new(kernels));
        all.insert(file.to_owned(), kernels);
        kernels
    }

    /// Starts a call of an entry; arguments follow, in its order.
    pub(in crate::ops::cuda) fn call(
        &self,
        entry: &str,
        grid: [u32; 3],
        manner: Manner,
    ) -> Call<'_> {
        let (order, seed) = match manner.order {
            Order::Forward => (0, 0),
            Order::Backward => (1, 0),
            Order::Random(seed) => (2, seed),
        };
        let how = Launch { grid, block: [manner.block, 1, 1], shared: 0, order, seed, first: 0 };
        Call {
            kernels: self,
            entry: entry.to_owned(),
            how,
            args: Vec::new(),
            sizes: Vec::new(),
            borrowed: PhantomData,
        }
    }
}

/// A launch in preparation; borrows its buffers.
pub(in crate::ops::cuda) struct Call<'a> {
    kernels: &'a Kernels,
    entry: String,
    how: Launch,
    args: Vec<Vec<u64>>,
    sizes: Vec<usize>,
    borrowed: PhantomData<&'a mut ()>,
}

impl<'a> Call<'a> {
    /// Requests dynamic shared memory, in bytes.
    pub(in crate::ops::cuda) fn shared(mut self, bytes: usize) -> Self {
        self.how.shared = bytes as u32;
        self
    }

    /// Runs only the blocks from this x index on, as if earlier ones had nothing to do.
    pub(in crate::ops::cuda) fn starting_at(mut self, first: usize) -> Self {
        self.how.first = first as u32;
        self
    }

    /// A number, or a C-layout struct of numbers without padding.
    pub(in crate::ops::cuda) fn arg<A: Copy>(mut self, value: A) -> Self {
        let mut words = vec![0_u64; size_of::<A>().div_ceil(8)];
        // SAFETY: the words have room for the value and are aligned for numbers.
        unsafe { words.as_mut_ptr().cast::<A>().write_unaligned(value) };
        self.args.push(words);
        self.sizes.push(size_of::<A>());
        self
    }

    /// A buffer that the kernel reads.
    pub(in crate::ops::cuda) fn input<T: Copy>(self, buffer: &'a Guarded<T>) -> Self {
        self.arg(buffer.as_ptr())
    }

    /// A buffer that the kernel writes or updates in place.
    pub(in crate::ops::cuda) fn output<T: Copy>(self, buffer: &'a mut Guarded<T>) -> Self {
        self.arg(buffer.as_mut().as_mut_ptr())
    }

    /// A null pointer.
    pub(in crate::ops::cuda) fn null(self) -> Self {
        self.arg(std::ptr::null::<u8>())
    }

    /// Runs the kernel.
    ///
    /// # Panics
    /// If the shim reports an error.
    #[track_caller]
    pub(in crate::ops::cuda) fn run(self) {
        let what = format!("{}, {}", self.kernels.file, self.entry);
        if let Err(message) = self.result() {
            panic!("{what}: {message}");
        }
    }

    /// Runs the kernel. An error is the shim's report: a divergent barrier, wrong arguments.
    pub(in crate::ops::cuda) fn result(self) -> Result<(), String> {
        let library = &self.kernels.library;
        let name = format!("host_{}", self.entry);
        // SAFETY: every symbol of that prefix is a launcher of this type, made by a macro of common.cuh.
        let entry = unsafe { library.get::<Entry>(name.as_bytes()) };
        let entry = entry.map_err(|error| error.to_string())?;
        let args: Vec<*const c_void> =
            self.args.iter().map(|words| words.as_ptr().cast()).collect();
        let (args, sizes) = (args.as_ptr(), self.sizes.as_ptr());
        let turn = self.kernels.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the arguments have the sizes that are named, which the launcher compares with its own; buffers are
        // borrowed, and what lies beside them may not be touched.
        let status = unsafe { entry(&raw const self.how, args, sizes, self.args.len()) };
        if status == 0 {
            note(&self.entry);
            return Ok(());
        }
        // SAFETY: a function of host.h of this type.
        let message =
            unsafe { library.get::<extern "C" fn() -> *const c_char>(&b"host_message"[..]) };
        // SAFETY: the text ends in a zero, and stays as it is until another launch has its turn.
        let message = unsafe { CStr::from_ptr(message.unwrap()()) }.to_string_lossy().into_owned();
        drop(turn);
        Err(message)
    }
}

fn read(file: &str) -> String {
    let path = Path::new(FOLDER).join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[expect(clippy::disallowed_methods, reason = "a temporary file of a test")]
fn save(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

/// The shared library of a kernel source, cached beside the test binary, since every test runs in its own process.
#[expect(
    clippy::disallowed_methods,
    reason = "renamed, so that it appears whole; no artefact of a run"
)]
fn compiled(file: &str, text: &str) -> PathBuf {
    let mut hash = Sha256::new();
    hash.update(text);
    for header in ["common.cuh", "attention.cuh", "host.h", "launch.h"] {
        hash.update(read(header));
    }
    hash.update(format!("{} {:?} {:?}", compiler().display(), CHECKED, std::env::var(FLAGS)));
    let program = std::env::current_exe().unwrap();
    let folder = program.parent().unwrap().join("host-kernels");
    std::fs::create_dir_all(&folder).unwrap();
    let kept = folder.join(format!("{file}-{:x}.so", hash.finalize()));
    if !kept.exists() {
        let own = tempfile::tempdir_in(&folder).unwrap();
        std::fs::rename(compile(own.path(), file, text, &CHECKED), &kept).unwrap();
    }
    kept
}

/// The C++ compiler.
pub(in crate::ops::cuda) fn compiler() -> OsString {
    std::env::var_os("CXX").unwrap_or_else(|| "c++".into())
}

/// Compiles a kernel source to a shared library.
fn compile(folder: &Path, file: &str, text: &str, options: &[&str]) -> PathBuf {
    let source = folder.join(file);
    let library = source.with_extension("so");
    save(&source, text);
    let compiler = compiler();
    let output = Command::new(&compiler)
        .args(["-x", "c++", "-std=c++17", "-g0", "-DARRIERO_HOST", "-shared", "-fPIC"])
        // Switching stacks is intended here.
        .args(["-U_FORTIFY_SOURCE", "-ffp-contract=off", "-Wno-unknown-pragmas", "-I", FOLDER])
        .args(options)
        .args(std::env::var(FLAGS).unwrap_or_default().split_whitespace())
        // A preloaded sanitizer library is meant for the tests, not the compiler.
        .env_remove("LD_PRELOAD")
        .args([OsStr::new("-o"), library.as_os_str(), source.as_os_str()])
        .output();
    let output = output.unwrap_or_else(|error| {
        panic!(
            "cannot run {}: {error}; install g++, or name a C++ compiler in CXX",
            compiler.display()
        )
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{file} does not compile on the host:\n{said}");
    library
}

/// The library that replaces a file's kernels in this process, if any.
fn mutant_of(file: &str) -> Option<PathBuf> {
    let mutant = std::env::var(MUTANT).ok()?;
    let (of, library) = mutant.split_once('=')?;
    if of != file {
        return None;
    }
    let limit = libc::rlimit { rlim_cur: PATIENCE, rlim_max: PATIENCE };
    // SAFETY: the struct is read before the call returns; a signal ends this process at the limit.
    let status = unsafe { libc::setrlimit(libc::RLIMIT_CPU, &raw const limit) };
    assert_eq!(status, 0, "no limit for a mutant");
    Some(library.into())
}

/// Replaces texts in a kernel file, one `(text, replacement)` at a time, and runs a test of this binary, given by its
/// full name, with each: it must fail or crash.
///
/// # Panics
/// A mutant that survives; a text that does not occur exactly once; a mutant that does not compile.
pub(in crate::ops::cuda) fn every_mutant_is_caught(
    file: &str,
    test: &str,
    mutants: &[(&str, &str)],
) {
    every_mutant_within_is_caught(file, file, test, mutants);
}

/// [`every_mutant_is_caught`], for kernels whose header `within` is changed.
pub(in crate::ops::cuda) fn every_mutant_within_is_caught(
    within: &str,
    file: &str,
    test: &str,
    mutants: &[(&str, &str)],
) {
    let original = read(within);
    let survivors: Vec<&str> = mutants
        .par_iter()
        .filter_map(|&(text, replacement)| {
            assert_eq!(original.matches(text).count(), 1, "{within} has this once: {text}");
            let changed = original.replace(text, replacement);
            let folder = tempfile::tempdir().unwrap();
            // Files next to a source take precedence over the include path.
            save(&folder.path().join(within), &changed);
            let source = if within == file { changed } else { read(file) };
            let library = compile(folder.path(), file, &source, &QUICK);
            let output = Command::new(std::env::current_exe().unwrap())
                .args([test, "--exact", "--test-threads=1"])
                .env(MUTANT, format!("{file}={}", library.display()))
                // Symbolising a backtrace takes longer than most mutants run.
                .env("RUST_BACKTRACE", "0")
                .output();
            survives(test, &output.unwrap()).then_some(text)
        })
        .collect();
    assert!(survivors.is_empty(), "{test} passes although {within} has lost {survivors:#?}");
}

fn survives(test: &str, output: &Output) -> bool {
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("running 1 test"), "no test {test}: {said}");
    output.status.success()
}
