//! Reward-model losses: on a score at the end of a response or of a step.
//!
//! `ranked` compares responses to one prompt (Bradley-Terry, Plackett-Luce), `judged` compares a score with its label
//! (ratings, right/wrong), `quality` evaluates a trained model on held-out rows.

mod judged;
mod quality;
mod ranked;

pub use judged::{Correctness, Regression};
pub use quality::Observation;
pub use ranked::Reward;

use super::{log_sigmoid, sigmoid};

/// `−ln σ(gap)` and its derivative. The gap is the better score minus the worse one, minus the margin if there is one
/// (Llama 2, equations 1 and 2).
///
/// ```
/// use arriero::loss::reward::bradley_terry;
/// assert_eq!(bradley_terry(0.0), (std::f64::consts::LN_2, -0.5));
/// ```
pub fn bradley_terry(gap: f64) -> (f64, f64) {
    (-log_sigmoid(gap), -sigmoid(-gap))
}
