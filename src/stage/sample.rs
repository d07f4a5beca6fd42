//! The sampling half of rejection sampling (Llama 3, section 4.2.2): K candidates per prompt from the newest policy, or
//! from the policy for the prompt's capability, each scored.

use std::collections::BTreeMap;
use std::path::Path;

use super::generation::{self, Keep, Pace, mean};
use super::{Metrics, StageContext};
use crate::data::record::{Message, Row};
use crate::error::{Error, Result};
use crate::generate::engine::Finish;
use crate::generate::local::LocalModel;
use crate::generate::sampling::Sampling;
use crate::generate::teacher::Asked;
use crate::model::Precision;
use crate::model::bases::{Bases, Form};
use crate::recipe::plan;
use crate::report::candidates as page;
use crate::score::Panel;
use crate::score::candidates::{Candidate, Candidates, REFERENCE, prompt_key};
use crate::score::curve::{Curve, Drawn};
use crate::store;

/// Draws and scores K candidates per prompt. Input: checkpoints, prompts, earlier rounds' candidates. Output:
/// `data.jsonl`, one row per prompt; for people `candidates.html` and `curve.json`.
pub fn run(context: &StageContext<'_>, spec: &plan::Sample) -> Result<Metrics> {
    let rows = generation::rows(context, &spec.datasets, &spec.scorers)?;
    if spec.include_reference && rows.iter().all(|row| row.reference_answer().is_none()) {
        return Err(Error::run("`include_reference`, but no row has an answer of its own")
            .hint("it comes from the last assistant message, `completion` or `chosen`"));
    }
    for (at, policy) in spec.policies.iter().enumerate() {
        if rows.iter().all(|row| spec.policy_of(&row.extra) != Some(at)) {
            context.events.note(&format!("policy `{}` draws for none of the rows", policy.name));
        }
    }
    // Adapter policies share the base of the reward models, which stay loaded.
    let bases = Bases::default();
    let panel = Panel::among(&spec.scorers, &context.device, &bases, context.events)?;
    let form = Form::dense(&context.device, Precision::F32);
    let earlier = earlier_best(&spec.earlier)?;
    let mut pace = Pace::start();
    let sampled = generation::once_each(context, rows.len(), |left, keep| {
        let turns = turns(spec, &rows, left);
        let mut loaded: Option<(&Turn<'_>, LocalModel)> = None;
        for turn in &turns {
            let earlier_turn = loaded.take().filter(|(before, _)| before.shares_model(turn));
            let model = if let Some((_, model)) = earlier_turn {
                model
            } else {
                let read = bases.model(turn.model, &form)?;
                generation::written_by(context, (turn.model, read), turn.sampling)?
            };
            let draw =
                Draw { round: context.round, spec, rows: &rows, earlier: &earlier, panel: &panel };
            draw.answers(turn, &model, &mut pace, keep)?;
            loaded = Some((turn, model));
        }
        Ok(())
    });
    let sampled = generation::accounted(&context.dir, &panel, sampled)?;

    generation::write_rows(context, "data.jsonl", &sampled)?;
    page::write(&context.dir, sampled.iter())?;
    let drawn: Vec<usize> =
        rows.iter().zip(&sampled).map(|(row, sampled)| drawn(spec, row, sampled)).collect();
    let mut metrics = measures(&sampled, &drawn, panel.verifies());
    let skipped = rows.iter().zip(&sampled).filter(|(_, sampled)| sampled.unanswered);
    generation::name_skipped(context, &mut metrics, skipped.map(|(row, _)| row));
    if !panel.is_empty() {
        let curve = Curve::of(&choices(&sampled, &drawn, panel.verifies()), "score");
        metrics.extend(generation::write_curve(context, curve.as_ref())?);
    }
    metrics.extend(pace.metrics());
    Ok(metrics)
}

/// One policy with the rows that it samples for.
struct Turn<'a> {
    name: &'a str,
    model: &'a str,
    system: &'a str,
    sampling: &'a Sampling,
    rows: Vec<usize>,
}

