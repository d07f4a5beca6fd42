//! Which examples form which optimizer step: a pure function of (seed, settings, number of examples).

use std::cell::RefCell;
use std::ops::Range;

use super::Settings;
use crate::data::examples::Examples;
use crate::data::tree::Tree;
use crate::error::Result;
use crate::rng::Stream;

/// The example order of a run. A step never spans two epochs; an epoch's last step may be partial and still counts.
#[derive(Clone, Debug)]
pub struct Order {
    stream: Stream,
    examples: usize,
    per_step: usize,
    shuffle: bool,
    total: usize,
    /// Shuffled indices of the most recently requested epoch.
    epoch: RefCell<Option<(usize, Vec<usize>)>>,
}

impl Order {
    /// The order of `examples` under `settings`.
    pub fn new(seed: u64, examples: usize, settings: &Settings) -> Self {
        Self {
            stream: Stream::new(seed, "train/shuffle"),
            examples,
            per_step: settings.examples_per_step(),
            shuffle: settings.shuffle,
            total: settings.total_steps(examples),
            epoch: RefCell::new(None),
        }
    }

    /// Number of steps in the whole run.
    pub fn total_steps(&self) -> usize {
        self.total
    }

    /// Number of steps per epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.examples.div_ceil(self.per_step)
    }

    /// Indices of the examples of `step`, counted from 0.
    pub fn step(&self, step: usize) -> Vec<usize> {
        let (epoch, within) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let range = self.range(within);
        if !self.shuffle {
            return range.collect();
        }
        let mut known = self.epoch.borrow_mut();
        if known.as_ref().is_none_or(|(of, _)| *of != epoch) {
            *known = Some((epoch, self.stream.permutation(epoch as u64, self.examples)));
        }
        known.as_ref().map_or_else(Vec::new, |(_, order)| order[range].to_vec())
    }

    /// The trees of `step`.
    ///
    /// # Errors
    /// As [`Examples::get`].
    pub fn trees(&self, step: usize, examples: &dyn Examples) -> Result<Vec<Tree>> {
        self.step(step).into_iter().map(|index| examples.get(index)).collect()
    }

    fn range(&self, within: usize) -> Range<usize> {
        within * self.per_step..((within + 1) * self.per_step).min(self.examples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_sees_every_example_once_in_another_order() {
        let settings = Settings {
            per_device_train_batch_size: 3,
            num_train_epochs: 2.0,
            ..Settings::default()
        };
        let order = Order::new(5, 10, &settings);
        assert_eq!(order.total_steps(), 8);
        let epoch = |first: usize| -> Vec<usize> {
            (first..first + 4).flat_map(|step| order.step(step)).collect()
        };
        let (one, two) = (epoch(0), epoch(4));
        assert_ne!(one, two);
        // Going back gives the same order, although only one epoch is cached.
        assert_eq!(epoch(0), one);
        for mut seen in [one, two] {
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
    }
}
