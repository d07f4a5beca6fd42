//! The two streams. Results go to standard output, everything else to standard error.

use std::io::Write;

use crate::error::Error;
use crate::store;

/// Prints one line of what the user asked for.
pub(super) fn line(text: &str) {
    // A reader that has seen enough (`| head`) is no error.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints one line for the user that is not the result.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Prints an error and its hint.
pub(super) fn error(error: &Error) {
    note(&format!("error: {error}"));
    // Libraries report a full disk in words only; the way out is the same wherever it happened.
    let full = error.to_string().contains("No space left on device");
    if let Some(hint) = error.hint_text().or(full.then_some(store::FULL_DISK)) {
        note(&format!("hint: {hint}"));
    }
}
