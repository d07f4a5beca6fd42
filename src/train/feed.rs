//! Where the examples of a step come from: a set of known size, or a stream.

use std::sync::Arc;

use super::Settings;
use super::order::Order;
use crate::data::examples::Examples;
use crate::data::stream::{Cursor, Origin, Stream};
use crate::data::tree::Tree;
use crate::error::{Error, Result};

/// What to train on.
pub enum Data {
    /// A set of known size, shuffled whole each epoch.
    Set(Box<dyn Examples>),
    /// Files of any length, read while training goes on and shuffled in a window.
    Stream(Arc<Origin>),
}

/// The examples of one step after another.
pub(super) enum Feed<'a> {
    Set { order: Order, examples: &'a dyn Examples },
    Stream { stream: Stream, settings: &'a Settings },
}

impl<'a> Feed<'a> {
    /// The feed of a run; a stream begins at the cursor that a checkpoint kept.
    ///
    /// # Errors
    /// No examples.
    pub(super) fn new(
        data: &'a Data,
        seed: u64,
        settings: &'a Settings,
        cursor: Option<Cursor>,
    ) -> Result<Self> {
        match data {
            Data::Set(examples) if examples.is_empty() => {
                Err(Error::run("the dataset is empty: there is nothing to train on"))
            }
            Data::Set(examples) => {
                let order = Order::new(seed, examples.len(), settings);
                Ok(Self::Set { order, examples: examples.as_ref() })
            }
            Data::Stream(origin) => {
                let stream = Stream::start(origin, cursor.unwrap_or_default())?;
                Ok(Self::Stream { stream, settings })
            }
        }
    }

    /// Steps of the whole run.
    pub(super) fn total_steps(&self) -> usize {
        match self {
            Self::Set { order, .. } => order.total_steps(),
            // The settings' own check asks for `max_steps`.
            Self::Stream { settings, .. } => settings.max_steps,
        }
    }

    /// The examples of `step`, counted from 0. A stream gives those that follow the last ones.
    ///
    /// # Errors
    /// A row that cannot be read or used, where the settings do not skip it.
    pub(super) fn step(&mut self, step: usize) -> Result<Vec<Tree>> {
        match self {
            Self::Set { order, examples } => order.trees(step, *examples),
            Self::Stream { stream, settings } => stream.next(settings.examples_per_step()),
        }
    }

    /// Epochs after `steps` steps; whole ones where nobody knows how long one is.
    pub(super) fn epoch(&self, steps: usize) -> f64 {
        match self {
            Self::Set { order, .. } => steps as f64 / order.steps_per_epoch() as f64,
            Self::Stream { stream, .. } => stream.cursor().epoch as f64,
        }
    }

    /// Where a stream stands.
    pub(super) fn cursor(&self) -> Option<Cursor> {
        match self {
            Self::Set { .. } => None,
            Self::Stream { stream, .. } => Some(stream.cursor()),
        }
    }
}
