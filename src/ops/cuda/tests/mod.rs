//! Kernels compiled for the host, each compared with the CPU op, and mutants that the tests must catch.

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
