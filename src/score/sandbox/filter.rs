//! The system calls that a program in the sandbox is refused, as a seccomp filter: those that keep memory where the sum of
//! what processes have mapped misses it, and doors to parts of the kernel that an answer has no use for. All others are
//! allowed. A refused call fails with "operation not permitted"; a call by the numbers of another processor kills.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::io::{PipeReader, Write};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

/// Refused whatever the arguments.
const REFUSED: [i64; 14] = [
    // Memory without a mapping: System V's segments, semaphores and queues, files without a name, pages given to a pipe.
    libc::SYS_shmget,
    libc::SYS_semget,
    libc::SYS_msgget,
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    libc::SYS_vmsplice,
    // Large or old doors, behind which most holes were found.
    libc::SYS_io_uring_setup,
    libc::SYS_userfaultfd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_ptrace,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
];

/// From here on the numbers are those of x32, which asks for the same calls under other numbers.
const X32: u32 = 0x4000_0000;

/// A pipe that holds the filter, for bubblewrap to read. Closed on `exec`, as all files here are.
///
/// # Errors
/// No filter for this processor; no pipe.
pub(super) fn pipe() -> Result<PipeReader, String> {
    let bytes = bytes(&program()?);
    let (reader, mut writer) = std::io::pipe().map_err(|error| format!("no pipe: {error}"))?;
    // It fits: a pipe takes a page even where its user has too many.
    writer.write_all(&bytes).map_err(|error| format!("a pipe that takes nothing: {error}"))?;
    Ok(reader)
}

fn program() -> Result<BpfProgram, String> {
    let arch = TargetArch::try_from(ARCH).map_err(|_| {
        format!(
            "no filter of system calls for the processor `{ARCH}`, expected x86_64, aarch64 or \
             riscv64"
        )
    })?;
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    let filter = rules().and_then(|rules| {
        SeccompFilter::new(rules, SeccompAction::Allow, refused.clone(), arch)?.try_into()
    });
    let filter: BpfProgram =
        filter.map_err(|error| format!("the filter of system calls: {error}"))?;
    let mut program = Vec::new();
    if arch == TargetArch::x86_64 {
        // Load the call's number, which stands first; below x32's go on, two steps from here.
        program.push(step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0));
        program.push(step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, X32, 1));
        program.push(step(libc::BPF_RET | libc::BPF_K, refused.into(), 0));
    }
    program.extend(filter);
    Ok(program)
}

/// What is refused: calls, and among calls of `mmap` those for memory that processes share without a file. What of it is
/// unmapped lives on while any page of it is mapped.
fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    // Also set in `MAP_SHARED_VALIDATE`, and not in `MAP_PRIVATE`.
    let shared = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
    let flags =
        SeccompCondition::new(3, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(shared), shared)?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.into_iter().map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, vec![SeccompRule::new(vec![flags])?]);
    Ok(rules)
}

/// One instruction, which skips `otherwise` steps where it compares and the comparison fails.
fn step(code: u32, k: u32, otherwise: u8) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: otherwise, k }
}

/// The program as the kernel reads it.
fn bytes(program: &[sock_filter]) -> Vec<u8> {
    let bytes = |step: &sock_filter| {
        let [a, b] = step.code.to_ne_bytes();
        let [c, d, e, f] = step.k.to_ne_bytes();
        [a, b, step.jt, step.jf, c, d, e, f]
    };
    program.iter().flat_map(bytes).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_filter_fits_a_page_and_comes_whole_out_of_the_pipe() {
        let expected = bytes(&program().unwrap());
        let mut read = Vec::new();
        pipe().unwrap().read_to_end(&mut read).unwrap();
        assert_eq!(read, expected);
        assert!(read.len() % 8 == 0 && read.len() < 4096, "{}", read.len());
    }
}
