//! Programs that mean harm, in the sandbox: each must be contained, quickly, and this machine unharmed. Needs bubblewrap,
//! Python and user namespaces, and fails where one is absent (`scripts/test` installs them).

#![expect(clippy::unwrap_used, reason = "a test program; a failure here is a failed test")]

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use arriero::score::sandbox::{Ending, Execution, Limits, Sandbox};
use arriero::score::{Panel, Question, Score};
use candle_core::Device;
use serde_json::{Map, Value, json};

/// What must come of a program.
enum Outcome {
    /// It ends by itself and this is in its output.
    Says(&'static str),
    /// It ends by itself, whatever it says.
    Ends,
    /// It ends or its time is up: either way it is gone.
    Whatever,
    /// Its time is up.
    TimesOut,
    /// Its memory is.
    TooMuchMemory,
}
use Outcome::{Ends, Says, TimesOut, TooMuchMemory, Whatever};

/// In front of every program. `attempt` says what kept it from doing harm, or that nothing did.
const PRELUDE: &str = r#"
import os, sys, time, signal, socket, threading
def attempt(action):
    try:
        print("DONE", action())
    except BaseException as error:
        print("KEPT", type(error).__name__, error)
def libc(name, *arguments):
    import ctypes
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments)
    print("returned", result)
"#;

