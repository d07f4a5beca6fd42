//! `unpack.cu` compared with the definition, bit for bit.

use half::{bf16, f16};

use super::host::{
    Guarded, Kernels, Manner, Number, assert_same, each_block, every_mutant_is_caught, random,
};

const FILE: &str = "unpack.cu";
const CHECK: &str = "ops::cuda::tests::unpack::numbers_are_those_of_the_definition";
const GRID: [u32; 3] = [2, 1, 1];

/// Value counts: one, less than a vector, less than a block, a partial block, more scales than share one, more than one
/// pass of the grid.
const COUNTS: [usize; 6] = [1, 7, 63, 1003, 64 * 300, 40_037];

/// Bytes covering all values.
fn bytes(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at * 167 + seed) ^ (at >> 5)) as u8).collect()
}

fn same<T: Number>(what: &str, found: &Guarded<T>, expected: &[f32]) {
    let bits = |x: f32| x.to_bits();
    let found_bits: Vec<u32> = found.as_slice().iter().map(|x| bits(x.wide())).collect();
    let expected: Vec<u32> = expected.iter().map(|&x| bits(T::narrow(x).wide())).collect();
    assert_same(what, T::NAME, &found_bits, &expected);
    assert!(found.is_clean(), "{what}");
}

fn nf4<T: Number>(count: usize, manner: Manner) {
    let blocks = count.div_ceil(64);
    let (levels, scales) = (bytes(3, count.div_ceil(2)), bytes(91, blocks));
    let scale_of_scales = random::<f32>(1, blocks.div_ceil(256));
    let (tables, offset) = (random::<f32>(2, 256 + 16), 0.37);
    let expected: Vec<f32> = (0..count)
        .map(|at| {
            let scale = tables[usize::from(scales[at / 64])]
                .mul_add(scale_of_scales[at / 64 / 256], offset);
            let pair = levels[at / 2];
            scale * tables[256 + usize::from(if at % 2 == 0 { pair >> 4 } else { pair & 15 })]
        })
        .collect();
    let mut out = Guarded::new(&vec![T::narrow(f32::NAN); count], manner.side);
    let [levels, scales] = [levels, scales].map(|all| Guarded::new(&all, manner.side));
    let [of_scales, tables] = [scale_of_scales, tables].map(|all| Guarded::new(&all, manner.side));
    let entry = format!("unpack_nf4_{}", T::NAME);
    let call = Kernels::of(FILE).call(&entry, GRID, manner).input(&levels).input(&scales);
    let call = call.input(&of_scales).arg(offset).input(&tables).output(&mut out);
    call.arg(count as u64).run();
    same("unpack_nf4", &out, &expected);
}

/// Blocks with this many bits per value, with or without a minimum.
fn blocks<T: Number>((bits, minimum): (usize, bool), count: usize, manner: Manner) {
    // All kinds of scales: normal, subnormal, largest, zero.
    let halves = [0x3c00, 0xb123, 0x0001, 0x83ff, 0x0400, 0x7bff, 0x0000, 0x8000];
    let head = if minimum { 4 } else { 2 };
    let size = head + 4 * bits;
    let mut packed = bytes(17, count / 32 * size);
    for (at, block) in packed.chunks_mut(size).enumerate() {
        for (half, place) in (0..head / 2).zip(at..) {
            block[2 * half..][..2]
                .copy_from_slice(&u16::to_le_bytes(halves[(place * (1 + half)) % halves.len()]));
        }
    }
    let half = |block: &[u8], at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let expected: Vec<f32> = (0..count)
        .map(|at| {
            let (block, place) = (&packed[at / 32 * size..][..size], at % 32);
            let (scale, numbers) = (half(block, 0), &block[head..]);
            match (bits, minimum) {
                (8, _) => f32::from(numbers[place].cast_signed()) * scale,
                (_, minimum) => {
                    let byte = numbers[place % 16];
                    let number = f32::from(if place < 16 { byte & 15 } else { byte >> 4 });
                    if minimum { number * scale + half(block, 2) } else { (number - 8.0) * scale }
                }
            }
        })
        .collect();
    let mut out = Guarded::new(&vec![T::narrow(f32::NAN); count], manner.side);
    let packed = Guarded::new(&packed, manner.side);
    let entry = format!("unpack_blocks_{}", T::NAME);
    let call = Kernels::of(FILE).call(&entry, GRID, manner).input(&packed).arg(bits as u32);
    call.arg(u32::from(minimum)).output(&mut out).arg(count as u64).run();
    same("unpack_blocks", &out, &expected);
}

#[test]
fn numbers_are_those_of_the_definition() {
    for (turn, count) in COUNTS.into_iter().enumerate() {
        for manner in each_block(turn) {
            nf4::<f32>(count, manner);
            nf4::<bf16>(count, manner);
            for kind in [(4, false), (4, true), (8, false)] {
                blocks::<f32>(kind, count.next_multiple_of(32), manner);
                blocks::<bf16>(kind, count.next_multiple_of(32), manner);
            }
        }
    }
}

#[test]
fn kernels_that_are_wrong_are_caught() {
    let mutants = [
        ("  __syncthreads();\n", ""),
        ("i % 2 ? pair & 15 : pair >> 4", "i % 2 ? pair >> 4 : pair & 15"),
        ("scale_of_scales[block / 256]", "scale_of_scales[block / 255]"),
        ("const u64 block = at / 64;", "const u64 block = at / 32;"),
        ("if (at + i >= count) break;", ""),
        ("packed && at + EIGHT <= count", "packed"),
        ("const u32 head = minimum ? 2 : 1", "const u32 head = 2"),
        ("part % 2 * EIGHT + i", "part * EIGHT + i"),
        ("byte >> part / 2 * 4", "byte >> part % 2 * 4"),
        ("i32(byte << 24) >> 24", "i32(byte)"),
        ("- (minimum ? 0 : 8)", "- 8"),
    ];
    every_mutant_is_caught(FILE, CHECK, &mutants);
}
