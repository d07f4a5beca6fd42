//! Runs programs that nobody has read, so that they can do no harm: no network, no files of this machine, bounded
//! time, memory, processes and output.
//!
//! The walls are bubblewrap's namespaces and the limits of prlimit; the clock, the memory of all processes together and
//! the size of the output are watched from outside. Memory is what processes have mapped: open files without a name
//! are bounded by their size and their number, segments of System V shared memory that nobody has mapped are not. It
//! is no virtual machine: a hole in the kernel is a hole in it.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process_group};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// Most of a stream that is kept, half of it from its beginning and half from its end.
const KEPT: usize = 64 << 10;
/// Most bytes of a stream that are shown.
const SHOWN: usize = 4 << 10;
/// The user and group of programs in the sandbox: nobody.
const NOBODY: u32 = 65534;
/// Between two looks at a running program.
const LOOK: Duration = Duration::from_millis(2);
/// Between two sums of its memory.
const WEIGH: Duration = Duration::from_millis(20);
/// Most open files of a process. Those that only memory holds are counted nowhere else.
const OPEN_FILES: u64 = 64;
/// How long a stream may stay open after its program has ended: someone else must hold it then.
const LINGER: Duration = Duration::from_millis(500);

/// What a program may use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Time by the clock.
    pub wall: Duration,
    /// Processor time of each process, in seconds.
    pub cpu_s: u64,
    /// Memory that all processes together have mapped, in bytes; the address space of each.
    pub memory: u64,
    /// Processes and threads at once. Without a sandbox there is no such limit.
    pub processes: u64,
    /// Size of a file, in bytes. All files together may take 16 times as much.
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
    /// By itself, with this status. Killed by a signal inside the sandbox, it has 128 and the signal's number.
    Exited(i32),
    /// By a signal.
    Signal(i32),
    /// Its time was up.
    TimedOut,
    /// It took more memory than it may.
    OutOfMemory,
}

/// What a program wrote to a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// The first bytes.
    head: Vec<u8>,
    /// The last bytes of the rest.
    tail: Vec<u8>,
    /// How many bytes there were.
    pub bytes: u64,
}

impl Output {
    fn push(&mut self, mut part: &[u8]) {
        self.bytes += part.len() as u64;
        let room = (KEPT / 2).saturating_sub(self.head.len()).min(part.len());
        self.head.extend_from_slice(&part[..room]);
        part = &part[room..];
        self.tail.extend_from_slice(part);
        // Cut now and then, not at every part.
        if self.tail.len() > KEPT {
            self.tail.drain(..self.tail.len() - KEPT / 2);
        }
    }

    /// The text: all of it, or its beginning and its end with `…` between.
    pub fn text(&self) -> String {
        let end = &self.tail[self.tail.len().saturating_sub(KEPT / 2)..];
        let whole = self.head.len() + end.len();
        let cut = if self.bytes > whole as u64 { "\n…\n" } else { "" };
        // Joined before it is decoded, so that no letter is cut where nothing was left out.
        if cut.is_empty() {
            return String::from_utf8_lossy(&[&self.head, end].concat()).into_owned();
        }
        String::from_utf8_lossy(&self.head).into_owned() + cut + &String::from_utf8_lossy(end)
    }
}

/// What a program wrote, for people to read: text, whatever the bytes were, and no more than the beginning and the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streams {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Streams {
    /// Keeps 4 KiB of each, half from its beginning and half from its end, with `…` between.
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

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Execution {
    /// How it ended.
    pub ending: Ending,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
    /// How long it took by the clock.
    pub wall: Duration,
}

/// The walls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Walls {
    /// Bubblewrap, started by `nobody` where this program runs as root: the kernel does not count root's processes.
    Bubblewrap { as_nobody: bool },
    /// None; the limits hold.
    Bare,
}

/// A place to run programs in.
#[derive(Clone, Debug)]
pub struct Sandbox {
    walls: Walls,
    limits: Limits,
}

impl Sandbox {
    /// Finds out, once a process, whether programs can be walled in here.
    ///
    /// # Errors
    /// They cannot, and `allow_unsandboxed` does not say that they may run all the same.
    pub fn new(limits: Limits, allow_unsandboxed: bool) -> Result<Self> {
        static WALLS: OnceLock<std::result::Result<Walls, (String, String)>> = OnceLock::new();
        let walls = match WALLS.get_or_init(walls) {
            Ok(walls) => *walls,
            Err(_) if allow_unsandboxed => Walls::Bare,
            Err((error, hint)) => return Err(Error::run(error).hint(hint)),
        };
        Ok(Self { walls, limits })
    }

