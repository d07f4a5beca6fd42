//! `code`: the program in the answer passes the row's tests, run in a sandbox.
//!
//! Program and tests share one interpreter, as in HumanEval and MBPP. A program that exits early, with any status, does
//! not pass: a secret it has not seen must be printed after the tests. A program written against this very harness
//! could still cheat. Tests that only define functions and classes, as for pytest and unittest,
//! are found by name and called; tests that no program could fail are an error of the row.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde_json::Value;

use super::{Rule, after_thoughts, column, judged, pattern};
use crate::data::record::kind;
use crate::error::{Error, Result};
use crate::score::sandbox::{self, Ending, Execution, Sandbox, Streams};
use crate::score::{Question, Score, ScorerSpec};
use crate::store;

const PYTHON: &str = "/usr/bin/python3";
const HARNESS: &str = concat!(include_str!("collect.py"), "\n\n", include_str!("harness.py"));
/// Columns with tests; the first one a row has is used.
const TESTS: [&str; 3] = ["test", "tests", "test_list"];
/// Most characters of a reason.
const WHY: usize = 300;

/// Limits a recipe may set.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    sandbox: sandbox::Limits,
    allow_unsandboxed: bool,
}

impl Limits {
    /// Limits of a spec.
    ///
    /// # Errors
    /// A time limit of zero, or too little memory for an interpreter.
    pub(super) fn of(spec: &ScorerSpec) -> Result<Self> {
        let wall = spec.timeout_s.unwrap_or(10.0);
        if !(wall > 0.0 && wall <= 3600.0) {
            return Err(Error::usage(format!(
                "`timeout_s` is {wall}, expected more than 0 and up to 3600"
            )));
        }
        let memory = spec.memory_mb.unwrap_or(1024);
        if !(64..=1 << 20).contains(&memory) {
            return Err(Error::usage(format!(
                "`memory_mb` is {memory}, expected 64 to {}",
                1 << 20
            )));
        }
        let sandbox = sandbox::Limits {
            wall: Duration::from_secs_f64(wall),
            cpu_s: wall.ceil() as u64,
            memory: memory << 20,
            ..sandbox::Limits::default()
        };
        Ok(Self { sandbox, allow_unsandboxed: spec.allow_unsandboxed })
    }
}

/// Runs Python programs against tests.
pub(super) struct Code {
    sandbox: Sandbox,
}

impl Code {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        let limits = Limits::of(spec)?;
        if !std::path::Path::new(PYTHON).exists() {
            return Err(Error::run(format!("no {PYTHON} to run programs with"))
                .hint("apt install python3; a Python elsewhere is not seen from the sandbox"));
        }
        Ok(Self { sandbox: Sandbox::new(limits.sandbox, limits.allow_unsandboxed)? })
    }

    fn run(&self, program: &str, tests: &str) -> Result<Score> {
        let (ready, passed) = (secret(), secret());
        let input = [program, tests, &passed].concat();
        let sizes = [program.len().to_string(), tests.len().to_string()];
        let command = [PYTHON, "-s", "-B", "-c", HARNESS, &sizes[0], &sizes[1], &ready];
        let execution = self.sandbox.run(&command, input.as_bytes())?;
        let errors = execution.stderr.text();
        match errors.split_once(&format!("{ready}\n")) {
            Some((_, errors)) => Ok(verdict(&execution, &passed, errors)),
            None if execution.ending == Ending::Exited(4) => Err(Error::run(format!(
                "the row's tests are not valid Python: {}",
                last_lines(&errors)
            ))),
            None if execution.ending == Ending::Exited(5) => {
                let why = errors.lines().last().unwrap_or_default();
                Err(Error::run(format!("the row's tests cannot be used: {why}"))
                    .hint("docs/verifiers.md says which tests `code` finds and runs"))
            }
            // Out of time or memory before the program's first line: the user's limits are to blame.
            None if !matches!(execution.ending, Ending::Exited(_)) => {
                Ok(verdict(&execution, &passed, &errors))
            }
            None => Err(Error::run(format!("the sandbox failed: {}", last_lines(&errors)))
                .hint("try again; with less work at once if it lacks processes or memory")),
        }
    }
}

impl Rule for Code {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let tests = tests(question)?;
        self.run(&program(question, text), &tests)
    }

    fn verify_all(&self, question: &Question<'_>, texts: &[&str]) -> Result<Vec<Score>> {
        side_by_side(texts, |text| self.verify(question, text))
    }

    fn runs_programs(&self) -> bool {
        true
    }
}

