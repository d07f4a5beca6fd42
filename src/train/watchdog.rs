//! Notices when preference training makes the chosen responses unlikely too: the usual way in which DPO goes wrong.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::report::record::Metrics;

/// Steps whose mean is compared.
const STEPS: usize = 10;
/// How far the chosen responses' log-probability a token may fall, in nats: to a third of the probability.
const FALL: f64 = 1.0;

/// What to do when the chosen responses become unlikely.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Watchdog {
    /// Nothing.
    Off,
    /// Say so, once.
    #[default]
    Warn,
    /// Stop with an error.
    Stop,
}

/// What was seen so far; part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// Chosen log-probability a token of the first steps.
    first: Vec<f64>,
    /// And of the last ones.
    last: Vec<f64>,
    warned: bool,
}

impl Watch {
    /// Looks at one step's numbers. Returns a warning, the first time that there is cause for one.
    ///
    /// # Errors
    /// With [`Watchdog::Stop`], the same as an error.
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

    /// Steps of chosen responses of 4 tokens that lose `fall` nats a token each step; the first warning or error.
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
    fn a_collapse_is_heard_once_and_drift_is_not() {
        // The means are `step - 10` steps apart: 21 nats in 1,000 are more than 1 after 48.
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
        // A mean over other numbers, such as SFT's, is none of its business.
        let other = Metrics::from([("loss".to_owned(), 9.0)]);
        assert_eq!(Watch::default().see(&other, Watchdog::Stop).unwrap(), None);
    }
}
