//! Keeps freed memory in the process.
//!
//! A training step frees and reallocates the same large buffers. glibc returns them to the kernel, which zeroes fresh
//! pages each time: in measurements, page faults took more time than arithmetic.

/// Makes glibc's allocator keep freed memory, in large pages. Call once, first thing in `main`. A no-op elsewhere.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(
    unsafe_code,
    reason = "mallopt is the only way to set the allocator's thresholds from within"
)]
pub fn keep_memory() {
    const NEVER: libc::c_int = -1;
    // SAFETY: mallopt only stores tunables; it is called before any other thread exists.
    unsafe {
        // No separate mappings for large blocks, no trimming, and growth in large steps.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        // Arenas of other threads are limited to 64 MiB, too small for a chunk of logits.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
    ask_for_large_pages();
}

/// Lets the heap's next addresses, half the machine's memory, be backed by huge pages if the kernel has any, which
/// reduces TLB misses for a model's weights. Untouched addresses use no memory.
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
            // The address space is limited: keep small pages.
            return;
        }
        let gap = block.align_offset(LARGE);
        libc::madvise(block.wrapping_byte_add(gap), len - LARGE, libc::MADV_HUGEPAGE);
        libc::free(block);
    }
}

/// Makes glibc's allocator keep freed memory. Call once, first thing in `main`. A no-op on this platform.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_memory() {}
