//! The command line as a user meets it: help, mistakes, exit statuses, and a run from beginning to end.

#![expect(clippy::unwrap_used, reason = "a test program; a failure here is a failed test")]

use std::path::Path;

use arriero::ops::cpu::isa::Isa;
use assert_cmd::Command;

/// Runs `arriero` and returns (exit status, standard output, standard error).
fn arriero(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("arriero").unwrap().args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// Fails unless `arriero` refuses the arguments with status 2 and exactly this text.
#[track_caller]
fn refuses(arguments: &[&str], expected: &str) {
    let (status, stdout, stderr) = arriero(arguments);
    assert_eq!((status, stdout.as_str(), stderr.trim_end()), (2, "", expected));
}

const RECIPE: &str = "tests/fixtures/recipes/select.toml";

#[test]
fn help_lists_every_command() {
    let (status, stdout, _) = arriero(&["--help"]);
    assert_eq!(status, 0);
    let commands: Vec<&str> = stdout
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    insta::assert_snapshot!(
        commands.join(" "),
        @"run ls cp validate plan report merge export score chat serve doctor bench synth sft reward sample select dpo average eval help"
    );
}

#[test]
fn mistakes_exit_with_status_2_and_a_hint() {
    refuses(
        &["run", RECIPE, "select.min_scor=1"],
        "error: `select.min_scor=1`: stage `select`: unknown key `min_scor`\nhint: did you mean `min_score`?",
    );
    refuses(
        &["run", RECIPE, "select.best_of=many"],
        "error: `select.best_of=many`: stage `select`: `best_of` is \"many\", expected a whole number, 0 or more",
    );
    refuses(
        &["run", RECIPE, "round=2"],
        "error: `round=2`: unknown key `round`\nhint: did you mean `rounds`?",
    );
    refuses(
        &["run", RECIPE, "select.datasets=@sample"],
        "error: `select.datasets=@sample`: stage `select`: `datasets`: `@sample` names no stage of this recipe\nhint: there is: select",
    );
    refuses(
        &["run", "missing.toml"],
        "error: no recipe `missing.toml`\nhint: `arriero ls` lists the recipes that come with the program",
    );
    refuses(
        &["report", "tests"],
        "error: `tests` is not a run directory\nhint: it has no plan.json; `arriero run` writes runs under runs/",
    );
    let (status, _, stderr) = arriero(&["valdate"]);
    assert_eq!(status, 2);
    assert!(stderr.contains("'validate'"), "{stderr}");
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_program_without_cuda_says_how_to_build_one_with_it() {
    let run = tempfile::tempdir().unwrap();
    let out = run.path().to_str().unwrap();
    refuses(
        &["run", RECIPE, "device=cuda:1", "--out", out],
        "error: `device` is \"cuda:1\": this program was built for the CPU alone\nhint: build the other one with `cargo build --release --features cuda` and put it beside this one as arriero-cuda",
    );
}

#[test]
fn a_recipe_runs_reports_and_is_reused() {
    let run = tempfile::tempdir().unwrap();
    let out = run.path().to_str().unwrap();
    let (status, stdout, stderr) = arriero(&["run", RECIPE, "--out", out, "--json"]);
    assert_eq!(status, 0, "{stderr}");
    let summary = |stdout: &str| -> serde_json::Value {
        serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
    };
    let first = summary(&stdout);
    assert_eq!(first["stages"][0]["name"], "select");
    assert_eq!(first["stages"][0]["reused"], false);
    assert!(first["peak_rss_bytes"].as_u64().unwrap() > 0);
    for file in
        ["recipe.toml", "plan.json", "report.md", "report.html", "stages/01-select/pairs.jsonl"]
    {
        assert!(run.path().join(file).is_file(), "{file}");
    }
    let (status, stdout, _) = arriero(&["run", RECIPE, "--out", out, "--json"]);
    assert_eq!(
        (status, &summary(&stdout)["stages"][0]["reused"]),
        (0, &serde_json::Value::Bool(true))
    );
    let (_, stdout, _) = arriero(&["run", RECIPE, "select.best_of=2", "--out", out, "--json"]);
    assert_eq!(summary(&stdout)["stages"][0]["reused"], false);
    assert_eq!(arriero(&["report", out]).0, 0);
    for file in ["recipe.toml", "report.md"] {
        let text = std::fs::read_to_string(run.path().join(file)).unwrap();
        assert!(text.contains("# Changed on the command line:\n# select.best_of=2\n"), "{text}");
    }
}

#[test]
fn data_that_a_recipe_needs_is_named() {
    let (status, stdout, _) = arriero(&["ls"]);
    assert_eq!(status, 0);
    assert!(stdout.contains("the better ones preferred.\n"), "{stdout}");
    assert!(stdout.contains("  needs data/tiny (in the repository)\n"), "{stdout}");
    let elsewhere = tempfile::tempdir().unwrap();
    let output = Command::cargo_bin("arriero")
        .unwrap()
        .args(["run", "quickstart"])
        .current_dir(elsewhere.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    let hint = "hint: data/tiny is part of arriero's repository: run in a checkout of it";
    assert!(stderr.contains(hint), "{stderr}");
}

#[test]
fn setting_with_dashes_gets_a_tip_to_drop_them() {
    for arguments in [
        &["sft", "--learning_rate=1e-4"][..],
        &["sft", "--learning_rate", "1e-4"],
        &["run", RECIPE, "--learning_rate=1e-4"],
    ] {
        let (status, _, stderr) = arriero(arguments);
        assert_eq!(status, 2);
        assert!(stderr.contains("tip: settings have no dashes: learning_rate=1e-4"), "{stderr}");
    }
    let (_, _, stderr) = arriero(&["sft", "--jsn"]);
    assert!(stderr.contains("--json") && !stderr.contains("settings"), "{stderr}");
}

#[test]
fn a_second_process_on_the_same_run_is_refused() {
    let run = tempfile::tempdir().unwrap();
    let _lock = arriero::store::RunLock::acquire(run.path()).unwrap();
    let (status, _, stderr) = arriero(&["run", RECIPE, "--out", run.path().to_str().unwrap()]);
    assert_eq!(status, 1);
    let expected = format!(
        "error: {}: in use by another process {}\nhint: wait until it ends, or give this run another directory with --out",
        run.path().display(),
        std::process::id()
    );
    assert_eq!(stderr.trim_end(), expected);
}

/// One step of SFT with the kernels of an instruction set; its summary, or the refusal.
fn train_with(isa: &str) -> (i32, String, String) {
    let run = tempfile::tempdir().unwrap();
    let output = Command::cargo_bin("arriero")
        .unwrap()
        .env("ARRIERO_ISA", isa)
        .args(["sft", "model_name_or_path=data/tiny/student", "chat_template=chatml", "--json"])
        .args(["datasets=tests/fixtures/recipes/conversations.jsonl", "max_steps=1", "--out"])
        .arg(run.path())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn training_step_is_bitwise_equal_on_every_instruction_set() {
    let hash = |isa: &str| -> String {
        let (status, stdout, stderr) = train_with(isa);
        assert_eq!(status, 0, "{isa}: {stderr}");
        let summary: serde_json::Value =
            serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
        summary["stages"][0]["weights_sha256"].as_str().unwrap().to_owned()
    };
    let expected = hash("");
    for isa in Isa::ALL {
        if isa.is_supported() {
            assert_eq!(hash(isa.name()), expected, "{}", isa.name());
        } else {
            let (status, _, stderr) = train_with(isa.name());
            assert!(status == 2 && stderr.contains("which this processor lacks"), "{stderr}");
        }
    }
    let (status, _, stderr) = train_with("avx3");
    assert!(status == 2 && stderr.contains("hint: did you mean `avx2`?"), "{stderr}");
}

#[test]
fn one_stage_runs_without_a_recipe() {
    let run = tempfile::tempdir().unwrap();
    let out = run.path().to_str().unwrap();
    let data = "datasets=tests/fixtures/recipes/candidates.jsonl";
    let (status, _, stderr) = arriero(&["select", data, "best_of=1", "--out", out]);
    assert_eq!(status, 0, "{stderr}");
    assert!(run.path().join("stages/01-select/sft.jsonl").is_file());
}

#[test]
fn models_are_averaged_and_the_run_is_exported() {
    const TEACHER: &str = "data/tiny/teacher";
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    // A path may have the sign that settings have.
    let (run, gguf) = (path("lr=1e-4"), path("mean.gguf"));
    let average = ["average", TEACHER, TEACHER, "weights=[3,1]", "--out", &run, "--json"];
    let (status, stdout, stderr) = arriero(&average);
    assert_eq!(status, 0, "{stderr}");
    let summary: serde_json::Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(summary["stages"][0]["metrics"]["models"], 2.0);
    let (status, stdout, stderr) = arriero(&["export", &run, "--dtype", "q8_0", "--out", &gguf]);
    assert_eq!(status, 0, "{stderr}");
    let expected = format!("{gguf}: {run}/stages/01-average/checkpoint as q8_0");
    assert!(stdout.starts_with(&expected) && stdout.contains("KL "), "{stdout}");
    // A GGUF file is a model like any other.
    let (bf16, stage) = (path("bf16"), format!("{run}/stages/01-average"));
    let export = ["export", &gguf, "--dtype", "bf16", "--out", &bf16, "--json"];
    let (status, stdout, stderr) = arriero(&export);
    assert_eq!(status, 0, "{stderr}");
    let about: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert!(about["kl"].as_f64().unwrap() < 0.05, "{about}");
    refuses(
        &["export", &stage, "--dtype", "q4_0", "--out", &path("new")],
        "error: safetensors in q4_0, expected f32, f16 or bf16\nhint: quantised weights need --format gguf",
    );
    refuses(
        &["export", &stage, "--out", &bf16],
        &format!("error: {bf16}: exists already\nhint: give the name of a new file or directory"),
    );
    refuses(
        &["average", &stage, "method=slerp", "--out", &path("slerp")],
        &format!(
            "error: `models=[\"{stage}\"]`: stage `average`: `models` has 1 entries, `slerp` takes 2"
        ),
    );
}

/// An adapter's checkpoint is a model: of a run it is the last that was made.
#[test]
#[expect(clippy::disallowed_methods, reason = "the data of a test")]
fn a_run_of_adapters_is_exported_and_merged() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    let (data, run, gguf, merged) = (path("a.jsonl"), path("run"), path("a.gguf"), path("merged"));
    std::fs::write(&data, "{\"prompt\": \"1 + 1\", \"completion\": \"2\"}\n".repeat(4)).unwrap();
    let datasets = format!("datasets={data}");
    let model = "model_name_or_path=data/tiny/student";
    let sft = ["sft", model, &datasets, "use_peft=true", "lora_r=2", "max_steps=1", "--out", &run];
    let (status, _, stderr) = arriero(&sft);
    assert_eq!(status, 0, "{stderr}");
    let (status, stdout, stderr) = arriero(&["export", &run, "--dtype", "f32", "--out", &gguf]);
    assert_eq!(status, 0, "{stderr}");
    let checkpoint = format!("{run}/stages/01-sft/checkpoint");
    assert!(stdout.starts_with(&format!("{gguf}: {checkpoint} as f32")), "{stdout}");
    let (status, stdout, stderr) = arriero(&["merge", &checkpoint, "--out", &merged]);
    assert_eq!(status, 0, "{stderr}");
    assert!(stdout.contains(&format!("adapters merged into {merged}: ")), "{stdout}");
}

/// What a rounded policy says is weighed by its whole weights: against those as a reference nothing diverges.
#[test]
fn rounded_policy_is_rescored_by_its_unrounded_weights() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("run").display().to_string();
    let datasets = "datasets=[{path=\"data/tiny/heldout.jsonl\",limit=6}]";
    let student = "data/tiny/student";
    let [model, reference] =
        ["model_name_or_path", "reference"].map(|key| format!("{key}={student}"));
    let eval = ["eval", &model, &reference, datasets, "quantization=q4_0", "max_new_tokens=16"];
    let (status, stdout, stderr) = arriero(&[&eval[..], &["--json", "--out", &out]].concat());
    assert_eq!(status, 0, "{stderr}");
    let said: serde_json::Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    let kl = said.pointer("/stages/0/metrics/kl").and_then(serde_json::Value::as_f64).unwrap();
    assert!(kl.abs() < 1e-5, "{kl}");
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the data of a test")]
fn a_file_is_scored_by_a_verifier_and_by_a_reward_model() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    let (data, pairs, out, run) =
        (path("a.jsonl"), path("pairs.jsonl"), path("out.jsonl"), path("run"));
    let row = |reply: &str| {
        format!("{{\"question\": \"1 + 1?\", \"reply\": \"{reply}\", \"solution\": \"2\"}}\n")
    };
    std::fs::write(&data, row("It is 2.") + &row("It is 3.")).unwrap();
    let columns = ["prompt=question", "completion=reply", "answer=solution"];
    let columns: Vec<&str> = columns.iter().flat_map(|pair| ["--column", *pair]).collect();
    let score = |judge: &[&str]| {
        let files = ["--data", &data, "--out", &out];
        let (status, stdout, stderr) = arriero(&[&["score"], judge, &columns, &files].concat());
        assert_eq!(status, 0, "{stderr}");
        let rows = std::fs::read_to_string(&out).unwrap();
        let of_row = |line: &str| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            row["score"].as_f64().unwrap()
        };
        (stdout, rows.lines().map(of_row).collect::<Vec<f64>>())
    };
    let (said, scores) = score(&["--verifier", "number"]);
    assert_eq!(scores, [1.0, 0.0]);
    assert!(said.contains("2 rows, 2 completions, mean score 0.5000, 1 passed"), "{said}");
    std::fs::remove_file(&out).unwrap();

    let pair = "{\"prompt\": \"1 + 1?\", \"chosen\": \"2\", \"rejected\": \"3\"}\n";
    std::fs::write(&pairs, pair.repeat(4)).unwrap();
    let datasets = format!("datasets={pairs}");
    let model = "model_name_or_path=data/tiny/student";
    let (status, _, stderr) = arriero(&["reward", model, &datasets, "max_steps=1", "--out", &run]);
    assert_eq!(status, 0, "{stderr}");
    let (_, scores) = score(&["--reward-model", &format!("{run}/stages/01-reward/checkpoint")]);
    let apart = (scores[0] - scores[1]).abs();
    assert!(scores.len() == 2 && apart.is_finite() && apart > 0.0, "{scores:?}");
}

#[test]
fn recipes_are_copied_once_and_validated() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("mine.toml");
    let copy = copy.to_str().unwrap();
    assert_eq!(arriero(&["cp", RECIPE, copy]).0, 0);
    assert!(Path::new(copy).is_file());
    let (status, _, stderr) = arriero(&["cp", RECIPE, copy]);
    assert!(status == 2 && stderr.contains("is already there"), "{stderr}");
    let (status, stdout, _) = arriero(&["validate", RECIPE]);
    assert_eq!(status, 0);
    assert!(stdout.contains("01-select (select)") && stdout.contains("best_of = 1"), "{stdout}");
    let (status, stdout, _) = arriero(&["plan", RECIPE, "seed=3"]);
    assert_eq!(status, 0);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&stdout).unwrap()["seed"], 3);
}

