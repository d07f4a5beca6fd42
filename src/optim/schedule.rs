//! Learning-rate schedules: linear warm-up, then one of four shapes.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Constant at the peak.
    #[serde(alias = "constant_with_warmup")]
    Constant,
    /// Linear decay to 0.
    Linear,
    /// Half-cosine decay to 0.
    #[default]
    Cosine,
    /// Warmup-stable-decay: constant at the peak, then linear decay to 0 over the last tenth.
    #[serde(alias = "warmup_stable_decay")]
    Wsd,
}

impl Schedule {
    /// Factor on the peak learning rate at `step` (counted from 0) of `total`, after `warmup` steps of warm-up.
    ///
    /// Warm-up rises from `1 / (warmup + 1)` on the first step to the peak at step `warmup`. Unlike in `transformers`,
    /// where the first step has rate 0, every step updates the weights.
    ///
    /// ```
    /// use arriero::optim::schedule::Schedule;
    /// assert_eq!(Schedule::Linear.factor(0, 3, 0), 1.0);
    /// assert_eq!(Schedule::Linear.factor(4, 20, 9), 0.5);
    /// assert!((Schedule::Cosine.factor(5, 10, 0) - 0.5).abs() < 1e-12);
    /// ```
    pub fn factor(self, step: usize, total: usize, warmup: usize) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / (warmup + 1) as f64;
        }
        let span = total.saturating_sub(warmup).max(1) as f64;
        let progress = ((step - warmup) as f64 / span).min(1.0);
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Self::Wsd => ((1.0 - progress) / 0.1).min(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn the_rate_stays_between_zero_and_the_peak(step in 0_usize..200, total in 1_usize..200, warmup in 0_usize..50) {
            for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine, Schedule::Wsd] {
                let factor = schedule.factor(step, total, warmup);
                prop_assert!((0.0..=1.0).contains(&factor), "{schedule:?} gives {factor}");
            }
        }
    }
}
