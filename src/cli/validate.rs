//! `arriero validate`: what a recipe will do, its steps and memory, and a few rows as the model will see them, with the
//! trained tokens marked. Loads no weights and writes nothing.

use std::io::IsTerminal;

use clap::Args;

use super::estimate::{self, Peak, Reference};
use super::{RecipeArgs, inputs, output, recipes};
use crate::data::pipeline::{Source, first_rows};
use crate::data::prepare::Rule;
use crate::data::preview;
use crate::data::record::Record;
use crate::error::Result;
use crate::model::checkpoint::peek;
use crate::model::lora::Lora;
use crate::model::params::count;
use crate::recipe::plan::Dataset;
use crate::recipe::{Plan, Spec, Step};
use crate::train::Settings;

#[derive(Debug, Args)]
pub(super) struct ValidateArgs {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Rows to show per training stage
    #[arg(long, default_value_t = 2)]
    rows: usize,
}

/// Checks a recipe and prints what is known before it runs.
pub(super) fn run(args: &ValidateArgs) -> Result<()> {
    let (file, resolved) = recipes::resolved(&args.recipe)?;
    let plan = &resolved.plan;
    output::line(&format!(
        "{}: {} stages in {} rounds, seed {}, device {}, run directory {}",
        file.path.display(),
        plan.steps.len(),
        plan.rounds,
        plan.seed,
        plan.device,
        plan.output_dir.display()
    ));
    for step in &plan.steps {
        inputs::check(step)?;
        describe(plan, step)?;
    }
    for step in plan.steps.iter().filter(|step| step.round == 1) {
        show_rows(plan, step, args.rows)?;
    }
    Ok(())
}

fn describe(plan: &Plan, step: &Step) -> Result<()> {
    output::line(&format!("\n{} ({})", step.id, step.spec.kind().name()));
    if let Some(training) = Training::of(&step.spec, step.seed) {
        let rows = training.rows()?;
        let steps = match rows {
            Some(rows) => {
                let steps = training.settings.total_steps(rows);
                format!("{rows} rows, {steps} steps of {}", training.settings.examples_per_step())
            }
            None if training.settings.max_steps > 0 => {
                format!("{} steps", training.settings.max_steps)
            }
            None => "steps depend on the output of an earlier stage".to_owned(),
        };
        let memory = match estimate::config(plan, training.model) {
            Some(config) => {
                let gpu = plan.device != "cpu";
                let trained = (training.settings, training.lora);
                let peak = Peak::of(&config, trained, Reference::of(&step.spec), gpu)?;
                format!("{:.1} M parameters, {}", count(&config) as f64 / 1e6, peak.told(gpu))
            }
            None => "memory depends on a model that is not here yet".to_owned(),
        };
        output::line(&format!("  {steps}; {memory}"));
    }
    let settings = serde_json::to_value(&step.spec)?;
    for (key, value) in settings.as_object().into_iter().flatten().filter(|(key, _)| *key != "kind")
    {
        match value {
            serde_json::Value::Object(section) => {
                let keys: Vec<String> =
                    section.iter().map(|(key, value)| format!("{key} = {value}")).collect();
                output::line(&format!("  {key}: {}", keys.join(", ")));
            }
            value => output::line(&format!("  {key} = {value}")),
        }
    }
    Ok(())
}

/// The common settings of training stages.
struct Training<'a> {
    model: &'a str,
    datasets: &'a [Dataset],
    chat_template: &'a str,
    settings: &'a Settings,
    lora: &'a Lora,
    rule: Rule,
}

impl<'a> Training<'a> {
    fn of(spec: &'a Spec, seed: u64) -> Option<Self> {
        let (model, datasets, chat_template, settings, lora, rule) = match spec {
            Spec::Sft(s) => (
                &s.model_name_or_path,
                &s.datasets,
                &s.chat_template,
                &s.train,
                &s.lora,
                Rule::Sft(s.data.clone()),
            ),
            Spec::Reward(s) => (
                &s.model_name_or_path,
                &s.datasets,
                &s.chat_template,
                &s.train,
                &s.lora,
                s.rule(seed),
            ),
            Spec::Dpo(s) => (
                &s.model_name_or_path,
                &s.datasets,
                &s.chat_template,
                &s.train,
                &s.lora,
                Rule::Pairs(s.data.clone()),
            ),
            _ => return None,
        };
        Some(Self { model, datasets, chat_template, settings, lora, rule })
    }

    /// The datasets, if all of them are on this machine.
    fn sources(&self) -> Option<Vec<Source>> {
        self.datasets
            .iter()
            .map(|dataset| {
                let here = std::path::Path::new(&dataset.path).exists();
                here.then(|| dataset.source(self.rule.on_bad_row()))
            })
            .collect()
    }

    /// How many rows are used from them.
    fn rows(&self) -> Result<Option<usize>> {
        let Some(sources) = self.sources() else { return Ok(None) };
        let taken = |source: &Source| -> Result<usize> {
            Ok((source.count()? as f64 * source.fraction).round() as usize)
        };
        sources.iter().map(taken).sum::<Result<usize>>().map(Some)
    }
}

/// Prints the first rows of a training stage as the model will see them.
fn show_rows(plan: &Plan, step: &Step, count: usize) -> Result<()> {
    let Some(training) = Training::of(&step.spec, step.seed).filter(|_| count > 0) else {
        return Ok(());
    };
    let Some(origin) = estimate::origin(plan, training.model) else { return Ok(()) };
    let Some(sources) = training.sources() else { return Ok(()) };
    let (_, Some(mut tokenizer)) = peek(&origin)? else { return Ok(()) };
    if !training.chat_template.is_empty() {
        tokenizer = tokenizer.with_template(training.chat_template)?;
    }
    let rows = first_rows(&sources, step.seed, count)?;
    let colour = std::io::stdout().is_terminal();
    // The rows of a `dpo` stage decide which of the two formats it reads.
    let labelled = rows.iter().any(|row| matches!(row.record, Record::Completion { .. }));
    let rule = match training.rule {
        Rule::Pairs(options) if labelled => Rule::Responses(options),
        rule => rule,
    };
    let prepared = rule.trees(&rows, &tokenizer)?;
    for tree in &prepared.trees {
        let place = rows.get(tree.source).map_or("", |row| row.place.as_str());
        output::line(&format!("\n{} {place}: {} tokens", step.id, tree.tokens()));
        output::line(preview::preview(tree, &tokenizer, colour).trim_end());
    }
    if !prepared.trees.is_empty() {
        let how = if colour { "green and yellow" } else { "in [[ ]] and {{ }}" };
        output::line(&format!("(trained: content and what the template adds, {how})"));
    }
    Ok(())
}
