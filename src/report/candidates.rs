//! `candidates.html`: every prompt with its ranked candidates, in one self-contained file.
//!
//! Built from the rows of `data.jsonl`. The page holds the rows as data, one per line, and its script renders a few at
//! a time; nothing from the rows ever becomes markup.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use minijinja::{AutoEscape, Environment, context};

use crate::error::{Error, Result};
use crate::score::candidates::Candidates;
use crate::store;

/// Name of the page in a stage's directory.
pub const PAGE: &str = "candidates.html";

const HEAD: &str = include_str!("candidates.html");
const SCRIPT: &str = include_str!("candidates.js");

/// Writes the page of a stage's rows into its directory.
///
/// # Errors
/// The file cannot be written.
pub fn write<'a>(dir: &Path, rows: impl Iterator<Item = &'a Candidates> + Clone) -> Result<()> {
    // While a stage runs, its directory is `<id>.work`.
    let title = dir.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let head = head(&title, rows.clone())?;
    let path = dir.join(PAGE);
    store::write_atomic_with(&path, |file| {
        let failed = |error| store::io_error(&path, error);
        file.write_all(head.as_bytes()).map_err(failed)?;
        for row in rows {
            file.write_all(inert(&serde_json::to_string(row)?).as_bytes()).map_err(failed)?;
            file.write_all(b"\n").map_err(failed)?;
        }
        write!(file, "</script>\n<script>\n{SCRIPT}</script></body></html>\n").map_err(failed)
    })
}

/// The page before its rows.
fn head<'a>(title: &str, rows: impl Iterator<Item = &'a Candidates>) -> Result<String> {
    let (mut prompts, mut candidates) = (0_usize, 0_usize);
    let mut judges: BTreeSet<&str> = BTreeSet::new();
    for row in rows {
        prompts += 1;
        candidates += row.candidates.len();
        judges.extend(row.candidates.iter().flat_map(|one| one.scores.keys().map(String::as_str)));
    }
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment
        .render_str(HEAD, context! { title, prompts, candidates, judges })
        .map_err(|error| Error::run(format!("the page of candidates: {error}")))
}

/// JSON that cannot close the enclosing script element: `<` occurs only in strings, where its escape means the same.
fn inert(json: &str) -> String {
    json.replace('<', "\\u003c")
}

#[cfg(test)]
mod tests {
    use indexmap::IndexMap;

    use super::*;
    use crate::data::record::Message;
    use crate::generate::engine::Finish;
    use crate::score::candidates::Candidate;
    use crate::score::sandbox::Streams;

    fn row(text: &str) -> Candidates {
        let candidate = Candidate {
            text: text.to_owned(),
            tokens: 3,
            finish: Finish::Stop,
            logprob_sum: -1.0,
            scores: IndexMap::from([("<b>".to_owned(), 1.0)]),
            score: 1.0,
            passed: Some(true),
            origin: "round 1/0".to_owned(),
            why: IndexMap::new(),
            streams: None,
        };
        Candidates {
            prompt: vec![Message::new("user", "say <i>")],
            answer: String::new(),
            tools: None,
            candidates: vec![candidate],
            unanswered: false,
        }
    }

    #[test]
    fn page_is_self_contained_and_row_text_is_escaped() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("03-a<b>&c.work");
        store::create_dir(&work).unwrap();
        let hostile = "</script><script>alert(1)</script><!-- \u{2028} \"'";
        write(&work, [row(hostile), row("plain")].iter()).unwrap();
        let page = std::fs::read_to_string(work.join(PAGE)).unwrap();
        assert!(page.contains("<h1>03-a&lt;b&gt;&amp;c</h1>"), "{page}");
        assert!(page.contains("2 prompts, 2 candidates, judged by &lt;b&gt;."), "{page}");
        assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("src="));
        assert_eq!((page.matches("<script").count(), page.matches("</script>").count()), (2, 2));
        assert!(!page.contains("alert(1)</"));
        // The rows round-trip: a browser reads what was written.
        let data = page.split_once("id=\"data\">").unwrap().1.split_once("</script>").unwrap().0;
        let rows: Vec<Candidates> =
            data.trim().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows, [row(hostile), row("plain")]);
    }

    #[test]
    fn page_shows_program_output_and_failed_judges() {
        let dir = tempfile::tempdir().unwrap();
        let mut row = row("print('<hello>')");
        let one = &mut row.candidates[0];
        one.streams = Some(Streams { stdout: "<hello>\n".to_owned(), stderr: "oops".to_owned() });
        one.why.insert("judge".to_owned(), "not judged: too long".to_owned());
        assert!(one.is_unjudged());
        write(dir.path(), std::iter::once(&row)).unwrap();
        let page = std::fs::read_to_string(dir.path().join(PAGE)).unwrap();
        for part in [r#""stdout":"\u003chello>\n","stderr":"oops""#, "not judged: too long"] {
            assert!(page.contains(part), "{page}");
        }
        // The script reads the rows' fields under these names.
        for part in [r#"["stdout", "stderr"]"#, "one[stream]", "one.why", "row.unanswered"] {
            assert!(SCRIPT.contains(part), "{part}");
        }
    }
}
