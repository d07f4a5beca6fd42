//! The selection half of rejection sampling (Llama 3, section 4.2.2): good candidates become training rows, better and
//! worse ones become preference pairs.

use std::path::Path;

use super::generation::{self, mean};
use super::{Metrics, StageContext};
use crate::error::{Error, Result};
use crate::recipe::plan;
use crate::score::candidates::{Candidates, REFERENCE};
use crate::score::select::{Outcome, PairRow, SftRow, select};
use crate::store;

/// Selects from every prompt's candidates. Input: rows of `sample` stages. Output: `sft.jsonl` and `pairs.jsonl`.
pub fn run(context: &StageContext<'_>, spec: &plan::Select) -> Result<Metrics> {
    let rules = spec.rules(context.seed)?;
    let mut rows: Vec<Candidates> = Vec::new();
    for dataset in &spec.datasets {
        rows.extend(store::read_ledger(Path::new(&dataset.path))?);
    }
    let chosen = select(&rows, &rules);
    let count = |outcome| chosen.iter().filter(|one| one.outcome == outcome).count() as f64;
    let empty: usize = chosen.iter().map(|one| one.empty).sum();
    let counts = [Outcome::Identical, Outcome::AllFailed, Outcome::TooClose].map(count);
    let (sft, pairs): (Vec<_>, Vec<_>) = chosen.into_iter().map(|one| (one.sft, one.pairs)).unzip();
    let sft: Vec<SftRow> = sft.into_iter().flatten().collect();
    let pairs: Vec<PairRow> = pairs.into_iter().flatten().collect();
    if sft.is_empty() && pairs.is_empty() {
        return Err(Error::run(format!("nothing was chosen from {} prompts", rows.len()))
            .hint("every candidate failed, was cut off, or is empty: check the scorers and max_new_tokens of `sample`"));
    }
    generation::write_rows(context, "sft.jsonl", &sft)?;
    generation::write_rows(context, "pairs.jsonl", &pairs)?;

    let margins = pairs.iter().map(|pair| pair.score_chosen - pair.score_rejected);
    let mut metrics = Metrics::from(
        [
            ("prompts", rows.len() as f64),
            ("sft_rows", sft.len() as f64),
            ("pairs", pairs.len() as f64),
            ("identical", counts[0]),
            ("all_failed", counts[1]),
            ("too_close", counts[2]),
            ("empty", empty as f64),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    let from_reference = sft.iter().filter(|row| row.origin == REFERENCE).count();
    if from_reference > 0 {
        metrics.insert("from_reference".to_owned(), from_reference as f64);
    }
    let agreement = mean(sft.iter().filter_map(|row| row.agreement));
    metrics.extend(agreement.map(|agreement| ("agreement".to_owned(), agreement)));
    metrics.extend(mean(margins).map(|margin| ("margin".to_owned(), margin)));
    metrics.extend(mean(sft.iter().map(|row| row.score)).map(|score| ("score".to_owned(), score)));
    Ok(metrics)
}
