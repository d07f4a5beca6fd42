//! The policy as a stage finds it, frozen: what an anchored loss keeps it close to.

use super::Learner;
use crate::data::forest::Forest;
use crate::error::Result;
use crate::loss::anchor::LiveAnchor;
use crate::model::transformer::Transformer;
use crate::ops::head::Anchor;

/// The policy's current weights, frozen. Trained parameters are copied in the type that they are computed in; frozen ones are
/// shared, so that with adapters the copy is a second set of factors on the same base.
///
/// # Errors
/// A device error.
pub fn anchor(policy: &Learner) -> Result<LiveAnchor> {
    let model = Transformer::of(policy.model().config(), &policy.tensors().frozen_copy()?)?;
    let computed = policy.params().values().map(|param| {
        let tensor = param.computed();
        (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
    });
    Ok(LiveAnchor::new(computed.sum(), move |forest: &Forest| {
        let (hidden, weight) = (model.hidden(forest)?, model.head().clone());
        Ok(Anchor { hidden, weight, slopes: Vec::new() })
    }))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::data::tree::{Role, Tree};
    use crate::loss::sft::{Normalization, Sft, TokenLoss};
    use crate::model::checkpoint::Checkpoint;
    use crate::model::lora::{Lora, attach_beside};
    use crate::model::params::EMBEDDING;
    use crate::model::{Precision, Tensors, Weights};
    use crate::train::step::{self, StepOptions};

    fn hidden(anchor: &LiveAnchor) -> Vec<f32> {
        let tree = Tree::sequence((5..25).collect(), vec![Role::Content; 20], 0);
        let anchor = anchor.of(&Forest::pack(&[tree]).unwrap(), Vec::new()).unwrap();
        anchor.hidden.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn moved(policy: &Learner) {
        let moved: Weights = policy
            .weights()
            .iter()
            .map(|(name, tensor)| (name.clone(), (tensor + 0.02).unwrap()))
            .collect();
        policy.set(&moved).unwrap();
    }

    #[test]
    fn frozen_copy_does_not_move_and_shares_untrained_tensors() {
        let start = || Checkpoint::load_dir("data/tiny/student".as_ref(), &Device::Cpu).unwrap();
        let Checkpoint { config, weights, .. } = start();
        let size: usize = weights.values().map(candle_core::Tensor::elem_count).sum();
        for dtype in [Precision::F32, Precision::Bf16] {
            let policy = Learner::with(&config, start().weights, dtype, |_| false).unwrap();
            let anchor = anchor(&policy).unwrap();
            let before = hidden(&anchor);
            moved(&policy);
            assert_eq!(hidden(&anchor), before);
            assert_ne!(hidden(&super::anchor(&policy).unwrap()), before);
            if dtype == Precision::F32 {
                assert_eq!(anchor.bytes(), 4 * size as u64);
            } else {
                assert!(anchor.bytes() < 3 * size as u64);
            }
        }

        let tensors = Tensors::dense(weights);
        let lora = Lora { lora_r: 4, use_dora: true, ..Lora::default() };
        let attached = attach_beside(&lora, &config, (&tensors, &Device::Cpu), 1).unwrap();
        let policy =
            Learner::adapted(&config, tensors, &attached, Precision::F32, |_| false).unwrap();
        let copy = policy.tensors().frozen_copy().unwrap();
        assert_eq!(copy.weights[EMBEDDING].id(), policy.tensors().weights[EMBEDDING].id());
        let anchor = anchor(&policy).unwrap();
        let before = hidden(&anchor);
        moved(&policy);
        assert_eq!(hidden(&anchor), before);
        assert_ne!(hidden(&super::anchor(&policy).unwrap()), before);
        assert_eq!(anchor.bytes(), policy.trained_bytes());
    }

    /// Rows of other lengths, with a context that is not trained.
    fn rows() -> Vec<Tree> {
        let row = |source: usize, length: u32| {
            let tokens = (0..length).map(|at| 4 + (at * 7 + source as u32) % 60).collect();
            let roles = vec![Role::Context; 3];
            let roles = [roles, vec![Role::Content; length as usize - 3]].concat();
            Tree::sequence(tokens, roles, source)
        };
        vec![row(0, 9), row(1, 25), row(2, 4)]
    }

    /// The divergence of every trained token of each row, from plain logits in double precision.
    fn divergences(policy: &Transformer, reference: &Transformer) -> Vec<Vec<f64>> {
        let log_softmax = |model: &Transformer, forest: &Forest| -> Vec<Vec<f64>> {
            let hidden = model.hidden(forest).unwrap();
            let logits = hidden.matmul(&model.head().t().unwrap()).unwrap();
            let of_row = |row: Vec<f32>| {
                let row: Vec<f64> = row.into_iter().map(f64::from).collect();
                let lse = row.iter().map(|x| x.exp()).sum::<f64>().ln();
                row.into_iter().map(|x| x - lse).collect()
            };
            logits.to_vec2().unwrap().into_iter().map(of_row).collect()
        };
        let of_tree = |tree: &Tree| {
            let forest = Forest::pack([tree]).unwrap();
            let (p, q) = (log_softmax(policy, &forest), log_softmax(reference, &forest));
            let of_target = |row: usize| -> f64 {
                p[row].iter().zip(&q[row]).map(|(p, q)| q.exp() * (q - p)).sum()
            };
            forest.targets.iter().map(|target| of_target(target.row as usize)).collect()
        };
        rows().iter().map(of_tree).collect()
    }

    /// A policy beside another model.
    fn beside() -> (Learner, LiveAnchor, Transformer) {
        let load = |path: &str| Checkpoint::load_dir(path.as_ref(), &Device::Cpu).unwrap();
        let student = load("data/tiny/student");
        let policy =
            Learner::with(&student.config, student.weights, Precision::F32, |_| false).unwrap();
        let other = load("data/tiny/teacher");
        let other = Learner::with(&other.config, other.weights, Precision::F32, |_| false).unwrap();
        (policy, anchor(&other).unwrap(), other.model().clone())
    }

    fn of_step(
        policy: &Learner,
        objective: &Sft,
        max_tokens: usize,
    ) -> (crate::model::gradients::Gradients, step::StepReport) {
        let trees = rows();
        let trees: Vec<&Tree> = trees.iter().collect();
        step::gradients(policy, objective, &trees, StepOptions::new(max_tokens)).unwrap()
    }

    fn asft(normalization: Normalization, reference: &LiveAnchor) -> Sft {
        Sft {
            loss: TokenLoss::Asft,
            asft_alpha: 0.4,
            reference: Some(reference.clone()),
            normalization,
            row_weights: [(1, 2.0)].into(),
            ..Sft::default()
        }
    }

    #[test]
    fn asft_is_dft_plus_the_divergence_from_the_reference() {
        let (policy, reference, other) = beside();
        let apart = divergences(policy.model(), &other);
        let sums: Vec<f64> = apart.iter().map(|row| row.iter().sum()).collect();
        let lengths: Vec<f64> = apart.iter().map(|row| row.len() as f64).collect();
        // The second row weighs 2.
        let kl = |normalization| match normalization {
            Normalization::Token => {
                (sums[0] + 2.0 * sums[1] + sums[2]) / (lengths[0] + 2.0 * lengths[1] + lengths[2])
            }
            Normalization::Row => {
                (sums[0] / lengths[0] + 2.0 * sums[1] / lengths[1] + sums[2] / lengths[2]) / 4.0
            }
            Normalization::Step => (sums[0] + 2.0 * sums[1] + sums[2]) / 4.0,
        };
        for normalization in [Normalization::Token, Normalization::Row, Normalization::Step] {
            let kl = kl(normalization);
            let objective = asft(normalization, &reference);
            let dft = Sft { loss: TokenLoss::Dft, reference: None, ..objective.clone() };
            let (_, dft) = of_step(&policy, &dft, 1000);
            // However the step is cut into micro-batches.
            for max_tokens in [1000, 30] {
                let (_, report) = of_step(&policy, &objective, max_tokens);
                let near = |found: f64, expected: f64, what: &str| {
                    let apart = (found - expected).abs();
                    assert!(
                        apart < 1e-5 * expected,
                        "{normalization:?} {what}: {found}, {expected}"
                    );
                };
                near(report.metrics["loss/kl"], kl, "kl");
                near(report.metrics["loss/dft"], dft.loss, "dft");
                near(report.loss, dft.loss + 0.4 * kl, "loss");
            }
        }
    }

    /// What ASFT's gradient adds to DFT's is the slope of the divergence, by finite differences along it.
    #[test]
    fn divergence_gradient_matches_finite_differences() {
        let (policy, reference, _) = beside();
        let objective = asft(Normalization::Row, &reference);
        let dft = Sft { loss: TokenLoss::Dft, reference: None, ..objective.clone() };
        let (with, _) = of_step(&policy, &objective, 30);
        let (without, _) = of_step(&policy, &dft, 1000);
        let added: Weights = with
            .iter()
            .map(|(name, grad)| {
                let added = (grad - without.get(name).unwrap()).unwrap();
                (name.to_owned(), (added / objective.asft_alpha).unwrap())
            })
            .collect();
        let square = |x: &candle_core::Tensor| {
            f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
        };
        let norm = added.values().map(square).sum::<f64>().sqrt();
        assert!(norm > 1e-3, "{norm}");
        let start: Weights = policy
            .weights()
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.copy().unwrap()))
            .collect();
        let kl_at = |distance: f64| {
            let moved: Weights = start
                .iter()
                .map(|(name, tensor)| {
                    let along = (&added[name] * (distance / norm)).unwrap();
                    (name.clone(), (tensor + along).unwrap())
                })
                .collect();
            policy.set(&moved).unwrap();
            of_step(&policy, &objective, 1000).1.metrics["loss/kl"]
        };
        let h = 2e-3;
        let slope = (kl_at(h) - kl_at(-h)) / (2.0 * h);
        assert!((slope - norm).abs() < 2e-2 * norm, "{slope}, {norm} by the gradient");
    }

    #[test]
    fn divergence_from_itself_is_zero_until_the_policy_moves() {
        let (policy, _, _) = beside();
        let reference = anchor(&policy).unwrap();
        let objective = asft(Normalization::Token, &reference);
        let (_, first) = of_step(&policy, &objective, 1000);
        assert_eq!(first.metrics["loss/kl"].to_bits(), 0);
        moved(&policy);
        let (_, later) = of_step(&policy, &objective, 1000);
        assert!(later.metrics["loss/kl"] > 0.0, "{:?}", later.metrics);
        // Held-out rows are compared too.
        let budget = 1000;
        let held_out = step::evaluate(policy.model(), &objective, &rows(), budget).unwrap();
        let [one, two] = [&held_out, &later].map(|report| report.metrics["loss/kl"]);
        assert!((one - two).abs() < 1e-6 * two, "{one}, {two}");
    }
}