/// Runs `work` on all texts in a separate thread pool: blocking the global pool's compute threads on programs would
/// stall the model that generates the next answers.
fn side_by_side(texts: &[&str], work: impl Fn(&str) -> Result<Score> + Sync) -> Result<Vec<Score>> {
    // One thread per program that may run at once. If the system refuses threads, programs run sequentially.
    static WAITING: OnceLock<Option<ThreadPool>> = OnceLock::new();
    let pool = WAITING.get_or_init(|| {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let named = ThreadPoolBuilder::new().thread_name(|at| format!("programs-{at}"));
        named.num_threads(cores).build().ok()
    });
    match pool {
        Some(pool) => pool.install(|| texts.par_iter().map(|text| work(text)).collect()),
        None => texts.iter().map(|text| work(text)).collect(),
    }
}

/// An unguessable word.
fn secret() -> String {
    use std::hash::{BuildHasher, RandomState};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // The standard library seeds each of these from OS randomness. No output depends on it.
    let keys = [RandomState::new(), RandomState::new()];
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let bytes = keys.map(|key| key.hash_one(count).to_le_bytes());
    store::hex(&bytes.concat())
}

fn verdict(execution: &Execution, passed: &str, errors: &str) -> Score {
    let written = execution.stdout.text();
    let own = written.strip_suffix(passed);
    // A background thread may write after the word, which differs in every run.
    let streams = Some(Streams::of(&written.replace(passed, ""), errors));
    Score { streams, ..judgement(execution, own.is_some(), errors) }
}

/// `said`: whether it printed the secret known only after the tests.
fn judgement(execution: &Execution, said: bool, errors: &str) -> Score {
    let seconds = execution.wall.as_secs_f64();
    match execution.ending {
        Ending::Exited(0) if said => judged(true, "tests passed"),
        Ending::Exited(0) => judged(false, "ended before the tests did"),
        Ending::TimedOut => judged(false, format!("not done after {seconds:.0} s")),
        Ending::OutOfMemory => judged(false, "too much memory"),
        Ending::Exited(status) if errors.trim().is_empty() => {
            judged(false, format!("exit status {status}"))
        }
        Ending::Signal(signal) => judged(false, format!("killed by signal {signal}")),
        Ending::Exited(_) => judged(false, last_lines(errors)),
    }
}

/// The last three non-empty lines, truncated.
fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let lines = lines[lines.len().saturating_sub(3)..].join(" | ");
    let cut = lines.chars().count().saturating_sub(WHY);
    lines.chars().skip(cut).collect()
}

/// The row's tests as one program, ending with a call of `check` if they define it.
///
/// # Errors
/// No tests, none that are text, or a `check` without a name to call it with.
pub(crate) fn tests(question: &Question<'_>) -> Result<String> {
    let found = TESTS.iter().find_map(|name| Some((*name, column(question, name)?)));
    let Some((name, tests)) = found else {
        return Err(Error::run(format!("the row has no tests: no column {}", TESTS.join(", ")))
            .hint("map its column, e.g. columns = {tests = \"unit_tests\"}"));
    };
    let mut text = String::new();
    if let Some(Value::String(setup)) = column(question, "test_setup_code") {
        text = format!("{setup}\n");
    }
    match tests {
        Value::String(tests) => text.push_str(tests),
        Value::Array(list) => {
            for test in list {
                let Value::String(test) = test else {
                    return Err(
                        Error::run(format!("a test is {}, expected text", kind(test))).at(name)
                    );
                };
                text = text + test + "\n";
            }
        }
        other => {
            return Err(Error::run(format!(
                "`{name}` is {}, expected text or a list of texts",
                kind(other)
            )));
        }
    }
    let defines_check =
        pattern!(r"(?m)^[ \t]*def check[ \t]*\(").is_some_and(|check| check.is_match(&text));
    match column(question, "entry_point") {
        Some(Value::String(entry)) if defines_check => {
            text = format!("{text}\n\ncheck({entry})\n");
        }
        None if defines_check && is_idle_check(&text) => {
            return Err(Error::run(
                "the row's tests define `check`, which nothing calls: no column entry_point",
            )
            .hint(
                "map the column that names the function, e.g. columns = {entry_point = \"name\"}",
            ));
        }
        _ => {}
    }
    Ok(text)
}

/// Whether the tests define a `check` with a parameter and never call it.
fn is_idle_check(tests: &str) -> bool {
    let calls = pattern!(r"\bcheck[ \t]*\(").map_or(0, |call| call.find_iter(tests).count());
    let needs = pattern!(r"(?m)^[ \t]*def check[ \t]*\(\s*\w");
    calls == 1 && needs.is_some_and(|check| check.is_match(tests))
}

/// The program to run: the prompt, if it is the beginning of the program, then the answer's code.
fn program(question: &Question<'_>, text: &str) -> String {
    let entry = column(question, "entry_point").and_then(Value::as_str);
    let code = code_of(after_thoughts(text), entry);
    match beginning(question) {
        Some(beginning) => format!("{beginning}\n{code}\n"),
        None => format!("{code}\n"),
    }
}

