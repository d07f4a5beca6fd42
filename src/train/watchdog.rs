//! Notices when preference training makes the chosen responses unlikely too: DPO's usual failure mode.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::report::record::Metrics;

/// Number of steps averaged for the comparison.
const STEPS: usize = 10;
/// Allowed fall of the chosen responses' log-probability per token, in nats: to about a third of the probability.
const FALL: f64 = 1.0;

/// What to do when the chosen responses become unlikely.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Watchdog {
    /// Do nothing.
    Off,
    /// Warn once.
    #[default]
    Warn,
    /// Stop with an error.
    Stop,
}

/// What the watchdog has seen so far; part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// Chosen log-probability per token in the first steps.
    first: Vec<f64>,
    /// The same in the last steps.
    last: Vec<f64>,
    warned: bool,
}

impl Watch {
    /// Looks at one step's metrics. Returns a warning the first time there is cause for one.
    ///
    /// # Errors
    /// With [`Watchdog::Stop`], that warning as an error.
    pub fn see(&mut self, metrics: &Metrics, watchdog: Watchdog) -> Result<Option<String>> {
        let number = |name: &str| metrics.get(name).copied();
        let (Some(logp), Some(length)) = (number("logps/chosen"), number("lengths/chosen")) else {
            return Ok(None);
        };
        if watchdog == Watchdog::Off || self.warned {
            return Ok(None);
        }
        let seen = logp / length;
        if self.first.len() < STEPS {
            self.first.push(seen);
            return Ok(None);
        }
        self.last.push(seen);
        if self.last.len() > STEPS {
            self.last.remove(0);
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let (before, now) = (mean(&self.first), mean(&self.last));
        if self.last.len() < STEPS || now > before - FALL {
            return Ok(None);
        }
        self.warned = true;
        let what = format!(
            "the chosen responses' log-probability fell from {before:.2} to {now:.2} a token (means of {STEPS} steps)"
        );
        let hint = "lower learning_rate, or raise beta, or for pairs sft_loss_weight";
        match watchdog {
            Watchdog::Stop => {
                Err(Error::run(what).hint(format!("{hint}; watchdog = \"warn\" goes on")))
            }
            _ => Ok(Some(format!("{what}: {hint}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of chosen responses of 4 tokens that lose `fall` nats per token each step; the first warning or error.
    fn run(fall: f64, watchdog: Watchdog) -> Option<(usize, String)> {
        let mut watch = Watch::default();
        let mut heard = None;
        for step in 1..=60 {
            let logp = -4.0 * (1.0 + fall * step as f64);
            let metrics = Metrics::from([
                ("logps/chosen".to_owned(), logp),
                ("lengths/chosen".to_owned(), 4.0),
            ]);
            match watch.see(&metrics, watchdog) {
                Ok(None) => {}
                Ok(Some(text)) => {
                    assert!(heard.is_none(), "a second warning");
                    heard = Some((step, text));
                }
                Err(error) => return Some((step, format!("{error:?}"))),
            }
        }
        heard
    }

    #[test]
    fn watchdog_reports_a_collapse_once_and_ignores_drift() {
        // The means are `step - 10` steps apart: at 0.021 nats per step they differ by more than 1 after 48 steps.
        let (step, text) = run(0.021, Watchdog::Warn).unwrap();
        assert_eq!(step, 58);
        assert_eq!(
            text,
            "the chosen responses' log-probability fell from -1.12 to -2.12 a token (means of 10 steps): lower \
             learning_rate, or raise beta, or for pairs sft_loss_weight"
        );
        assert_eq!(run(0.015, Watchdog::Warn), None);
        assert_eq!(run(0.11, Watchdog::Off), None);
        let (step, error) = run(0.11, Watchdog::Stop).unwrap();
        assert_eq!(step, 20);
        assert!(error.ends_with("watchdog = \"warn\" goes on)"), "{error}");
        // Ignores other metrics, such as SFT's.
        let other = Metrics::from([("loss".to_owned(), 9.0)]);
        assert_eq!(Watch::default().see(&other, Watchdog::Stop).unwrap(), None);
    }
}
