//! The contents of a run directory: the plan and the manifest of every finished stage. Reports are built from it.

use std::path::Path;

use serde_json::Value;

use super::metrics;
use super::record::{Manifest, Metrics};
use crate::error::{Context, Error, Result};
use crate::score::curve::{CURVE, Curve};
use crate::store::{self, MANIFEST};

/// The metrics that every report leads with: (metric key, heading).
pub const HEADLINE: [(&str, &str); 5] = [
    ("accuracy", "accuracy"),
    ("best_of_k_accuracy", "best of k"),
    ("reward", "reward"),
    ("kl", "KL to base"),
    ("mean_length", "mean length"),
];

/// A headline metric. A training stage also has the accuracy of its last batch; only the held-out accuracy counts.
fn headline(metrics: &Metrics, key: &str) -> Option<f64> {
    let key = if key == "accuracy" && metrics.contains_key("loss") { "eval_accuracy" } else { key };
    metrics.get(key).copied()
}

/// A stage of the plan and its results so far.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its directory's name.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Its round.
    pub round: u64,
    /// Its manifest; `None` until it has finished.
    pub manifest: Option<Manifest>,
    /// Its per-step metrics, if it trained.
    pub steps: Vec<(u64, Metrics)>,
    /// Best of k, if it sampled and scored several answers per prompt.
    pub curve: Option<Curve>,
}

/// A run directory.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The recipe's name.
    pub name: String,
    /// The plan as it was written.
    pub plan: Value,
    /// The recipe as it was written.
    pub recipe: String,
    /// The stages in order.
    pub stages: Vec<Finished>,
}

impl Summary {
    /// Reads a run directory.
    ///
    /// # Errors
    /// Not a run directory.
    pub fn read(run: &Path) -> Result<Self> {
        let plan = run.join("plan.json");
        if !plan.is_file() {
            return Err(Error::usage(format!("`{}` is not a run directory", run.display()))
                .hint("it has no plan.json; `arriero run` writes runs under runs/"));
        }
        let plan: Value = store::read_json(&plan)?;
        let recipe = store::read_text(&run.join("recipe.toml"))?;
        let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let mut stages = Vec::new();
        for step in plan["steps"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let id = text(step, "id");
            let dir = run.join("stages").join(&id);
            let path = dir.join(MANIFEST);
            let manifest = path
                .is_file()
                .then(|| {
                    store::read_json(&path).hint("remove this stage's directory, then run again")
                })
                .transpose()?;
            let steps = metrics::read(&dir)?;
            let curve = dir.join(CURVE);
            let curve = curve.is_file().then(|| store::read_json::<Curve>(&curve)).transpose()?;
            stages.push(Finished {
                name: text(step, "name"),
                kind: text(step, "kind"),
                round: step["round"].as_u64().unwrap_or_default(),
                id,
                manifest,
                steps,
                curve: curve.filter(|curve| curve.samples > 1),
            });
        }
        Ok(Self { name: text(&plan, "name"), plan, recipe, stages })
    }

    /// Stages with at least one headline metric, each with all of them.
    pub fn measured(&self) -> impl Iterator<Item = (&Finished, [Option<f64>; HEADLINE.len()])> {
        self.stages
            .iter()
            .filter_map(|stage| {
                let metrics = &stage.manifest.as_ref()?.record.metrics;
                Some((stage, HEADLINE.map(|(key, _)| headline(metrics, key))))
            })
            .filter(|(_, numbers)| numbers.iter().any(Option::is_some))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headline_of_a_trained_stage_uses_held_out_metrics() {
        let metrics = |all: &[(&str, f64)]| -> Metrics {
            all.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
        };
        let of_eval = metrics(&[("accuracy", 0.5)]);
        assert_eq!(headline(&of_eval, "accuracy"), Some(0.5));
        let trained = metrics(&[("accuracy", 0.9), ("loss", 0.1), ("eval_accuracy", 0.7)]);
        assert_eq!(headline(&trained, "accuracy"), Some(0.7));
        let unseen = metrics(&[("accuracy", 0.9), ("loss", 0.1), ("mean_length", 3.0)]);
        assert_eq!(
            HEADLINE.map(|(key, _)| headline(&unseen, key)),
            [None, None, None, None, Some(3.0)]
        );
    }
}
