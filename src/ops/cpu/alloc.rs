//! Keeps freed memory in the process.
//!
//! A training step frees and asks again for the same large buffers. glibc hands each of them back to the kernel,
//! which zeroes fresh pages the next time: measured, more time went into page faults than into arithmetic.

/// Tells glibc's allocator to keep what was freed, in large pages. Call once, first thing in `main`. Elsewhere it does
/// nothing.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(
    unsafe_code,
    reason = "mallopt is the only way to set the allocator's thresholds from within"
)]
pub fn keep_memory() {
    const NEVER: libc::c_int = -1;
    // SAFETY: mallopt only stores tunables; it is called before any other thread exists.
    unsafe {
        // No separate mappings for large blocks, never shrink the heap, grow it in large steps.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        // Arenas of other threads are limited to 64 MiB and cannot hold a logits chunk.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
    ask_for_large_pages();
}

/// Lets the heap's next addresses, half as many as the machine has memory, be backed by large pages where the kernel has
/// some: a model's weights then cost fewer address look-ups. Addresses take no memory until something is written there.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "madvise")]
fn ask_for_large_pages() {
    const LARGE: usize = 2 << 20;
    // SAFETY: sysconf only reads; the block is this function's own, freed once, and advice changes no contents.
    unsafe {
        let (pages, size) =
            (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE));
        let memory = usize::try_from(pages).unwrap_or(0) * usize::try_from(size).unwrap_or(0);
        let len = (memory / 2).next_multiple_of(LARGE);
        let block = libc::malloc(len);
        if block.is_null() {
            // Someone limits our addresses: pages stay small.
            return;
        }
        let gap = block.align_offset(LARGE);
        libc::madvise(block.wrapping_byte_add(gap), len - LARGE, libc::MADV_HUGEPAGE);
        libc::free(block);
    }
}

/// Tells glibc's allocator to keep what was freed. Call once, first thing in `main`. Elsewhere it does nothing.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_memory() {}
