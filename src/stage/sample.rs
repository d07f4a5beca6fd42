//! Rejection sampling's draw (Llama 3, section 4.2.2): K candidates a prompt from the newest policy, each judged.

use std::collections::BTreeMap;
use std::path::Path;

use super::generation::{self, mean};
use super::{Metrics, StageContext};
use crate::error::Result;
use crate::generate::engine::Finish;
use crate::recipe::plan;
use crate::score::Panel;
use crate::score::candidates::{Candidate, Candidates};
use crate::store;

/// Draws and judges K candidates a prompt. Input: a checkpoint, prompts, earlier rounds' candidates. Output:
/// `data.jsonl`, one row a prompt.
pub fn run(context: &StageContext<'_>, spec: &plan::Sample) -> Result<Metrics> {
    let policy = generation::load(context, &spec.model_name_or_path, spec.sampling.dtype)?;
    let panel = Panel::new(&spec.scorers, &context.device)?;
    let rows = generation::rows(context, &spec.datasets)?;
    let earlier = earlier_best(&spec.earlier)?;
    let origin = format!("round {}", context.round);

    let sampled = generation::once_each(context, rows.len(), |left, keep| {
        let asked = generation::questions(&rows, left)?;
        generation::answer_and_judge(
            (&policy, &asked, &spec.sampling),
            &panel,
            &|place, answers| {
                let (asked, row) = (&asked[place], &rows[left[place]]);
                let key = crate::score::candidates::prompt_key(&asked.messages);
                let earlier = earlier.get(&key).map_or(&[][..], Vec::as_slice);
                let drawn = (answers, origin.as_str());
                Ok(generation::candidates(&panel, asked, row, drawn, earlier)?.0)
            },
            &mut |place, row| keep(left[place], row),
        )
    })?;

    generation::write_rows(context, "data.jsonl", &sampled)?;
    generation::close_ledger(context)?;
    Ok(measures(&sampled, spec.sampling.num_samples))
}

/// The best candidate of each earlier round for each prompt.
fn earlier_best(files: &[String]) -> Result<BTreeMap<String, Vec<Candidate>>> {
    let mut best: BTreeMap<String, Vec<Candidate>> = BTreeMap::new();
    for file in files {
        for row in store::read_ledger::<Candidates>(Path::new(file))? {
            let Some(candidate) = row.best() else { continue };
            let known = best.entry(row.key()).or_default();
            if known.iter().all(|known| known.text != candidate.text) {
                known.push(candidate.clone());
            }
        }
    }
    Ok(best)
}

/// What this round's draws are like; earlier rounds' candidates are left out.
fn measures(sampled: &[Candidates], drawn: usize) -> Metrics {
    let all = || sampled.iter().flat_map(|row| row.candidates.iter().take(drawn));
    let best = sampled.iter().filter_map(Candidates::best).map(|candidate| candidate.score);
    let cut_off = |candidate: &Candidate| f64::from(u8::from(candidate.finish == Finish::Length));
    let passed = all().filter_map(|candidate| candidate.passed);
    [
        ("prompts", Some(sampled.len() as f64)),
        ("candidates", Some(all().count() as f64)),
        ("score", mean(all().map(|candidate| candidate.score))),
        ("best_score", mean(best)),
        ("accuracy", mean(passed.map(|passed| f64::from(u8::from(passed))))),
        ("mean_length", mean(all().map(|candidate| candidate.tokens as f64))),
        ("cut_off", mean(all().map(cut_off))),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
    .collect()
}
