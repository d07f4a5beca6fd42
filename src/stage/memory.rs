//! Memory of this process as counted by Linux; `None` on other systems.

use std::fs::OpenOptions;
use std::io::Write;

use crate::train::memory::kibibytes;

const STATUS: &str = "/proc/self/status";

/// Peak memory of this process, in bytes.
pub fn peak_bytes() -> Option<u64> {
    kibibytes(STATUS, "VmHWM:")
}

/// Measures the increase in peak memory from a given moment.
#[derive(Debug)]
pub struct Extra {
    /// Bytes held at the start; `None` if the peak could not be reset.
    start: Option<u64>,
}

impl Extra {
    /// Starts here: resets the system's peak to the current usage.
    pub fn begin() -> Self {
        // Writing "5" requests that, see proc_pid_clear_refs(5).
        let reset = OpenOptions::new()
            .write(true)
            .open("/proc/self/clear_refs")
            .and_then(|mut file| file.write_all(b"5"));
        Self { start: reset.ok().and_then(|()| kibibytes(STATUS, "VmRSS:")) }
    }

    /// The largest increase since the start, in bytes.
    pub fn peak_bytes(&self) -> Option<u64> {
        Some(peak_bytes()?.saturating_sub(self.start?))
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn extra_memory_counts_only_the_rise_since_the_start() {
        const BYTES: usize = 128 << 20;
        drop(std::hint::black_box(vec![1_u8; 2 * BYTES]));
        let extra = Extra::begin();
        let held = std::hint::black_box(vec![1_u8; BYTES]);
        let rise = extra.peak_bytes().unwrap();
        assert!(rise > BYTES as u64 / 2 && rise < BYTES as u64 * 3 / 2, "{rise}");
        assert!(peak_bytes().unwrap() > held.len() as u64);
    }
}
