//! How fast this machine prepares a dataset for training and reads the examples back in shuffled order.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use crate::data::examples::Examples;
use crate::data::pipeline::{Pipeline, first_rows};
use crate::data::prepare::{OnBadRow, PairOptions, Rule, SftOptions};
use crate::data::record::Record;
use crate::data::stored::Stored;
use crate::error::{Error, Result};
use crate::model::checkpoint::peek;
use crate::model::run_dir;
use crate::recipe::plan::Dataset;
use crate::rng::Stream;
use crate::store;

/// The measurements.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Rows read.
    pub rows: usize,
    /// Examples made from them.
    pub examples: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Size of the file of examples in bytes.
    pub bytes: u64,
    /// Seconds to hash, read, prepare and write everything, and to verify the file.
    pub prepare_s: f64,
    /// Rows prepared per second.
    pub rows_per_s: f64,
    /// Examples read back per second, in shuffled order.
    pub reads_per_s: f64,
}

/// Prepares `data` for the model in the directory or GGUF file `model`, with the default settings of `sft`, or of `dpo`
/// if the first row is a preference. The examples are written to the system's temporary directory.
///
/// # Errors
/// No such model or data, a model without a tokenizer; as [`Pipeline::write`].
pub fn run(model: &str, data: &str) -> Result<Figures> {
    let (config, tokenizer) = peek(&run_dir::model(Path::new(model))?)?;
    let tokenizer = tokenizer.ok_or_else(|| {
        Error::run("no tokenizer").at(model).hint("a model directory needs tokenizer.json")
    })?;
    let dataset = Dataset { path: data.to_owned(), ..Dataset::default() };
    let sources = vec![dataset.source(OnBadRow::Error)];
    let first = first_rows(&sources, 0, 1)?;
    let rule = match first.first().map(|row| &row.record) {
        Some(Record::Preference { .. }) => Rule::Pairs(PairOptions::default()),
        _ => Rule::Sft(SftOptions::default()),
    };
    let positions = config.max_position_embeddings;
    let pipeline = Pipeline { sources, rule, tokenizer, seed: 0, positions };
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join("examples.trees");

    let began = Instant::now();
    let hash = pipeline.hash()?;
    store::write_atomic_with(&path, |out| pipeline.write(out, (&path, &hash), &mut |_| Ok(())))?;
    let stored = Stored::open(&path, &hash)?;
    let prepare_s = began.elapsed().as_secs_f64();

    let order = Stream::new(0, "bench/read").permutation(0, stored.len());
    let began = Instant::now();
    for index in order {
        stored.get(index)?;
    }
    let report = stored.report();
    Ok(Figures {
        rows: report.rows,
        examples: stored.len(),
        tokens: report.tokens,
        bytes: path.metadata()?.len(),
        prepare_s,
        rows_per_s: report.rows as f64 / prepare_s,
        reads_per_s: stored.len() as f64 / began.elapsed().as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sft_and_preference_datasets_are_measured() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let model = "data/tiny/student";
        let measure = |text: &str| {
            store::write_atomic(&path, text.as_bytes()).unwrap();
            run(model, &path.to_string_lossy())
        };
        let figures = measure("{\"prompt\": \"1 + 1\", \"completion\": \"2\"}\n").unwrap();
        assert_eq!((figures.rows, figures.examples), (1, 1));
        assert!(figures.rows_per_s > 0.0 && figures.reads_per_s > 0.0 && figures.tokens > 1);
        let pairs = "{\"prompt\": \"1\", \"chosen\": \"2\", \"rejected\": \"3\"}\n".repeat(2);
        assert_eq!(measure(&pairs).unwrap().examples, 2);
        assert!(measure("").is_err());
    }
}
