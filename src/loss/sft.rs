//! Supervised fine-tuning: cross-entropy on trained tokens, averaged over the tokens of the whole step
//! (Llama 3, section 4.1.3).

use super::{Mean, Objective, StepTotals, Weighed};
use crate::data::forest::Forest;
use crate::error::Result;

/// Mean negative log-likelihood of the trained tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sft;

impl Objective for Sft {
    fn terms(&self) -> Vec<(&'static str, f64)> {
        vec![("nll", 1.0)]
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        vec![forest.targets.len() as f64]
    }

    fn fixed_gradient(&self, forest: &Forest, totals: &StepTotals) -> Option<Vec<f32>> {
        Some(vec![(-1.0 / totals.counts[0]) as f32; forest.targets.len()])
    }

    fn weigh(&self, forest: &Forest, logps: &[f32], totals: &StepTotals) -> Result<Weighed> {
        let nll: f64 = logps.iter().map(|&logp| -f64::from(logp)).sum();
        Ok(Weighed {
            d_values: self.fixed_gradient(forest, totals).unwrap_or_default(),
            sums: vec![nll],
            metrics: vec![Mean { name: "trained_tokens", sum: logps.len() as f64, count: 0.0 }],
        })
    }
}
