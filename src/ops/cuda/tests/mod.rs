//! Kernels compiled for the host, each held against the CPU's op, and mutants of each that its test must catch.

pub(super) mod host;

mod adamw;
mod embed;
mod far;
mod head;
mod host_tests;
mod norm;
mod reduce;
mod rope;
mod sample;
mod swiglu;
mod unpack;
