//! The rate of multiply-adds between registers: what no product on this machine can exceed.

#![expect(
    unsafe_code,
    clippy::inline_always,
    reason = "functions that may only be called where an instruction set was detected"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::isa::Isa;
use super::vector::{Plain, Vector};

/// Chains that do not wait for each other: more than the latency of a multiply-add times those that begin in one cycle
/// (4 · 2 on today's processors), few enough to stay in sixteen registers.
const CHAINS: usize = 12;
/// The shortest time that is measured.
const WINDOW: Duration = Duration::from_millis(20);
/// Windows a thread takes the median of.
const WINDOWS: usize = 9;

/// `rounds` multiply-adds in each chain.
type Chains = unsafe fn(rounds: usize, factor: f32) -> f32;

/// # Safety
/// The processor has the vector's instruction set.
#[inline(always)]
unsafe fn chains<V: Vector>(rounds: usize, factor: f32) -> f32 {
    // SAFETY: the caller's promise; `lanes` has room for the widest register.
    unsafe {
        let (factor, addend) = (V::splat(factor), V::splat(0.5));
        let mut sums = [V::splat(0.0); CHAINS];
        for (chain, sum) in sums.iter_mut().enumerate() {
            *sum = V::splat(chain as f32);
        }
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = sum.fma(factor, addend);
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

/// The chains of an instruction set, and the lanes of its registers.
fn of(isa: Isa) -> (Chains, usize) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => (x86::avx512, x86::AVX512_LANES),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (x86::avx2, x86::AVX2_LANES),
        _ => (chains::<Plain<8>>, Plain::<8>::LANES),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::vector::{Avx2, Avx512, Vector};
    use super::chains;

    pub(super) const AVX2_LANES: usize = Avx2::LANES;
    pub(super) const AVX512_LANES: usize = Avx512::LANES;

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(rounds: usize, factor: f32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { chains::<Avx2>(rounds, factor) }
    }

    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
    pub(super) unsafe fn avx512(rounds: usize, factor: f32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { chains::<Avx512>(rounds, factor) }
    }
}

/// Floating-point operations a second in f32, two a multiply-add, on all threads of rayon's pool at once, with the
/// instruction set of this process. Takes about a fifth of a second.
pub fn register_peak() -> f64 {
    let (chains, lanes) = of(Isa::current());
    rayon::broadcast(|_| 2.0 * lanes as f64 * CHAINS as f64 * rounds_per_second(chains))
        .iter()
        .sum()
}

fn rounds_per_second(chains: Chains) -> f64 {
    let seconds = |rounds: usize| {
        let began = Instant::now();
        // SAFETY: `Isa::current` is an instruction set that was detected.
        black_box(unsafe { chains(rounds, black_box(0.5)) });
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

    #[test]
    fn chains_are_the_multiply_adds_that_they_say() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            let (chains, lanes) = of(isa);
            assert!(lanes <= 16);
            // Chain c after r rounds of x/2 + 1/2: 1 + (c - 1) / 2^r.
            for rounds in [0, 1, 3] {
                let expected: f64 = (0..CHAINS)
                    .map(|chain| 1.0 + (chain as f64 - 1.0) / f64::from(1 << rounds))
                    .sum();
                // SAFETY: the instruction set was detected.
                let found = unsafe { chains(rounds, 0.5) };
                assert!((f64::from(found) - expected).abs() < 1e-4, "{isa:?}: {found}, {expected}");
            }
        }
        let peak = register_peak();
        assert!(peak > 1e6 && peak < 1e15, "{peak}");
    }
}
