//! Rows that cannot be answered or judged, and programs that take a while: none of them may hold up the others.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use candle_core::Device;
use serde_json::{Value, json};

use super::generation;
use super::generation_tests::{lines, run, sampling, save_model};
use crate::data::record::{Message, Record, Row, Side};
use crate::error::Result;
use crate::generate::engine::Answer;
use crate::generate::sampling::Sampling;
use crate::generate::teacher::{Asked, Teacher, TeacherSpec};
use crate::recipe::Spec;
use crate::recipe::plan::{self, Dataset};
use crate::report::record::{Events, Silent};
use crate::score::Panel;
use crate::store;

/// Records a stage's notes.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Events for Notes {
    fn note(&self, text: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text.to_owned());
    }
}

/// Three prompts with answers of their own; the second has more bytes than the model has positions.
fn prompts(home: &Path) -> Vec<Dataset> {
    let long = "x".repeat(200);
    let row = |text: &str| {
        let said =
            json!([{"role": "user", "content": text}, {"role": "assistant", "content": "0"}]);
        json!({"messages": said, "answer": "0"}).to_string()
    };
    let path = home.join("prompts.jsonl");
    let rows = ["a", &long, "b"].map(row).join("\n");
    store::write_atomic(&path, rows.as_bytes()).unwrap();
    vec![Dataset { path: path.display().to_string(), ..Dataset::default() }]
}

/// The stages that generate, over the three prompts.
fn stages(home: &Path, skip_refused: bool) -> [(&'static str, Spec); 3] {
    let directory = home.join("policy");
    let model = if directory.exists() {
        directory.display().to_string()
    } else {
        save_model(&directory, 1, false)
    };
    let datasets = prompts(home);
    let stop = vec!["\u{fffd}".to_owned()];
    let sampling = Sampling { stop, skip_refused, ..sampling(4) };
    let scorers = vec![json!({"verifier": "length", "max": 20})];
    let sample = plan::Sample {
        model_name_or_path: model.clone(),
        datasets: datasets.clone(),
        sampling: sampling.clone(),
        scorers: scorers.clone(),
        include_reference: true,
        ..plan::Sample::default()
    };
    let eval = plan::Eval {
        model_name_or_path: model.clone(),
        datasets: datasets.clone(),
        sampling: sampling.clone(),
        scorers: scorers.clone(),
        reference: model.clone(),
    };
    let teacher = TeacherSpec::Local(model);
    let synth = plan::Synth { teacher, datasets, sampling, scorers, ..plan::Synth::default() };
    [("sample", Spec::Sample(sample)), ("eval", Spec::Eval(eval)), ("synth", Spec::Synth(synth))]
}

#[test]
fn prompt_without_room_ends_the_stage_or_is_counted_and_named() {
    let home = tempfile::tempdir().unwrap();
    for (name, spec) in stages(home.path(), false) {
        let error = format!("{:?}", run(home.path().join(name), &spec, &Silent).unwrap_err());
        assert!(error.contains("prompts.jsonl:2: ") && error.contains("positions"), "{error}");
        assert!(error.contains("hint: skip_refused = true"), "{error}");
    }
    for (name, spec) in stages(home.path(), true) {
        let notes = Notes::default();
        // In the directory where the error ended the work, like a resumed run.
        let dir = home.path().join(name);
        let metrics = run(dir.clone(), &spec, &notes).unwrap();
        let counts = [metrics["prompts"], metrics["skipped"]];
        assert_eq!(counts.map(|count| count as usize), [3, 1], "{name}: {metrics:?}");
        let notes = notes.0.into_inner().unwrap();
        let named = |note: &String| note.starts_with("1 prompts ") && note.ends_with(":2");
        assert!(notes.iter().any(named), "{name}: {notes:?}");
        let rows = lines(&dir.join("data.jsonl"));
        if name == "synth" {
            continue;
        }
        let unanswered: Vec<bool> = rows.iter().map(|row| row["unanswered"] == true).collect();
        assert_eq!(unanswered, [false, true, false], "{name}");
        let drawn: Vec<usize> =
            rows.iter().map(|row| row["candidates"].as_array().unwrap().len()).collect();
        let reference = usize::from(name == "sample");
        assert_eq!(drawn, [4, 0, 4].map(|drawn| drawn + reference), "{name}");
        // The unanswered prompt does not count in the statistics.
        let curve: Value = store::read_json(&dir.join("curve.json")).unwrap();
        assert_eq!((&curve["prompts"], &curve["samples"]), (&json!(2), &json!(4)), "{name}");
    }
}

#[test]
fn answer_a_local_judge_cannot_read_fails_with_a_reason() {
    let home = tempfile::tempdir().unwrap();
    // The rubric alone has more bytes than this judge has positions.
    let judge = save_model(&home.path().join("judge"), 2, false);
    let policy = save_model(&home.path().join("policy"), 1, false);
    let path = home.path().join("prompts.jsonl");
    store::write_atomic(&path, b"{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}").unwrap();
    let datasets = vec![Dataset { path: path.display().to_string(), ..Dataset::default() }];
    let sample = |scorer: Value| {
        let scorers = vec![scorer];
        let spec = plan::Sample {
            model_name_or_path: policy.clone(),
            datasets: datasets.clone(),
            sampling: sampling(2),
            scorers,
            ..plan::Sample::default()
        };
        let dir = home.path().join("sampled");
        run(dir.clone(), &Spec::Sample(spec), &Silent)
            .map(|metrics| (lines(&dir.join("data.jsonl")), metrics))
    };
    let error = format!("{:?}", sample(json!({"judge": judge})).unwrap_err());
    assert!(error.contains("scorer `judge`") && error.contains("on_error = \"fail\""), "{error}");
    let (rows, metrics) = sample(json!({"judge": judge, "on_error": "fail"})).unwrap();
    assert_eq!(metrics["unjudged"] as usize, 4, "{metrics:?}");
    // There is no verifier, so nothing is reported as right.
    let right = ["accuracy", "pass@1", "pass@2"];
    assert!(right.iter().all(|name| !metrics.contains_key(*name)), "{metrics:?}");
    for one in rows.iter().flat_map(|row| row["candidates"].as_array().unwrap()) {
        assert_eq!((&one["passed"], &one["scores"]), (&json!(false), &json!({})));
        assert!(one["why"]["judge"].as_str().unwrap().starts_with("not judged: "), "{one}");
    }
    let select = Spec::Select(plan::Select {
        datasets: vec![Dataset {
            path: home.path().join("sampled/data.jsonl").display().to_string(),
            ..Dataset::default()
        }],
        ..plan::Select::default()
    });
    let error = run(home.path().join("chosen"), &select, &Silent).unwrap_err();
    assert_eq!(error.to_string(), "nothing was chosen from 2 prompts");
}

fn code_panel() -> Panel<'static> {
    let code = json!({"verifier": "code", "allow_unsandboxed": true});
    Panel::new(&[code], &Device::Cpu).unwrap()
}

