//! Shuffles of four-byte units between AVX-512 registers, for packing.

#![expect(
    unsafe_code,
    reason = "functions compiled for an instruction set, over pointers, that may only be called where it was detected"
)]

/// Rows and columns of the square transposed by [`transpose`].
pub(super) const SIDE: usize = 16;

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{interleave, transpose, turned_from, turned_to};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512i, _mm256_maskz_loadu_epi16, _mm512_cvtepu16_epi32, _mm512_loadu_si512,
        _mm512_mask_storeu_epi32, _mm512_maskz_loadu_epi32, _mm512_or_si512,
        _mm512_permutex2var_epi64, _mm512_set_epi64, _mm512_setzero_si512, _mm512_shuffle_i32x4,
        _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi16, _mm512_unpackhi_epi32,
        _mm512_unpackhi_epi64, _mm512_unpacklo_epi16, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };

    use super::super::rows::call_for;
    use super::SIDE;

    /// A mask of the first `lanes` lanes.
    const fn first(lanes: usize) -> u16 {
        ((1_u32 << lanes) - 1) as u16
    }

    /// Interleaves `WIDTH` two-byte values of `a` and `b` into pairs. `WIDTH` is 32, or 16 at most.
    ///
    /// # Safety
    /// AVX-512 F, VL and BW; `a` and `b` cover `WIDTH` numbers, `to` as many pairs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    pub(in super::super) unsafe fn interleave<const WIDTH: usize>(
        a: *const i16,
        b: *const i16,
        to: *mut i32,
    ) {
        const { assert!(WIDTH <= SIDE || WIDTH == 2 * SIDE) };
        // SAFETY: the caller's promise; masks keep to `WIDTH` lanes.
        unsafe {
            if WIDTH == 2 * SIDE {
                let (a, b) = (_mm512_loadu_si512(a.cast()), _mm512_loadu_si512(b.cast()));
                // Works on each quarter of a register: pairs 0 to 3, 8 to 11, … and 4 to 7, 12 to 15, …
                let (even, odd) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
                let front = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
                let back = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
                _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi64(even, front, odd));
                let to = to.add(SIDE);
                _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi64(even, back, odd));
            } else {
                let mask = first(WIDTH);
                let low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
                let high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b));
                let pairs = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                _mm512_mask_storeu_epi32(to, mask, pairs);
            }
        }
    }

    /// Transposes sixteen units of each of `WIDTH` rows into sixteen rows of `WIDTH` units.
    ///
    /// # Safety
    /// AVX-512 F; `from` covers the rows, `row_bytes` apart; `to` has room.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    pub(in super::super) unsafe fn transpose<const WIDTH: usize>(
        from: *const u8,
        row_bytes: usize,
        to: *mut i32,
    ) {
        for low in (0..WIDTH).step_by(SIDE) {
            let rows = SIDE.min(WIDTH - low);
            let mut square = [_mm512_setzero_si512(); SIDE];
            for (i, row) in square.iter_mut().take(rows).enumerate() {
                // SAFETY: row `low + i` is one of `WIDTH`.
                *row = unsafe { _mm512_loadu_si512(from.add((low + i) * row_bytes).cast()) };
            }
            for (i, column) in turned(&square).into_iter().enumerate() {
                // SAFETY: the mask keeps to the rows that are there.
                unsafe {
                    _mm512_mask_storeu_epi32(to.add(i * WIDTH + low), first(rows), column);
                }
            }
        }
    }

    /// Loads sixteen units of each of sixteen rows as sixteen registers of one unit per row. Prefetches the kilobyte at
    /// `ahead`, any address, on the way.
    ///
    /// # Safety
    /// AVX-512 F; `from` covers the rows, `row_bytes` apart.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    pub(in super::super) unsafe fn turned_from(
        from: *const u8,
        row_bytes: usize,
        ahead: *const u8,
    ) -> [__m512i; SIDE] {
        let mut square = [_mm512_setzero_si512(); SIDE];
        for (i, row) in square.iter_mut().enumerate() {
            call_for(ahead.wrapping_add(i * size_of::<__m512i>()));
            // SAFETY: the caller's promise.
            *row = unsafe { _mm512_loadu_si512(from.add(i * row_bytes).cast()) };
        }
        turned(&square)
    }

    /// Stores up to sixteen rows of results transposed: `from` `[rows, columns]`, rows `stride` apart, to `to`
    /// `[columns, rows]`, rows `to_stride` apart.
    ///
    /// # Safety
    /// AVX-512 F; `from` covers the rows, `to` has room.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    pub(in super::super) unsafe fn turned_to(
        (from, stride): (*const f32, usize),
        (rows, columns): (usize, usize),
        (to, to_stride): (*mut f32, usize),
    ) {
        for left in (0..columns).step_by(SIDE) {
            let width = SIDE.min(columns - left);
            let mut square = [_mm512_setzero_si512(); SIDE];
            for (i, row) in square.iter_mut().take(rows).enumerate() {
                // SAFETY: the caller's promise; the mask keeps to the row.
                *row = unsafe {
                    _mm512_maskz_loadu_epi32(first(width), from.add(i * stride + left).cast())
                };
            }
            for (j, column) in turned(&square).into_iter().take(width).enumerate() {
                // SAFETY: the caller's promise; the mask keeps to the rows that are there.
                unsafe {
                    let to = to.add((left + j) * to_stride);
                    _mm512_mask_storeu_epi32(to.cast(), first(rows), column);
                }
            }
        }
    }

    /// The transposed square: pairs of rows, then fours, eights and sixteens, are interleaved.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    fn turned(rows: &[__m512i; SIDE]) -> [__m512i; SIDE] {
        let (mut a, mut b) = (*rows, *rows);
        for i in (0..SIDE).step_by(2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for i in (0..SIDE).step_by(4) {
            a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        for i in 0..4 {
            b[i] = _mm512_shuffle_i32x4::<0x88>(a[i], a[i + 4]);
            b[i + 4] = _mm512_shuffle_i32x4::<0xdd>(a[i], a[i + 4]);
            b[i + 8] = _mm512_shuffle_i32x4::<0x88>(a[i + 8], a[i + 12]);
            b[i + 12] = _mm512_shuffle_i32x4::<0xdd>(a[i + 8], a[i + 12]);
        }
        for i in 0..8 {
            a[i] = _mm512_shuffle_i32x4::<0x88>(b[i], b[i + 8]);
            a[i + 8] = _mm512_shuffle_i32x4::<0xdd>(b[i], b[i + 8]);
        }
        a
    }
}
