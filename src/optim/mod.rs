//! AdamW with exportable state, schedules, clipping.

pub mod schedule;
