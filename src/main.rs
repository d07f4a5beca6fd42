//! The `arriero` binary.

fn main() {}