/// A row with a test, and its question.
fn task() -> (Asked, Row) {
    let mut row = Row::new("p:1", Record::Prompt(Side::Text("say hello".to_owned())));
    row.extra.insert("test".to_owned(), json!("assert hello"));
    let messages = vec![Message::new("user", "say hello")];
    (Asked { place: row.place.clone(), messages, ..Asked::default() }, row)
}

#[test]
fn sampled_rows_include_the_output_of_their_programs() {
    let (asked, row) = task();
    let program = "import sys\nprint('hello', file=sys.stderr)\nprint('x' * 9000)\nhello = True";
    let answers = [Answer::said(program), Answer::said("hello = 0")];
    let judged = generation::candidates(&code_panel(), &asked, &row, (&answers, "round 1"), &[]);
    let row = serde_json::to_value(judged.unwrap().0).unwrap();
    let [right, wrong] = [0, 1].map(|at| &row["candidates"][at]);
    assert_eq!((&right["passed"], &right["stderr"]), (&json!(true), &json!("hello\n")));
    let written = right["stdout"].as_str().unwrap();
    assert!(written.starts_with("xxx") && written.len() < 4200, "{} bytes", written.len());
    assert_eq!((&wrong["passed"], &wrong["stdout"]), (&json!(false), &json!("")));
    assert!(wrong["stderr"].as_str().unwrap().contains("AssertionError"), "{wrong}");
}

/// Answers two questions at once, and records whether the first was judged before the second was drawn.
struct Quick<'a> {
    judged: &'a AtomicBool,
    waited: AtomicBool,
}

impl Teacher for Quick<'_> {
    fn answer(
        &self,
        _: &[Asked],
        _: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        done(1, vec![Answer::said("import time\ntime.sleep(1)\nhello = True")])?;
        self.waited.store(self.judged.load(Ordering::SeqCst), Ordering::SeqCst);
        done(0, vec![Answer::said("hello = False")])
    }
}

#[test]
fn generation_continues_while_programs_run() {
    let (panel, (asked, row)) = (code_panel(), task());
    let judged = AtomicBool::new(false);
    let teacher = Quick { judged: &judged, waited: AtomicBool::new(false) };
    let judge = |_, answers: &[Answer]| {
        let row = generation::candidates(&panel, &asked, &row, (answers, "round 1"), &[])?.0;
        judged.store(true, Ordering::SeqCst);
        Ok(row.candidates[0].passed)
    };
    let mut kept = Vec::new();
    let asked = [asked.clone(), asked.clone()];
    let asks = (&teacher as &dyn Teacher, asked.as_slice(), &Sampling::default());
    generation::answer_and_judge(asks, &panel, &judge, &mut |place, passed| {
        kept.push((place, passed));
        Ok(())
    })
    .unwrap();
    assert!(!teacher.waited.into_inner(), "the program was waited for");
    kept.sort_unstable();
    assert_eq!(kept, [(0, Some(false)), (1, Some(true))]);
}

#[test]
fn unjudgeable_row_is_named_before_the_model_is_looked_up() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("prompts.jsonl");
    let rows = [json!({"prompt": "1+1?", "answer": "2"}), json!({"prompt": "2+2?"})];
    store::write_atomic(&path, rows.map(|row| row.to_string()).join("\n").as_bytes()).unwrap();
    let datasets = vec![Dataset { path: path.display().to_string(), ..Dataset::default() }];
    let (model, scorers) = ("not/here".to_owned(), vec![json!({"verifier": "number"})]);
    let sample = plan::Sample {
        model_name_or_path: model.clone(),
        datasets: datasets.clone(),
        scorers: scorers.clone(),
        ..plan::Sample::default()
    };
    let eval = plan::Eval {
        model_name_or_path: model.clone(),
        datasets: datasets.clone(),
        scorers: scorers.clone(),
        ..plan::Eval::default()
    };
    let teacher = TeacherSpec::Local(model);
    let synth = plan::Synth { teacher, datasets, scorers, ..plan::Synth::default() };
    for spec in [Spec::Sample(sample), Spec::Eval(eval), Spec::Synth(synth)] {
        let dir = home.path().join(spec.kind().name());
        let error = run(dir, &spec, &Silent).unwrap_err().to_string();
        let expected = "prompts.jsonl:2: scorer `number`: the row has no `answer`";
        assert!(error.contains(expected), "{error}");
    }
}
