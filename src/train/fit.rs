//! The training loop: schedule, clipping, evaluation, checkpoints, and the divergence guard. It knows only an
//! [`Objective`].

use std::path::{Path, PathBuf};
use std::thread::Scope;
use std::time::Instant;

use super::checkpoint::{Saved, State};
use super::feed::{self, Data, Feed, Prepared};
use super::memory::full_in_pass;
use super::step::{self, StepOptions, StepReport};
use super::update::{self, Pace};
use super::{Ema, Follower, Learner, Recompute, Settings};
use crate::data::examples::Examples;
use crate::error::{Error, Result};
use crate::loss::Objective;
use crate::optim::adamw::AdamW;
use crate::report::record::{Events, Metrics};

/// Answers prompts with the current weights; returns lines to log.
pub type Samples<'a> = dyn Fn(&Learner) -> Result<Vec<String>> + 'a;

/// The inputs of a training run.
pub struct Job<'a> {
    /// The objective to minimize.
    pub objective: &'a dyn Objective,
    /// Training examples.
    pub train: &'a Data,
    /// Held-out examples, possibly none, and their objective.
    pub eval: (&'a dyn Objective, &'a dyn Examples),
    /// Training settings.
    pub settings: &'a Settings,
    /// Seed of the example order and of all random draws in training.
    pub seed: u64,
    /// The stage's directory; checkpoints go to its `checkpoints/`.
    pub dir: &'a Path,
    /// Writes the current weights as a complete Hugging Face directory.
    pub save: &'a dyn Fn(&Learner, &Path) -> Result<()>,
    /// A reference that follows the policy, if the objective needs one.
    pub follower: Option<&'a Follower>,
    /// Answers a few held-out prompts with the current weights, for people to read. Returns lines to log.
    pub samples: Option<&'a Samples<'a>>,
    /// Receives progress and metrics.
    pub events: &'a dyn Events,
}

/// Trains to the end, resuming from the newest complete checkpoint in the stage's directory. Returns the final metrics.
/// With `ema_decay`, the learner ends with the averaged weights.
///
/// A run that was killed and resumed ends with the same bits as an uninterrupted one.
///
/// # Errors
/// Settings that do not fit the job; no examples; a loss or gradient that is not finite, named by step and rows;
/// [`Error::interrupted`] after saving.
pub fn fit(learner: &Learner, job: &Job<'_>) -> Result<Metrics> {
    check(learner, job)?;
    // The thread that prepares the next step ends with the run.
    std::thread::scope(|scope| {
        let mut run = Run::resume(learner, job, scope)?;
        while run.state.step < run.feed.total_steps() && !run.waited_long_enough() {
            run.step()?;
            run.after_step()?;
        }
        run.finish()
    })
}

/// Refuses settings that do not apply to this model and these examples.
fn check(learner: &Learner, job: &Job<'_>) -> Result<()> {
    job.settings.check()?;
    job.settings.check_held_out(!job.eval.1.is_empty())?;
    if job.settings.stochastic_rounding && !learner.rounds() {
        let count = learner.params().len();
        return Err(Error::usage(format!(
            "`stochastic_rounding` is true and of {count} trained parameters none has a bf16 copy, expected 1 or more"
        ))
        .hint("matrices have one; norms, biases and score heads are computed with in f32: leave it out"));
    }
    Ok(())
}

struct Run<'a> {
    learner: &'a Learner,
    job: &'a Job<'a>,
    feed: Feed,
    adamw: AdamW,
    ema: Option<Ema>,
    state: State,
    options: StepOptions,
    started: (Instant, usize),
}

