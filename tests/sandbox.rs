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
        "opens files without a name",
        "attempt(lambda: [os.memfd_create('x') for _ in range(1000)])",
        Says("KEPT OSError [Errno 24]"),
    ),
    (
        "makes a big file without a name",
        "attempt(lambda: os.truncate(os.memfd_create('x'), 1 << 30))",
        Says("KEPT OSError [Errno 27]"),
    ),
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
fn hostile_programs_are_contained_and_this_machine_is_unharmed() {
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
fn what_a_program_says_and_how_it_ends_is_told() {
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
fn a_program_passes_by_passing_its_tests_and_in_no_other_way() {
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
fn what_a_judged_program_wrote_comes_back_without_the_harness_words() {
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
fn tests_come_as_text_or_as_a_list_and_mistakes_in_them_are_the_rows() {
    let code = "def square(x):\n    return x * x";
    let list = json!({"test_list": ["assert square(2) == 4", "assert square(0) == zero"], "test_setup_code": "zero = 0"});
    assert!(judge_row(code, &list).unwrap().value > 0.5);
    assert!(judge_row(code, &json!({"tests": "assert square(2) == 5"})).unwrap().value < 0.5);
    for (row, part) in [
        (json!({}), "row: scorer `code`: the row has no tests"),
        (json!({"tests": 1}), "`tests` is a number"),
        (json!({"tests": "assert ("}), "the row's tests are no Python"),
        (json!({"tests": "assert True\0"}), "the row's tests are no Python"),
        (json!({"tests": format!("{}1", "-".repeat(100_000))}), "the row's tests are no Python"),
    ] {
        let error = judge_row(code, &row).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// Where bubblewrap is missing nothing runs, unless somebody allowed that.
#[test]
fn without_bubblewrap_nothing_runs_unless_it_is_allowed() {
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
