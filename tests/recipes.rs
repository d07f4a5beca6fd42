//! The program end to end on a recipe in small: run, run again, and kill -9 at every kind of moment.

#![expect(clippy::unwrap_used, reason = "a test program; a failure here is a failed test")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const RECIPE: &str = "tests/fixtures/tiny/two-rounds.toml";

fn arriero(out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arriero"));
    command.args(["run", RECIPE, "--json", "--out"]).arg(out);
    command
}

/// Runs to the end; name, round, reuse and weights of every stage.
fn finish(out: &Path) -> Vec<(String, u64, bool, String)> {
    let done = arriero(out).output().unwrap();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{stderr}");
    let stdout = String::from_utf8(done.stdout).unwrap();
    let summary: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    let stage = |stage: &Value| {
        let text = |key: &str| stage[key].as_str().unwrap_or("").to_owned();
        (
            text("name"),
            stage["round"].as_u64().unwrap(),
            stage["reused"].as_bool().unwrap(),
            text("weights_sha256"),
        )
    };
    summary["stages"].as_array().unwrap().iter().map(stage).collect()
}

fn weights(stages: &[(String, u64, bool, String)]) -> Vec<(String, u64, String)> {
    stages.iter().map(|(name, round, _, hash)| (name.clone(), *round, hash.clone())).collect()
}

/// Whether a path below `dir` contains all of `parts`.
fn appeared(dir: &Path, parts: &[&str]) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| {
        let path = entry.path();
        let text = path.to_string_lossy();
        parts.iter().all(|part| text.contains(part)) || (path.is_dir() && appeared(&path, parts))
    })
}

/// Starts the run and kills it as soon as a path with all `parts` is there. False where it ended before.
fn kill_when(out: &Path, parts: &[&str]) -> bool {
    let mut child = arriero(out).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !appeared(&out.join("stages"), parts) {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(started.elapsed() < Duration::from_secs(200), "{parts:?} never appeared");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

#[test]
fn a_run_repeats_resumes_after_kills_and_refuses_a_second_process() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let first = finish(&whole);
    assert_eq!(first.len(), 13);
    assert!(first.iter().all(|(_, _, reused, _)| !reused));
    let trained =
        first.iter().filter(|(name, ..)| ["sft", "reward", "dpo"].contains(&name.as_str()));
    assert!(trained.clone().all(|(_, _, _, hash)| hash.len() == 64) && trained.count() == 6);

    let again = finish(&whole);
    assert!(again.iter().all(|(_, _, reused, _)| *reused));
    assert_eq!(weights(&again), weights(&first));
    for file in ["report.md", "report.html", "plan.json", "recipe.toml"] {
        assert!(whole.join(file).is_file(), "{file}");
    }

    let killed = dir.path().join("killed");
    let moments: [&[&str]; 6] = [
        &["synth.work", "begun"],     // the teacher is about to answer, or answers
        &["sft.work", "step-000020"], // a training step after the first checkpoint
        &["sft.work", "partial"],     // a checkpoint is being written
        &["sample.work"],             // candidates are drawn
        &["select.work"],             // pairs are chosen
        &["r2", ".work"],             // the second round has begun
    ];
    let hits = moments.iter().filter(|parts| kill_when(&killed, parts)).count();
    assert!(hits >= 5, "only {hits} kills hit");
    assert_eq!(weights(&finish(&killed)), weights(&first));
}

#[test]
fn a_second_process_on_the_same_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut child = arriero(&out).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !appeared(&out, &["stages"]) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let second = arriero(&out).output().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let stderr = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && stderr.contains("in use by another process"), "{stderr}");
}

#[test]
fn an_interrupted_run_exits_130_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut child = arriero(&out).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !appeared(&out, &["sft.work"]) {
        assert!(child.try_wait().unwrap().is_none(), "ended before training");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert_eq!(finish(&out).len(), 13);
}
