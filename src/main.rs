//! The `arriero` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    arriero::ops::cpu::alloc::keep_memory();
    arriero::cli::main()
}