/// The prompt's code that begins the function (HumanEval). An answer that repeats all of it replaces it.
fn beginning(question: &Question<'_>) -> Option<String> {
    let entry = column(question, "entry_point")?.as_str()?;
    let prompt = question.prompt.iter().rev().find(|message| message.role() == "user")?.text();
    let code = code_of(&prompt, Some(entry));
    let starts = ["from ", "import ", "def ", "class ", "@", "#", "\"\"\""];
    let code_start = code.trim_start();
    let is_code = starts.iter().any(|start| code_start.starts_with(start))
        || pattern!(r"\A[A-Za-z_]\w* = ").is_some_and(|assigns| assigns.is_match(code_start));
    (is_code && code.contains(&format!("def {entry}"))).then(|| code.trim_end().to_owned())
}

/// The last fenced Python block that defines the function; else the last that defines anything; else the last block;
/// else the whole text: a usage example often follows the solution. An unclosed block ends with the text. A text that
/// starts as code is one block up to its first fence.
fn code_of(text: &str, entry: Option<&str>) -> String {
    if let Some((before, after)) = text.split_once("```")
        && after.lines().next().is_none_or(|tag| tag.trim().is_empty())
        && continues(before)
    {
        return before.to_owned();
    }
    let Some(fence) = pattern!(r"(?s)```([^\n`]*)\n(.*?)(?:\n[ \t]*```|\z)") else {
        return text.to_owned();
    };
    let blocks: Vec<(String, &str)> = fence
        .captures_iter(text)
        .filter_map(|block| Some((block[1].trim().to_lowercase(), block.get(2)?.as_str())))
        .collect();
    let is_python = |tag: &str| ["python", "python3", "py"].contains(&tag);
    let any_python = blocks.iter().any(|(tag, _)| is_python(tag));
    let blocks = blocks.iter().filter(|(tag, _)| !any_python || is_python(tag));
    let blocks: Vec<&str> = blocks.map(|(_, code)| *code).collect();
    let last = |is: &dyn Fn(&str) -> bool| blocks.iter().rfind(|code| is(code)).copied();
    let solution = entry.and_then(|entry| last(&|code| defines(code, entry)));
    let solution =
        solution.or_else(|| last(&|code| STARTS.iter().any(|start| has_line(code, start))));
    solution.or(blocks.last().copied()).unwrap_or(text).to_owned()
}

/// Line prefixes of definitions.
const STARTS: [&str; 3] = ["def ", "class ", "async def "];

fn has_line(code: &str, start: &str) -> bool {
    code.lines().any(|line| line.trim_start().starts_with(start))
}

fn defines(code: &str, name: &str) -> bool {
    let rest = |line: &str| line.trim_start().strip_prefix("def ").map(str::to_owned);
    let named = |rest: String| {
        rest.trim_start().strip_prefix(name).map(|rest| rest.trim_start().starts_with('('))
    };
    code.lines().any(|line| rest(line).and_then(named) == Some(true))
}

/// Whether a text is a program or its continuation, rather than prose before a block.
fn continues(text: &str) -> bool {
    let Some(first) = text.lines().find(|line| !line.trim().is_empty()) else { return false };
    let code = ["from ", "import ", "@", "#!"].iter().chain(&STARTS);
    first.starts_with([' ', '\t']) || code.into_iter().any(|start| first.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_is_the_block_that_defines_the_requested_function() {
        let of = |text: &str| code_of(text, Some("square"));
        let solution = "def square(x):\n    return x * x";
        let usage = "print(square(2))";
        for text in [
            format!("Here:\n```python\n{solution}\n```\nCall it:\n```python\n{usage}\n```"),
            format!("```python\n{usage}\n```\n```python\n{solution}\n```\n```\n4\n```"),
            format!("```py\n{solution}\n```\n```python\ndef other():\n    pass\n```"),
            format!("It is this:\n```\n{solution}"),
        ] {
            assert_eq!(of(&text), solution, "{text}");
        }
        // Without a name, the block that defines something; a longer name is another function.
        let text = format!("```python\n{solution}\n```\n```python\n{usage}\n```");
        assert_eq!(code_of(&text, None), solution);
        assert_eq!(code_of(&text, Some("squa")), solution);
        // The rest of a function ends at a fence that opens no block.
        let body = "    return x * x\n";
        for end in ["```", "```\nThis squares it.", "```\n\n```python\nprint(square(2))\n```"] {
            assert_eq!(of(&format!("{body}{end}")), body);
        }
        assert_eq!(of(body), body);
    }

    #[test]
    fn programs_are_awaited_in_dedicated_threads() {
        let name = |text: &str| {
            let thread = thread::current().name().unwrap_or_default().to_owned();
            Ok(judged(true, format!("{text} {thread}")))
        };
        for (at, score) in side_by_side(&["0", "1", "2"], name).unwrap().iter().enumerate() {
            assert!(score.why.starts_with(&format!("{at} programs-")), "{}", score.why);
        }
        assert!(side_by_side(&["0"], |_| Err(Error::run("no tests"))).is_err());
    }
}
