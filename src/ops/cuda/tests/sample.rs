//! `sample.cu` compared with the CPU sampler: equal tokens for equal draws.

#[cfg(test)]
mod tests {
    use llguidance::toktrie::SimpleVob;
    use rand::Rng;
    use rand_chacha::ChaCha8Rng;

    use super::super::host::{
        Guarded, Kernels, Manner, Order, Side, assert_same, each_block, every_mutant_is_caught,
        random, record,
    };
    use crate::generate::engine::Extras;
    use crate::generate::sampler::Sampler;
    use crate::generate::sampling::Sampling;
    use crate::ops::head::log_sum_exp;
    use crate::ops::sample::{Drawn, LIST, NoDraw, shared};
    use crate::rng::Stream;

    const FILE: &str = "sample.cu";
    const CHECK: &str = "ops::cuda::tests::sample::tests::draws_are_the_cpus";

    type Settings = [u64; 8];

    /// A row's settings in the kernel's layout.
    fn settings(sampling: &Sampling, rng: &ChaCha8Rng) -> Settings {
        Sampler::new(sampling, &Extras::default()).chance(rng).unwrap().words()
    }

    /// The kernel's results for rows of logits.
    fn draws(
        logits: &[f32],
        allowed: Option<&[SimpleVob]>,
        settings: &[Settings],
        manner: Manner,
    ) -> Vec<Result<Drawn, NoDraw>> {
        let rows = settings.len();
        let vocab = logits.len() / rows;
        let given = Guarded::new(logits, manner.side);
        let words = allowed.map(|rows| {
            let words = rows.iter().flat_map(|row| &row.as_slice()[..vocab.div_ceil(32)]);
            Guarded::new(&words.copied().collect::<Vec<u32>>(), manner.side)
        });
        let settings = Guarded::new(settings, manner.side);
        let mut weights = Guarded::new(&vec![f32::NAN; logits.len()], manner.side);
        let mut out = Guarded::new(&vec![[u32::MAX; 4]; rows], manner.side);
        let mut log_sums = Guarded::new(&vec![0.0_f32; rows], manner.side);
        let call = Kernels::of(FILE).call("sample", [rows as u32, 1, 1], manner).input(&given);
        let call = call.shared(shared(vocab));
        let call = match &words {
            Some(words) => call.input(words),
            None => call.null(),
        };
        let call = call.input(&settings).output(&mut weights).output(&mut out);
        call.output(&mut log_sums).arg(vocab as u32).run();
        assert!(weights.is_clean() && out.is_clean() && log_sums.is_clean(), "{manner:?}");
        for (found, logits) in log_sums.as_slice().iter().zip(logits.chunks(vocab)) {
            let expected = log_sum_exp(logits);
            let close = (found - expected).abs() < 1e-5 * (1.0 + expected.abs());
            assert!(close || !expected.is_finite(), "{found}, expected {expected}");
        }
        out.as_slice().iter().map(Drawn::of).collect()
    }

    /// All token filters, alone and combined.
    fn ways() -> Vec<Sampling> {
        let base = Sampling::default();
        let hot = Sampling { temperature: 2.5, ..base.clone() };
        let mut ways = vec![base.clone(), hot, Sampling::greedy(1)];
        ways.extend([1, 3, 40, 100_000].map(|top_k| Sampling { top_k, ..base.clone() }));
        ways.extend([0.01, 0.5, 0.95].map(|top_p| Sampling { top_p, ..base.clone() }));
        ways.extend([0.02, 0.5, 1.0].map(|min_p| Sampling { min_p, ..base.clone() }));
        ways.push(Sampling { top_k: 20, top_p: 0.8, temperature: 0.7, ..base.clone() });
        ways.push(Sampling { top_k: 30, top_p: 0.9, min_p: 0.05, temperature: 1.5, ..base });
        ways
    }

    /// Logits with a model-like spread; every third row, including the greedy one, has integers up to 4, so that many
    /// tie and no maximum is unique.
    fn logits(rows: usize, vocab: usize) -> Vec<f32> {
        let values = random::<f32>(3, rows * vocab).into_iter().enumerate();
        let spread = |(at, x): (usize, f32)| {
            let x = 3.0 * x;
            if at / vocab % 3 == 2 { x.round().min(4.0) } else { x }
        };
        values.map(spread).collect()
    }

    fn check(vocab: usize, masked: bool, manner: Manner) {
        let ways = ways();
        let logits = logits(ways.len(), vocab);
        let mut masks = vec![SimpleVob::alloc(vocab); ways.len()];
        for (row, mask) in masks.iter_mut().enumerate() {
            (0..vocab as u32).filter(|id| (id + row as u32) % 3 != 1 || vocab == 1).for_each(
                |id| {
                    mask.allow_token(id);
                },
            );
        }
        let stream = Stream::new(7, "sample");
        // Draws from the middle of a stream, at every offset within a generator block.
        let generator = |row: usize| {
            let mut rng = stream.at(1, row as u64);
            rng.set_word_pos(2 * (row as u128 * 5 + 3));
            rng
        };
        let rows: Vec<Settings> =
            ways.iter().enumerate().map(|(row, way)| settings(way, &generator(row))).collect();
        let found = draws(&logits, masked.then_some(masks.as_slice()), &rows, manner);
        for (row, (way, found)) in ways.iter().zip(found).enumerate() {
            let mut logits = logits[row * vocab..][..vocab].to_vec();
            let allowed = masked.then_some(&masks[row]);
            let mut sampler = Sampler::new(way, &Extras::default());
            let drawn = sampler.draw(&mut logits, (&[], 0), allowed, &mut generator(row));
            let expected = drawn.unwrap();
            let found = found.unwrap();
            assert_eq!(found.id, expected.id, "{way:?}, {vocab}, {manner:?}");
            assert!((found.logprob - expected.logprob).abs() < 1e-5, "{found:?} {expected:?}");
            let difference = (found.sample_logprob - expected.sample_logprob).abs();
            assert!(difference < 1e-6, "{found:?} {expected:?}");
            record("draws", "f32", difference as f32, 1e-6);
        }
    }

