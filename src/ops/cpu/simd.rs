//! Auto-vectorised row kernels, compiled for each instruction set and dispatched at run time.
//!
//! The bodies are ordinary Rust with sixteen explicit lanes, so sums have one fixed order on every instruction set of
//! the same width; only fused multiply-add differs between them.

#![expect(
    unsafe_code,
    reason = "functions compiled for a CPU feature may only be called where it was detected"
)]
#![expect(
    clippy::inline_always,
    reason = "a body is compiled for an instruction set only inside the function that enables it"
)]

use half::bf16;

const LANES: usize = 16;

/// Declares a function compiled for AVX-512, AVX2 and the portable baseline, with run-time dispatch. It may be generic
/// over an element type and sizes.
macro_rules! multiversion {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<$element:ident: $bound:ident $(, const $size:ident)*>)? ($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        $vis fn $name $(<$element: $bound $(, const $size: usize)*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                unsafe fn avx512 $(<$element: $bound $(, const $size: usize)*>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body $(::<$element $(, $size)*>)? ($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2 $(<$element: $bound $(, const $size: usize)*>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body $(::<$element $(, $size)*>)? ($($arg),*)
                }
                use $crate::ops::cpu::isa::Isa;
                match Isa::current() {
                    // SAFETY: the features were detected.
                    Isa::Avx512 | Isa::Avx512Bf16 => return unsafe { avx512 $(::<$element $(, $size)*>)? ($($arg),*) },
                    // SAFETY: the features were detected.
                    Isa::Avx2 => return unsafe { avx2 $(::<$element $(, $size)*>)? ($($arg),*) },
                    Isa::Portable => {}
                }
            }
            $body $(::<$element $(, $size)*>)? ($($arg),*)
        }
    };
}

pub(super) use multiversion;

/// Around 1.5 · 2²³ a float's low bits are those of its integer: adding this to `n` gives the exponent bits of 2ⁿ. A
/// float-to-int cast would have to saturate, which no vector instruction does.
const EXPONENT: f32 = 12_582_912.0 + 127.0;

/// `e^x` to about two units in the last place: range reduction to `[-ln 2 / 2, ln 2 / 2]` and a polynomial.
/// Below -87.3 the result is 0 to within 1e-38.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.3, 88.0);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    // ln 2 in two parts, so that the reduced argument keeps full precision.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    p * f32::from_bits((n + EXPONENT).to_bits() << 23)
}

#[inline(always)]
fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    let mut lanes = lanes;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn max_body(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

#[inline(always)]
fn exp_sub_body(row: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - shift);
            lanes[i] += chunk[i];
        }
    }
    let mut sum = sum_lanes(lanes);
    for value in chunks.into_remainder() {
        *value = exp(*value - shift);
        sum += *value;
    }
    sum
}

#[inline(always)]
fn sum_exp_sub_body(row: &[f32], shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += exp(chunk[i] - shift);
        }
    }
    rest.iter().fold(sum_lanes(lanes), |sum, value| sum + exp(value - shift))
}

#[inline(always)]
fn moments_body(row: &[f32], shift: f32) -> [f32; 4] {
    let mut lanes = [[0.0; LANES]; 4];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    let add = |x: f32, lanes: &mut [[f32; LANES]; 4], i: usize| {
        let below = x - shift;
        let e = exp(below);
        lanes[0][i] += e;
        // If e is 0, its product with minus infinity would be NaN.
        lanes[1][i] += e * below.max(-100.0);
        lanes[2][i] += e * e;
        lanes[3][i] += below;
    };
    for chunk in chunks {
        for i in 0..LANES {
            add(chunk[i], &mut lanes, i);
        }
    }
    let mut sums = lanes.map(sum_lanes);
    for &x in rest {
        let mut one = [[0.0; LANES]; 4];
        add(x, &mut one, 0);
        sums.iter_mut().zip(one).for_each(|(sum, one)| *sum += one[0]);
    }
    sums
}

#[inline(always)]
fn scale_body(row: &mut [f32], factor: f32) {
    for value in row {
        *value *= factor;
    }
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    a_rest.iter().zip(b_rest).fold(sum_lanes(lanes), |sum, (a, b)| a.mul_add(*b, sum))
}

#[inline(always)]
fn axpy_body(out: &mut [f32], factor: f32, x: &[f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = factor.mul_add(*x, *out);
    }
}

