//! Runs untrusted programs: no network, no access to this machine's files, and bounded time, memory, processes and
//! output.
//!
//! Isolation comes from bubblewrap's namespaces, a system-call filter and prlimit; wall time, total memory and output size
//! are monitored from outside. Memory is that mapped by processes; the filter refuses calls that would keep it elsewhere.
//! Memory that the kernel holds for a program, such as socket buffers, has only the kernel's own limits. This is not a
//! virtual machine: a kernel vulnerability breaks it.

mod filter;

use std::io::{PipeReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, geteuid, kill_process_group};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// Most bytes of a stream kept, half from its start and half from its end.
const KEPT: usize = 64 << 10;
/// Most bytes of a stream shown.
const SHOWN: usize = 4 << 10;
/// User and group id of sandboxed programs: `nobody`.
const NOBODY: u32 = 65534;
/// Polling interval of a running program.
const LOOK: Duration = Duration::from_millis(2);
/// Polling interval of its memory.
const WEIGH: Duration = Duration::from_millis(20);
/// Most open files per process.
const OPEN_FILES: u64 = 64;
/// How long a stream may stay open after its program ended: another process must be holding it.
const LINGER: Duration = Duration::from_millis(500);

/// Resource limits of a program.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Wall time.
    pub wall: Duration,
    /// CPU time per process, in seconds.
    pub cpu_s: u64,
    /// Memory mapped by all processes together, and address space of each, in bytes.
    pub memory: u64,
    /// Concurrent processes and threads. Not enforced without a sandbox.
    pub processes: u64,
    /// File size, in bytes. All files together may take 16 times as much.
    pub file: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            wall: Duration::from_secs(10),
            cpu_s: 10,
            memory: 1 << 30,
            processes: 64,
            file: 1 << 20,
        }
    }
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Exited with this status. If killed by a signal inside the sandbox: 128 plus the signal number.
    Exited(i32),
    /// Killed by a signal.
    Signal(i32),
    /// Exceeded its time limit.
    TimedOut,
    /// Exceeded its memory limit.
    OutOfMemory,
}

/// A program's output on one stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// The first bytes.
    head: Vec<u8>,
    /// The last bytes of the rest.
    tail: Vec<u8>,
    /// Total number of bytes.
    pub bytes: u64,
}

impl Output {
    fn push(&mut self, mut part: &[u8]) {
        self.bytes += part.len() as u64;
        let room = (KEPT / 2).saturating_sub(self.head.len()).min(part.len());
        self.head.extend_from_slice(&part[..room]);
        part = &part[room..];
        self.tail.extend_from_slice(part);
        // Trimmed occasionally rather than on every read.
        if self.tail.len() > KEPT {
            self.tail.drain(..self.tail.len() - KEPT / 2);
        }
    }

    /// The text, complete or with `…` between its start and end.
    pub fn text(&self) -> String {
        let end = &self.tail[self.tail.len().saturating_sub(KEPT / 2)..];
        let whole = self.head.len() + end.len();
        let cut = if self.bytes > whole as u64 { "\n…\n" } else { "" };
        // Joined before decoding, so that no character is split where nothing was cut.
        if cut.is_empty() {
            return String::from_utf8_lossy(&[&self.head, end].concat()).into_owned();
        }
        String::from_utf8_lossy(&self.head).into_owned() + cut + &String::from_utf8_lossy(end)
    }
}

/// A program's output for display: lossily decoded, start and end only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streams {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Streams {
    /// Keeps 4 KiB of each stream, half from its start and half from its end, with `…` between.
    pub fn of(stdout: &str, stderr: &str) -> Self {
        let brief = |text: &str| {
            let half = SHOWN / 2;
            if text.len() <= SHOWN {
                return text.to_owned();
            }
            let (head, tail) =
                (text.floor_char_boundary(half), text.ceil_char_boundary(text.len() - half));
            format!("{}\n…\n{}", &text[..head], &text[tail..])
        };
        Self { stdout: brief(stdout), stderr: brief(stderr) }
    }
}

/// Result of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Execution {
    /// How it ended.
    pub ending: Ending,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
    /// Wall time used.
    pub wall: Duration,
}

/// Kind of isolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Walls {
    /// Bubblewrap; run as `nobody` if this program is root, since the kernel does not count root's processes.
    Bubblewrap { as_nobody: bool },
    /// None; only the resource limits apply.
    Bare,
}

/// An environment to run programs in.
#[derive(Clone, Debug)]
pub struct Sandbox {
    walls: Walls,
    limits: Limits,
}

impl Sandbox {
    /// Checks, once per process, whether programs can be isolated here.
    ///
    /// # Errors
    /// They cannot, and `allow_unsandboxed` is not set.
    pub fn new(limits: Limits, allow_unsandboxed: bool) -> Result<Self> {
        static WALLS: OnceLock<std::result::Result<Walls, (String, String)>> = OnceLock::new();
        let walls = match WALLS.get_or_init(walls) {
            Ok(walls) => *walls,
            Err(_) if allow_unsandboxed => Walls::Bare,
            Err((error, hint)) => return Err(Error::run(error).hint(hint)),
        };
        Ok(Self { walls, limits })
    }