impl Turn<'_> {
    fn shares_model(&self, other: &Self) -> bool {
        // Everything that is fixed when a model is loaded.
        let held = |turn: &Self| {
            let Sampling { dtype, quantization, prompt_lookup_num_tokens, .. } = *turn.sampling;
            (turn.model.to_owned(), dtype, quantization, prompt_lookup_num_tokens)
        };
        let assistant = |turn: &Self| {
            (turn.sampling.assistant_model.clone(), turn.sampling.num_assistant_tokens)
        };
        held(self) == held(other) && assistant(self) == assistant(other)
    }
}

/// The policy that samples for a row; its list of rows is empty.
fn way<'a>(spec: &'a plan::Sample, row: &Row) -> Turn<'a> {
    match spec.policy_of(&row.extra).map(|at| &spec.policies[at]) {
        Some(policy) => Turn {
            name: &policy.name,
            model: &policy.model_name_or_path,
            system: &policy.system,
            sampling: &policy.sampling,
            rows: Vec::new(),
        },
        None => Turn {
            name: "",
            model: &spec.model_name_or_path,
            system: &spec.system,
            sampling: &spec.sampling,
            rows: Vec::new(),
        },
    }
}

/// How many of a row's candidates were drawn in this stage.
fn drawn(spec: &plan::Sample, row: &Row, sampled: &Candidates) -> usize {
    if sampled.unanswered { 0 } else { way(spec, row).sampling.num_samples }
}

/// The policies needed for the remaining rows, grouped by model: each model is loaded once, and one at a time.
fn turns<'a>(spec: &'a plan::Sample, rows: &[Row], left: &[usize]) -> Vec<Turn<'a>> {
    let mut turns: Vec<Turn<'a>> = Vec::new();
    for &index in left {
        let way = way(spec, &rows[index]);
        let same = |turn: &Turn<'_>| std::ptr::eq(turn.sampling, way.sampling);
        let at = turns.iter().position(same).unwrap_or_else(|| {
            let after = turns.iter().rposition(|turn| turn.shares_model(&way));
            let at = after.map_or(turns.len(), |after| after + 1);
            turns.insert(at, way);
            at
        });
        turns[at].rows.push(index);
    }
    turns
}

/// The shared inputs for drawing and scoring answers.
struct Draw<'a> {
    round: u32,
    spec: &'a plan::Sample,
    rows: &'a [Row],
    earlier: &'a BTreeMap<String, Vec<Candidate>>,
    panel: &'a Panel<'a>,
}

impl Draw<'_> {
    /// Draws and scores the answers of one policy.
    fn answers(
        &self,
        turn: &Turn<'_>,
        model: &LocalModel,
        pace: &mut Pace,
        keep: &mut Keep<'_, Candidates>,
    ) -> Result<()> {
        let origin = match turn.name {
            "" => format!("round {}", self.round),
            name => format!("round {} {name}", self.round),
        };
        let plain = generation::questions(self.rows, &turn.rows)?;
        let steered: Vec<Asked> = plain.iter().map(|asked| steer(asked, turn.system)).collect();
        let written = if self.spec.keep_system { &steered } else { &plain };
        generation::answer_and_judge(
            (model, &steered, turn.sampling),
            self.panel,
            &|place, answers| {
                let (asked, row) = (&written[place], &self.rows[turn.rows[place]]);
                let others = self.others(asked, row, model);
                let drawn = (answers, origin.as_str());
                let row = generation::candidates(self.panel, asked, row, drawn, &others)?.0;
                Ok((row, answers.len(), answers.iter().map(|answer| answer.tokens).sum()))
            },
            &mut |place, (row, samples, tokens)| {
                pace.add(samples, tokens);
                keep(turn.rows[place], row)
            },
        )
    }

    /// Candidates not drawn in this stage: the row's own answer, then the best of each earlier round.
    fn others(&self, asked: &Asked, row: &Row, model: &LocalModel) -> Vec<Candidate> {
        let mut others = Vec::new();
        if self.spec.include_reference
            && let Some(text) = row.reference_answer()
        {
            others.push(reference(text, model));
        }
        let earlier = self.earlier.get(&prompt_key(&asked.messages));
        for candidate in earlier.map(Vec::as_slice).unwrap_or_default() {
            if others.iter().all(|known| known.text != candidate.text) {
                others.push(candidate.clone());
            }
        }
        others
    }
}