#[inline(always)]
fn swiglu_body(out: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

#[inline(always)]
fn swiglu_grad_body(d_gate: &mut [f32], d_up: &mut [f32], inputs: [&[f32]; 3]) {
    let [gate, up, d_out] = inputs;
    let len = gate.len();
    let (d_gate, d_up, up, d_out) =
        (&mut d_gate[..len], &mut d_up[..len], &up[..len], &d_out[..len]);
    for i in 0..len {
        let sigmoid = 1.0 / (1.0 + exp(-gate[i]));
        let silu = gate[i] * sigmoid;
        d_up[i] = d_out[i] * silu;
        d_gate[i] = d_out[i] * up[i] * (sigmoid + silu * (1.0 - sigmoid));
    }
}

#[inline(always)]
fn softmax_grad_body(scores: &mut [f32], d_probs: &[f32], probs: &mut [f32], constants: [f32; 3]) {
    let [shift, mean, scale] = constants;
    let len = scores.len();
    let (d_probs, probs) = (&d_probs[..len], &mut probs[..len]);
    for i in 0..len {
        probs[i] = exp(scores[i] - shift);
        scores[i] = probs[i] * (d_probs[i] - mean) * scale;
    }
}

#[inline(always)]
fn to_bf16_body(out: &mut [bf16], values: &[f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
        // Keep NaN a quiet NaN: rounding could clear its mantissa.
        let quiet = (bits >> 16) | 0x40;
        let nan = (bits & 0x7fff_ffff) > 0x7f80_0000;
        *out = bf16::from_bits(if nan { quiet } else { rounded } as u16);
    }
}

#[inline(always)]
fn from_bf16_body(out: &mut [f32], values: &[bf16]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

multiversion! {
    /// Rounds each element to nearest, ties to even.
    pub fn to_bf16(out: &mut [bf16], values: &[f32]) = to_bf16_body
}
multiversion! {
    /// Widens each element.
    pub fn from_bf16(out: &mut [f32], values: &[bf16]) = from_bf16_body
}
multiversion! {
    /// The largest element; -inf for an empty row.
    pub fn max(row: &[f32]) -> f32 = max_body
}
multiversion! {
    /// Replaces each element by `e^(x - shift)` and returns their sum.
    pub fn exp_sub(row: &mut [f32], shift: f32) -> f32 = exp_sub_body
}
multiversion! {
    /// The sum of `e^(x - shift)`.
    pub fn sum_exp_sub(row: &[f32], shift: f32) -> f32 = sum_exp_sub_body
}
multiversion! {
    /// Sums of `e`, `e (x - shift)`, `e²` and `x - shift`, with `e = e^(x - shift)`; the first is bit-identical to
    /// [`sum_exp_sub`].
    pub fn moments(row: &[f32], shift: f32) -> [f32; 4] = moments_body
}
multiversion! {
    /// Multiplies each element.
    pub fn scale(row: &mut [f32], factor: f32) = scale_body
}
multiversion! {
    /// The inner product.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 = dot_body
}
multiversion! {
    /// `out += factor · x`.
    pub fn axpy(out: &mut [f32], factor: f32, x: &[f32]) = axpy_body
}
multiversion! {
    /// `out = silu(gate) · up`.
    pub fn swiglu(out: &mut [f32], gate: &[f32], up: &[f32]) = swiglu_body
}
multiversion! {
    /// Gradients of [`swiglu`]; `inputs` are gate, up and the gradient of the output.
    pub fn swiglu_grad(d_gate: &mut [f32], d_up: &mut [f32], inputs: [&[f32]; 3]) = swiglu_grad_body
}
multiversion! {
    /// One row of attention's backward: `probs = e^(scores - shift)`, `scores = probs · (d_probs - mean) · scale`,
    /// with `constants = [shift, mean, scale]`.
    pub fn softmax_grad(scores: &mut [f32], d_probs: &[f32], probs: &mut [f32], constants: [f32; 3]) =
        softmax_grad_body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_a_few_parts_in_ten_million() {
        let mut x = -87.0_f32;
        while x < 87.0 {
            let exact = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - exact) / exact).abs() < 3e-7, "exp({x})");
            x += 0.037;
        }
        assert_eq!(exp(0.0).to_bits(), 1.0_f32.to_bits());
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn rows_of_odd_length_are_reduced_completely() {
        for len in [0, 1, 3, 15, 16, 17, 33, 100] {
            let row: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let shift = max(&row);
            let exact: f64 = row.iter().map(|&x| f64::from(x - shift).exp()).sum();
            assert!((f64::from(sum_exp_sub(&row, shift)) - exact).abs() < 1e-5 || len == 0);
            let mut copy = row.clone();
            let sum = exp_sub(&mut copy, shift);
            assert!((f64::from(sum) - exact).abs() < 1e-5 || len == 0);
            assert_eq!(moments(&row, shift)[0].to_bits(), sum.to_bits());
            let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((f64::from(dot(&row, &row)) - squares).abs() < 1e-5);
        }
    }
}
