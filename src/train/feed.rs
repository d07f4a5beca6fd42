//! Source of a run's steps: a set of known size, or a stream. A separate thread reads and packs the examples of the
//! next step while the model computes the current one.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, Scope};

use super::order::Order;
use super::{Batch, Settings};
use crate::data::examples::Examples;
use crate::data::stream::{Cursor, Origin, Stream};
use crate::data::tree::Tree;
use crate::error::{Error, Result};
use crate::model::transformer::Transformer;

/// Training data of a run.
pub enum Data {
    /// A set of known size, shuffled whole each epoch.
    Set(Box<dyn Examples>),
    /// Files of any length, read during training and shuffled within a window.
    Stream(Arc<Origin>),
}

/// Where a run starts or resumes.
#[derive(Clone, Copy, Debug)]
pub(super) struct From {
    /// Seed of the example order.
    pub seed: u64,
    /// Steps already taken.
    pub step: usize,
    /// Position of a stream after those steps.
    pub cursor: Option<Cursor>,
}

/// One step's examples.
pub(super) struct Prepared {
    pub batch: Batch,
    /// Position of a stream after these examples.
    pub cursor: Option<Cursor>,
    /// Epochs completed after these examples; a whole number if the length of an epoch is unknown.
    pub epoch: f64,
}

/// Yields steps in order, each prepared while the previous one runs.
pub(super) struct Feed {
    ready: Receiver<Result<Prepared>>,
    total: usize,
}

impl Feed {
    /// Starts preparing a run's remaining steps on a thread that ends with its scope or when the receiver is dropped.
    ///
    /// # Errors
    /// No examples.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        data: &'scope Data,
        model: &'scope Transformer,
        settings: &'scope Settings,
        from: From,
    ) -> Result<Self> {
        let mut examples = Steps::new(data, settings, from)?;
        let total = examples.total();
        // A zero-capacity channel: one step is ready while another one runs.
        let (send, ready) = sync_channel(0);
        let prepare = move || {
            for step in from.step..total {
                let prepared = examples.prepared(step, model, settings);
                let last = prepared.is_err();
                if send.send(prepared).is_err() || last {
                    return;
                }
            }
        };
        Builder::new().name("feed".to_owned()).spawn_scoped(scope, prepare)?;
        Ok(Self { ready, total })
    }

    /// Number of steps in the whole run.
    pub(super) fn total_steps(&self) -> usize {
        self.total
    }

    /// The next step.
    ///
    /// # Errors
    /// A row that cannot be read or used, unless the settings skip it; as [`Batch::new`].
    pub(super) fn next(&self) -> Result<Prepared> {
        self.ready
            .recv()
            .unwrap_or_else(|_| Err(Error::run("the thread that prepares steps has ended")))
    }
}