/// Models and rows that are here already are looked at before a run would come to them.
#[test]
#[expect(clippy::disallowed_methods, reason = "the data of a test")]
fn validate_checks_models_and_the_rows_of_judging_stages() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let row = "{\"prompt\": \"2+2?\", \"answer\": \"4\"}\n";
    std::fs::write(path("rows.jsonl"), row).unwrap();
    std::fs::write(path("bare.jsonl"), format!("{row}{{\"prompt\": \"3+3?\"}}\n")).unwrap();
    let validated = |rows: &str, scorer: &str| {
        let (recipe, rows) = (path("r.toml"), path(rows));
        let stage = "[[stage]]\nkind = 'eval'\nmodel_name_or_path = 'data/tiny/student'";
        let scorers = format!("scorers = [{{verifier = 'number'}}{scorer}]");
        std::fs::write(&recipe, format!("{stage}\ndatasets = ['{rows}']\n{scorers}\n")).unwrap();
        let (status, _, stderr) = arriero(&["validate", &recipe]);
        (status, stderr)
    };
    assert_eq!(validated("rows.jsonl", "").0, 0);
    let (status, stderr) = validated("bare.jsonl", "");
    let lacks = "bare.jsonl:2: scorer `number`: the row has no `answer`";
    assert!(status == 1 && stderr.contains(lacks), "{stderr}");
    let no_model = format!(", {{reward_model = '{}'}}", dir.path().display());
    let (status, stderr) = validated("rows.jsonl", &no_model);
    assert!(status == 1 && stderr.contains("`reward_model`: "), "{stderr}");
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the data of a test")]
fn validate_shows_labelled_responses() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, r#"{"prompt": "How many?", "completion": "4 pears", "label": true}"#)
        .unwrap();
    let recipe = dir.path().join("kto.toml");
    let stage =
        "[[stage]]\nkind = 'dpo'\nmodel_name_or_path = 'data/tiny/student'\nloss_type = 'kto'";
    let text = format!("{stage}\ndatasets = ['{}']\n", rows.display());
    std::fs::write(&recipe, text).unwrap();
    let (status, stdout, stderr) = arriero(&["validate", recipe.to_str().unwrap()]);
    assert!(status == 0 && stdout.contains("4 pears"), "{stdout} {stderr}");
}

