//! Scoring files: what is added to rows, what is refused, and what a stop leaves behind.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::report::record::Silent;

fn work(dir: &Path, rows: &[Value], scorers: &str) -> Scoring {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    store::write_atomic(&dir.join("in.jsonl"), lines.join("\n").as_bytes()).unwrap();
    Scoring {
        data: dir.join("in.jsonl").display().to_string(),
        out: dir.join("out.jsonl"),
        replace: false,
        scorers: super::scorers(scorers).unwrap(),
        columns: IndexMap::new(),
        device: Device::Cpu,
    }
}

fn written(work: &Scoring) -> Vec<Value> {
    store::read_ledger(&work.out).unwrap()
}

#[test]
fn rows_are_written_with_score_and_reason() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [
        json!({"id": 1, "prompt": "2+2?", "completion": "It is 4.", "answer": 4}),
        json!({"prompt": [{"role": "user", "content": "2+2?"}], "completions": ["5", [{"role": "assistant", "content": "4"}]], "answer": "4"}),
        json!({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}], "answer": "4"}),
    ];
    let work = work(dir.path(), &rows, r#""number""#);
    let scored = score(&work, &Silent).unwrap();
    assert_eq!((scored.rows, scored.completions, scored.passed), (3, 4, Some(2)));
    assert!((scored.mean_score - 0.5).abs() < 1e-12);
    let rows = written(&work);
    assert_eq!(
        rows[0],
        json!({"id": 1, "prompt": "2+2?", "completion": "It is 4.", "answer": 4, "score": 1.0, "why": "4", "passed": true})
    );
    assert_eq!((&rows[1]["score"], &rows[1]["why"]), (&json!([0.0, 1.0]), &json!(["5", "4"])));
    assert_eq!((&rows[2]["score"], &rows[2]["why"]), (&json!(0.0), &json!("no number")));
    assert_eq!(store::entries(dir.path()).unwrap().len(), 2, "nothing is left behind");
}

#[test]
fn several_scorers_are_summed_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [json!({"prompt": "q", "completion": "yes", "answer": "yes"})];
    let work =
        work(dir.path(), &rows, r#"["exact", {"verifier": "length", "max": 2, "weight": 0.5}]"#);
    score(&work, &Silent).unwrap();
    let row = written(&work).remove(0);
    assert_eq!((&row["score"], &row["passed"]), (&json!(1.0), &json!(false)));
    assert_eq!(row["scores"], json!({"exact": 1.0, "length": 0.0}));
    assert_eq!(row["why"], json!("exact: yes; length: 3 characters"));
}