/// Yields the examples of consecutive steps.
enum Steps<'a> {
    Set { order: Order, examples: &'a dyn Examples },
    Stream { stream: Stream, settings: &'a Settings },
}

impl<'a> Steps<'a> {
    fn new(data: &'a Data, settings: &'a Settings, from: From) -> Result<Self> {
        match data {
            Data::Set(examples) if examples.is_empty() => {
                Err(Error::run("the dataset is empty: there is nothing to train on"))
            }
            Data::Set(examples) => {
                let order = Order::new(from.seed, examples.len(), settings);
                Ok(Self::Set { order, examples: examples.as_ref() })
            }
            Data::Stream(origin) => {
                let stream = Stream::start(origin, from.cursor.unwrap_or_default())?;
                Ok(Self::Stream { stream, settings })
            }
        }
    }

    fn total(&self) -> usize {
        match self {
            Self::Set { order, .. } => order.total_steps(),
            // `Settings::check` requires `max_steps`.
            Self::Stream { settings, .. } => settings.max_steps,
        }
    }

    /// Prepares step `step`, counted from 0. A stream continues after its last example.
    fn prepared(
        &mut self,
        step: usize,
        model: &Transformer,
        settings: &Settings,
    ) -> Result<Prepared> {
        let trees: Vec<Tree> = match self {
            Self::Set { order, examples } => order.trees(step, *examples),
            Self::Stream { stream, settings } => stream.next(settings.examples_per_step()),
        }?;
        let batch = Batch::new(model, &trees, settings.max_tokens_per_micro_batch)
            .map_err(|error| error.at(format!("step {}", step + 1)))?;
        let (cursor, epoch) = match self {
            Self::Set { order, .. } => (None, (step + 1) as f64 / order.steps_per_epoch() as f64),
            Self::Stream { stream, .. } => (Some(stream.cursor()), stream.cursor().epoch as f64),
        };
        Ok(Prepared { batch, cursor, epoch })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use candle_core::Device;

    use super::*;
    use crate::data::tree::Role;
    use crate::model::checkpoint::Checkpoint;

    /// Rows of one to three tokens, one of which may be unreadable, and the number of reads.
    struct Rows {
        count: usize,
        broken: Option<usize>,
        asked: Arc<AtomicUsize>,
    }

    impl Examples for Rows {
        fn len(&self) -> usize {
            self.count
        }

        fn get(&self, index: usize) -> Result<Tree> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            if self.broken == Some(index) {
                return Err(Error::run("damaged").at(format!("row {index}")));
            }
            let len = 2 + index % 3;
            Ok(Tree::sequence(vec![index as u32; len], vec![Role::Content; len], index))
        }
    }

    fn model() -> Transformer {
        let dir = std::path::Path::new("tests/fixtures/goldens/model_tied");
        let Checkpoint { config, weights, .. } = Checkpoint::load_dir(dir, &Device::Cpu).unwrap();
        Transformer::new(&config, &weights).unwrap()
    }

    fn settings() -> Settings {
        Settings {
            per_device_train_batch_size: 3,
            num_train_epochs: 2.0,
            max_tokens_per_micro_batch: 5,
            ..Settings::default()
        }
    }

    /// Takes up to `most` steps from step `step` on. Returns their rows or errors, and how many rows were read.
    fn taken(rows: (usize, Option<usize>), step: usize, most: usize) -> (Vec<String>, usize) {
        let asked = Arc::new(AtomicUsize::new(0));
        let (count, broken) = rows;
        let data = Data::Set(Box::new(Rows { count, broken, asked: asked.clone() }));
        let (model, settings) = (model(), settings());
        let from = From { seed: 5, step, cursor: None };
        let all = thread::scope(|scope| {
            let feed = Feed::start(scope, &data, &model, &settings, from).unwrap();
            let left = feed.total_steps() - step;
            let said = |next: Result<Prepared>| match next {
                Ok(Prepared { batch, epoch, .. }) => format!("{:?} {epoch}", batch.rows),
                Err(error) => error.to_string(),
            };
            (0..left.min(most)).map(|_| said(feed.next())).collect()
        });
        (all, asked.load(Ordering::SeqCst))
    }

    #[test]
    fn every_step_is_prepared_once_from_any_starting_step() {
        let order = Order::new(5, 10, &settings());
        let expected: Vec<String> = (0..8)
            .map(|step| format!("{:?} {}", order.step(step), (step + 1) as f64 / 4.0))
            .collect();
        assert_eq!(taken((10, None), 0, 100), (expected.clone(), 20));
        assert_eq!(taken((10, None), 5, 100), (expected[5..].to_vec(), 20 - 10 - 3));
    }

    #[test]
    fn dropping_the_receiver_ends_the_thread_at_most_one_step_ahead() {
        // Steps of three rows: two were taken and a third may be ready, but no fourth.
        let (steps, asked) = taken((10, None), 0, 2);
        assert_eq!(steps.len(), 2);
        assert!((6..=9).contains(&asked), "{asked} rows were read");
    }

    #[test]
    fn error_is_reported_at_its_step_after_the_earlier_steps() {
        let order = Order::new(5, 10, &settings());
        let broken = order.step(2)[1];
        let (said, _) = taken((10, Some(broken)), 0, 4);
        assert!(said[1].starts_with(&format!("{:?}", order.step(1))), "{said:?}");
        assert_eq!(said[2], format!("row {broken}: damaged"));
        // Nothing follows the error.
        assert_eq!(said[3], "the thread that prepares steps has ended");
    }

    #[test]
    fn batch_is_split_by_the_budget_and_records_its_rows() {
        let examples = Rows { count: 5, broken: None, asked: Arc::default() };
        let trees: Vec<Tree> = (0..5).map(|row| examples.get(row).unwrap()).collect();
        let batch = Batch::new(&model(), &trees, 5).unwrap();
        let lens: Vec<usize> = batch.parts.iter().map(|part| part.forest.len()).collect();
        assert_eq!((lens, batch.tokens(), batch.rows), (vec![5, 4, 5], 14, vec![0, 1, 2, 3, 4]));
        for part in &batch.parts {
            assert_eq!(part.layout.rotary.tokens(), part.forest.len());
            assert_eq!(part.layout.attention.tokens, part.forest.len());
        }
    }
}
