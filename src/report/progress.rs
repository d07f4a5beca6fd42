//! Progress on standard error: bars on a terminal, plain lines elsewhere. Step metrics go to the stage's files.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::metrics::MetricsLog;
use super::record::{Events, Metrics, StageRecord};
use crate::error::Result;
use crate::recipe::Step;
use crate::stage::rounds::Observer;

/// Shows a run's progress to the user.
#[derive(Debug)]
pub struct Progress<'a> {
    interrupted: &'a AtomicBool,
    steps: usize,
    terminal: bool,
}

impl<'a> Progress<'a> {
    /// Tracks a run of `steps` stages. `interrupted` is set when the user asks to stop.
    pub fn new(steps: usize, interrupted: &'a AtomicBool) -> Self {
        Self { interrupted, steps, terminal: std::io::stderr().is_terminal() }
    }

    fn title(&self, step: &Step) -> String {
        // The number in the id is the stage's index in the run.
        let number = step.id.split('-').next().unwrap_or_default();
        let kind = step.spec.kind().name();
        let kind = if kind == step.name { String::new() } else { format!(" ({kind})") };
        format!("[{number}/{:02}] round {} {}{kind}", self.steps, step.round, step.name)
    }
}

impl Observer for Progress<'_> {
    fn begin<'a>(&'a self, step: &Step, dir: &Path, resumes: bool) -> Result<Box<dyn Events + 'a>> {
        let title = self.title(step);
        if resumes {
            line(&format!("{title}: continuing"));
        } else if !self.terminal {
            line(&format!("{title}: started"));
        }
        let bar = bar(title);
        Ok(Box::new(StageEvents {
            progress: self,
            bar,
            dir: dir.to_path_buf(),
            log: Mutex::new(None),
        }))
    }

    fn end(&self, step: &Step, record: &StageRecord) {
        let how =
            if record.reused { "reused".to_owned() } else { format!("{:.1} s", record.wall_s) };
        let shown = [
            "accuracy",
            "reward",
            "kl",
            "mean_length",
            "loss",
            "eval_loss",
            "margin",
            "rewards/accuracies",
            "rewards/margins",
            "kl/chosen",
            "rows",
        ];
        let numbers: Vec<String> = shown
            .iter()
            .filter_map(|name| Some(format!("{name} {}", short(*record.metrics.get(*name)?))))
            .collect();
        line(format!("{}: {how} {}", self.title(step), numbers.join(", ")).trim_end());
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

fn line(text: &str) {
    // Nothing can be reported when standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Four significant digits.
pub fn short(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs().log10().floor();
    if !(-4.0..15.0).contains(&magnitude) {
        return format!("{value:.3e}");
    }
    let decimals = (3.0 - magnitude).max(0.0) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

struct StageEvents<'a> {
    progress: &'a Progress<'a>,
    bar: ProgressBar,
    dir: std::path::PathBuf,
    /// Opened at the first metric: most stages have none.
    log: Mutex<Option<MetricsLog>>,
}

/// Progress of one piece of work outside a run: a bar on standard error, cleared at the end.
#[derive(Debug)]
pub struct Bar<'a> {
    interrupted: &'a AtomicBool,
    bar: ProgressBar,
}

impl<'a> Bar<'a> {
    /// Shows a bar with this title. `interrupted` is set when the user asks to stop.
    pub fn new(title: &str, interrupted: &'a AtomicBool) -> Self {
        Self { interrupted, bar: bar(title.to_owned()) }
    }
}

impl Events for Bar<'_> {
    fn progress(&self, what: &str, done: u64, total: u64) {
        show(&self.bar, what, done, total);
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| line(text));
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn bar(title: String) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    // The template is a constant; an invalid one would leave indicatif's default.
    if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} {eta}") {
        bar.set_style(style);
    }
    bar.set_prefix(title);
    bar
}

fn show(bar: &ProgressBar, what: &str, done: u64, total: u64) {
    if total > 0 {
        bar.set_length(total);
    }
    bar.set_position(done);
    if bar.message().is_empty() {
        bar.set_message(what.to_owned());
    }
}

impl StageEvents<'_> {
    fn with_log<T>(&self, act: impl FnOnce(&mut MetricsLog) -> Result<T>) -> Result<T> {
        // A panic elsewhere does not corrupt the log.
        let mut guard = self.log.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if guard.is_none() {
            *guard = Some(MetricsLog::open(&self.dir)?);
        }
        match guard.as_mut() {
            Some(log) => act(log),
            None => Err(crate::Error::run("the metrics log is not open")),
        }
    }
}

impl Events for StageEvents<'_> {
    fn progress(&self, what: &str, done: u64, total: u64) {
        show(&self.bar, what, done, total);
    }

    fn metrics(&self, step: u64, values: &Metrics) -> Result<()> {
        if let Some(loss) = values.get("loss") {
            self.bar.set_message(format!("steps, loss {}", short(*loss)));
        }
        self.with_log(|log| log.write(step, values))
    }

    fn resume_after(&self, step: u64) -> Result<()> {
        self.with_log(|log| log.resume_after(step))
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| line(&format!("  {text}")));
    }

    fn interrupted(&self) -> bool {
        self.progress.interrupted()
    }
}

impl Drop for StageEvents<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_with_four_digits() {
        for (value, text) in [
            (0.0, "0"),
            (0.123_456, "0.1235"),
            (1.0, "1"),
            (-12.3456, "-12.35"),
            (123_456.0, "123456"),
            (1e-7, "1.000e-7"),
            (0.001, "0.001"),
        ] {
            assert_eq!(short(value), text);
        }
    }
}
