//! The kernels on the host, for tests: each `.cu` is compiled by the system's C++ compiler under `host.h`, which runs a
//! block's threads as fibres, and called through a shared library.
//!
//! A test compares a kernel with its CPU op in every [`Manner`]: block size, order of the threads, and the side of its
//! buffers that touches a page which nobody may touch. [`every_mutant_is_caught`] breaks a kernel on purpose and sees
//! the same test fail.

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

/// Where kernels and headers lie.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/ops/cuda");

/// `file=library`: what a test under [`every_mutant_is_caught`] takes for the kernels of that file.
const MUTANT: &str = "ARRIERO_TEST_MUTANT";

/// More options for the compiler, e.g. `-fsanitize=address` beside an `LD_PRELOAD` of its library.
pub(in crate::ops::cuda) const FLAGS: &str = "ARRIERO_TEST_KERNEL_FLAGS";

/// Seconds of computing after which a mutant that runs in circles counts as caught.
const PATIENCE: libc::rlim_t = 20;

/// What kernels are compiled with. Undefined behaviour ends the process.
const CHECKED: [&str; 3] = ["-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"];

/// What mutants are compiled with: there are many, so it must be quick. Of undefined behaviour that the host's processor
/// lets pass, packs at addresses that are no multiple of theirs end the process.
const QUICK: [&str; 4] =
    ["-O1", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-DARRIERO_MUTANT"];

/// Block sizes that kernels are tested with.
pub(in crate::ops::cuda) const BLOCKS: [u32; 6] = [32, 64, 128, 256, 512, 1024];

/// Which thread of a block, and which block, goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops::cuda) enum Order {
    /// The first.
    Forward,
    /// The last.
    Backward,
    /// A random one of this seed, drawn anew after each round.
    Random(u64),
}

impl Order {
    pub(in crate::ops::cuda) const ALL: [Self; 3] =
        [Self::Forward, Self::Backward, Self::Random(7)];
}

/// One way to run a kernel; none may change what it computes beyond rounding.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops::cuda) struct Manner {
    /// Threads of a block.
    pub(in crate::ops::cuda) block: u32,
    /// Whose turn it is.
    pub(in crate::ops::cuda) order: Order,
    /// The end of the buffers that is guarded. With [`Side::Start`] a buffer begins at a page; with [`Side::End`] it is
    /// aligned to no more than its length is a multiple of.
    pub(in crate::ops::cuda) side: Side,
}

/// Every order and side with each of the block sizes.
pub(in crate::ops::cuda) fn manners(blocks: &[u32]) -> Vec<Manner> {
    let with = |block, order| Side::BOTH.map(|side| Manner { block, order, side });
    let of_block = |&block: &u32| Order::ALL.map(|order| with(block, order));
    blocks.iter().flat_map(of_block).flatten().collect()
}

/// Each block size once. From one to the next the order and the side change, so that every pair of them occurs; with the
/// next `turn`, which may be a shape's place in a list, each block has another pair.
pub(in crate::ops::cuda) fn each_block(turn: usize) -> Vec<Manner> {
    let manner = |(place, &block): (usize, &u32)| {
        let at = place + turn;
        Manner { block, order: Order::ALL[at % 3], side: Side::BOTH[at % 2] }
    };
    BLOCKS.iter().enumerate().map(manner).collect()
}

/// The element types that kernels have entries for.
pub(in crate::ops::cuda) trait Number:
    Copy + Default + Send + Sync + 'static
{
    /// The suffix of its entries.
    const NAME: &'static str;
    /// The largest relative error of one rounding to this type, beside that of f32.
    const ROUNDING: f32;
    /// Rounded to nearest, ties to even.
    fn narrow(value: f32) -> Self;
    /// Without loss.
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

/// All numbers rounded.
pub(in crate::ops::cuda) fn narrow<T: Number>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::narrow(value)).collect()
}

/// All numbers in f32.
pub(in crate::ops::cuda) fn wide<T: Number>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.wide()).collect()
}

/// Draws from a normal distribution, rounded; the same for the same index.
pub(in crate::ops::cuda) fn random<T: Number>(index: u64, len: usize) -> Vec<T> {
    narrow(&Stream::new(0, "kernels").normal(index, len, 1.0))
}

/// Asserts that numbers are as expected, to 1e-5 and one rounding to their type. The error is relative to the expected
/// number, or to the root mean square of all where that is larger: sums that cancel have no digits of their own.
#[track_caller]
pub(in crate::ops::cuda) fn assert_close<T: Number>(what: &str, found: &[T], expected: &[f32]) {
    assert_within(what, found, expected, 1e-5);
}

/// [`assert_close`] to another precision. Records the worst error.
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
        // Infinities, and bits that agree.
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

/// Asserts that numbers are the expected ones, to the bit, and records it.
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
    /// Entries that ran since the last comparison, and whether one followed them.
    static RAN: RefCell<(Vec<String>, bool)> = const { RefCell::new((Vec::new(), false)) };
}