/// Name, program, outcome. `CANARY` is a file of this machine, `MARK` names its processes, `HOST_PID` is one of ours.
const HOSTILE: &[(&str, &str, Outcome)] = &[
    ("fork bomb", "while True:\n  try: os.fork()\n  except OSError: pass", TimesOut),
    (
        "thread bomb",
        "attempt(lambda: [threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(10000)])\nsys.stdout.flush(); os._exit(0)",
        Says("can't start new thread"),
    ),
    ("100 GB", "attempt(lambda: bytearray(100 << 30))", Says("KEPT MemoryError")),
    (
        "memory in many processes",
        "for _ in range(12):\n  if os.fork() == 0:\n    b = bytearray(120 << 20); time.sleep(60)\ntime.sleep(60)",
        TooMuchMemory,
    ),
    ("prints forever", "while True: print('x' * 4000)", TimesOut),
    ("prints forever to standard error", "while True: sys.stderr.write('y' * 4000)", TimesOut),
    (
        "reads the users",
        "attempt(lambda: open('/etc/passwd').read())",
        Says("KEPT FileNotFoundError"),
    ),
    (
        "reads a file of this machine",
        "attempt(lambda: open('CANARY').read())",
        Says("KEPT FileNotFoundError"),
    ),
    (
        "overwrites a file of this machine",
        "attempt(lambda: open('CANARY', 'w').write('gone'))",
        Says("KEPT"),
    ),
    (
        "calls home",
        "attempt(lambda: socket.create_connection(('1.1.1.1', 80), 1))",
        Says("KEPT OSError [Errno 101]"),
    ),
    (
        "talks to this machine",
        "attempt(lambda: socket.create_connection(('127.0.0.1', PORT), 1))",
        Says("KEPT ConnectionRefusedError"),
    ),
    (
        "writes a big file",
        "attempt(lambda: open('/tmp/big', 'wb').write(bytes(1 << 28)))",
        Says("KEPT OSError [Errno 27]"),
    ),
    (
        "fills the disk",
        "def fill():\n  for n in range(10000): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))\nattempt(fill)",
        Says("KEPT OSError [Errno 28]"),
    ),
    (
        "fills shared memory",
        "def fill():\n  for n in range(10000): open(f'/dev/shm/{n}', 'wb').write(bytes(1 << 20))\nattempt(fill)",
        Says("KEPT OSError [Errno 28]"),
    ),
    (
        "fills files without a name, which nothing maps",
        "def fill():\n  for n in range(60):\n    file = os.memfd_create('x')\n    os.write(file, bytes(1 << 20))\nattempt(fill)",
        Says("KEPT PermissionError"),
    ),
    (
        "fills segments of shared memory and unmaps them",
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nc.shmat.restype = ctypes.c_void_p\nc.shmdt.argtypes = [ctypes.c_void_p]\ndef fill():\n  for n in range(20):\n    segment = c.shmget(0, 64 << 20, 0o1600)\n    if segment < 0: raise OSError(ctypes.get_errno(), 'shmget')\n    place = c.shmat(segment, None, 0)\n    ctypes.memset(place, 1, 64 << 20)\n    c.shmdt(place)\nattempt(fill)",
        Says("KEPT PermissionError"),
    ),
    (
        "fills memory without a file and keeps a page of it",
        "import ctypes, mmap\nc = ctypes.CDLL(None)\nc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]\ndef fill():\n  for n in range(20):\n    place = mmap.mmap(-1, 64 << 20)\n    start = ctypes.addressof(ctypes.c_char.from_buffer(place))\n    ctypes.memset(start, 1, 64 << 20)\n    c.munmap(start + 4096, (64 << 20) - 4096)\nattempt(fill)",
        Says("KEPT PermissionError"),
    ),
    (
        "shares the device of zeros",
        "import mmap\nattempt(lambda: mmap.mmap(os.open('/dev/zero', os.O_RDWR), 64 << 20))",
        Says("KEPT PermissionError"),
    ),
    ("makes semaphores", "libc('semget', 0, 32000, 0o600)", Says("returned -1")),
    ("makes queues", "libc('msgget', 0, 0o600)", Says("returned -1")),
    ("sleeps forever", "time.sleep(10**6)", TimesOut),
    (
        "leaves a daemon",
        "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    os.execv('/usr/bin/sleep', ['MARK', '600'])\n  os._exit(0)\ntime.sleep(0.2)\nprint('left')",
        Says("left"),
    ),
    ("kills its parent", "os.kill(os.getppid(), 9)\nprint('still here')", Says("still here")),
    ("kills all it sees", "os.kill(-1, 9)\ntime.sleep(0.1)", Ends),
    (
        "kills a process of this machine",
        "attempt(lambda: os.kill(HOST_PID, 9))",
        Says("KEPT ProcessLookupError"),
    ),
    (
        "ignores signals",
        "for s in (15, 2, 1, 14): signal.signal(s, signal.SIG_IGN)\nwhile True: time.sleep(1)",
        TimesOut,
    ),
    (
        "links to a file of this machine",
        "os.symlink('CANARY', '/tmp/link')\nattempt(lambda: open('/tmp/link').read())",
        Says("KEPT FileNotFoundError"),
    ),
    (
        "climbs out by dots",
        "attempt(lambda: open('/tmp/../../../../etc/shadow').read())",
        Says("KEPT FileNotFoundError"),
    ),
    (
        "endless recursion",
        "sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)",
        Ends,
    ),
    (
        "looks at processes",
        "print('sees', sum(name.isdigit() for name in os.listdir('/proc')) < 6)",
        Says("sees True"),
    ),
    (
        "changes the kernel",
        "attempt(lambda: open('/proc/sys/kernel/hostname', 'w').write('x'))",
        Says("KEPT"),
    ),
    (
        "reads the memory of the first process",
        "attempt(lambda: open('/proc/1/mem', 'rb').read(1))",
        Says("KEPT"),
    ),
    ("traces this machine's process", "libc('ptrace', 16, HOST_PID, 0, 0)", Says("returned -1")),
    ("stops its first process by a trace", "libc('ptrace', 16, 1, 0, 0)", Whatever),
    ("mount", "libc('mount', b'none', b'/tmp', b'tmpfs', 0, None)", Says("returned -1")),
    ("new namespaces", "libc('unshare', 0x10000000)", Says("returned -1")),
    ("chroot", "attempt(lambda: os.chroot('/tmp'))", Says("KEPT PermissionError")),
    ("becomes root", "attempt(lambda: os.setuid(0))", Says("KEPT")),
    (
        "writes to the programs",
        "attempt(lambda: open('/usr/bin/x', 'w'))",
        Says("KEPT OSError [Errno 30]"),
    ),
    ("writes to the root", "attempt(lambda: open('/x', 'w'))", Says("KEPT OSError [Errno 30]")),
    (
        "makes a device",
        "attempt(lambda: os.mknod('/tmp/d', 0o60666, os.makedev(8, 0)))",
        Says("KEPT PermissionError"),
    ),
    ("raw memory", "attempt(lambda: open('/dev/mem', 'rb'))", Says("KEPT FileNotFoundError")),
    ("reads its input", "attempt(input)", Says("KEPT EOFError")),
    ("takes the processor", "while True: pass", TimesOut),
    ("dumps core", "os.abort()", Ends),
];

