//! Upper bounds for products on this machine: the register-to-register multiply-add rate in f32 and bf16, and for few
//! rows the memory read rate.

#![expect(
    unsafe_code,
    clippy::inline_always,
    reason = "functions that may only be called where an instruction set was detected"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{CpuStorage, DType, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::element::Element;
use super::isa::Isa;
use super::vector::{Operand, Plain, Single, Vector, Widened};

/// Independent chains: more than the multiply-add latency times throughput (4 · 2 on current processors), few enough
/// for sixteen registers.
const CHAINS: usize = 12;
/// Shortest time measured.
const WINDOW: Duration = Duration::from_millis(20);
/// Windows per thread, of which the median is taken.
const WINDOWS: usize = 9;

/// Adds the product of a unit with itself `rounds` times to each chain. A unit is four bytes: one f32 or two bf16.
type Chains = unsafe fn(rounds: usize, unit: [u8; 4]) -> f32;

/// # Safety
/// The processor has the operand's instruction set.
#[inline(always)]
unsafe fn chains<O: Operand>(rounds: usize, unit: [u8; 4]) -> f32 {
    // SAFETY: the caller's promise; `lanes` has room for the widest register.
    unsafe {
        let factor = O::splat(unit.as_ptr());
        let mut sums = [O::Sum::splat(0.0); CHAINS];
        for (chain, sum) in sums.iter_mut().enumerate() {
            *sum = O::Sum::splat(chain as f32);
        }
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = factor.fma(factor, *sum);
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = total.add(*sum);
        }
        let mut lanes = [0.0_f32; 16];
        total.store(lanes.as_mut_ptr());
        lanes[0]
    }
}

/// The chain function of an instruction set, and its register lanes.
fn of(isa: Isa, dtype: DType) -> (Chains, usize) {
    match (isa, dtype) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, DType::BF16) => (x86::avx512_bf16, x86::AVX512_LANES),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, DType::BF16) => (x86::avx512_widened, x86::AVX512_LANES),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, _) => (x86::avx512, x86::AVX512_LANES),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, DType::BF16) => (x86::avx2_widened, x86::AVX2_LANES),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => (x86::avx2, x86::AVX2_LANES),
        (_, DType::BF16) => (chains::<Widened<Plain<8>>>, Plain::<8>::LANES),
        _ => (chains::<Single<Plain<8>>>, Plain::<8>::LANES),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::vector::{Avx2, Avx512, Pairs, Single, Vector, Widened};
    use super::chains;

    pub(super) const AVX2_LANES: usize = Avx2::LANES;
    pub(super) const AVX512_LANES: usize = Avx512::LANES;

    macro_rules! chains {
        ($name:ident = $operand:ty, $feature:literal) => {
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn $name(rounds: usize, unit: [u8; 4]) -> f32 {
                // SAFETY: the caller's promise.
                unsafe { chains::<$operand>(rounds, unit) }
            }
        };
    }

    chains! { avx2 = Single<Avx2>, "avx2,fma" }
    chains! { avx2_widened = Widened<Avx2>, "avx2,fma" }
    chains! { avx512 = Single<Avx512>, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma" }
    chains! { avx512_widened = Widened<Avx512>, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma" }
    chains! { avx512_bf16 = Pairs, "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma" }
}

/// Floating-point operations per second from registers, two per multiply-add, in this dtype with f32 sums, on all of
/// rayon's threads at once, with this process's instruction set. Takes about a fifth of a second.
pub fn register_peak<E: Element>() -> f64 {
    let (chains, lanes) = of(Isa::current(), E::DTYPE);
    let operations = (2 * E::PER_UNIT * lanes * CHAINS) as f64;
    rayon::broadcast(|_| operations * rounds_per_second(chains, unit::<E>())).iter().sum()
}

/// Bytes per second read by all of rayon's threads together from contiguous f32 or bf16 CPU tensors too large for the
/// caches. Takes nine passes.
pub fn read_rate(tensors: &[Tensor]) -> f64 {
    let held: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let seconds = |_| {
        let began = Instant::now();
        let read = held.par_iter().map(|(storage, _)| match &**storage {
            Storage::Cpu(CpuStorage::F32(data)) => folded(data, f32::to_bits),
            Storage::Cpu(CpuStorage::BF16(data)) => folded(data, |x| x.to_bits().into()),
            _ => 0,
        });
        black_box(read.reduce(|| 0, |a, b| a ^ b));
        began.elapsed()
    };
    let mut windows: Vec<Duration> = (0..WINDOWS).map(seconds).collect();
    windows.sort();
    let bytes: usize = tensors.iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum();
    bytes as f64 / windows[WINDOWS / 2].as_secs_f64()
}

/// Combined bits of all values, in pieces shared among threads.
fn folded<T: Copy + Sync>(data: &[T], bits: impl Fn(T) -> u32 + Sync) -> u32 {
    const PIECE: usize = 1 << 16;
    let piece = |piece: &[T]| piece.iter().fold(0, |all, &x| all ^ bits(x));
    data.par_chunks(PIECE).map(piece).reduce(|| 0, |a, b| a ^ b)
}

/// A unit of halves, in memory layout.
fn unit<E: Element>() -> [u8; 4] {
    match E::DTYPE {
        DType::BF16 => {
            [bf16::from_f32(0.5).to_le_bytes(); 2].concat().try_into().unwrap_or_default()
        }
        _ => 0.5_f32.to_le_bytes(),
    }
}

fn rounds_per_second(chains: Chains, unit: [u8; 4]) -> f64 {
    let seconds = |rounds: usize| {
        let began = Instant::now();
        // SAFETY: `Isa::current` is an instruction set that was detected.
        black_box(unsafe { chains(rounds, black_box(unit)) });
        began.elapsed()
    };
    let mut rounds = 1 << 10;
    while seconds(rounds) < WINDOW {
        rounds *= 2;
    }
    let mut windows: Vec<Duration> = (0..WINDOWS).map(|_| seconds(rounds)).collect();
    windows.sort();
    rounds as f64 / windows[WINDOWS / 2].as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn are_what_they_say<E: Element>() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            let (chains, lanes) = of(isa, E::DTYPE);
            assert!(lanes <= 16);
            // Chain c starts at c; each round adds a quarter per element of a unit.
            for rounds in [0, 1, 3] {
                let added = 0.25 * (rounds * E::PER_UNIT) as f64;
                let expected: f64 = (0..CHAINS).map(|chain| chain as f64 + added).sum();
                // SAFETY: the instruction set was detected.
                let found = unsafe { chains(rounds, unit::<E>()) };
                assert!((f64::from(found) - expected).abs() < 1e-4, "{isa:?}: {found}, {expected}");
            }
        }
        let peak = register_peak::<E>();
        assert!(peak > 1e6 && peak < 1e15, "{peak}");
    }

    #[test]
    fn measured_memory_read_rate_is_plausible() {
        let tensor = Tensor::ones((300, 1000), DType::BF16, &candle_core::Device::Cpu).unwrap();
        let rate = read_rate(&[tensor.clone(), tensor.to_dtype(DType::F32).unwrap()]);
        assert!(rate > 1e6 && rate < 1e14, "{rate}");
        assert_eq!(folded(&[1_u32, 2, 4, 4], |x| x), 3);
    }

    #[test]
    fn chains_compute_the_multiply_adds_that_they_claim() {
        are_what_they_say::<f32>();
        are_what_they_say::<bf16>();
    }
}
