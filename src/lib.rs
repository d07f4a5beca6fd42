//! arriero: post-training alignment for Llama-family models.
//!
//! One way through the crate: a [`recipe`] is resolved into a plan; [`data`] becomes trees of tokens; a [`model`]
//! turns them into hidden states; a [`loss`] says what each log-probability is worth; [`train`] takes the step;
//! [`generate`] and [`score`] draw and judge samples; [`stage`] composes these into the methods; [`report`] shows
//! what happened. [`serve`], [`bench`] and [`doctor`] are commands beside that way. Lower modules never import higher ones (`tests/tidy.rs` checks it).
//!
//! ```
//! use arriero::data::tree::{Role, Segment, Tree};
//! // A preference pair is a tree: the prompt once, both responses under it.
//! let response = |tokens: Vec<u32>| Segment { parent: Some(0), roles: vec![Role::Content; tokens.len()], tokens };
//! let prompt = Segment { parent: None, tokens: vec![1, 5, 9], roles: vec![Role::Context; 3] };
//! let segments = vec![prompt, response(vec![4, 2]), response(vec![7, 8, 2])];
//! let pair = Tree { segments, ..Tree::default() };
//! assert_eq!(pair.leaves(), [1, 2]);
//! assert_eq!(pair.tokens(), 8);
//! ```

pub mod error;
pub mod rng;
pub mod store;

pub mod data;
pub mod ops;

pub mod loss;
pub mod model;
pub mod optim;

pub mod generate;
pub mod score;
pub mod train;

pub mod recipe;

pub mod bench;
pub mod doctor;
pub mod report;
pub mod serve;
pub mod stage;

pub mod cli;

pub use error::{Error, Result};
