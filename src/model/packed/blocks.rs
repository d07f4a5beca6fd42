//! llama.cpp's blocks: 32 weights with a half-precision scale, and for Q4_1 a minimum.

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::ops::cpu::blocks::{Bits, Block};

/// Weights per block.
pub(super) const LEN: usize = 32;

/// Block type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockType {
    /// `(n − 8) · d` with 4-bit `n`.
    Q4_0,
    /// `n · d + m` with 4-bit `n`.
    Q4_1,
    /// `n · d` with signed 8-bit `n`.
    Q8_0,
}

impl BlockType {
    /// The block type of a GGUF tensor, if supported.
    pub fn of(dtype: GgmlDType) -> Option<Self> {
        match dtype {
            GgmlDType::Q4_0 => Some(Self::Q4_0),
            GgmlDType::Q4_1 => Some(Self::Q4_1),
            GgmlDType::Q8_0 => Some(Self::Q8_0),
            _ => None,
        }
    }

    /// Candle's dtype.
    pub fn dtype(self) -> GgmlDType {
        match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q8_0 => GgmlDType::Q8_0,
        }
    }

    /// Bits per weight.
    pub(super) fn bits(self) -> Bits {
        match self {
            Self::Q4_0 | Self::Q4_1 => Bits::Four,
            Self::Q8_0 => Bits::Eight,
        }
    }

    /// Whether a block has a minimum.
    pub(super) fn has_minimum(self) -> bool {
        self == Self::Q4_1
    }

    /// One block as integers with scale and minimum. Q4_0's −8 becomes a minimum, exactly.
    pub(super) fn block(self, bytes: &[u8]) -> Block {
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let scale = half(0);
        let nibbles = |bytes: &[u8]| {
            std::array::from_fn(|k| {
                let byte = bytes[k % (LEN / 2)];
                (if k < LEN / 2 { byte & 15 } else { byte >> 4 }).cast_signed()
            })
        };
        match self {
            Self::Q4_0 => Block {
                scale,
                minimum: f16::from_f32(-8.0 * scale.to_f32()),
                numbers: nibbles(&bytes[2..]),
            },
            Self::Q4_1 => Block { scale, minimum: half(2), numbers: nibbles(&bytes[4..]) },
            Self::Q8_0 => Block {
                scale,
                minimum: f16::ZERO,
                numbers: std::array::from_fn(|k| bytes[2 + k].cast_signed()),
            },
        }
    }

    /// Bytes per block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 2 + LEN / 2,
            Self::Q4_1 => 4 + LEN / 2,
            Self::Q8_0 => 2 + LEN,
        }
    }

    /// Bytes per row of `cols` weights, a multiple of the block length.
    pub fn row_bytes(self, cols: usize) -> usize {
        cols / LEN * self.bytes()
    }

    /// Dequantises one block. The first half of the weights is in the low nibbles.
    pub(super) fn unpack(self, block: &[u8], out: &mut [f32]) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let scale = half(0);
        let (low, high) = out.split_at_mut(LEN / 2);
        let pairs = |bytes: &[u8], value: &dyn Fn(u8) -> f32| {
            for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
                *low = value(byte & 15);
                *high = value(byte >> 4);
            }
        };
        match self {
            Self::Q4_0 => pairs(&block[2..], &|n| (f32::from(n) - 8.0) * scale),
            Self::Q4_1 => {
                let minimum = half(2);
                pairs(&block[4..], &|n| f32::from(n) * scale + minimum);
            }
            Self::Q8_0 => {
                for (out, byte) in out.iter_mut().zip(&block[2..]) {
                    *out = f32::from(byte.cast_signed()) * scale;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    use super::super::Packed;
    use super::*;
    use crate::ops::linear::tests::random;

    #[test]
    fn unpacked_blocks_match_candle() {
        for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0] {
            let weight: Tensor = (random(3, (9, 64)) * 0.02).unwrap();
            let packed = QTensor::quantize(&weight, dtype).unwrap();
            let kind = BlockType::of(dtype).unwrap();
            let ours = Packed::blocks(kind, (9, 64), packed.data().unwrap().into_owned()).unwrap();
            let theirs = packed.dequantize(&Device::Cpu).unwrap();
            let theirs = theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(ours.unpack::<f32>(), theirs, "{dtype:?}");
            assert_eq!(ours.bytes(), packed.storage_size_in_bytes());
            let (matrix, mut rows) = (ours.block_matrix().unwrap(), Vec::new());
            (0..9).for_each(|row| matrix.row(row, &mut rows));
            // Products of a half-precision scale and so few bits are exact.
            assert_eq!(rows, theirs, "{dtype:?}");
        }
        let error = Packed::blocks(BlockType::Q8_0, (2, 48), vec![0; 102]).unwrap_err();
        assert!(error.to_string().contains("[2, 48]"), "{error}");
    }
}