#[test]
fn chat_answers_line_by_line_and_keeps_the_conversation() {
    let output = Command::cargo_bin("arriero")
        .unwrap()
        .args(["chat", "data/tiny/teacher", "temperature=0.0"])
        .write_stdin(
            "Tom has 6 eggs and finds 8 more. How many eggs does Tom have now?\n\
             Ben has 9 pens and gives 4 to Iris. How many pens does Ben have left?\n",
        )
        .output()
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(output.status.success() && lines.len() == 2, "{stdout}");
    assert!(lines[0].contains("6 + 8 = 14") && lines[1].contains("pens"), "{stdout}");
    let (status, _, stderr) = arriero(&["chat", "data/tiny/teachr"]);
    assert!(status == 1 && stderr.contains("did you mean `teacher`?"), "{stderr}");
}

#[test]
fn doctor_and_ls_succeed_and_an_unknown_device_is_refused() {
    let (status, stdout, _) = arriero(&["doctor"]);
    assert_eq!(status, 0);
    assert!(stdout.contains("HF_HOME") && stdout.contains("cuda"), "{stdout}");
    assert_eq!(arriero(&["ls"]).0, 0);
    let (status, stdout, _) = arriero(&["doctor", "--device", "cpu", "--check"]);
    assert_eq!(status, 0, "{stdout}");
    assert!(stdout.starts_with("cpu\n") && stdout.contains("attention"), "{stdout}");
    refuses(
        &["doctor", "--device", "gpu"],
        "error: `device` is \"gpu\", expected \"cpu\" or \"cuda:N\"",
    );
}

