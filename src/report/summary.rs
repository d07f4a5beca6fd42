//! What a run directory holds: the plan and the manifest of every finished stage. Reports are made from this.

use std::path::Path;

use serde_json::Value;

use super::metrics;
use super::record::{Manifest, Metrics};
use crate::error::{Context, Error, Result};
use crate::score::curve::{CURVE, Curve};
use crate::store::{self, MANIFEST};

/// The numbers that every report leads with: (key of the metrics, heading).
pub const HEADLINE: [(&str, &str); 4] = [
    ("accuracy", "accuracy"),
    ("reward", "reward"),
    ("kl", "KL to base"),
    ("mean_length", "mean length"),
];

/// A stage of the plan and what there is of it.
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
    /// What it left; `None` while it is not finished.
    pub manifest: Option<Manifest>,
    /// The numbers of its steps, where it trained.
    pub steps: Vec<(u64, Metrics)>,
    /// Best of k, where it drew and judged several answers a prompt.
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

    /// Stages with at least one headline number.
    pub fn measured(&self) -> impl Iterator<Item = (&Finished, &Metrics)> {
        self.stages
            .iter()
            .filter_map(|stage| Some((stage, &stage.manifest.as_ref()?.record.metrics)))
            .filter(|(_, metrics)| HEADLINE.iter().any(|(key, _)| metrics.contains_key(*key)))
    }
}
