//! The shim itself: its results, and the errors it must report.

use half::bf16;

use super::host::{FLAGS, Guarded, Kernels, Manner, Order, Side, compiler, random, wide};

const KERNELS: &str = r#"
#include "common.cuh"
KERNEL_ONE(divergent, (float *out), (out)) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 1.0f;
    __syncthreads();
  }
}
KERNEL_ONE(unmet, (float *out), (out)) {
  if (threadIdx.x != 5) __syncwarp();
  out[threadIdx.x] = 1.0f;
}
KERNEL_ONE(neighbour, (float *out, u32 barrier), (out, barrier)) {
  SHARED(float, values, [64]);
  values[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ 32];
}
KERNEL_ONE(beside, (float *out), (out)) {
  DYNAMIC_SHARED(float, values);
  if (threadIdx.x == 0) values[blockDim.x] = 1.0f;
  out[threadIdx.x] = 1.0f;
}
KERNEL_ONE(unset, (float *out), (out)) {
  SHARED(float, values, [32]);
  if (blockIdx.x == 0) values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
}
KERNEL_ONE(reach, (float *out, u32 own, u32 shared), (out, own, shared)) {
  float values[4] = {out[0], out[1], out[2], out[3]};
  SHARED(float, tile, [64]);
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const float *of_values = values, *of_tile = tile;
  // Nobody else knows any more where it points to.
  asm("" : "+r"(of_values));
  out[threadIdx.x] = of_values[own] + of_tile[shared];
}
KERNEL_ONE(lanes, (u32 *out), (out)) {
  u32 lane = lane_id();
  out[0 * 32 + lane] = __shfl_sync(FULL, lane, 3);
  out[1 * 32 + lane] = __shfl_xor_sync(FULL, lane, 5);
  out[2 * 32 + lane] = __shfl_down_sync(FULL, lane, 4);
  out[3 * 32 + lane] = __shfl_up_sync(FULL, lane, 4);
  out[4 * 32 + lane] = __shfl_xor_sync(FULL, lane, 4, 8);
  out[5 * 32 + lane] = __ballot_sync(FULL, lane % 3 == 0);
  if (lane < 16) out[6 * 32 + lane] = __shfl_xor_sync(0xffff, lane, 1);
  __syncwarp();
}
KERNEL_ONE(rounded, (const float *x, bf16 *out, u64 count), (x, out, count)) {
  for (u64 i = global_thread(); i < count; i += global_threads()) out[i] = from_f32<bf16>(x[i]);
}
KERNEL_ONE(product, (const bf16 *a, const bf16 *b, float *out, u32 waits), (a, b, out, waits)) {
  SHARED(bf16, tile, [16][16]);
  u32 lane = lane_id(), g = lane / 4, t = lane % 4;
  copy_async(&tile[lane / 2][lane % 2 * 8], a + lane * 8);
  commit_copies();
  if (waits) wait_copies<0>();
  __syncwarp();
  float sum[4] = {};
  u32 left[4], right[2];
  for (u32 i = 0; i < 4; i++) {
    const bf16 *from = &tile[g + i % 2 * 8][2 * t + i / 2 * 8];
    left[i] = pack_bf16(from[0], from[1]);
  }
  for (u32 i = 0; i < 2; i++) right[i] = pack_bf16(b[(2 * t + i * 8) * 8 + g], b[(2 * t + i * 8 + 1) * 8 + g]);
  mma_bf16(sum, left, right);
  for (u32 i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
"#;

fn kernels() -> &'static Kernels {
    Kernels::of_text("shim.cu", || KERNELS.to_owned())
}

fn manner(block: u32, order: Order) -> Manner {
    Manner { block, order, side: Side::Start }
}

fn blank(len: usize) -> Guarded<f32> {
    Guarded::new(&vec![0.0; len], Side::Start)
}

/// Runs a kernel with one buffer of 64 floats.
fn complaint(kernels: &Kernels, entry: &str, order: Order, shared: usize) -> String {
    let mut out = blank(64);
    let call = kernels.call(entry, [1, 1, 1], manner(64, order)).shared(shared);
    call.output(&mut out).result().unwrap_err()
}

#[test]
fn barriers_that_some_threads_miss_are_reported() {
    let kernels = kernels();
    for order in Order::ALL {
        let message = complaint(kernels, "divergent", order, 0);
        assert!(message.contains("divergent barrier"), "{message}");
        let message = complaint(kernels, "unmet", order, 0);
        assert!(message.contains("waits for threads that never come"), "{message}");
        let message = complaint(kernels, "beside", order, 64 * 4);
        assert!(message.contains("a write beside a shared array"), "{message}");
    }
}

/// Element indices (`own shared`) that the child process of the test below reads from arrays of four and of 64.
#[cfg(target_os = "linux")]
const REACH: &str = "ARRIERO_TEST_REACH";

/// The sanitizer used by `scripts/cuda-proof`, tested on a kernel that reads out of bounds.
#[cfg(target_os = "linux")]
#[test]
fn the_address_sanitizer_sees_one_element_too_far() {
    use std::process::Command;

    if let Ok(reach) = std::env::var(REACH) {
        let (own, shared) = reach.split_once(' ').unwrap();
        let mut out = blank(64);
        let call = kernels().call("reach", [1, 1, 1], manner(64, Order::Forward)).output(&mut out);
        return call.arg::<u32>(own.parse().unwrap()).arg::<u32>(shared.parse().unwrap()).run();
    }
    let library = Command::new(compiler()).arg("-print-file-name=libasan.so").output().unwrap();
    let library = String::from_utf8(library.stdout).unwrap();
    let test = "ops::cuda::tests::host_tests::the_address_sanitizer_sees_one_element_too_far";
    for (reach, seen) in [("3 63", false), ("4 63", true), ("3 64", true)] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact"])
            .env(REACH, reach)
            .env(FLAGS, "-fsanitize=address")
            .env("LD_PRELOAD", library.trim())
            // The sanitizer does not know the fibres' stacks, and leaks at exit do not matter.
            .env("ASAN_OPTIONS", "detect_stack_use_after_return=0:detect_leaks=0")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.contains("ERROR: AddressSanitizer"), seen, "{reach}: {said}");
        assert_eq!(output.status.success(), !seen, "{reach}: {said}");
    }
}

