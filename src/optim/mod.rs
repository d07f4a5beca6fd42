//! AdamW with exportable state, learning-rate schedules, gradient clipping.

pub mod adamw;
mod param;
pub mod schedule;

pub use param::Param;

/// Factor that scales a gradient of this norm down to `max_norm`; 1 if the norm is smaller or clipping is off. As
/// PyTorch's `clip_grad_norm_`: `max_norm / (norm + 1e-6)`, at most 1.
///
/// ```
/// assert_eq!(arriero::optim::clip_factor(0.5, 1.0), 1.0);
/// assert!((arriero::optim::clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
/// assert_eq!(arriero::optim::clip_factor(4.0, 0.0), 1.0);
/// ```
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm <= 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) }
}
