//! Recipes: from the file as written to a fully resolved plan.
//!
//! The plan knows no tensors and touches no files: it names every stage of every round, with references such as
//! `"@sft"` replaced by the paths that those stages will write.

mod average;
mod dpo;
pub mod file;
pub mod keys;
pub mod plan;
pub mod refs;
pub mod rejection;
pub mod resolve;
mod reward;
mod sft;
mod shape;
pub mod shipped;
pub mod top;

pub use file::RecipeFile;
pub use plan::{Kind, Plan, Spec, Step};
pub use resolve::{Resolved, resolve};
