//! Tests from files of rows to files of examples.

#![expect(clippy::disallowed_methods, reason = "tests write broken files on purpose")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::examples::Examples;
use super::mix::take;
use super::pipeline::{Pipeline, Source, first_rows};
use super::prepare::{OnBadRow, PairOptions, PrepareReport, Rule, SftOptions, Truncation};
use super::read::{ReadOptions, read};
use super::record::Row;
use super::stored::{Stored, Writer};
use super::tests::tokenizer;
use super::tree::{Role, Tree};
use crate::error::{Error, Result};
use crate::store::write_atomic_with;

pub(super) struct Home(tempfile::TempDir);

impl Home {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn source(&self, name: &str, text: &str, fraction: f64) -> Source {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        let path = path.to_string_lossy().into_owned();
        Source { path, read: ReadOptions::default(), limit: 0, fraction }
    }

    /// The examples that end up in a file.
    fn prepare(&self, sources: &[Source], rule: &Rule) -> Result<Stored> {
        let pipeline = pipeline(sources, rule, 1 << 20);
        let (path, hash) = (self.path("x.trees"), pipeline.hash()?);
        write_atomic_with(&path, |out| pipeline.write(out, (&path, &hash), &mut |_| Ok(())))?;
        Stored::open(&path, &hash)
    }
}

pub(super) fn pipeline(sources: &[Source], rule: &Rule, positions: usize) -> Pipeline {
    let (sources, rule) = (sources.to_vec(), rule.clone());
    Pipeline { sources, rule, tokenizer: tokenizer("chatml"), seed: 7, positions }
}

/// The same in memory, as one list.
pub(super) fn in_memory(sources: &[Source], rule: &Rule) -> (Vec<Row>, Vec<Tree>, PrepareReport) {
    let mut rows = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let mut found = read(&source.path, &source.read).unwrap().rows;
        if source.limit > 0 {
            found.truncate(source.limit);
        }
        rows.extend(take(&found, source.fraction, index, 7).unwrap());
    }
    let prepared = rule.trees(&rows, &tokenizer("chatml")).unwrap();
    (rows, prepared.trees, prepared.report)
}

fn all(examples: &dyn Examples) -> Vec<Tree> {
    examples.trees().collect::<Result<_>>().unwrap()
}

/// `count` lines of prompt and completion, of different lengths.
pub(super) fn lines(count: usize) -> String {
    (0..count).fold(String::new(), |mut text, index| {
        let answer = "é".repeat(index % 7 + 1);
        let _ = writeln!(text, r#"{{"prompt": "{index}", "completion": "{answer}"}}"#);
        text
    })
}

#[test]
fn prepared_file_matches_in_memory_preparation() {
    let home = Home::new();
    let skip = SftOptions {
        on_bad_row: OnBadRow::Skip,
        max_length: Some(12),
        truncation: Truncation::KeepStart,
        ..SftOptions::default()
    };
    let mut bad = lines(2500);
    bad.insert_str(0, "{\"prompt\": \"no answer\"}\nnot JSON\n");
    bad.push_str("{\"prompt\": \"0123456789ab\", \"completion\": \"beyond the limit\"}\n");
    let mut sources = [
        home.source("a.jsonl", &lines(1030), 2.5),
        home.source("b.jsonl", &bad, 0.3),
        home.source("c.jsonl", &bad, 1.0),
        home.source("d.jsonl", &lines(40), 0.0),
        Source { limit: 7, ..home.source("e.jsonl", &lines(20), 1.5) },
    ];
    for source in &mut sources {
        source.read.on_bad_row = OnBadRow::Skip;
    }
    let rule = &Rule::Sft(skip);
    let stored = home.prepare(&sources, rule).unwrap();
    let (rows, trees, report) = in_memory(&sources, rule);
    assert_eq!(all(&stored), trees);
    let found = stored.report();
    assert!(report.truncated > 0 && report.skipped.count > 0, "{report:?}");
    assert_eq!((found.rows, found.truncated), (report.rows, report.truncated));
    assert_eq!(found.skipped.count, report.skipped.count);
    assert_eq!((found.tokens, found.trained_tokens), (report.tokens, report.trained_tokens));
    let unread: Vec<(usize, &str)> = found
        .unread
        .iter()
        .map(|(_, skipped)| (skipped.count, skipped.first[0].0.rsplit('/').next().unwrap()))
        .collect();
    assert_eq!(unread, [(1, "b.jsonl:2"), (1, "c.jsonl:2")]);
    assert_eq!(first_rows(&sources, 7, 3).unwrap(), rows[..3]);
    // Only the subset of the second source that is used.
    let of_b = first_rows(&sources[1..2], 7, usize::MAX).unwrap();
    assert_eq!(
        of_b,
        take(&read(&sources[1].path, &sources[1].read).unwrap().rows, 0.3, 0, 7).unwrap()
    );
}

#[test]
fn preferences_keep_their_shared_prompt() {
    let home = Home::new();
    let text = "{\"prompt\": \"q\", \"responses\": [\"best\", \"good\", \"bad\"]}\n".repeat(3);
    let options = PairOptions::default();
    let sources = [home.source("p.jsonl", &text, 1.0)];
    let stored = home.prepare(&sources, &Rule::Pairs(options.clone())).unwrap();
    assert_eq!(all(&stored), in_memory(&sources, &Rule::Pairs(options)).1);
    assert_eq!(stored.get(2).unwrap().segments.len(), 4);
}

#[test]
fn prepared_file_is_identical_for_any_thread_count() {
    let home = Home::new();
    let options = SftOptions::default();
    let sources = [home.source("a.jsonl", &lines(3000), 1.25)];
    let bytes = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| home.prepare(&sources, &Rule::Sft(options.clone())).unwrap());
        std::fs::read(home.path("x.trees")).unwrap()
    };
    let one = bytes(1);
    assert_eq!(bytes(2), one);
    assert_eq!(bytes(5), one);
}