    /// Runs a program with `input` on stdin, and returns once all its processes are gone. Waits while as many programs
    /// are running as there are cores. Files that this process inherited open without close-on-exec stay open in the
    /// program.
    ///
    /// # Errors
    /// The program could not be started. A failing program is not an error.
    pub fn run(&self, program: &[&str], input: &[u8]) -> Result<Execution> {
        let _turn = Turn::take();
        // Without isolation it gets a temporary directory.
        let home = match self.walls {
            Walls::Bare => Some(tempfile::tempdir().at("a directory for a program")?),
            Walls::Bubblewrap { .. } => None,
        };
        let (mut command, filter) =
            self.command(program, home.as_ref().map(tempfile::TempDir::path))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Its own process group, to be killed as one.
        command.process_group(0);
        let started = Instant::now();
        let mut child = start(&mut command, filter)
            .map_err(|error| Error::run(format!("cannot start a sandbox: {error}")))?;
        let stdout = child.stdout.take().map(Drain::start);
        let stderr = child.stderr.take().map(Drain::start);
        let ending = thread::scope(|scope| {
            if let Some(mut pipe) = child.stdin.take() {
                // Writing fails if the program does not read its input, which is not our error.
                scope.spawn(move || pipe.write_all(input));
            }
            self.watch(&mut child, started)
        })?;
        let wall = started.elapsed();
        let finish = |drain: Option<Drain>| drain.map(Drain::finish).unwrap_or_default();
        Ok(Execution { ending, stdout: finish(stdout), stderr: finish(stderr), wall })
    }

    /// The command line, and the filter that it reads where there are walls.
    fn command(
        &self,
        program: &[&str],
        home: Option<&Path>,
    ) -> Result<(Command, Option<PipeReader>)> {
        let limits = &self.limits;
        let (mut command, filter) = match self.walls {
            Walls::Bubblewrap { as_nobody } => {
                let (mut command, filter) =
                    bubblewrap(as_nobody, limits.file * 16).map_err(Error::run)?;
                command.arg("prlimit").arg(format!("--nproc={}", limits.processes));
                (command, Some(filter))
            }
            Walls::Bare => {
                let mut command = Command::new("prlimit");
                command.env_clear().env("PATH", "/usr/bin:/bin");
                (command, None)
            }
        };
        command
            .arg(format!("--as={}", limits.memory))
            .arg(format!("--cpu={}", limits.cpu_s))
            .arg(format!("--fsize={}", limits.file))
            .arg(format!("--nofile={OPEN_FILES}"))
            .arg("--core=0")
            .args(program)
            .current_dir(home.unwrap_or(Path::new("/")));
        Ok((command, filter))
    }

    /// Waits for the program to end, or ends it.
    fn watch(&self, child: &mut Child, started: Instant) -> Result<Ending> {
        let mut weighed = started;
        let forced = loop {
            if let Some(status) = child.try_wait()? {
                // Also kills remaining processes in its group.
                kill(child);
                let by_itself = status.code().map(Ending::Exited);
                return Ok(by_itself.unwrap_or(Ending::Signal(status.signal().unwrap_or(0))));
            }
            if started.elapsed() > self.limits.wall {
                break Ending::TimedOut;
            }
            if weighed.elapsed() > WEIGH {
                weighed = Instant::now();
                if resident(child.id()) > self.limits.memory {
                    break Ending::OutOfMemory;
                }
            }
            thread::sleep(LOOK);
        };
        kill(child);
        child.wait()?;
        Ok(forced)
    }
}

/// The bubblewrap command line, and the system-call filter that it reads. Everything writable is in memory and bounded by
/// `room`.
fn bubblewrap(as_nobody: bool, room: u64) -> std::result::Result<(Command, PipeReader), String> {
    let filter = filter::pipe()?;
    let mut command = Command::new("bwrap");
    if as_nobody {
        command.uid(NOBODY).gid(NOBODY);
    }
    let (room, nobody) = (room.to_string(), NOBODY.to_string());
    command
        .args(["--seccomp", &filter.as_raw_fd().to_string()])
        .args(["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"])
        .args(["--new-session", "--clearenv", "--setenv", "PATH", "/usr/bin"])
        .args(["--setenv", "LANG", "C.UTF-8", "--setenv", "HOME", "/tmp"])
        // Python's set order must be reproducible across runs.
        .args(["--setenv", "PYTHONHASHSEED", "0"])
        .args(["--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin"])
        .args(["--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"])
        .args(["--proc", "/proc", "--dev", "/dev", "--size", &room, "--tmpfs", "/tmp"])
        // What maps this device to share it has memory without a file, which the filter refuses elsewhere.
        .args(["--ro-bind", "/dev/null", "/dev/zero"])
        .args(["--size", &room, "--tmpfs", "/dev/shm", "--remount-ro", "/dev", "--remount-ro", "/"])
        .args(["--uid", &nobody, "--gid", &nobody, "--cap-drop", "ALL", "--hostname", "sandbox"])
        .args(["--chdir", "/tmp"]);
    Ok((command, filter))
}