/// Where a GPU is asked for, the program beside this one takes over with the same words; without a driver it says so.
#[cfg(not(feature = "cuda"))]
#[test]
fn the_program_for_gpus_takes_over() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("arriero");
    std::fs::hard_link(assert_cmd::cargo::cargo_bin("arriero"), &own)
        .or_else(|_| std::fs::copy(assert_cmd::cargo::cargo_bin("arriero"), &own).map(|_| ()))
        .unwrap();
    let run = |script: &str| {
        let beside = folder.path().join("arriero-cuda");
        let version = env!("CARGO_PKG_VERSION");
        let text = format!("#!/bin/sh\n{}\n", script.replace("VERSION", version));
        arriero::store::write_atomic(&beside, text.as_bytes()).unwrap();
        std::fs::set_permissions(&beside, PermissionsExt::from_mode(0o755)).unwrap();
        let output = Command::new(&own).args(["doctor", "--device", "cuda:1"]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let answers =
        "if [ \"$1\" = --version ]; then echo arriero VERSION; else echo \"got $*\"; exit 7; fi";
    let taken = (Some(7), "got doctor --device cuda:1\n".to_owned(), String::new());
    assert_eq!(run(answers), taken);
    let fails = "echo 'arriero-cuda: error while loading shared libraries: libcuda.so.1: cannot open shared object file: \
                 No such file or directory' >&2; exit 127";
    let (status, stdout, stderr) = run(fails);
    assert_eq!((status, stdout.as_str()), (Some(1), ""), "{stderr}");
    insta::assert_snapshot!(
        stderr.trim_end(),
        @r#"
    error: `device` is "cuda:1": this machine has no NVIDIA driver: there is no libcuda.so.1
    hint: install driver 580 or newer; device = "cpu" works without
    "#
    );
}