#[test]
fn first_bad_row_of_the_file_is_reported() {
    let home = Home::new();
    let options = SftOptions::default();
    let unusable = "{\"prompt\": \"no answer\"}\n";
    let unreadable = "{\"prompt\": \n";
    let report = |first: &str, second: &str| {
        // Both in one batch, after a full one.
        let text = lines(1400) + first + &lines(9) + second + &lines(5);
        let sources = [home.source("a.jsonl", &text, 1.0)];
        let error = home.prepare(&sources, &Rule::Sft(options.clone())).unwrap_err().to_string();
        assert!(!home.path("x.trees").exists(), "a file was left behind");
        error.rsplit('/').next().unwrap().to_owned()
    };
    for _ in 0..3 {
        assert_eq!(
            report(unusable, unreadable),
            "a.jsonl:1401: a prompt without a response cannot be trained on"
        );
        assert_eq!(report(unreadable, unusable), "a.jsonl:1401: the JSON ends too early");
    }
}

#[test]
fn row_longer_than_the_model_is_refused_with_its_location() {
    let home = Home::new();
    let options = SftOptions::default();
    let sources = [home.source("a.jsonl", &lines(9), 1.0)];
    let pipeline = pipeline(&sources, &Rule::Sft(options), 8);
    let written = pipeline.write(&mut Vec::new(), (Path::new("x"), &[0; 32]), &mut |_| Ok(()));
    let error = written.unwrap_err();
    assert!(error.to_string().ends_with("a.jsonl:4: 10 tokens, the model has 8 positions"));
    assert_eq!(error.hint_text(), Some("set max_length = 8 or less"));
}

#[test]
fn sources_without_usable_rows_are_refused() {
    let home = Home::new();
    let options = SftOptions { on_bad_row: OnBadRow::Skip, ..SftOptions::default() };
    let error = |text: &str, fraction: f64| {
        let sources = [home.source("a.jsonl", text, fraction)];
        let error = home.prepare(&sources, &Rule::Sft(options.clone())).unwrap_err();
        (error.to_string().rsplit('/').next().unwrap().to_owned(), format!("{error:?}"))
    };
    assert_eq!(error("", 1.0).0, "a.jsonl: no rows");
    assert_eq!(error("\n \n", 1.0).0, "a.jsonl: no rows");
    assert_eq!(error(&lines(3), 0.0).0, "a.jsonl: no rows");
    let (message, all) = error("{\"prompt\": \"x\"}\n{\"prompt\": \"y\"}\n", 1.0);
    assert_eq!(message, "none of 2 rows can be used");
    assert!(all.contains("a.jsonl:1: a prompt without a response"), "{all}");
    assert_eq!(error(&lines(3), -1.0).0, "datasets[0]: fraction = -1, expected 0 or more");
}