    #[test]
    fn draws_are_the_cpus() {
        // The widest first, since it exposes most mistakes.
        for (turn, vocab) in [300, 31, 1].into_iter().enumerate() {
            for (place, manner) in each_block(turn).into_iter().enumerate() {
                check(vocab, (place / 2 + turn) % 2 == 0, manner);
            }
        }
        let manner = Manner { block: 128, order: Order::Random(3), side: Side::End };
        check(5003, false, manner);
    }

    /// More kept tokens than the kernel can list: uses the other sampling path, which hits no boundary here.
    #[test]
    fn draws_from_more_tokens_than_the_list_holds_match_the_cpu() {
        let manner = Manner { block: 1024, order: Order::Forward, side: Side::Start };
        let vocab = 3 * LIST;
        let way = Sampling { top_k: 2 * LIST, temperature: 3.0, ..Sampling::default() };
        let logits = random::<f32>(3, 4 * vocab);
        let generator = |row: usize| Stream::new(9, "sample").at(0, row as u64);
        let rows: [Settings; 4] = std::array::from_fn(|row| settings(&way, &generator(row)));
        for (row, found) in draws(&logits, None, &rows, manner).iter().enumerate() {
            let mut sampler = Sampler::new(&way, &Extras::default());
            let mut logits = logits[row * vocab..][..vocab].to_vec();
            let expected = sampler.draw(&mut logits, (&[], 0), None, &mut generator(row)).unwrap();
            let found = found.unwrap();
            assert_eq!(found.id, expected.id);
            assert!((found.sample_logprob - expected.sample_logprob).abs() < 1e-6);
        }
    }

    #[test]
    fn the_generator_is_the_cpus() {
        let manner = Manner { block: 32, order: Order::Forward, side: Side::End };
        let mut rng = Stream::new(3, "sample").at(4, 5);
        let key = Guarded::new(&settings(&Sampling::default(), &rng)[4..], manner.side);
        for first in [0_u64, 13, (1 << 35) - 2] {
            let mut out = Guarded::new(&[0.0_f64; 20], manner.side);
            let call = Kernels::of(FILE).call("chacha_draws", [1, 1, 1], manner).input(&key);
            call.output(&mut out).arg(first).arg(20_u64).run();
            rng.set_word_pos(2 * u128::from(first));
            let expected = [(); 20].map(|()| rng.random::<f64>());
            assert_same("generator", "f64", out.as_slice(), &expected);
        }
    }

    #[test]
    fn rows_without_a_draw_report_the_reason() {
        let manner = Manner { block: 64, order: Order::Forward, side: Side::End };
        let rng = Stream::new(3, "sample").at(0, 0);
        let row = settings(&Sampling::default(), &rng);
        let (infinite, nothing) = (f32::INFINITY, Some(NoDraw::NothingAllowed));
        let status = |logits: &[f32], allowed: &[bool]| {
            let allowed = [SimpleVob::from_slice(allowed)];
            draws(logits, Some(&allowed), &[row], manner)[0].err()
        };
        for bad in [[0.0, f32::NAN, 1.0], [0.0, infinite, 1.0], [-infinite; 3]] {
            assert_eq!(status(&bad, &[true; 3]), Some(NoDraw::NotFinite), "{bad:?}");
        }
        assert_eq!(status(&[0.0, 1.0, 2.0], &[false; 3]), nothing);
        assert_eq!(status(&[0.0, -infinite, 2.0], &[false, true, false]), nothing);
        assert_eq!(status(&[0.0, -infinite, 2.0], &[true, true, false]), None);
    }

    #[test]
    fn kernels_that_are_wrong_are_caught() {
        let mutants = [
            ("u64 block = index / 8;", "u64 block = index / 16;"),
            (
                "u64(__float_as_uint(weight)) << 32 | (FULL - id)",
                "u64(__float_as_uint(weight)) << 32 | id",
            ),
            ("mass.count >= how.top_k", "mass.count > how.top_k"),
            ("mass.weight >= needed", "mass.weight > 1.1 * needed"),
            ("&& weight >= row.floor", ""),
            ("if (sums[piece] > 0.0) last = piece;", "last = 0;"),
            ("__popc(votes & ((1u << lane_id()) - 1))", "__popc(votes & (1u << lane_id()))"),
            ("if (warp < warp_id()) place += counts[warp];", ""),
            (
                "if (threadIdx.x == 0) listed[0] = after;\n    __syncthreads();",
                "if (threadIdx.x == 0) listed[0] = after;",
            ),
            ("sums[piece] = sum;\n  }\n  __syncthreads();", "sums[piece] = sum;\n  }"),
            ("a.value == b.value && a.id < b.id", "a.value == b.value && a.id > b.id"),
            (
                "allows(allowed, id) && logits[id] > NEG_INF ? weight",
                "logits[id] > NEG_INF ? weight",
            ),
        ];
        every_mutant_is_caught(FILE, CHECK, &mutants);
    }
}