/// Enough for a slow machine; programs that never end get less.
const PATIENCE: Duration = Duration::from_secs(20);

fn sandbox(wall: Duration) -> Sandbox {
    let limits = Limits { wall, cpu_s: 20, memory: 512 << 20, ..Limits::default() };
    Sandbox::new(limits, false).unwrap()
}

fn python(sandbox: &Sandbox, program: &str) -> Execution {
    let program = format!("{PRELUDE}{program}\n");
    sandbox.run(&["/usr/bin/python3", "-s", "-B", "-c", &program], b"").unwrap()
}

/// Kills its process when it goes.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn processes_called(mark: &str) -> usize {
    let commands = fs::read_dir("/proc").unwrap().flatten();
    let commands = commands.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    commands.filter(|command| command.starts_with(mark.as_bytes())).count()
}

#[test]
fn hostile_programs_are_contained_and_leave_the_host_unharmed() {
    let home = tempfile::tempdir().unwrap();
    let canary = home.path().join("canary");
    arriero::store::write_atomic(&canary, b"alive").unwrap();
    let mut host = Guard(Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mark = format!("hostile-{}", std::process::id());
    let mut failures = Vec::new();
    for (name, program, outcome) in HOSTILE {
        let program = program
            .replace("CANARY", canary.to_str().unwrap())
            .replace("MARK", &mark)
            .replace("HOST_PID", &host.0.id().to_string())
            .replace("PORT", &listener.local_addr().unwrap().port().to_string());
        let endless = matches!(outcome, TimesOut | Whatever);
        let wall = if endless { Duration::from_secs(2) } else { PATIENCE };
        let started = Instant::now();
        let execution = python(&sandbox(wall), &program);
        let text = execution.stdout.text() + &execution.stderr.text();
        let ended = matches!(execution.ending, Ending::Exited(_) | Ending::Signal(_));
        let contained = match outcome {
            Says(part) => ended && text.contains(part) && !text.contains("DONE"),
            Ends => ended,
            Whatever => ended || execution.ending == Ending::TimedOut,
            TimesOut => execution.ending == Ending::TimedOut,
            TooMuchMemory => execution.ending == Ending::OutOfMemory,
        };
        // Some seconds above its time are the machine's, not the program's.
        let quick = started.elapsed() < wall + Duration::from_secs(8);
        if !contained || !quick || text.len() > 200_000 {
            let shown: String = text.chars().take(300).collect();
            failures.push(format!(
                "{name}: {:?} in {:?}: {shown}",
                execution.ending,
                started.elapsed()
            ));
        }
    }
    assert!(failures.is_empty(), "not contained:\n{}", failures.join("\n"));
    assert_eq!(fs::read_to_string(&canary).unwrap(), "alive");
    assert!(host.0.try_wait().unwrap().is_none(), "a process of this machine was killed");
    assert_eq!(processes_called(&mark), 0, "a daemon outlived its sandbox");
}

#[test]
fn program_output_and_exit_status_are_reported() {
    let sandbox = sandbox(PATIENCE);
    let execution = python(&sandbox, "print('out'); print('err', file=sys.stderr); sys.exit(3)");
    assert_eq!(execution.ending, Ending::Exited(3));
    assert_eq!(
        (execution.stdout.text(), execution.stderr.text()),
        ("out\n".into(), "err\n".into())
    );
    assert!(execution.wall > Duration::ZERO && execution.wall < PATIENCE);
    let echo = sandbox.run(&["/usr/bin/cat"], "grüße".as_bytes()).unwrap();
    assert_eq!((echo.ending, echo.stdout.text().as_str()), (Ending::Exited(0), "grüße"));
    let execution = python(&sandbox, "print('x' * 1000000)");
    assert_eq!(execution.stdout.bytes, 1_000_001);
    assert!(execution.stdout.text().len() < 70_000);
}

/// Each fails with EPERM and in no other way, whatever the kernel would say of it.
#[test]
#[cfg(target_arch = "x86_64")]
fn unneeded_system_calls_are_refused_under_any_number() {
    let calls = [
        ("shmget", 29),
        ("semget", 64),
        ("msgget", 68),
        ("ptrace", 101),
        ("add_key", 248),
        ("request_key", 249),
        ("keyctl", 250),
        ("vmsplice", 278),
        ("perf_event_open", 298),
        ("memfd_create", 319),
        ("bpf", 321),
        ("userfaultfd", 323),
        ("io_uring_setup", 425),
        ("memfd_secret", 447),
        ("getpid of x32", 0x4000_0027),
        ("shmget of x32", 0x4000_001d),
        ("ptrace of x32", 0x4000_0209),
    ];
    for (name, number) in calls {
        let program = format!(
            "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nprint(c.syscall({number}, 0, 4096, 0o600, 0, 0, 0), ctypes.get_errno())"
        );
        let execution = python(&sandbox(PATIENCE), &program);
        assert_eq!(execution.stdout.text(), "-1 1\n", "{name}: {}", execution.stderr.text());
    }
    // The process's number, asked for as i386 does.
    let program = "import ctypes, mmap\nplace = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)\nplace.write(bytes.fromhex('b814000000cd80c3'))\nstart = ctypes.addressof(ctypes.c_char.from_buffer(place))\nprint('got', ctypes.CFUNCTYPE(ctypes.c_int)(start)())";
    let execution = python(&sandbox(PATIENCE), program);
    assert_ne!(execution.ending, Ending::Exited(0), "{}", execution.stdout.text());
}

/// What programs and their tests do use.
#[test]
fn processes_threads_and_files_in_memory_work_in_the_sandbox() {
    let program = "import multiprocessing, mmap, tempfile, asyncio, subprocess\nfrom concurrent.futures import ThreadPoolExecutor\ndef square(x): return x * x\nwith multiprocessing.Pool(2) as pool: assert pool.map(square, [2, 3]) == [4, 9]\nwith ThreadPoolExecutor(2) as pool: assert list(pool.map(square, [2])) == [4]\nassert multiprocessing.Value('i', 3).value == 3\nfile = tempfile.TemporaryFile()\nfile.write(b'abc'); file.flush()\nassert mmap.mmap(file.fileno(), 3)[:] == b'abc'\nassert asyncio.run(asyncio.sleep(0, 5)) == 5\nassert subprocess.run(['/usr/bin/echo', 'x'], capture_output=True).stdout == b'x\\n'\nprint('all work')";
    let execution = python(&sandbox(PATIENCE), program);
    let errors = execution.stderr.text();
    assert_eq!(execution.stdout.text(), "all work\n", "{errors}");
}

const TEST: &str =
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n";

fn judge(text: &str) -> Score {
    judge_row(text, &json!({"test": TEST, "entry_point": "square"})).unwrap()
}

fn judge_row(text: &str, row: &Value) -> arriero::Result<Score> {
    let panel = Panel::new(&[json!({"verifier": "code", "timeout_s": 8})], &Device::Cpu)?;
    let row: Map<String, Value> = row.as_object().unwrap().clone();
    let question =
        Question { place: "row", prompt: &[], tools: None, answer: None, extra: Some(&row) };
    let verdict = panel.judge(&question, &[text], &[])?.remove(0);
    let why = verdict.explanation();
    Ok(Score { value: verdict.score, why, streams: verdict.streams, ..Score::default() })
}

#[test]
fn program_passes_only_by_passing_its_tests() {
    let right = [
        "def square(x):\n    return x * x",
        "Sure:\n```python\ndef square(x):\n    return x * x\n```\nIt squares.",
        "```\ndef wrong(x): pass\n```\nBetter:\n```py\ndef square(x):\n    return x ** 2\n```",
        "<think>```python\nx\n```</think>\n```python\nprint('noise' * 100000)\ndef square(x):\n    return x * x",
        "import os\nassert len(os.listdir('/proc/self/fd')) < 8\ndef square(x):\n    return x * x",
        "def square(x):\n    return x * x\nif __name__ == '__main__':\n    print(input())",
    ];
    for text in right {
        let score = judge(text);
        assert!(score.value > 0.5, "{text}: {}", score.why);
    }
    let wrong = [
        ("def square(x):\n    return x + x", "AssertionError"),
        ("def square(x): return", "AssertionError"),
        ("def cube(x): return x", "NameError"),
        ("def square(x) return x", "SyntaxError"),
        ("", "NameError"),
        ("I cannot do that.", "SyntaxError"),
        ("import os\nos._exit(0)", "ended before"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("exit()", "SystemExit"),
        ("def square(x):\n    import os\n    os._exit(0)", "ended before"),
        (
            "import atexit, os\natexit.register(lambda: os._exit(0))\nraise SystemExit(0)",
            "SystemExit",
        ),
        (
            "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()\nimport time; time.sleep(3)",
            "ended before",
        ),
        (
            "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef square(x): return 0",
            "AssertionError",
        ),
        ("import sys\nprint(sys.stdin.read(), sys.argv)\nimport os\nos._exit(0)", "ended before"),
        ("import os\nprint(os.read(0, 99))\nos._exit(0)", "ended before"),
        (
            "import signal, os, time\nsignal.signal(14, lambda *a: os._exit(0))\nsignal.alarm(1)\ntime.sleep(6)",
            "ended before",
        ),
        ("def check(candidate): pass\ndef square(x): return 0", "AssertionError"),
        ("import os\nos.execv('/usr/bin/true', ['true'])", "ended before"),
        ("import os\nprint('tests passed')\nos.kill(os.getpid(), 9)", "exit status 137"),
        ("while True: pass", "not done after"),
        (
            "import sys\nsys.stdout.close()\nsys.stderr.close()\nimport os; os._exit(0)",
            "ended before",
        ),
        (
            "import sys, traceback\ntraceback.print_exc = lambda: None\nsys.exit = print\ndef square(x): return 0",
            "AssertionError",
        ),
    ];
    for (text, why) in wrong {
        let score = judge(text);
        assert!(score.value < 0.5, "passed: {text}");
        assert!(score.why.contains(why), "{text}: {}", score.why);
    }
}

#[test]
fn program_output_is_returned_without_harness_output() {
    let streams = |code: &str| {
        let score = judge(code);
        let streams = score.streams.unwrap();
        (score.value > 0.5, streams.stdout, streams.stderr)
    };
    let square = "import sys\nprint('grüße')\nsys.stderr.write('hm')\ndef square(x): return x";
    assert_eq!(streams(&format!("{square} * x")), (true, "grüße\n".into(), "hm".into()));
    let (passed, stdout, stderr) = streams(square);
    assert!(!passed && stdout == "grüße\n", "{stdout}");
    assert!(stderr.starts_with("hmTraceback") && stderr.contains("candidate(2) == 4"), "{stderr}");
    // Bytes that are no text, and more of them than anybody reads.
    let (_, stdout, _) =
        streams("import sys\nsys.stdout.buffer.write(b'<\\xff' + b'x' * 100000 + b'>')");
    assert!(stdout.starts_with("<\u{fffd}x") && stdout.ends_with("x>"), "{stdout}");
    assert!(stdout.contains("x\n…\nx") && stdout.len() < 5000, "{}", stdout.len());
    // Also of one that did not end by itself.
    let (passed, stdout, stderr) = streams("print('begun', flush=True)\nwhile True: pass");
    assert_eq!((passed, stdout.as_str(), stderr.as_str()), (false, "begun\n", ""));
}

#[test]
fn tests_are_text_or_a_list_and_mistakes_in_them_are_row_errors() {
    let code = "def square(x):\n    return x * x";
    let list = json!({"test_list": ["assert square(2) == 4", "assert square(0) == zero"], "test_setup_code": "zero = 0"});
    assert!(judge_row(code, &list).unwrap().value > 0.5);
    assert!(judge_row(code, &json!({"tests": "assert square(2) == 5"})).unwrap().value < 0.5);
    for (row, part) in [
        (json!({}), "row: scorer `code`: the row has no tests"),
        (json!({"tests": 1}), "`tests` is a number"),
        (json!({"tests": "assert ("}), "the row's tests are not valid Python"),
        (json!({"tests": "assert True\0"}), "the row's tests are not valid Python"),
        (
            json!({"tests": format!("{}1", "-".repeat(100_000))}),
            "the row's tests are not valid Python",
        ),
    ] {
        let error = judge_row(code, &row).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// Tests that the text defines and does not call, or leaves to a runner.
const UNCALLED: &[&str] = &[
    "def test_two():\n    assert square(2) == 4\ndef test_three():\n    assert square(3) == 9",
    "async def test_three():\n    import asyncio\n    await asyncio.sleep(0)\n    assert square(3) == 9",
    "class TestSquare:\n    def setup_method(self, method):\n        self.three = 3\n    def test_three(self):\n        assert square(self.three) == 9",
    "import unittest\nclass Squares(unittest.TestCase):\n    def test_three(self):\n        self.assertEqual(square(3), 9)",
    "import unittest\nclass Squares(unittest.TestCase):\n    def setUp(self):\n        self.three = 3\n    def test_three(self):\n        for x in (0, self.three):\n            with self.subTest(x=x):\n                self.assertEqual(square(x), x ** 2)\nif __name__ == '__main__':\n    unittest.main()",
    "import unittest\nfrom unittest import main, TestCase as Case\nclass Squares(Case):\n    def test_three(self):\n        self.assertEqual(square(3), 9)\nmain()",
    "import sys, unittest as u\nclass Squares(u.TestCase):\n    def test_three(self):\n        self.assertEqual(square(3), 9)\n    @u.skip('not here')\n    def test_skipped(self):\n        self.fail()\n    @u.expectedFailure\n    def test_expected(self):\n        self.fail()\nsys.exit(u.main(exit=False))",
    "import unittest\nclass Mixin:\n    def test_three(self):\n        self.assertEqual(square(3), 9)\nclass Squares(Mixin, unittest.TestCase):\n    pass",
    "import unittest\nclass Squares(unittest.IsolatedAsyncioTestCase):\n    async def test_three(self):\n        self.assertEqual(square(3), 9)",
    "from unittest.mock import patch\n@patch('builtins.print')\ndef test_three(said):\n    assert square(3) == 9 and not said.called",
    "def test_square(x=3):\n    assert square(x) == x ** 2\ndef test_helper(x):\n    return square(x)\ndef test_helped():\n    assert test_helper(3) == 9",
    // What the text calls itself, it calls once.
    "calls = []\ndef test_three():\n    calls.append(3)\n    assert len(calls) == 1 and square(3) == 9\ntest_three()",
    "def run_all():\n    assert square(3) == 9\nif '__main__' == __name__:\n    run_all()",
    "def test_of(f, x):\n    assert f(x) == x ** 2\nfor x in range(4):\n    test_of(square, x)",
    "def check():\n    assert square(3) == 9\ncheck()",
    "if True:\n    def test_three():\n        assert square(3) == 9",
    "from answer import square as under_test\ndef test_three():\n    assert under_test(3) == 9",
    "exec('assert square(3) == 9')",
];

#[test]
fn tests_that_are_defined_but_not_called_are_run() {
    let right = "def square(x):\n    return x * x\nif __name__ == '__main__':\n    print(square(int(input())))";
    for tests in UNCALLED {
        let row = json!({ "tests": tests });
        let score = judge_row(right, &row).unwrap();
        assert!(score.value > 0.5, "refused by {tests}: {}", score.why);
        for wrong in [
            "def square(x):\n    return 2 * x",
            "def square(x):\n    raise SystemExit(0)",
            "import unittest\ndef square(x):\n    raise unittest.SkipTest('hard')",
            "import sys\ndef square(x):\n    sys.exit()",
            "import os\ndef square(x):\n    os._exit(0)",
            // Tests of its own count for nothing.
            "import unittest\ndef square(x): return 2 * x\ndef test_three(): pass\ndef test_other(): assert square(3) == 6\nclass TestSquare:\n    def test_three(self): pass\nclass Squares(unittest.TestCase):\n    def test_three(self): pass",
        ] {
            let score = judge_row(wrong, &row).unwrap();
            assert!(score.value < 0.5, "{wrong} passed {tests}");
        }
    }
    // The line that failed is shown, of a unittest's too.
    for tests in [UNCALLED[0], UNCALLED[3]] {
        let score = judge_row("def square(x): return 2 * x", &json!({ "tests": tests })).unwrap();
        assert!(
            score.why.contains("square(3)") && score.why.contains("Assertion"),
            "{}",
            score.why
        );
    }
    // Tests of which none ran.
    let skipped =
        "import unittest\n@unittest.skip('all')\ndef test_three():\n    assert square(3) == 9";
    let score = judge_row(right, &json!({ "tests": skipped })).unwrap();
    assert!(score.value < 0.5 && score.why.contains("no test ran"), "{}", score.why);
}

#[test]
fn tests_that_cannot_run_or_cannot_fail_are_row_errors() {
    for (tests, part) in [
        ("", "no program can fail them: there is no assertion"),
        (
            "import sys\nsys.setrecursionlimit(9999)\nx = [1]\nprint(len(x))",
            "no program can fail them",
        ),
        (
            "from answer import square\nCASES = [(2, 4)]\ndef verify(f):\n    assert f(2) == 4",
            "`verify` is never called",
        ),
        (
            "import unittest\nclass Squares(unittest.TestCase):\n    pass\nunittest.main()",
            "no program can fail them",
        ),
        (TEST, "define `check`, which nothing calls: no column entry_point"),
        (
            "# check(square) is for later\ndef check(f):\n    assert f(2) == 4",
            "`check` is never called",
        ),
        (
            "def test_square(client):\n    assert square(2) == client",
            "`test_square` needs `client`",
        ),
        ("def test_square(*, x):\n    assert square(x) == 4", "`test_square` needs `x`"),
        (
            "import pytest\n@pytest.mark.parametrize('x', [2])\ndef test_square(x):\n    assert square(x) == x * x",
            "`test_square` needs pytest's `parametrize`",
        ),
        (
            "import pytest\n@pytest.fixture(autouse=True)\ndef two():\n    return 2\nassert square(2) == 4",
            "`two` is a fixture",
        ),
        (
            "def setup_module():\n    global two\n    two = 2\ndef test_square():\n    assert square(two) == 4",
            "`setup_module` is called only by pytest",
        ),
        (
            "class TestSquare:\n    def setup_class(self): pass\n    def test_two(self):\n        assert square(2) == 4",
            "`setup_class` is called only by pytest",
        ),
        (
            "class TestSquare:\n    def test_two(self, two):\n        assert square(two) == 4",
            "`TestSquare.test_two` needs `two`",
        ),
        ("def test_square():\n    assert square(2) == 4\n    yield", "`test_square` yields"),
        (
            "import unittest\nclass Squares(unittest.TestCase):\n    async def test_two(self):\n        self.assertEqual(square(2), 5)",
            "`Squares.test_two` is async",
        ),
    ] {
        // Nothing of the program runs.
        let program = "import os\nos.write(2, b'it ran')\nos._exit(4)";
        let error = judge_row(program, &json!({ "tests": tests })).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("row: scorer `code`"), "{tests}: {error}");
    }
}

/// Where bubblewrap is missing nothing runs, unless somebody allowed that.
#[test]
fn without_bubblewrap_programs_run_only_if_allowed() {
    let home = tempfile::tempdir().unwrap();
    let [bin, data, out, mark] =
        ["bin", "rows.jsonl", "out.jsonl", "mark"].map(|name| home.path().join(name));
    fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink("/usr/bin/prlimit", bin.join("prlimit")).unwrap();
    let program = format!("open({mark:?}, 'w').write('ran')\ndef f(x):\n    return x\n");
    let row = json!({"prompt": "Write f.", "completion": program, "test": "assert f(1) == 1"});
    arriero::store::write_atomic(&data, row.to_string().as_bytes()).unwrap();
    let score = |scorers: Value| {
        Command::new(env!("CARGO_BIN_EXE_arriero"))
            .args(["score", "--scorers", &scorers.to_string(), "--data"])
            .arg(&data)
            .arg("--out")
            .arg(&out)
            .env("PATH", &bin)
            .output()
            .unwrap()
    };
    let refused = score(json!([{"verifier": "code"}]));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("no bubblewrap here") && said.contains("allow_unsandboxed"), "{said}");
    assert!(!mark.exists() && !out.exists());
    let allowed = score(json!([{"verifier": "code", "allow_unsandboxed": true}]));
    assert!(allowed.status.success(), "{}", String::from_utf8_lossy(&allowed.stderr));
    assert!(mark.exists());
    let scored: Value = serde_json::from_str(&fs::read_to_string(&out).unwrap()).unwrap();
    assert_eq!(scored["score"], 1.0);
    assert_eq!((&scored["stdout"], &scored["stderr"]), (&json!(""), &json!("")));
}