#[test]
fn truncated_damaged_or_foreign_files_are_not_opened() {
    let home = Home::new();
    let tree = Tree::sequence(vec![5, 6, 7], vec![Role::Context, Role::Content, Role::Format], 0)
        .labelled(vec![vec![Some(-1.5), None]]);
    let (path, hash) = (home.path("x.trees"), [3; 32]);
    let mut whole = Vec::new();
    let mut writer = Writer::new(&mut whole, &path, &hash).unwrap();
    let place = writer.tree(&tree).unwrap();
    writer.finish([(place, 0), (place, 9)].into_iter(), &PrepareReport::default()).unwrap();
    let why = |bytes: &[u8], hash: &[u8; 32]| {
        std::fs::write(&path, bytes).unwrap();
        match Stored::open(&path, hash) {
            Ok(stored) => {
                assert_eq!(all(&stored), [tree.clone(), Tree { source: 9, ..tree.clone() }]);
                String::new()
            }
            Err(error) => error.to_string().rsplit('/').next().unwrap().to_owned(),
        }
    };
    assert_eq!(why(&whole, &hash), "");
    assert_eq!(why(&whole, &[4; 32]), "x.trees: made from other data or settings");
    for len in 0..whole.len() {
        assert_ne!(why(&whole[..len], &hash), "", "cut to {len} bytes");
    }
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        assert_ne!(why(&flipped, &hash), "", "byte {at} flipped");
    }
    let mut newer = whole.clone();
    newer[8] = 3;
    assert_eq!(why(&newer, &hash), "x.trees: format version 3, expected 2");

    // Damage after opening is an error of the affected example.
    std::fs::write(&path, &whole).unwrap();
    let stored = Stored::open(&path, &hash).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(50).unwrap();
    let error = stored.get(1).unwrap_err();
    assert!(error.to_string().contains("x.trees: example 1: "), "{error}");
    assert_eq!(error.hint_text(), Some("delete the file; it is made again"));
}

#[test]
fn full_disk_error_names_the_file_and_hints_at_a_fix() {
    let home = Home::new();
    let options = SftOptions::default();
    let sources = [home.source("a.jsonl", &lines(9), 1.0)];
    let pipeline = pipeline(&sources, &Rule::Sft(options), 99);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    // With a buffer, the writes succeed and the final flush fails.
    for capacity in [0, 1 << 20] {
        let mut full = std::io::BufWriter::with_capacity(capacity, &full);
        let path = Path::new("run/x.trees");
        let written = pipeline.write(&mut full, (path, &[0; 32]), &mut |_| Ok(()));
        let error = written.unwrap_err();
        assert!(error.to_string().starts_with("run/x.trees: "), "{error}");
        assert_eq!(error.hint_text(), Some(crate::store::FULL_DISK));
    }
}

#[test]
fn interrupt_is_checked_after_each_batch_and_leaves_no_file() {
    let home = Home::new();
    let options = SftOptions::default();
    let sources = [home.source("a.jsonl", &lines(4000), 1.0)];
    let pipeline = pipeline(&sources, &Rule::Sft(options), 99);
    let path = home.path("x.trees");
    let mut heard = Vec::new();
    let stopped = write_atomic_with(&path, |out| {
        pipeline.write(out, (&path, &[0; 32]), &mut |rows| {
            heard.push(rows);
            if rows > 2000 { Err(Error::interrupted()) } else { Ok(()) }
        })
    });
    assert_eq!(stopped.unwrap_err().kind(), crate::error::Kind::Interrupted);
    assert_eq!(heard, [1024, 2048]);
    assert_eq!(std::fs::read_dir(home.0.path()).unwrap().count(), 1);
}

#[test]
fn the_hash_depends_on_data_settings_and_tokenizer() {
    let home = Home::new();
    let mut seen = std::collections::BTreeSet::new();
    let mut hash = |text: &str, fraction: f64, options: &SftOptions, template: &str, seed: u64| {
        let sources = [home.source("a.jsonl", text, fraction)];
        let pipeline = Pipeline {
            tokenizer: tokenizer(template),
            seed,
            ..pipeline(&sources, &Rule::Sft(options.clone()), 9)
        };
        seen.insert(pipeline.hash().unwrap())
    };
    let options = SftOptions::default();
    assert!(hash("a", 1.0, &options, "chatml", 1));
    assert!(!hash("a", 1.0, &options, "chatml", 1));
    assert!(hash("b", 1.0, &options, "chatml", 1));
    assert!(hash("a", 1.5, &options, "chatml", 1));
    assert!(hash("a", 1.0, &SftOptions { max_length: None, ..options.clone() }, "chatml", 1));
    assert!(hash("a", 1.0, &options, "llama3", 1));
    assert!(hash("a", 1.0, &options, "chatml", 2));
}

