//! Tests of streams: their order, where they resume, and how far they read ahead.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use super::pipeline::Source;
use super::pipeline_tests::{Home, in_memory, lines, pipeline};
use super::prepare::{OnBadRow, Rule, SftOptions};
use super::stream::{Cursor, Origin, Stream};
use super::tree::Tree;
use crate::error::Result;

fn sft() -> Rule {
    Rule::Sft(SftOptions::default())
}

fn origin(sources: &[Source], rule: &Rule, window: usize) -> Arc<Origin> {
    let pipeline = pipeline(sources, rule, 1 << 20);
    Arc::new(Origin { pipeline, window, report: Mutex::default() })
}

fn stream(sources: &[Source], window: usize) -> Stream {
    Stream::start(&origin(sources, &sft(), window), Cursor::default()).unwrap()
}

/// The examples of a whole number of passes, in steps of 7.
fn passes(stream: &mut Stream, count: usize) -> Vec<Tree> {
    let (mut all, until) = (Vec::new(), stream.cursor().epoch + count);
    loop {
        let before = stream.cursor();
        let step = stream.next(7).unwrap();
        // A step that starts the next pass has seen the end of the previous one.
        if stream.cursor().epoch == until {
            assert_eq!(stream.cursor().taken, if step.len() < 7 { 0 } else { 7 }, "{before:?}");
            if stream.cursor().taken == 0 {
                all.extend(step);
            }
            return all;
        }
        all.extend(step);
    }
}

#[test]
fn without_a_window_every_pass_keeps_row_order() {
    let home = Home::new();
    let sources =
        [home.source("a.jsonl", &lines(1500), 1.0), home.source("b.jsonl", &lines(10), 2.0)];
    let (_, trees, _) = in_memory(&sources, &sft());
    assert_eq!(trees.len(), 1520);
    assert_eq!(passes(&mut stream(&sources, 0), 2), [trees.clone(), trees].concat());
}

#[test]
fn a_step_does_not_straddle_two_passes() {
    let home = Home::new();
    let sources = [home.source("a.jsonl", &lines(10), 1.0)];
    let mut stream = stream(&sources, 3);
    let sizes: Vec<usize> = (0..7).map(|_| stream.next(4).unwrap().len()).collect();
    assert_eq!(sizes, [4, 4, 2, 4, 4, 2, 4]);
    assert_eq!(stream.cursor(), Cursor { epoch: 2, taken: 4 });
}

#[test]
fn window_shuffles_each_pass_and_yields_every_example_once() {
    let home = Home::new();
    let sources = [home.source("a.jsonl", &lines(300), 1.0)];
    let sources_of = |trees: &[Tree]| trees.iter().map(|tree| tree.source).collect::<Vec<_>>();
    for window in [1, 64, 300, 10_000] {
        let both = sources_of(&passes(&mut stream(&sources, window), 2));
        let (one, two) = both.split_at(300);
        assert_ne!(one, two, "window {window}");
        for pass in [one, two] {
            assert_eq!(pass.iter().copied().collect::<BTreeSet<_>>().len(), 300);
            assert_ne!(pass, (0..300).collect::<Vec<_>>(), "window {window}");
            // No row comes earlier than the window allows.
            let early = |(at, row): (usize, &usize)| *row > at + window;
            assert!(!pass.iter().enumerate().any(early), "window {window}");
        }
        assert_eq!(sources_of(&passes(&mut stream(&sources, window), 2)), both);
    }
}

#[test]
fn stream_resumes_from_the_cursor_of_another() {
    let home = Home::new();
    let sources = [home.source("a.jsonl", &lines(30), 1.0)];
    let origin = origin(&sources, &sft(), 8);
    let mut whole = Stream::start(&origin, Cursor::default()).unwrap();
    let mut steps = vec![(whole.cursor(), Vec::new())];
    for _ in 0..14 {
        let step = whole.next(7).unwrap();
        steps.push((whole.cursor(), step));
    }
    for at in 0..12 {
        let mut later = Stream::start(&origin, steps[at].0).unwrap();
        for (cursor, step) in &steps[at + 1..] {
            assert_eq!((&later.next(7).unwrap(), later.cursor()), (step, *cursor), "from {at}");
        }
    }
}

#[test]
fn stream_yields_examples_before_reading_all_rows_and_stops_at_a_bad_one() {
    let home = Home::new();
    let text = lines(9000) + "not JSON\n";
    let sources = [home.source("a.jsonl", &text, 1.0)];
    let origin = origin(&sources, &sft(), 16);
    let mut stream = Stream::start(&origin, Cursor::default()).unwrap();
    assert_eq!(stream.next(8).unwrap().len(), 8);
    let read = origin.report.lock().unwrap().rows;
    assert!(read < 8 + 16 + 3 * 1024 + 1, "{read} rows were read for the first 8 examples");
    let failed = std::iter::repeat_with(|| stream.next(8)).find_map(Result::err).unwrap();
    assert!(failed.to_string().contains("a.jsonl:9001: not JSON"), "{failed}");
    assert_eq!(stream.cursor().taken, 9000 - 16);
}

#[test]
fn streams_without_examples_or_with_partial_fractions_are_refused() {
    let home = Home::new();
    let start = |source: Source| {
        let options = SftOptions { on_bad_row: OnBadRow::Skip, ..SftOptions::default() };
        Stream::start(&origin(&[source], &Rule::Sft(options), 4), Cursor::default())
    };
    let first = |text: &str| {
        let error = start(home.source("a.jsonl", text, 1.0)).unwrap().next(2).unwrap_err();
        error.to_string().rsplit('/').next().unwrap().to_owned()
    };
    assert_eq!(first(""), "a.jsonl: no rows");
    assert_eq!(first("{\"prompt\": \"x\"}\n"), "none of 1 rows can be used");
    for fraction in [0.5, 1.5, 0.0, -1.0, f64::NAN] {
        let refused = start(home.source("a.jsonl", &lines(3), fraction)).err().unwrap();
        assert!(refused.to_string().ends_with("expected a whole number, 1 or more"), "{refused}");
    }
}

#[test]
fn rows_skipped_by_a_stream_are_counted() {
    let home = Home::new();
    let text = lines(20) + "{\"prompt\": \"x\"}\nnot JSON\n";
    let mut source = home.source("a.jsonl", &text, 1.0);
    source.read.on_bad_row = OnBadRow::Skip;
    let options = SftOptions { on_bad_row: OnBadRow::Skip, ..SftOptions::default() };
    let origin = origin(&[source], &Rule::Sft(options), 0);
    assert_eq!(Stream::start(&origin, Cursor::default()).unwrap().next(50).unwrap().len(), 20);
    let report = origin.report.lock().unwrap();
    assert_eq!((report.rows, report.skipped.count), (21, 1));
    assert_eq!(report.unread[0].1.count, 1);
}

#[test]
fn column_missing_from_the_first_rows_is_refused_at_stream_start() {
    let home = Home::new();
    let mut source = home.source("a.jsonl", &lines(20), 1.0);
    source.read.columns = [("tools".to_owned(), "functions".to_owned())].into();
    let refused = Stream::start(&origin(&[source], &sft(), 0), Cursor::default()).err().unwrap();
    let expected = "column `functions` (for `tools`) is in none of the first rows; found: ";
    assert!(refused.to_string().contains(expected), "{refused}");
}