/// Prepends the system message to the question; an existing one follows in the same message, since chat templates
/// expect only one.
fn steer(asked: &Asked, system: &str) -> Asked {
    let mut steered = asked.clone();
    if system.is_empty() {
        return steered;
    }
    match steered.messages.first_mut().filter(|message| message.role() == "system") {
        Some(own) => *own = Message::new("system", format!("{system}\n\n{}", own.text())),
        None => steered.messages.insert(0, Message::new("system", system)),
    }
    steered
}

/// The row's own answer. No model drew it, so its log-probability stays 0; its length is that under the policy's
/// tokenizer, including the end-of-turn token.
fn reference(text: String, model: &LocalModel) -> Candidate {
    let tokens = model.tokenizer().encode(&text).len() + 1;
    Candidate {
        text,
        tokens,
        finish: Finish::Stop,
        logprob_sum: 0.0,
        scores: indexmap::IndexMap::new(),
        score: 0.0,
        passed: None,
        origin: REFERENCE.to_owned(),
        why: indexmap::IndexMap::new(),
        streams: None,
    }
}

/// The best candidate per prompt of each earlier round.
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

/// The policies' draws, without candidates from elsewhere and skipped prompts.
fn choices(sampled: &[Candidates], drawn: &[usize], verified: bool) -> Vec<Vec<Drawn>> {
    let judged = |one: &&Candidate| !one.is_unjudged();
    // Answers that could not be scored are never chosen.
    let lowest = generation::lowest(
        sampled.iter().flat_map(|row| row.candidates.iter().filter(judged).map(|one| one.score)),
    );
    let of_row = |(row, drawn): (&Candidates, &usize)| {
        let drawn = row.candidates.iter().take(*drawn);
        drawn
            .map(|one| Drawn {
                score: if one.is_unjudged() { one.score.min(lowest) } else { one.score },
                passed: one.passed.filter(|_| verified),
            })
            .collect()
    };
    sampled.iter().zip(drawn).filter(|(_, drawn)| **drawn > 0).map(of_row).collect()
}

/// Metrics of this round's draws; earlier rounds' candidates and references count only in `best_score`. `verified`:
/// scored by verifiers; otherwise no answer is right, though one that could not be judged did not pass.
fn measures(sampled: &[Candidates], drawn: &[usize], verified: bool) -> Metrics {
    let all =
        || sampled.iter().zip(drawn).flat_map(|(row, drawn)| row.candidates.iter().take(*drawn));
    let best = sampled.iter().filter_map(Candidates::best).map(|candidate| candidate.score);
    let cut_off = |candidate: &Candidate| f64::from(u8::from(candidate.finish == Finish::Length));
    let passed = all().filter_map(|candidate| candidate.passed.filter(|_| verified));
    let unjudged = all().filter(|candidate| candidate.is_unjudged()).count();
    let references: Vec<&Candidate> = sampled
        .iter()
        .flat_map(|row| row.candidates.iter().filter(|one| one.origin == REFERENCE))
        .collect();
    [
        ("prompts", Some(sampled.len() as f64)),
        ("candidates", Some(all().count() as f64)),
        ("score", mean(all().filter(|one| !one.is_unjudged()).map(|one| one.score))),
        ("best_score", mean(best)),
        ("accuracy", mean(passed.map(|passed| f64::from(u8::from(passed))))),
        ("mean_length", mean(all().map(|candidate| candidate.tokens as f64))),
        ("cut_off", mean(all().map(cut_off))),
        ("unjudged", (unjudged > 0).then_some(unjudged as f64)),
        ("reference_score", mean(references.iter().map(|candidate| candidate.score))),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
    .collect()
}
