//! Kernels at element offsets beyond 32 bits: the last rows of arrays of more than 2³² elements, whose other rows are
//! never touched and so use no memory.

#![expect(unsafe_code, reason = "a map is viewed as numbers")]

use memmap2::{MmapMut, MmapOptions};

use super::host::{Guarded, Kernels, Manner, Order, Side, every_mutant_is_caught, random};

/// Llama 3's vocabulary size.
const VOCAB: usize = 128_256;
/// The whole last row is beyond 2³² elements.
const ROWS: usize = (1 << 32) / VOCAB + 3;
/// Elements per block within a row.
const SPAN: u64 = 16384;
const MANNER: Manner = Manner { block: 256, order: Order::Forward, side: Side::End };

/// `[rows, width]` of f32, initially zero; memory is used only where touched.
struct Far {
    map: MmapMut,
    rows: usize,
    width: usize,
}

impl Far {
    fn new(rows: usize, width: usize) -> Self {
        assert!((rows - 1) * width > u32::MAX as usize, "the last row is not far");
        let map = MmapOptions::new().len(rows * width * 4).no_reserve_swap().map_anon().unwrap();
        Self { map, rows, width }
    }

    fn last(&mut self) -> &mut [f32] {
        let from = (self.rows - 1) * self.width * 4;
        // SAFETY: the map begins at a page and goes on for so many f32 from there, for which any bits are a value.
        unsafe { std::slice::from_raw_parts_mut(self.map[from..].as_mut_ptr().cast(), self.width) }
    }

    fn address(&mut self) -> *mut u8 {
        self.map.as_mut_ptr()
    }
}

/// The head's kernels on the last of `rows` rows at an address: its statistics and the in-place gradient.
fn head(logits: *mut u8, rows: usize) -> Vec<f32> {
    let mut starts = vec![0_u32; rows];
    starts.push(1);
    let starts = Guarded::new(&starts, MANNER.side);
    let ids = Guarded::new(&[VOCAB as u32 - 7], MANNER.side);
    let [mut logps, d_logps] = [[0.0_f32], [0.75]].map(|one| Guarded::new(&one, MANNER.side));
    let mut log_sums = Guarded::new(&vec![0.0_f32; rows], MANNER.side);
    let mut stats = Guarded::new(&vec![0.0_f32; rows * 5], MANNER.side);
    let call = |entry: &str, parts: u32| {
        let call = Kernels::of("head.cu").call(entry, [rows as u32, parts, 1], MANNER);
        call.starting_at(rows - 1).arg(logits)
    };
    let read = call("head_stats_f32", 1).arg(VOCAB as u64).input(&starts).input(&ids);
    read.output(&mut logps).output(&mut log_sums).output(&mut stats).run();
    let write = call("head_grad_f32", (VOCAB as u64).div_ceil(SPAN) as u32).arg(logits);
    let write = write.arg(VOCAB as u64).arg(SPAN).input(&log_sums).input(&starts).input(&ids);
    let write = write.input(&logps).input(&d_logps).arg(0.1_f32).arg(0.01_f32);
    write.null().null().null().null().arg(0_u32).null().run();
    let mut said = logps.as_slice().to_vec();
    said.extend(&stats.as_slice()[(rows - 1) * 5..]);
    said
}

#[test]
fn a_far_row_of_logits_is_a_near_one() {
    let row = random::<f32>(3, VOCAB);
    let mut near = row.clone();
    let expected = head(near.as_mut_ptr().cast(), 1);
    let mut far = Far::new(ROWS, VOCAB);
    far.last().copy_from_slice(&row);
    assert!(head(far.address(), ROWS) == expected);
    assert!(far.last() == near && near != row);
}

/// Adds two tokens' gradients to the last of `rows` rows of a table at an address.
fn embed(table: *mut u8, (rows, width): (usize, usize)) {
    let d_x = Guarded::new(&random::<f32>(4, 2 * width), MANNER.side);
    let buffers = [vec![0, 1], vec![0, 2], vec![rows as u32 - 1]];
    let [order, starts, rows] = buffers.map(|values| Guarded::new(&values, MANNER.side));
    let call = Kernels::of("embed.cu").call("embed_backward_f32", [1, 1, 1], MANNER);
    call.input(&d_x).input(&order).input(&starts).input(&rows).arg(table).arg(width as u64).run();
}

#[test]
fn a_far_row_of_a_table_is_a_near_one() {
    const WIDTH: usize = 40_000;
    let mut near = random::<f32>(5, WIDTH);
    let mut far = Far::new(VOCAB, WIDTH);
    far.last().copy_from_slice(&near);
    embed(near.as_mut_ptr().cast(), (1, WIDTH));
    embed(far.address(), (VOCAB, WIDTH));
    assert!(far.last() == near && near != random::<f32>(5, WIDTH));
}

#[test]
fn kernels_with_32_bit_offsets_are_caught() {
    let check = |test: &str| format!("ops::cuda::tests::far::{test}");
    every_mutant_is_caught(
        "head.cu",
        &check("a_far_row_of_logits_is_a_near_one"),
        &[
            ("D *out = d_logits + row * vocab;", "D *out = d_logits + u32(row * vocab);"),
            (
                "own_sums<T, STATS>(x, vocab)",
                "own_sums<T, STATS>(logits + u32(row * vocab), vocab)",
            ),
        ],
    );
    every_mutant_is_caught(
        "embed.cu",
        &check("a_far_row_of_a_table_is_a_near_one"),
        &[("d_table += u64(rows[segment]) * width;", "d_table += u32(rows[segment] * width);")],
    );
}