#[test]
fn missing_barrier_changes_the_result_in_either_order() {
    let kernels = kernels();
    let expected: Vec<f32> = (0..64_u8).map(|thread| f32::from(thread ^ 32)).collect();
    let run = |barrier: u32, order| {
        let mut out = blank(64);
        let call = kernels.call("neighbour", [1, 1, 1], manner(64, order));
        call.output(&mut out).arg(barrier).run();
        out.as_slice().to_vec()
    };
    for order in Order::ALL {
        assert!(run(1, order) == expected);
        assert!(run(0, order) != expected, "{order:?}");
    }
}

#[test]
fn shared_memory_does_not_outlive_its_block() {
    let mut out = blank(64);
    let kernels = kernels();
    let call = kernels.call("unset", [2, 1, 1], manner(32, Order::Forward));
    call.output(&mut out).run();
    assert!(out.as_slice()[..32].iter().all(|value| value.to_bits() == 1.0_f32.to_bits()));
    assert!(out.as_slice()[32..].iter().all(|value| value.is_nan()));
}

#[test]
fn lanes_exchange_the_expected_values() {
    let kernels = kernels();
    for order in Order::ALL {
        let mut out = Guarded::new(&[0_u32; 7 * 32], Side::End);
        kernels.call("lanes", [1, 1, 1], manner(32, order)).output(&mut out).run();
        let votes: u32 = (0..32_u32).filter(|lane| lane % 3 == 0).map(|lane| 1 << lane).sum();
        for lane in 0..32_u32 {
            let found: Vec<u32> =
                (0..7).map(|row| out.as_slice()[row * 32 + lane as usize]).collect();
            let down = if lane + 4 < 32 { lane + 4 } else { lane };
            let up = if lane < 4 { lane } else { lane - 4 };
            let half = if lane < 16 { lane ^ 1 } else { 0 };
            assert_eq!(found, [3, lane ^ 5, down, up, lane ^ 4, votes, half], "lane {lane}");
        }
    }
}

#[test]
fn invalid_arguments_and_launches_are_refused() {
    let kernels = kernels();
    let mut out = blank(64);
    let one = manner(64, Order::Forward);
    let missing = kernels.call("neighbour", [1, 1, 1], one).output(&mut out).result();
    assert!(missing.unwrap_err().contains("1 arguments, expected 2"));
    let narrow = kernels.call("neighbour", [1, 1, 1], one).output(&mut out).arg(1_u8).result();
    assert!(narrow.unwrap_err().contains("argument 1 has 1 bytes, expected 4"));
    let call = kernels.call("unmet", [1, 1, 1], manner(1056, Order::Forward));
    assert!(call.output(&mut out).result().unwrap_err().contains("a block of 1056 threads"));
}

/// All kinds of values: ties, overflow to infinity, infinities, subnormals.
#[test]
fn bf16_rounding_matches_the_half_crate() {
    let mut bits: Vec<u32> = (0..1 << 16).map(|i: u32| i << 16 | i.wrapping_mul(0x9e37)).collect();
    bits.extend((0..1 << 16).map(|i: u32| i << 16 | 0x8000));
    let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
    let x = Guarded::new(&values, Side::End);
    let mut out = Guarded::new(&vec![bf16::ZERO; values.len()], Side::End);
    let kernels = kernels();
    let call = kernels.call("rounded", [4, 1, 1], manner(256, Order::Forward));
    call.input(&x).output(&mut out).arg(values.len() as u64).run();
    for (found, value) in out.as_slice().iter().zip(values) {
        let expected = bf16::from_f32(value);
        let same = found.to_bits() == expected.to_bits() || (found.is_nan() && value.is_nan());
        assert!(same, "{value}: {found}, expected {expected}");
    }
}

#[test]
fn warp_product_is_correct_and_copies_require_a_wait() {
    let kernels = kernels();
    let (a, b) = (random::<bf16>(1, 16 * 16), random::<bf16>(2, 16 * 8));
    let (left, right) = (Guarded::new(&a, Side::Start), Guarded::new(&b, Side::End));
    let (a, b) = (wide(&a), wide(&b));
    let expected: Vec<f32> = (0..16 * 8)
        .map(|at| (0..16).map(|k| a[at / 8 * 16 + k] * b[k * 8 + at % 8]).sum())
        .collect();
    for order in Order::ALL {
        let run = |waits: u32| {
            let mut out = blank(16 * 8);
            let call = kernels.call("product", [1, 1, 1], manner(32, order)).input(&left);
            call.input(&right).output(&mut out).arg(waits).run();
            out.as_slice().to_vec()
        };
        for (found, expected) in run(1).iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
        }
        assert!(run(0).iter().all(|value| value.is_nan()), "not copied yet");
    }
}
