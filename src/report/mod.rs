//! What happened, for people and for programs. Reports are made from records on disk, never from live state.

pub mod metrics;
pub mod record;