    /// Runs a program, gives it `input` to read, and returns when all of its processes are gone. Waits while as many
    /// programs run already as this machine has cores. Open files that this process was itself started with, and that
    /// are not marked to be closed, stay open in the program.
    ///
    /// # Errors
    /// It could not be started. A program that fails is no error.
    pub fn run(&self, program: &[&str], input: &[u8]) -> Result<Execution> {
        let _turn = Turn::take();
        // Without walls it gets a directory of its own, which goes away with it.
        let home = match self.walls {
            Walls::Bare => Some(tempfile::tempdir().at("a directory for a program")?),
            Walls::Bubblewrap { .. } => None,
        };
        let mut command = self.command(program, home.as_ref().map(tempfile::TempDir::path));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own, to be killed as one.
        command.process_group(0);
        let started = Instant::now();
        let mut child = command
            .spawn()
            .map_err(|error| Error::run(format!("cannot start a sandbox: {error}")))?;
        let stdout = child.stdout.take().map(Drain::start);
        let stderr = child.stderr.take().map(Drain::start);
        let ending = thread::scope(|scope| {
            if let Some(mut pipe) = child.stdin.take() {
                // One that does not read ends with an error here, which is its own affair.
                scope.spawn(move || pipe.write_all(input));
            }
            self.watch(&mut child, started)
        })?;
        let wall = started.elapsed();
        let finish = |drain: Option<Drain>| drain.map(Drain::finish).unwrap_or_default();
        Ok(Execution { ending, stdout: finish(stdout), stderr: finish(stderr), wall })
    }

    fn command(&self, program: &[&str], home: Option<&Path>) -> Command {
        let limits = &self.limits;
        let mut command = match self.walls {
            Walls::Bubblewrap { as_nobody } => {
                let mut command = bubblewrap(as_nobody, limits.file * 16);
                command.arg("prlimit").arg(format!("--nproc={}", limits.processes));
                command
            }
            Walls::Bare => {
                let mut command = Command::new("prlimit");
                command.env_clear().env("PATH", "/usr/bin:/bin");
                command
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
        command
    }

    /// Waits for the end, or makes it.
    fn watch(&self, child: &mut Child, started: Instant) -> Result<Ending> {
        let mut weighed = started;
        let forced = loop {
            if let Some(status) = child.try_wait()? {
                // What it left behind in its group goes too.
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

/// The command line of the walls. Everything that can be written is in memory and bounded by `room`.
fn bubblewrap(as_nobody: bool, room: u64) -> Command {
    let mut command = Command::new("bwrap");
    if as_nobody {
        command.uid(NOBODY).gid(NOBODY);
    }
    let (room, nobody) = (room.to_string(), NOBODY.to_string());
    command
        .args(["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"])
        .args(["--new-session", "--clearenv", "--setenv", "PATH", "/usr/bin"])
        .args(["--setenv", "LANG", "C.UTF-8", "--setenv", "HOME", "/tmp"])
        // The order of Python's sets must not change from run to run.
        .args(["--setenv", "PYTHONHASHSEED", "0"])
        .args(["--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin"])
        .args(["--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"])
        .args(["--proc", "/proc", "--dev", "/dev", "--size", &room, "--tmpfs", "/tmp"])
        .args(["--size", &room, "--tmpfs", "/dev/shm", "--remount-ro", "/dev", "--remount-ro", "/"])
        .args(["--uid", &nobody, "--gid", &nobody, "--cap-drop", "ALL", "--hostname", "sandbox"])
        .args(["--chdir", "/tmp"]);
    command
}

/// Kills the group. Bubblewrap's death takes everything in its namespace along.
fn kill(child: &Child) {
    if let Some(group) = Pid::from_raw(child.id() as i32) {
        // An error means that nobody is left.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// Which walls there are; an error and what to do about it where there are none.
fn walls() -> std::result::Result<Walls, (String, String)> {
    let candidates: &[bool] = if geteuid().is_root() { &[true, false] } else { &[false] };
    let mut failed = String::new();
    for &as_nobody in candidates {
        let mut command = bubblewrap(as_nobody, 1 << 20);
        command.args(["prlimit", "--nproc=8", "/usr/bin/true"]).current_dir("/");
        match command.stdin(Stdio::null()).output() {
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

/// Memory of a process and all that descend from it, in bytes.
fn resident(root: u32) -> u64 {
    let page = rustix::param::page_size() as u64;
    let (mut pages, mut left) = (0, vec![root]);
    while let Some(process) = left.pop() {
        let folder = PathBuf::from(format!("/proc/{process}"));
        // Whoever is gone by now has none.
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

/// Reads a stream to its end on a thread of its own, so that the program never waits and memory never fills.
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

    /// What was read. Who fled from a program that had no walls may hold the stream: nobody waits for him.
    fn finish(self) -> Output {
        let until = Instant::now() + LINGER;
        while !self.thread.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_micros(200));
        }
        self.output.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The right to run one program.
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
    fn output_keeps_its_beginning_and_its_end() {
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
    fn what_is_shown_is_cut_between_letters() {
        let long = "é".repeat(SHOWN);
        let Streams { stdout, stderr } = Streams::of(&long, &format!("x{long}"));
        for text in [&stdout, &stderr] {
            assert!(text.len() <= SHOWN + 5 && text.len() > SHOWN && text.contains("é\n…\né"));
        }
        let short = Streams::of("a\nb", "");
        assert_eq!((short.stdout.as_str(), short.stderr.as_str()), ("a\nb", ""));
    }

    #[test]
    fn a_stream_of_exactly_what_is_kept_is_whole() {
        let mut output = Output::default();
        for part in [b'a', b'b', b'c', b'd'] {
            output.push(&[part; KEPT / 4]);
        }
        assert!(output.text().len() == KEPT && !output.text().contains('…'));
    }
}