/// Prints a comparison that passed, once for each entry that made the numbers: `scripts/shim_table.py` reads it. Every
/// kernel must be in one, of each of its types.
pub(in crate::ops::cuda) fn record(what: &str, dtype: &str, error: f32, tolerance: f32) {
    RAN.with_borrow_mut(|(ran, compared)| {
        *compared = true;
        for entry in ran {
            println!("shim | {entry} | {what} | {dtype} | {error:.1e} | {tolerance:.1e}");
        }
    });
}

/// Notes that an entry ran. The first one after a comparison begins a new list.
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

/// What `host.h` is told of a launch; the same layout as in `launch.h`.
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
    /// The kernels of a file such as `norm.cu`, compiled when first asked for.
    pub(in crate::ops::cuda) fn of(file: &str) -> &'static Self {
        Self::of_text(file, || read(file))
    }

    /// The kernels of a source text that includes what lies beside the kernels. A name stands for one text.
    pub(in crate::ops::cuda) fn of_text(
        file: &str,
        text: impl FnOnce() -> String,
    ) -> &'static Self {
        static ALL: LazyLock<Mutex<BTreeMap<String, &'static Kernels>>> =
            LazyLock::new(Mutex::default);
        // A compiler's refusal fails every test that asks, not the first alone.
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

    /// Begins a call of an entry; arguments follow, in its order.
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

/// A launch in preparation. It borrows its buffers.
pub(in crate::ops::cuda) struct Call<'a> {
    kernels: &'a Kernels,
    entry: String,
    how: Launch,
    args: Vec<Vec<u64>>,
    sizes: Vec<usize>,
    borrowed: PhantomData<&'a mut ()>,
}

impl<'a> Call<'a> {
    /// Asks for dynamic shared memory, in bytes.
    pub(in crate::ops::cuda) fn shared(mut self, bytes: usize) -> Self {
        self.how.shared = bytes as u32;
        self
    }

    /// Runs the blocks from this one on along x alone, as if those before it had nothing to do.
    pub(in crate::ops::cuda) fn starting_at(mut self, first: usize) -> Self {
        self.how.first = first as u32;
        self
    }

    /// A number, or a struct of numbers with the layout of C and no padding.
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

    /// A buffer that the kernel writes, or changes in place.
    pub(in crate::ops::cuda) fn output<T: Copy>(self, buffer: &'a mut Guarded<T>) -> Self {
        self.arg(buffer.as_mut().as_mut_ptr())
    }

    /// No buffer.
    pub(in crate::ops::cuda) fn null(self) -> Self {
        self.arg(std::ptr::null::<u8>())
    }

    /// Runs the kernel.
    ///
    /// # Panics
    /// Where the shim complains.
    #[track_caller]
    pub(in crate::ops::cuda) fn run(self) {
        let what = format!("{}, {}", self.kernels.file, self.entry);
        if let Err(message) = self.result() {
            panic!("{what}: {message}");
        }
    }

    /// Runs the kernel. An error is what the shim says of it: a divergent barrier, wrong arguments.
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

/// The shared library of a kernel file's text: kept beside the tests' binary, for every test has its own process.
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

/// Makes a shared library of a kernel file's text.
fn compile(folder: &Path, file: &str, text: &str, options: &[&str]) -> PathBuf {
    let source = folder.join(file);
    let library = source.with_extension("so");
    save(&source, text);
    let compiler = compiler();
    let output = Command::new(&compiler)
        .args(["-x", "c++", "-std=c++17", "-g0", "-DARRIERO_HOST", "-shared", "-fPIC"])
        // Jumps between stacks are no mistake here.
        .args(["-U_FORTIFY_SOURCE", "-ffp-contract=off", "-Wno-unknown-pragmas", "-I", FOLDER])
        .args(options)
        .args(std::env::var(FLAGS).unwrap_or_default().split_whitespace())
        // A sanitizer's library is the tests', not the compiler's.
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

/// The library that stands for a file's kernels in this process, if one does.
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

/// Replaces texts of a kernel file, one `(text, replacement)` at a time, and runs a test of this binary, given by its
/// whole name, with each: it must fail, or die.
///
/// # Panics
/// A mutant that survives; a text that the file has not exactly once; one that does not compile.
pub(in crate::ops::cuda) fn every_mutant_is_caught(
    file: &str,
    test: &str,
    mutants: &[(&str, &str)],
) {
    every_mutant_within_is_caught(file, file, test, mutants);
}

/// [`every_mutant_is_caught`], of kernels whose header `within` is changed.
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
            // What lies beside a source is included before what lies in the compiler's list.
            save(&folder.path().join(within), &changed);
            let source = if within == file { changed } else { read(file) };
            let library = compile(folder.path(), file, &source, &QUICK);
            let output = Command::new(std::env::current_exe().unwrap())
                .args([test, "--exact", "--test-threads=1"])
                .env(MUTANT, format!("{file}={}", library.display()))
                // Names of functions take longer to find than most mutants.
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
