//! Recipes: from the file as written to a plan with every value decided.
//!
//! The plan knows no tensors and touches no files: it names every stage of every round, with references such as
//! `"@sft"` replaced by the paths that those stages will have written.

pub mod plan;

pub use plan::{Kind, Plan, Spec, Step};
