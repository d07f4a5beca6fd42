//! The training step, the loop around it, and its checkpoints. It knows no methods: an
//! [`Objective`](crate::loss::Objective) says what a log-probability is worth.

pub mod anchor;
pub mod batch;
pub mod checkpoint;
pub mod ema;
pub mod feed;
pub mod fit;
pub mod follower;
pub mod learner;
pub mod memory;
pub mod noise;
mod norms;
pub mod order;
pub mod reference;
pub mod settings;
pub mod step;
pub mod update;
pub mod watchdog;
mod weighing;

pub use anchor::anchor;
pub use batch::Batch;
pub use ema::Ema;
pub use feed::Data;
pub use fit::{Job, fit};
pub use follower::Follower;
pub use learner::{Held, Learner};
pub use memory::Recompute;
pub use order::Order;
pub use settings::Settings;
