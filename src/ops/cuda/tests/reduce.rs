//! `reduce.cu` compared with sums in f64, and with the optimizer's CPU results.

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::host::{
        Guarded, Kernels, Manner, Number, Order, Side, assert_same, each_block,
        every_mutant_is_caught, manners, random, record, wide,
    };
    use crate::optim::clip_factor;

    const FILE: &str = "reduce.cu";
    const CHECK: &str = "ops::cuda::tests::reduce::tests::norms_and_factors_are_the_cpus";

    /// Elements per partial sum.
    const CHUNK: usize = 1 << 16;
    const COUNTS: [usize; 5] = [1, 3, 130, 4099, CHUNK + 5];

    /// Whether to skip this case: long shapes run with one block size only.
    fn takes_long(count: usize, manner: Manner) -> bool {
        count > CHUNK && manner.block != 256
    }

    fn square_sum<T: Number>(values: &[T], manner: Manner) -> Guarded<f64> {
        let chunks = values.len().div_ceil(CHUNK);
        let x = Guarded::new(values, manner.side);
        let mut partials = Guarded::new(&vec![f64::NAN; chunks], manner.side);
        let entry = format!("square_sum_{}", T::NAME);
        let call = Kernels::of(FILE).call(&entry, [chunks as u32, 1, 1], manner);
        call.input(&x).output(&mut partials).arg(values.len() as u64).run();
        assert!(partials.is_clean());
        partials
    }

    /// The norm from partial sums, and the clipping factor.
    fn clip(squares: &Guarded<f64>, max_norm: f64, manner: Manner) -> (f64, f32) {
        let mut norm = Guarded::new(&[0.0_f64], manner.side);
        let mut factor = Guarded::new(&[0.0_f32], manner.side);
        let call = Kernels::of(FILE).call("clip", [1, 1, 1], manner).input(squares);
        let call = call.output(&mut norm).output(&mut factor);
        call.arg(squares.as_slice().len() as u64).arg(max_norm).run();
        (norm.as_slice()[0], factor.as_slice()[0])
    }

    #[track_caller]
    fn assert_near(what: &str, found: f64, expected: f64) {
        let error = (found - expected).abs() / expected;
        assert!(error <= 1e-12, "{what}: {found}, expected {expected}");
        record(what, "f64", error as f32, 1e-12);
    }

    fn check<T: Number>(count: usize, manner: Manner) {
        let values = random::<T>(1, count);
        let squares: Vec<f64> =
            wide(&values).iter().map(|&x| f64::from(x) * f64::from(x)).collect();
        let partials = square_sum(&values, manner);
        for (found, squares) in partials.as_slice().iter().zip(squares.chunks(CHUNK)) {
            assert_near(&format!("squares {manner:?}"), *found, squares.iter().sum());
        }
        let total: f64 = squares.iter().sum();
        let mut sum = Guarded::new(&[7.0_f64], manner.side);
        for (add, expected) in [(1_u32, total + 7.0), (0, total)] {
            let call = Kernels::of(FILE).call("sum_partials", [1, 1, 1], manner);
            let call = call.input(&partials).output(&mut sum);
            call.arg(partials.as_slice().len() as u64).arg(add).run();
            assert_near(&format!("sum {manner:?}"), sum.as_slice()[0], expected);
        }
        for max_norm in [0.0, 0.5, 1e9] {
            let (norm, factor) = clip(&partials, max_norm, manner);
            assert_near(&format!("norm {manner:?}"), norm, total.sqrt());
            let expected = clip_factor(total.sqrt(), max_norm);
            assert!((f64::from(factor) - expected).abs() <= 1e-7 * expected, "{factor}");
        }
    }

    fn accumulated<T: Number>(count: usize, manner: Manner) {
        let (start, more) = (random::<f32>(5, count), random::<T>(6, count));
        let expected: Vec<f32> = start.iter().zip(wide(&more)).map(|(a, b)| a + b).collect();
        let mut sum = Guarded::new(&start, manner.side);
        let more = Guarded::new(&more, manner.side);
        let entry = format!("accumulate_{}", T::NAME);
        let call = Kernels::of(FILE).call(&entry, [2, 1, 1], manner).output(&mut sum);
        call.input(&more).arg(count as u64).run();
        assert_same("accumulate", T::NAME, sum.as_slice(), &expected);
        assert!(sum.is_clean(), "{manner:?}");
    }

    #[test]
    fn norms_and_factors_are_the_cpus() {
        for (turn, count) in COUNTS.into_iter().enumerate() {
            for manner in each_block(turn) {
                if !takes_long(count, manner) {
                    check::<f32>(count, manner);
                    check::<bf16>(count, manner);
                    accumulated::<f32>(count, manner);
                    accumulated::<bf16>(count, manner);
                }
            }
        }
    }

    /// The sum depends neither on a tensor's address nor on scheduling.
    #[test]
    fn sum_is_bitwise_independent_of_address_and_scheduling() {
        let values = random::<f32>(1, 4099);
        let sums = manners(&[128]).into_iter().map(|manner| square_sum(&values, manner));
        let bits: Vec<u64> = sums.map(|sum| sum.as_slice()[0].to_bits()).collect();
        assert!(bits.iter().all(|sum| *sum == bits[0]), "{bits:?}");
    }

    /// Squares that overflow or underflow f32.
    #[test]
    fn sums_have_the_range_of_f64() {
        let manner = Manner { block: 64, order: Order::Forward, side: Side::End };
        for value in [3e38_f32, 1e-30] {
            let found = square_sum(&[value; 9], manner).as_slice()[0];
            assert_near("squares", found, 9.0 * f64::from(value) * f64::from(value));
        }
    }

    fn first_not_finite<T: Number>(values: &[T], manner: Manner) -> u64 {
        let chunks = values.len().div_ceil(CHUNK);
        let x = Guarded::new(values, manner.side);
        let mut partials = Guarded::new(&vec![0_u64; chunks], manner.side);
        let entry = format!("first_not_finite_{}", T::NAME);
        let call = Kernels::of(FILE).call(&entry, [chunks as u32, 1, 1], manner);
        call.input(&x).output(&mut partials).arg(values.len() as u64).run();
        let mut found = Guarded::new(&[0_u64], manner.side);
        let call = Kernels::of(FILE).call("minimum", [1, 1, 1], manner).input(&partials);
        call.output(&mut found).arg(chunks as u64).run();
        found.as_slice()[0]
    }

    fn check_finite<T: Number>(count: usize, manner: Manner) {
        let mut values = random::<T>(1, count);
        assert_eq!(first_not_finite(&values, manner), u64::MAX);
        for (place, bad) in [(count - 1, f32::NAN), (count / 2, f32::NEG_INFINITY)] {
            values[place] = T::narrow(bad);
            let found = first_not_finite(&values, manner);
            assert_same(&format!("place {manner:?}"), "u64", &[found], &[place as u64]);
            let (norm, factor) = clip(&square_sum(&values, manner), 1.0, manner);
            assert!(!norm.is_finite() && factor.is_nan(), "{norm} {factor}");
            record("not finite", "f32", 0.0, 0.0);
        }
    }

    #[test]
    fn what_is_not_finite_is_found_and_stops_the_step() {
        for (turn, count) in COUNTS.into_iter().enumerate() {
            for manner in each_block(turn) {
                if !takes_long(count, manner) {
                    check_finite::<f32>(count, manner);
                    check_finite::<bf16>(count, manner);
                }
            }
        }
    }

    #[test]
    fn kernels_that_are_wrong_are_caught() {
        let mutants = [
            ("sum += value * value;", "sum += to_f32(values.at[j]) * to_f32(values.at[j]);"),
            ("for (u32 j = 0; j < 4 && i + j < length; j++)", "for (u32 j = 0; j < 4; j++)"),
            (
                "u64 first = blockIdx.x * CHUNK, length = count - first",
                "u64 first = 0, length = count - first",
            ),
            ("*out = add ? *out + sum : sum;", "*out = sum;"),
            ("max_norm > 0.0 && max_norm < length + 1e-6", "max_norm < length + 1e-6"),
            ("scale = max_norm / (length + 1e-6);", "scale = max_norm / sum;"),
            ("sums.at[j] += to_f32(more.at[j]);", "sums.at[j] = to_f32(more.at[j]);"),
            (
                "packs<4>(sum, 0) && packs<4>(grad, 0);",
                "packs<4>(sum, 0) && (count = count / 4 * 4);",
            ),
        ];
        every_mutant_is_caught(FILE, CHECK, &mutants);
        let mutants = [
            ("if (value - value != 0.0f) found = i;", "if (value != value) found = i;"),
            ("return a < b ? a : b;", "return a < b ? b : a;"),
            ("sum - sum == 0.0 ? float(scale)", "true ? float(scale)"),
        ];
        let check =
            "ops::cuda::tests::reduce::tests::what_is_not_finite_is_found_and_stops_the_step";
        every_mutant_is_caught(FILE, check, &mutants);
    }
}
