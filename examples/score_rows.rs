//! Scores ranked responses with a reward model: one JSON list of numbers a row.
//!
//!     cargo run --release --example score_rows -- CHECKPOINT ROWS.jsonl

use std::io::Write;

use arriero::data::read::{ReadOptions, read};
use arriero::error::{Error, Result};
use arriero::score::reward_model::{Reading, RewardModel};
use candle_core::Device;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [checkpoint, rows] = arguments.as_slice() else {
        return Err(Error::usage("expected a checkpoint and a file of rows"));
    };
    let model = RewardModel::load(checkpoint, &Device::Cpu, &Reading::default())?;
    let rows = read(rows, &ReadOptions::default())?.rows;
    let mut out = std::io::stdout().lock();
    for scores in model.score_rows(&rows)? {
        writeln!(out, "{}", serde_json::to_string(&scores)?)?;
    }
    Ok(())
}