#[test]
fn answer_a_judge_cannot_read_fails_alone_with_on_error_fail() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [json!({"prompt": "2+2?", "completions": ["4", "5"]})];
    // The instructions alone have more tokens than this judge has positions.
    let judge = |more: &str| format!(r#"{{"judge": "data/tiny/student"{more}}}"#);
    let error = score(&work(dir.path(), &rows, &judge("")), &Silent).unwrap_err();
    assert!(format!("{error:?}").contains("on_error = \"fail\" in the scorer"), "{error:?}");
    let work = work(dir.path(), &rows, &judge(r#", "on_error": "fail""#));
    let scored = score(&work, &Silent).unwrap();
    // Without a verifier, the number of right answers is not reported.
    assert_eq!((scored.completions, scored.passed), (2, None));
    let row = written(&work).remove(0);
    assert_eq!((&row["score"], &row["passed"]), (&json!([0.0, 0.0]), &json!([false, false])));
    let why = "not judged: too long for the judge, or refused by its server";
    assert_eq!((&row["why"], row.get("scores")), (&json!([why, why]), None));
}

#[test]
fn malformed_lines_are_named_before_anything_is_judged() {
    let dir = tempfile::tempdir().unwrap();
    let good = r#"{"prompt": "q", "completion": "4", "answer": "4"}"#;
    let deep = "[".repeat(100_000);
    for (line, part) in [
        (b"{\"prompt\": ".to_vec(), "in.jsonl:2"),
        (b"null".to_vec(), "in.jsonl:2: a row is null"),
        (b"{\"completion\": NaN}".to_vec(), "in.jsonl:2"),
        (b"{\"completion\": \"\xff\"}".to_vec(), "in.jsonl: line 2 is not UTF-8"),
        (format!("{{\"completion\": {deep}").into_bytes(), "in.jsonl:2"),
        (b"{\"completions\": [null]}".to_vec(), "in.jsonl:2: completions[0]"),
        (b"{\"completions\": [[]]}".to_vec(), "in.jsonl:2: completions[0]"),
        (b"{\"messages\": []}".to_vec(), "in.jsonl:2: no `completion`"),
        (b"{\"messages\": [5]}".to_vec(), "in.jsonl:2: `messages`"),
        (b"{\"messages\": [{\"content\": \"4\"}]}".to_vec(), "in.jsonl:2: `messages`"),
        (b"{\"prompt\": 5, \"completion\": \"4\"}".to_vec(), "in.jsonl:2: `prompt`"),
        (b"{\"completion\": \"4\", \"tools\": 5}".to_vec(), "in.jsonl:2"),
    ] {
        let work = work(dir.path(), &[], r#""number""#);
        let lines = [good.as_bytes(), &line, good.as_bytes()].join(&b'\n');
        store::write_atomic(&dir.path().join("in.jsonl"), &lines).unwrap();
        let error = score(&work, &Silent).unwrap_err().to_string();
        let shown: String = error.chars().take(300).collect();
        assert!(shown.contains(part) && error.len() < 2000, "{}: {shown}", line.escape_ascii());
        assert!(!work.out.exists());
    }
}

#[test]
fn invalid_rows_are_named_by_file_and_line_before_judging() {
    let dir = tempfile::tempdir().unwrap();
    let good = json!({"prompt": "q", "completion": "4", "answer": "4"});
    for (row, part) in [
        (json!({"prompt": "q"}), "in.jsonl:2: no `completion`"),
        (json!({"prompt": "q", "completions": "4"}), "in.jsonl:2: `completions` is a string"),
        (json!({"prompt": "q", "completion": 4}), "in.jsonl:2: `completion`: found a number"),
        (
            json!({"prompt": "q", "completion": "4"}),
            "in.jsonl:2: scorer `number`: the row has no `answer`",
        ),
        (json!([1]), "in.jsonl:2: a row is a list"),
    ] {
        let work = work(dir.path(), &[good.clone(), row], r#""number""#);
        let error = score(&work, &Silent).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!work.out.exists());
    }
    let mut own = work(dir.path(), &[good], r#""number""#);
    own.out = dir.path().join("in.jsonl");
    assert!(score(&own, &Silent).unwrap_err().to_string().contains("would be read and written"));
    assert!(scorers(r#"{"verifier": "nummber"}"#).unwrap_err().to_string().contains("nummber"));
}

/// Stops after this many progress reports.
struct StopAfter(AtomicU64);

impl Events for StopAfter {
    fn progress(&self, _: &str, _: u64, _: u64) {
        let left = self.0.load(Ordering::Relaxed);
        self.0.store(left.saturating_sub(1), Ordering::Relaxed);
    }

    fn interrupted(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

#[test]
fn scores_before_a_stop_are_kept_and_other_scorers_start_anew() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<Value> = (0..2000)
        .map(|n| json!({"prompt": format!("{n}?"), "completion": n.to_string(), "answer": n.to_string()}))
        .collect();
    let work = work(dir.path(), &rows, r#""number""#);
    score(&work, &StopAfter(AtomicU64::new(2))).unwrap_err();
    assert!(!work.out.exists());
    let partial = dir.path().join("out.jsonl.unfinished/rows.jsonl");
    let kept = judged(&partial).unwrap();
    assert!(kept > 0 && kept < 2000, "{kept}");
    // A torn line, as left by a kill.
    let mut text = std::fs::read(&partial).unwrap();
    text.extend(b"{\"prompt\": \"to");
    store::write_atomic(&partial, &text).unwrap();
    score(&work, &Silent).unwrap();
    let whole = std::fs::read(&work.out).unwrap();
    let other = Scoring { out: dir.path().join("other.jsonl"), ..work.clone() };
    score(&other, &Silent).unwrap();
    assert_eq!(whole, std::fs::read(&other.out).unwrap());

    // Different scorers: the kept rows do not belong to them.
    let other = Scoring { out: dir.path().join("third.jsonl"), ..work };
    score(&other, &StopAfter(AtomicU64::new(2))).unwrap_err();
    let other =
        Scoring { scorers: scorers(r#"{"verifier": "length", "max": 1}"#).unwrap(), ..other };
    assert_eq!(score(&other, &Silent).unwrap().passed, Some(10));
}

#[test]
fn output_among_the_input_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let row = json!({"prompt": "2+2?", "completion": "4", "answer": "4"});
    let whole = work(dir.path(), &[row], r#""number""#);
    let folder = dir.path().display().to_string();
    let glob = format!("{folder}/*.jsonl");
    store::write_atomic(&dir.path().join("old.jsonl"), b"{}\n").unwrap();
    for (data, out) in
        [(folder.clone(), "out.jsonl"), (folder, "new/out.jsonl"), (glob, "old.jsonl")]
    {
        let out = dir.path().join(out);
        std::fs::create_dir_all(out.parent().unwrap()).unwrap();
        let error = score(&Scoring { data, out, ..whole.clone() }, &Silent).unwrap_err();
        assert!(error.to_string().contains("would be read and written"), "{error}");
    }
}

#[test]
fn length_penalty_counts_characters_and_empty_rows_get_no_scores() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [
        json!({"prompt": "2+2?", "completion": "four", "answer": "four"}),
        json!({"prompt": "2+2?", "completions": [], "answer": "four"}),
    ];
    let penalty = |unit: &str| format!(r#"{{"verifier": "exact", "length_penalty": 0.125{unit}}}"#);
    let tokens = work(dir.path(), &rows, &penalty(""));
    assert!(
        score(&tokens, &Silent).unwrap_err().to_string().contains("`length_penalty` for tokens")
    );
    let characters = work(dir.path(), &rows, &penalty(r#", "length_unit": "characters""#));
    score(&characters, &Silent).unwrap();
    let rows = written(&characters);
    assert_eq!((&rows[0]["score"], &rows[1]["score"]), (&json!(0.5), &json!([])));
}

#[test]
fn rows_with_different_answers_are_separate_questions() {
    let row = |answer: &str| json!({"prompt": "p", "completion": "c", "answer": answer});
    let dir = tempfile::tempdir().unwrap();
    let work = work(dir.path(), &[row("a"), row("a"), row("b")], r#""exact""#);
    let panel = Panel::new(&work.scorers, &work.device).unwrap();
    let groups = Groups { rows: rows(&work).unwrap().peekable(), panel: &panel };
    let sizes: Vec<usize> = groups.map(|group| group.unwrap().len()).collect();
    assert_eq!(sizes, [2, 1]);
}

#[test]
fn column_in_no_row_is_refused_before_anything_is_judged() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [json!({"prompt": "2+2?", "completion": "4", "answer": "5", "gold": "4"})];
    let named = |answer: &str| Scoring {
        columns: [("answer".to_owned(), answer.to_owned())].into(),
        ..work(dir.path(), &rows, r#""number""#)
    };
    let error = format!("{:?}", score(&named("gold_answer"), &Silent).unwrap_err());
    let expected =
        "column `gold_answer` (for `answer`) is in no row; found: answer, completion, gold, prompt";
    assert!(error.contains(expected), "{error}");
    assert!(!named("gold_answer").out.exists());
    assert_eq!(score(&named("gold"), &Silent).unwrap().passed, Some(1));
}

#[test]
fn existing_output_is_replaced_only_when_requested() {
    let dir = tempfile::tempdir().unwrap();
    let row = json!({"prompt": "2+2?", "completion": "4", "answer": "4"});
    let work = work(dir.path(), &[row], r#""number""#);
    store::write_atomic(&work.out, b"precious\n").unwrap();
    let refused = score(&work, &Silent).unwrap_err();
    assert!(refused.to_string().ends_with("out.jsonl` is already there"), "{refused}");
    assert_eq!(std::fs::read(&work.out).unwrap(), b"precious\n");
    let work = Scoring { replace: true, ..work };
    score(&work, &Silent).unwrap();
    assert_eq!(written(&work)[0]["score"], json!(1.0));
}
