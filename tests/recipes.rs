//! The program end to end on a recipe in small: run, run again, and kill -9 at every kind of moment.

#![expect(clippy::unwrap_used, reason = "a test program; a failure here is a failed test")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const RECIPE: &str = "tests/fixtures/tiny/two-rounds.toml";

fn arriero(out: &Path) -> Command {
    arriero_on(RECIPE, out)
}

fn arriero_on(recipe: &str, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arriero"));
    command.args(["run", recipe, "--json", "--out"]).arg(out);
    command
}

/// Runs to the end; name, round, reuse and weights of every stage.
fn finish(out: &Path) -> Vec<(String, u64, bool, String)> {
    finish_with(arriero(out))
}

fn finish_with(mut run: Command) -> Vec<(String, u64, bool, String)> {
    let done = run.output().unwrap();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{stderr}");
    stages(&done.stdout)
}

/// The stages of a run's summary, the last line that it printed.
fn stages(stdout: &[u8]) -> Vec<(String, u64, bool, String)> {
    let stdout = String::from_utf8(stdout.to_vec()).unwrap();
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

/// Whether a path below `dir` contains all of `parts`; a file counts once something is in it.
fn appeared(dir: &Path, parts: &[&str]) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| {
        let path = entry.path();
        let text = path.to_string_lossy();
        let found = || path.is_dir() || path.metadata().is_ok_and(|file| file.len() > 0);
        parts.iter().all(|part| text.contains(part)) && found()
            || path.is_dir() && appeared(&path, parts)
    })
}

/// Starts the run and kills it as soon as a path with all `parts` is there. False where it ended before.
fn kill_when(out: &Path, parts: &[&str]) -> bool {
    kill_run_when(arriero(out), out, parts)
}

fn kill_run_when(mut run: Command, out: &Path, parts: &[&str]) -> bool {
    let mut child = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
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
    let moments: [&[&str]; 9] = [
        &["synth.work", "ledger"],              // the teacher has answered a prompt
        &["sft.work", "step-000020/"],          // a training step after the first checkpoint
        &["sft.work", "partial"],               // a checkpoint is being written
        &["sample.work", "ledger"],             // candidates of a prompt are drawn
        &["-select"],                           // pairs are chosen, or just were
        &["reward.work", "checkpoint.partial"], // the reward model is being written
        &["dpo.work", "checkpoint.partial"],    // the policy is being written
        &["eval.work", "ledger"],               // a held-out prompt is judged
        &["sft-r2.work"],                       // the second round has begun
    ];
    for parts in moments {
        assert!(kill_when(&killed, parts), "the run ended before it was killed at {parts:?}");
    }
    assert_eq!(weights(&finish(&killed)), weights(&first));
    let left: Vec<_> = std::fs::read_dir(killed.join("stages/02-sft"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(!left.iter().any(|name| name == "checkpoints"), "scratch is left: {left:?}");
}

/// Runs in a file system of 8 MiB, which fills up while the first checkpoint is written, then in one with room.
const FULL: &str = r#"
    mount -t tmpfs -o size=8m full "$1" || exit 90
    "$2" run "$3" --out "$1/run"
    [ $? = 1 ] || exit 91
    mount -o remount,size=1g "$1" || exit 92
    exec "$2" run "$3" --json --out "$1/run"
"#;

#[test]
fn a_full_disk_stops_the_run_with_a_hint_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, whole) = (dir.path().join("disk"), dir.path().join("whole"));
    std::fs::create_dir(&disk).unwrap();
    // A name space of its own may mount without being root.
    let done = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", FULL, "sh"])
        .arg(&disk)
        .args([env!("CARGO_BIN_EXE_arriero"), RECIPE, "--json"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{:?}: {stderr}", done.status);
    assert!(stderr.contains("No space left on device") && stderr.contains("hint: "), "{stderr}");
    let after = stages(&done.stdout);
    assert_eq!(after.iter().filter(|(.., reused, _)| *reused).count(), 1, "the teacher's answers");
    assert_eq!(weights(&after), weights(&finish(&whole)));
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
    while !appeared(&out, &["sft.work", "step-000020/"]) {
        assert!(child.try_wait().unwrap().is_none(), "ended before training");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    let saved = std::fs::read_dir(out.join("stages/02-sft.work/checkpoints")).unwrap();
    let saved: Vec<_> =
        saved.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    // Checkpoints come every 20 steps: one of another step is what the interruption saved.
    let of_its_own = |name: &String| {
        name.strip_prefix("step-")
            .and_then(|step| step.parse::<u32>().ok())
            .is_some_and(|step| step % 20 != 0)
    };
    assert!(saved.iter().any(of_its_own), "what was trained is not saved: {saved:?}");
    let resumed = finish(&out);
    assert_eq!(weights(&resumed), weights(&finish(&dir.path().join("whole"))));
}

const REJECTION: &str = "tests/fixtures/tiny/rejection.toml";

/// Drawing by capability, references, a reward model, and the choice: what comes out does not depend on how often it
/// was killed.
#[test]
fn rejection_sampling_killed_five_times_ends_in_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    finish_with(arriero_on(REJECTION, &whole));
    let moments: [&[&str]; 5] = [
        &["drafts.work", "ledger"],             // the first answers are drawn
        &["reward.work", "checkpoint.partial"], // the reward model is being written
        &["04-sample.work", "ledger"], // the capability with a policy of its own, or the others
        &["04-sample.work", "data.jsonl"], // all are drawn, the page is being made
        &["-select"],                  // pairs are chosen, or just were
    ];
    for parts in moments {
        let run = arriero_on(REJECTION, &killed);
        assert!(kill_run_when(run, &killed, parts), "ended before it was killed at {parts:?}");
    }
    finish_with(arriero_on(REJECTION, &killed));
    for file in [
        "01-drafts/data.jsonl",
        "02-preferences/pairs.jsonl",
        "04-sample/data.jsonl",
        "04-sample/curve.json",
        "04-sample/candidates.html",
        "05-select/sft.jsonl",
        "05-select/pairs.jsonl",
    ] {
        let read = |run: &Path| std::fs::read(run.join("stages").join(file)).unwrap();
        assert!(!read(&whole).is_empty() && read(&whole) == read(&killed), "{file}");
    }
    let report = std::fs::read_to_string(whole.join("report.md")).unwrap();
    assert!(
        report.contains("04-sample: best of k by score") && report.contains("pass@6"),
        "{report}"
    );
}