impl<'a> Run<'a> {
    fn resume<'scope>(
        learner: &'a Learner,
        job: &'a Job<'a>,
        scope: &'scope Scope<'scope, '_>,
    ) -> Result<Self>
    where
        'a: 'scope,
    {
        let settings = job.settings;
        let mut adamw = settings.optimizer(job.seed);
        let ema = Ema::new(learner, settings)?;
        let state = match Saved::newest(&Self::checkpoints(job))? {
            Some(saved) => {
                let state = saved.load((learner, ema.as_ref()), &mut adamw)?;
                if let Some(follower) = job.follower {
                    follower.load(saved.dir())?;
                }
                job.events.note(&format!("resuming after step {}", state.step));
                state
            }
            None => State::default(),
        };
        job.events.resume_after(state.step as u64)?;
        let averaged = ema.as_ref().map_or(0, |ema| ema.learner().trained_bytes());
        // A resumed run has already allocated the moments.
        let moments = adamw.bytes(learner.model().device());
        let references = job.follower.map_or(0, Follower::bytes) + job.objective.bytes();
        let held = learner.bytes() + averaged + moments + references;
        let options = StepOptions {
            adapted: learner.adapted_sizes(),
            follows: job.follower.is_some(),
            anchored: job.objective.bytes() > 0,
            ..settings.step_options(held, learner.model().device())?
        };
        if let Some(note) = settings.without_effect(learner.model().device()) {
            job.events.note(&note);
        }
        if options.recompute == Recompute::Auto {
            job.events.note(&options.explain(learner.model().config()));
        }
        let from = feed::From { seed: job.seed, step: state.step, cursor: state.cursor };
        let feed = Feed::start(scope, job.train, learner.model(), settings, from)?;
        let follows = job.follower.and_then(|follower| follower.without_effect(feed.total_steps()));
        if let Some(note) = follows {
            job.events.note(&note);
        }
        let started = (Instant::now(), 0);
        Ok(Self { learner, job, feed, adamw, ema, state, options, started })
    }

    fn checkpoints(job: &Job<'_>) -> PathBuf {
        job.dir.join("checkpoints")
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<()> {
        let settings = self.job.settings;
        let Prepared { batch, cursor, epoch } = self.feed.next()?;
        let at = format!("step {}", self.state.step + 1);
        let total = self.feed.total_steps();
        let schedule = settings.lr_scheduler_type;
        let lr = settings.learning_rate
            * schedule.factor(self.state.step, total, settings.warmup(total));
        let dropout = self.learner.dropout(self.job.seed, self.state.step);
        let noise = settings.noise(self.job.seed, self.state.step);
        let options = StepOptions { dropout, noise, ..self.options };
        let pace = Pace { lr, max_grad_norm: settings.max_grad_norm };
        let what = (self.job.objective, batch);
        let (report, norm) = update::take(self.learner, what, options, &mut self.adamw, pace)
            .map_err(|error| options.out_of_memory(self.learner.model().config(), error).at(&at))?;
        if let Some(ema) = &self.ema {
            ema.update(self.learner)?;
        }
        self.state.step += 1;
        if let Some(follower) = self.job.follower {
            follower.after_step(self.learner, self.state.step)?;
        }
        self.state.cursor = cursor;
        self.state.tokens += report.tokens as u64;
        self.started.1 += report.tokens;
        self.log(report, norm, (lr, epoch))
    }

    fn log(&mut self, report: StepReport, norm: f64, (lr, epoch): (f64, f64)) -> Result<()> {
        let (step, total) = (self.state.step, self.feed.total_steps());
        let mut metrics = report.metrics;
        metrics.insert("loss".to_owned(), report.loss);
        metrics.insert("grad_norm".to_owned(), norm);
        if self.job.settings.max_grad_norm > 0.0 {
            self.state.clipped += usize::from(norm > self.job.settings.max_grad_norm);
            metrics.insert("clipped_share".to_owned(), self.state.clipped as f64 / step as f64);
        }
        metrics.insert("learning_rate".to_owned(), lr);
        metrics.insert("epoch".to_owned(), epoch);
        metrics.insert("num_tokens".to_owned(), self.state.tokens as f64);
        let seconds = self.started.0.elapsed().as_secs_f64();
        metrics.insert("tokens_per_second".to_owned(), self.started.1 as f64 / seconds.max(1e-9));
        if self.state.first.is_empty() {
            self.state.first = metrics.clone();
        }
        self.state.last = metrics.clone();
        let heard = self.state.watch.see(&metrics, self.job.settings.watchdog);
        if let Some(warning) = heard.map_err(|error| error.at(format!("step {step}")))? {
            self.job.events.note(&format!("step {step}: {warning}"));
        }
        let what = format!("loss {:.4}", report.loss);
        self.job.events.progress(&what, step as u64, total as u64);
        if step % self.job.settings.logging_steps == 0 || step == total {
            self.job.events.metrics(step as u64, &metrics)?;
        }
        Ok(())
    }

    /// Runs the evaluation and checkpoints due after a step; handles Ctrl-C.
    fn after_step(&mut self) -> Result<()> {
        let settings = self.job.settings;
        let step = self.state.step;
        let due = |every: usize| every > 0 && step.is_multiple_of(every);
        let last = step == self.feed.total_steps();
        if due(settings.eval_steps) || last {
            self.evaluate()?;
        }
        let interrupted = self.job.events.interrupted();
        if (due(settings.save_steps) && !last) || interrupted {
            let dir = Self::checkpoints(self.job);
            let weights = (self.learner, self.ema.as_ref());
            let save = |learner: &Learner, dir: &Path| {
                self.job.follower.map_or(Ok(()), |follower| follower.save(dir))?;
                (self.job.save)(learner, dir)
            };
            Saved::write(&dir, weights, &self.adamw, &self.state, &save)?;
            Saved::prune(&dir, settings.save_total_limit)?;
        }
        if interrupted { Err(Error::interrupted()) } else { Ok(()) }
    }

    /// The weights to evaluate and save: the average if there is one.
    fn kept(&self) -> &Learner {
        self.ema.as_ref().map_or(self.learner, Ema::learner)
    }

    /// Evaluates those weights as if read back from a file, that is, rounded to nearest.
    fn evaluate(&mut self) -> Result<()> {
        let by_chance = self.job.settings.stochastic_rounding && self.ema.is_none();
        if by_chance {
            self.learner.round_to_nearest()?;
        }
        self.evaluate_kept()?;
        if by_chance {
            self.adamw.round_again(self.learner.params())?;
        }
        Ok(())
    }

    fn evaluate_kept(&mut self) -> Result<()> {
        let (objective, examples) = self.job.eval;
        if !examples.is_empty() {
            let budget = self.job.settings.max_tokens_per_micro_batch;
            let model = self.kept().model();
            let report = step::evaluate(model, objective, examples, budget).map_err(|error| {
                full_in_pass(error, "in an evaluation", (model.config(), &self.options))
            })?;
            let mut metrics = Metrics::from([("eval_loss".to_owned(), report.loss)]);
            metrics.extend(
                report.metrics.into_iter().map(|(name, value)| (format!("eval_{name}"), value)),
            );
            self.job.events.metrics(self.state.step as u64, &metrics)?;
            let best = self.compare(report.loss)?;
            // The final report is about the weights that are saved.
            if best || !self.job.settings.load_best_model_at_end {
                self.state.eval = metrics;
            }
        }
        if let Some(samples) = self.job.samples {
            samples(self.kept())?.iter().for_each(|line| self.job.events.note(line));
        }
        Ok(())
    }

    /// Tracks the lowest evaluation loss and saves its weights. Returns whether this loss is the lowest.
    fn compare(&mut self, loss: f64) -> Result<bool> {
        if !loss.is_nan() && self.state.best.is_none_or(|best| loss < best) {
            (self.state.best, self.state.evals_since_best) = (Some(loss), 0);
            if self.job.settings.load_best_model_at_end {
                Saved::write_best(self.job.dir, self.kept())?;
            }
            return Ok(true);
        }
        self.state.evals_since_best += 1;
        if self.waited_long_enough() {
            let (step, waited) = (self.state.step, self.state.evals_since_best);
            self.job.events.note(&format!(
                "stopping after step {step}: no lower evaluation loss in {waited} evaluations"
            ));
        }
        Ok(false)
    }

    fn waited_long_enough(&self) -> bool {
        let patience = self.job.settings.early_stopping_patience;
        patience > 0 && self.state.evals_since_best >= patience
    }

    fn finish(self) -> Result<Metrics> {
        if self.job.settings.load_best_model_at_end && self.state.best.is_some() {
            Saved::load_best(self.job.dir, self.learner)?;
        } else if let Some(ema) = &self.ema {
            self.learner.set(&ema.learner().weights())?;
        }
        let State { step, tokens, first, last, eval, best, .. } = self.state;
        // Of the first step, report only what the objective measures.
        let told = |name: &str| {
            !["tokens_per_second", "num_tokens", "epoch", "clipped_share"].contains(&name)
                && !name.starts_with("grad_norm/")
        };
        let first = first.into_iter().filter(|(name, _)| told(name));
        let mut metrics: Metrics =
            first.map(|(name, value)| (format!("first_{name}"), value)).collect();
        metrics.extend(last);
        metrics.extend(eval);
        metrics.insert("steps".to_owned(), step as f64);
        metrics.insert("num_tokens".to_owned(), tokens as f64);
        if let Some(best) = best {
            metrics.insert("best_eval_loss".to_owned(), best);
        }
        Ok(metrics)
    }
}
