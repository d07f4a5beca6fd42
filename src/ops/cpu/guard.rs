//! Test buffers between two inaccessible pages: a kernel that accesses one element out of bounds crashes.

#![expect(unsafe_code, reason = "pages are protected, and viewed as numbers, by pointer")]
#![expect(clippy::unwrap_used, reason = "only tests use it; a failure here is a failed test")]

use memmap2::MmapMut;

/// Fill byte around the elements: stray writes within the same page change it.
const CANARY: u8 = 0xa5;

/// Which guard page the elements adjoin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum Side {
    /// The first element directly follows the page before.
    Start,
    /// The last element directly precedes the page after.
    End,
}

impl Side {
    pub(in crate::ops) const BOTH: [Self; 2] = [Self::Start, Self::End];
}

/// `[inaccessible page][pages of elements][inaccessible page]`, the elements at one end.
pub(in crate::ops) struct Guarded<T> {
    map: MmapMut,
    /// Byte offset of the elements.
    start: usize,
    len: usize,
    page: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Copy> Guarded<T> {
    /// A copy of `values` with its first or last element at a guard page.
    pub(in crate::ops) fn new(values: &[T], side: Side) -> Self {
        // SAFETY: sysconf only reads a constant of the system.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let bytes = size_of_val(values);
        let inner = bytes.div_ceil(page).max(1) * page;
        let mut map = MmapMut::map_anon(inner + 2 * page).unwrap();
        map[page..page + inner].fill(CANARY);
        let start = match side {
            Side::Start => page,
            Side::End => page + inner - bytes,
        };
        for guard in [0, page + inner] {
            // SAFETY: a whole page of a mapping of our own, which no reference covers.
            let status = unsafe {
                libc::mprotect(map.as_mut_ptr().add(guard).cast(), page, libc::PROT_NONE)
            };
            assert_eq!(status, 0, "mprotect refused a page");
        }
        let mut guarded =
            Self { map, start, len: values.len(), page, element: std::marker::PhantomData };
        guarded.as_mut().copy_from_slice(values);
        guarded
    }

    /// The first element's address.
    pub(in crate::ops) fn as_ptr(&self) -> *const T {
        // SAFETY: `start` lies within the mapping.
        unsafe { self.map.as_ptr().add(self.start).cast() }
    }

    /// The elements.
    pub(in crate::ops) fn as_slice(&self) -> &[T] {
        // SAFETY: the elements are initialised, aligned (pages are, and sizes are multiples of the alignment), and
        // between the guards.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    /// The elements, for writing.
    pub(in crate::ops) fn as_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; the mapping is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr().cast_mut(), self.len) }
    }

    /// Whether the bytes between the elements and the other guard are unchanged.
    pub(in crate::ops) fn is_clean(&self) -> bool {
        let (start, end) = (self.start, self.start + self.len * size_of::<T>());
        let untouched = |from: usize, to: usize| {
            // SAFETY: the range lies between the guards; every byte of it was written.
            let bytes =
                unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(from), to - from) };
            bytes.iter().all(|byte| *byte == CANARY)
        };
        untouched(self.page, start) && untouched(end, self.map.len() - self.page)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Names the element that the child process accesses.
    const TOUCH: &str = "ARRIERO_TEST_TOUCH";
    const SELF: &str = "ops::cpu::guard::tests::one_element_too_far_is_fatal_on_either_side";

    /// Reads or writes one element out of bounds of a buffer of seven.
    fn touch(what: &str) {
        let side = if what.starts_with("before") { Side::Start } else { Side::End };
        let buffer = Guarded::new(&[1.0_f32; 7], side);
        let offset = if side == Side::Start { -1 } else { 7 };
        let at = buffer.as_ptr().wrapping_offset(offset).cast_mut();
        // SAFETY: none: this process is meant to die here.
        unsafe {
            if what.ends_with("write") {
                at.write_volatile(0.0);
            } else {
                std::hint::black_box(at.read_volatile());
            }
        }
    }

    #[test]
    fn one_element_too_far_is_fatal_on_either_side() {
        if let Ok(what) = std::env::var(TOUCH) {
            return touch(&what);
        }
        let program = std::env::current_exe().unwrap();
        for what in ["before, read", "before, write", "after, read", "after, write"] {
            let output = Command::new(&program).args(["--exact", SELF]).env(TOUCH, what).output();
            let output = output.unwrap();
            // Killed by a signal; a test that fails or passes exits with a code.
            assert_eq!(output.status.code(), None, "{what}: {output:?}");
        }
    }

    #[test]
    fn write_between_the_elements_and_the_far_guard_is_detected() {
        for side in Side::BOTH {
            let mut buffer = Guarded::new(&[1.0_f32; 7], side);
            buffer.as_mut().fill(2.0);
            assert!(buffer.is_clean() && buffer.as_slice() == [2.0; 7], "{side:?}");
            let offset = if side == Side::Start { 7 } else { -1 };
            // SAFETY: within the accessible page.
            unsafe { buffer.as_ptr().wrapping_offset(offset).cast_mut().write(0.0) };
            assert!(!buffer.is_clean(), "{side:?}");
        }
        let empty = Guarded::<f32>::new(&[], Side::End);
        assert!(empty.as_slice().is_empty() && empty.is_clean());
    }
}
