//! The two streams. Results go to standard output, everything else to standard error.

use std::io::Write;

use crate::error::Error;
use crate::ops::cuda::device::is_out_of_memory;
use crate::store;

/// Prints one line of the result.
pub(super) fn line(text: &str) {
    // A reader that closes the pipe early (`| head`) is not an error.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints one line for the user that is not part of the result.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Hint for any GPU out-of-memory error; a training step gives a more specific one.
const FULL_GPU: &str = "the GPU is full: `nvidia-smi` shows who holds its memory; a smaller model, fewer samples at once or \
                        device = \"cpu\" need less";

/// Prints an error and its hint.
pub(super) fn error(error: &Error) {
    note(&format!("error: {error}"));
    // Libraries report a full disk only as text; the remedy is the same wherever it happened.
    let full = error.to_string().contains("No space left on device");
    let full_gpu = is_out_of_memory(&error.to_string());
    let way = error.hint_text().or(full.then_some(store::FULL_DISK));
    if let Some(hint) = way.or(full_gpu.then_some(FULL_GPU)) {
        note(&format!("hint: {hint}"));
    }
}
