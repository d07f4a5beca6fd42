//! Keeps freed memory in the process.
//!
//! A training step frees and asks again for the same large buffers. glibc hands each of them back to the kernel,
//! which zeroes fresh pages the next time: measured, more time went into page faults than into arithmetic.

/// Tells glibc's allocator to keep what was freed. Call once, first thing in `main`. Elsewhere it does nothing.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(
    unsafe_code,
    reason = "mallopt is the only way to set the allocator's thresholds from within"
)]
pub fn keep_memory() {
    const KEEP: libc::c_int = libc::c_int::MAX;
    // SAFETY: mallopt only stores tunables; it is called before any other thread exists.
    unsafe {
        // No separate mappings for large blocks, never shrink the heap, grow it in large steps.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEEP);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        // Arenas of other threads are limited to 64 MiB and cannot hold a logits chunk.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Tells glibc's allocator to keep what was freed. Call once, first thing in `main`. Elsewhere it does nothing.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_memory() {}