#[test]
fn json_lines_and_single_value_files_are_distinguished() {
    let home = Home::new();
    let options = ReadOptions { on_bad_row: OnBadRow::Skip, ..ReadOptions::default() };
    let places = |name: &str, text: &[u8]| {
        let path = home.path(name);
        std::fs::write(&path, text).unwrap();
        match read(&path.to_string_lossy(), &options) {
            Ok(found) => {
                let rows = found.rows.iter().map(|row| row.place.as_str());
                let skipped = found.skipped.iter().map(|(place, _)| place.as_str());
                let short = |place: &str| place.rsplit('/').next().unwrap().to_owned();
                rows.chain(skipped).map(short).collect::<Vec<_>>().join(" ")
            }
            Err(error) => error.to_string().rsplit('/').next().unwrap().to_owned(),
        }
    };
    let row = "{\"text\": \"a\"}";
    let spread = "\n{\n\"text\":\n\"a\"}\n";
    let list = format!("[\n{row},\n{row}]");
    assert_eq!(places("a.jsonl", format!("{row}\r\n\n{row}").as_bytes()), "a.jsonl:1 a.jsonl:3");
    assert_eq!(places("a.jsonl", format!("\u{feff}{row}\n").as_bytes()), "a.jsonl:1");
    assert_eq!(places("a.jsonl", list.as_bytes()), "a.jsonl[0] a.jsonl[1]");
    assert_eq!(places("a.json", list.as_bytes()), "a.json[0] a.json[1]");
    assert_eq!(
        places("a.json", b"\n[{},\nx]"),
        "a.json:3: not JSON: expected value at line 3 column 1"
    );
    assert_eq!(places("a.json", format!("{row}\n\n{row}").as_bytes()), "a.json:1 a.json:3");
    assert_eq!(places("a.json", spread.as_bytes()), "a.json:1");
    assert_eq!(places("a.json", format!("{{\"data\": [{row}]}}").as_bytes()), "a.json[0]");
    assert_eq!(places("a.json", format!("x\n{row}\n").as_bytes()), "a.json:2 a.json:1");
    let bytes = [row.as_bytes(), b"\n", b"\"\xff\"\n"].concat();
    assert_eq!(places("a.jsonl", &bytes), "a.jsonl: line 2 is not UTF-8");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, format!("{row}\n{row}\n").as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    assert_eq!(places("a.jsonl.gz", &gzip), "a.jsonl.gz:1 a.jsonl.gz:2");
    let cut = places("a.jsonl.gz", &gzip[..gzip.len() - 9]);
    assert!(cut.starts_with("a.jsonl.gz: broken gzip data: "), "{cut}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Any tree round-trips.
    #[test]
    fn any_tree_round_trips_through_a_file(
        prompt in proptest::collection::vec(any::<u32>(), 0..9),
        responses in proptest::collection::vec(
            proptest::collection::vec((any::<u32>(), 0..3_usize), 1..9), 1..4
        ),
        source in any::<u32>(),
        weighted in any::<bool>(),
    ) {
        let roles = [Role::Context, Role::Content, Role::Format];
        let responses = responses
            .into_iter()
            .map(|tokens| tokens.into_iter().map(|(id, role)| (id, roles[role])).unzip())
            .collect();
        let mut tree = Tree::siblings(prompt, responses, source as usize);
        if weighted {
            tree.weights = (0..tree.tokens()).map(|at| 0.5 * at as f32).collect();
        }
        let home = Home::new();
        let path = home.path("x.trees");
        write_atomic_with(&path, |out| {
            let mut writer = Writer::new(out, &path, &[0; 32])?;
            let place = writer.tree(&tree)?;
            writer.finish(std::iter::once((place, tree.source)), &PrepareReport::default())
        }).unwrap();
        prop_assert_eq!(Stored::open(&path, &[0; 32]).unwrap().get(0).unwrap(), tree);
    }
}
