//! `arriero doctor` on a GPU: whether each op and whole steps compute what the CPU does, and how fast the device is.

mod case;
pub mod check;
mod generation;
pub mod goldens;
pub mod rates;
mod steps;
