//! Element types of the kernels: f32, and bf16 with f32 accumulation.

use std::borrow::Cow;

use candle_core::{CpuStorage, WithDType};
use half::bf16;
use rayon::prelude::*;

use super::kernel::Numbers;
use super::packed::{Packed, PackedWeight};
use super::simd;

/// Elements per task.
const CHUNK: usize = 1 << 14;

/// A stored element. Arithmetic is always in f32: bf16 is widened when read, and rounded to nearest, ties to even, when
/// written.
pub trait Element: WithDType + Numbers {
    /// Widens one element.
    fn widened(self) -> f32;

    /// The elements of a unit, in order.
    fn of(unit: Self::Unit) -> impl Iterator<Item = f32>;

    /// The packed weight, if it is of this type.
    fn packed(weight: &PackedWeight) -> Option<&Packed<Self>>;

    /// The elements of a storage, if it is of this type.
    fn in_storage(storage: &mut CpuStorage) -> Option<&mut [Self]>;

    /// Rounds values into `out`, which has the same length.
    fn round_into(out: &mut [Self], values: &[f32]);

    /// Widens values into `out`, which has the same length.
    fn widen_into(out: &mut [f32], values: &[Self]);

    /// The values in f32: as is, or a copy in `scratch`.
    fn widen<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];

    /// The values rounded to this type: as is, or a copy in `scratch`.
    fn narrow<'a>(values: &'a [f32], scratch: &'a mut Vec<Self>) -> &'a [Self];

    /// Lets `fill` write f32 values: in place, or into `scratch` to be rounded into `out`.
    fn write(out: &mut [Self], scratch: &mut Vec<f32>, fill: impl FnOnce(&mut [f32]));

    /// Rounds a buffer, using all cores. For f32, the buffer itself.
    fn rounded(values: Vec<f32>) -> Vec<Self>;

    /// Rounds borrowed values, using all cores. For f32, without a copy.
    fn rounded_from(values: &[f32]) -> Cow<'_, [Self]>;
}

impl Element for f32 {
    #[inline]
    fn widened(self) -> Self {
        self
    }
    fn of(unit: Self) -> impl Iterator<Item = Self> {
        std::iter::once(unit)
    }
    fn packed(weight: &PackedWeight) -> Option<&Packed<Self>> {
        match weight {
            PackedWeight::F32(weight) => Some(weight),
            PackedWeight::Bf16(_) => None,
        }
    }
    fn in_storage(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::F32(data) => Some(data),
            _ => None,
        }
    }
    fn round_into(out: &mut [Self], values: &[f32]) {
        out.copy_from_slice(values);
    }
    fn widen_into(out: &mut [f32], values: &[Self]) {
        out.copy_from_slice(values);
    }
    fn widen<'a>(values: &'a [Self], _scratch: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }
    fn narrow<'a>(values: &'a [Self], _scratch: &'a mut Vec<Self>) -> &'a [Self] {
        values
    }
    fn write(out: &mut [Self], _scratch: &mut Vec<f32>, fill: impl FnOnce(&mut [Self])) {
        fill(out);
    }
    fn rounded(values: Vec<f32>) -> Vec<Self> {
        values
    }
    fn rounded_from(values: &[f32]) -> Cow<'_, [Self]> {
        Cow::Borrowed(values)
    }
}

impl Element for bf16 {
    #[inline]
    fn widened(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    fn of(unit: [Self; 2]) -> impl Iterator<Item = f32> {
        unit.into_iter().map(Self::to_f32)
    }
    fn packed(weight: &PackedWeight) -> Option<&Packed<Self>> {
        match weight {
            PackedWeight::Bf16(weight) => Some(weight),
            PackedWeight::F32(_) => None,
        }
    }
    fn in_storage(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::BF16(data) => Some(data),
            _ => None,
        }
    }
    fn round_into(out: &mut [Self], values: &[f32]) {
        simd::to_bf16(out, values);
    }
    fn widen_into(out: &mut [f32], values: &[Self]) {
        simd::from_bf16(out, values);
    }
    fn widen<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(values.len(), 0.0);
        simd::from_bf16(scratch, values);
        scratch
    }
    fn narrow<'a>(values: &'a [f32], scratch: &'a mut Vec<Self>) -> &'a [Self] {
        scratch.resize(values.len(), Self::ZERO);
        simd::to_bf16(scratch, values);
        scratch
    }
    fn write(out: &mut [Self], scratch: &mut Vec<f32>, fill: impl FnOnce(&mut [f32])) {
        scratch.resize(out.len(), 0.0);
        fill(scratch);
        simd::to_bf16(out, scratch);
    }
    fn rounded(values: Vec<f32>) -> Vec<Self> {
        Self::rounded_from(&values).into_owned()
    }
    fn rounded_from(values: &[f32]) -> Cow<'_, [Self]> {
        let mut out = vec![Self::ZERO; values.len()];
        out.par_chunks_mut(CHUNK)
            .zip(values.par_chunks(CHUNK))
            .for_each(|(out, values)| simd::to_bf16(out, values));
        Cow::Owned(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_non_finite_values() {
        let mut values: Vec<f32> = (0..4000_u32).map(|i| f32::from_bits(i * 0x0010_3107)).collect();
        values.extend([0.0, -0.0, 1.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, 1e-40]);
        // Midpoints between two neighbours, and just beside them.
        values.extend([0x3f80_8000, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001].map(f32::from_bits));
        let ours = bf16::rounded(values.clone());
        for (ours, value) in ours.iter().zip(&values) {
            let expected = bf16::from_f32(*value);
            let same = ours.to_bits() == expected.to_bits() || ours.is_nan() && value.is_nan();
            assert!(same, "{value}: {ours} {expected}");
        }
        let mut widened = vec![0.0; ours.len()];
        bf16::widen_into(&mut widened, &ours);
        let exact =
            |(wide, narrow): (&f32, &bf16)| wide.to_bits() == u32::from(narrow.to_bits()) << 16;
        assert!(widened.iter().zip(&ours).all(exact));
        assert_eq!(f32::rounded_from(&values).len(), values.len());
    }
}
