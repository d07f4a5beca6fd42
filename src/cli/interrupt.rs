//! Ctrl-C: the first asks the running stage to save and stop, the second exits immediately.

use std::sync::atomic::{AtomicBool, Ordering};

use super::output;
use crate::error::{Error, Result};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Starts listening, and returns the flag that Ctrl-C sets.
pub(super) fn listen() -> Result<&'static AtomicBool> {
    // Also if a shell started this in the background with SIGINT ignored: SIGTERM must still save.
    let listening = ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::Relaxed) {
            leave();
        }
        output::note("stopping after this step; press Ctrl-C again to stop at once");
    });
    match listening {
        // A second run in the same process is already listening.
        Ok(()) | Err(ctrlc::Error::MultipleHandlers) => Ok(&ASKED),
        Err(error) => Err(Error::run(format!("cannot listen for Ctrl-C: {error}"))),
    }
}

#[expect(
    clippy::exit,
    reason = "the user asked twice; what is on the disk is whole at every moment"
)]
fn leave() {
    std::process::exit(130);
}
