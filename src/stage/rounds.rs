//! A whole run: all stages of all rounds in order.

pub use super::device::open as device;
use super::run::StageStore;
use super::{Events, Metrics, StageContext, StageRecord};
use crate::error::{Error, Result};
use crate::recipe::{Plan, Spec, Step};
use crate::store::{self, RunLock};

/// Executes a stage: [`run_stage`](super::run_stage), or a fake in tests.
pub type StageFn<'a> = dyn Fn(&StageContext<'_>, &Spec) -> Result<Metrics> + 'a;

/// Observes a run: the terminal, the log files, or a test.
pub trait Observer {
    /// A stage starts or resumes in `dir`; returns the receiver of its events.
    fn begin<'a>(
        &'a self,
        step: &Step,
        dir: &std::path::Path,
        resumes: bool,
    ) -> Result<Box<dyn Events + 'a>>;

    /// A stage is finished, or was reused.
    fn end(&self, step: &Step, record: &StageRecord);

    /// Whether the user asked to stop.
    fn interrupted(&self) -> bool;
}

/// Runs the plan in its run directory: finished work is reused, unfinished work resumed. `recipe` is the recipe as
/// written, which is kept with the run.
///
/// # Errors
/// The first stage that fails; another process in the same directory; an interrupt. Finished work is kept.
pub fn run_plan(
    plan: &Plan,
    recipe: &str,
    observer: &dyn Observer,
    stage: &StageFn<'_>,
) -> Result<Vec<StageRecord>> {
    let device = device(&plan.device)?;
    let run = &plan.output_dir;
    let _lock = RunLock::acquire(run)?;
    store::remove_partials(run)?;
    store::write_atomic(&run.join("recipe.toml"), recipe.as_bytes())?;
    store::write_json(&run.join("plan.json"), plan)?;
    let mut stages = StageStore::open(run)?;
    let mut records = Vec::new();
    for step in &plan.steps {
        if observer.interrupted() {
            return Err(Error::interrupted());
        }
        let (inputs, found) = stages.look_up(step)?;
        let record = if found {
            stages.reuse(step, &inputs)?
        } else {
            let (dir, resumes) = stages.work_dir(step, &inputs)?;
            let events = observer.begin(step, &dir, resumes)?;
            stages.execute(step, inputs, &|dir| {
                let context = StageContext {
                    dir,
                    round: step.round,
                    seed: step.seed,
                    device: device.clone(),
                    events: events.as_ref(),
                };
                stage(&context, &step.spec)
            })?
        };
        observer.end(step, &record);
        records.push(record);
    }
    Ok(records)
}