/// Starts a command that inherits the filter: one at a time, so that none inherits another's too.
fn start(command: &mut Command, filter: Option<PipeReader>) -> std::io::Result<Child> {
    static STARTING: Mutex<()> = Mutex::new(());
    let _alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(filter) = &filter {
        fcntl_setfd(filter, FdFlags::empty())?;
    }
    let child = command.spawn();
    drop(filter);
    child
}

/// Kills the process group. Killing bubblewrap ends everything in its namespace.
fn kill(child: &Child) {
    if let Some(group) = Pid::from_raw(child.id() as i32) {
        // An error means that the group is already empty.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// The available isolation, or an error and a remedy.
fn walls() -> std::result::Result<Walls, (String, String)> {
    let candidates: &[bool] = if geteuid().is_root() { &[true, false] } else { &[false] };
    let mut failed = String::new();
    for &as_nobody in candidates {
        let (mut command, filter) = bubblewrap(as_nobody, 1 << 20).map_err(|error| {
            let trusted = "allow_unsandboxed = true where every program is trusted".to_owned();
            (error, trusted)
        })?;
        command.args(["prlimit", "--nproc=8", "/usr/bin/true"]).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        match start(&mut command, Some(filter)).and_then(Child::wait_with_output) {
            Ok(output) if output.status.success() => return Ok(Walls::Bubblewrap { as_nobody }),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().clone_into(&mut failed),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err((
                    "no bubblewrap here to run programs in".to_owned(),
                    "apt install bubblewrap, or allow_unsandboxed = true where every program is \
                     trusted"
                        .to_owned(),
                ));
            }
            Err(error) => failed = error.to_string(),
        }
    }
    Err((
        format!("bubblewrap cannot start a sandbox: {failed}"),
        "it must be 0.8 or newer and may need user namespaces: sysctl user.max_user_namespaces, \
         or a container that allows them"
            .to_owned(),
    ))
}

/// Memory of a process and all its descendants, in bytes.
fn resident(root: u32) -> u64 {
    let page = rustix::param::page_size() as u64;
    let (mut pages, mut left) = (0, vec![root]);
    while let Some(process) = left.pop() {
        let folder = PathBuf::from(format!("/proc/{process}"));
        // A process that has exited uses none.
        let statm = std::fs::read_to_string(folder.join("statm")).unwrap_or_default();
        pages += statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
        let Ok(threads) = std::fs::read_dir(folder.join("task")) else { continue };
        for thread in threads.flatten() {
            let children =
                std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            left.extend(children.split_whitespace().filter_map(|id| id.parse::<u32>().ok()));
        }
    }
    pages * page
}

/// Reads a stream to its end on its own thread, so that the program never blocks and memory stays bounded.
struct Drain {
    output: Arc<Mutex<Output>>,
    thread: thread::JoinHandle<()>,
}

impl Drain {
    fn start(mut stream: impl Read + Send + 'static) -> Self {
        let output = Arc::new(Mutex::new(Output::default()));
        let shared = Arc::clone(&output);
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                shared.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[..read]);
            }
        });
        Self { output, thread }
    }

    /// The data read. A process that escaped an unisolated run may hold the stream open; it is not waited for.
    fn finish(self) -> Output {
        let until = Instant::now() + LINGER;
        while !self.thread.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_micros(200));
        }
        self.output.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Permission to run one program.
struct Turn;

static RUNNING: Mutex<usize> = Mutex::new(0);
static FREED: Condvar = Condvar::new();

impl Turn {
    fn take() -> Self {
        let most = thread::available_parallelism().map_or(1, usize::from);
        let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut running = FREED
            .wait_while(running, |running| *running >= most)
            .unwrap_or_else(PoisonError::into_inner);
        *running += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        FREED.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_output_keeps_its_beginning_and_end() {
        let mut output = Output::default();
        output.push("héllo".as_bytes());
        assert_eq!(output.text(), "héllo");
        for _ in 0..100 {
            output.push(&[b'x'; 5000]);
        }
        output.push(b"the end");
        let text = output.text();
        assert!(text.starts_with("héllo") && text.ends_with("the end") && text.contains('…'));
        assert!(text.len() <= KEPT + 8 && output.bytes > 500_000);
    }

    #[test]
    fn shown_output_is_cut_between_characters() {
        let long = "é".repeat(SHOWN);
        let Streams { stdout, stderr } = Streams::of(&long, &format!("x{long}"));
        for text in [&stdout, &stderr] {
            assert!(text.len() <= SHOWN + 5 && text.len() > SHOWN && text.contains("é\n…\né"));
        }
        let short = Streams::of("a\nb", "");
        assert_eq!((short.stdout.as_str(), short.stderr.as_str()), ("a\nb", ""));
    }

    #[test]
    fn output_of_exactly_the_kept_size_is_not_cut() {
        let mut output = Output::default();
        for part in [b'a', b'b', b'c', b'd'] {
            output.push(&[part; KEPT / 4]);
        }
        assert!(output.text().len() == KEPT && !output.text().contains('…'));
    }
}
