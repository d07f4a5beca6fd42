//! The seccomp filter of the sandbox. It refuses system calls that keep memory without a mapping, which the sandbox's memory
//! accounting would miss, and kernel features that an answer does not need. All other calls are allowed. A refused call fails
//! with "operation not permitted"; a call with another architecture's numbers kills the program.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::io::{PipeReader, Write};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

/// Refused whatever their arguments.
const REFUSED: [i64; 14] = [
    // Memory without a mapping: System V segments, semaphores and queues, unnamed files, pages gifted to a pipe.
    libc::SYS_shmget,
    libc::SYS_semget,
    libc::SYS_msgget,
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    libc::SYS_vmsplice,
    // Large attack surfaces with a history of vulnerabilities.
    libc::SYS_io_uring_setup,
    libc::SYS_userfaultfd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_ptrace,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
];

/// System-call numbers from here on belong to the x32 ABI, which has the same calls under other numbers.
const X32: u32 = 0x4000_0000;

/// A pipe containing the filter, for bubblewrap to read. Closed on `exec`, like all files here.
///
/// # Errors
/// No filter for this architecture; the pipe cannot be created.
pub(super) fn pipe() -> Result<PipeReader, String> {
    let bytes = bytes(&program()?);
    let (reader, mut writer) =
        std::io::pipe().map_err(|error| format!("creating a pipe: {error}"))?;
    // It fits: a pipe holds at least a page, even if its user has many pipes.
    writer.write_all(&bytes).map_err(|error| format!("writing the filter to a pipe: {error}"))?;
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
        // Load the call's number, the first field; numbers below x32's skip the refusal.
        program.push(step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0));
        program.push(step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, X32, 1));
        program.push(step(libc::BPF_RET | libc::BPF_K, refused.into(), 0));
    }
    program.extend(filter);
    Ok(program)
}

/// The refused calls, and `mmap` of anonymous shared memory: pages unmapped there stay allocated while any page of the mapping
/// is still mapped.
fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    // `MAP_SHARED_VALIDATE` has these bits too; `MAP_PRIVATE` does not.
    let shared = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
    let flags =
        SeccompCondition::new(3, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(shared), shared)?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.into_iter().map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, vec![SeccompRule::new(vec![flags])?]);
    Ok(rules)
}

/// One instruction; a comparison that fails skips `otherwise` instructions.
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
    fn filter_fits_a_page_and_passes_through_the_pipe_intact() {
        let expected = bytes(&program().unwrap());
        let mut read = Vec::new();
        pipe().unwrap().read_to_end(&mut read).unwrap();
        assert_eq!(read, expected);
        assert!(read.len() % 8 == 0 && read.len() < 4096, "{}", read.len());
    }
}
