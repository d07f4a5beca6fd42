//! Examples from files of any length, read during training: prepared ahead by a separate thread, shuffled within a
//! window, never written to disk. Like `streaming = true` in Hugging Face's `datasets`.
//!
//! Memory holds one batch of rows, the window and the examples ready for the trainer, whatever the length of the files.
//! The order depends only on the seed, the window and the rows, so that a position in it can be found again.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::mix::Share;
use super::pipeline::{Pipeline, Source};
use super::prepare::{PrepareReport, Skipped};
use super::tree::Tree;
use crate::error::{Error, Result};
use crate::rng::Stream as Draws;

/// Maximum number of examples waiting for the trainer.
const READY: usize = 1024;

/// The source of a stream.
pub struct Origin {
    /// Rows, and how they become examples.
    pub pipeline: Pipeline,
    /// Number of examples in the shuffle window; 0 keeps the row order.
    pub window: usize,
    /// Accounting of the current pass so far, including rows read ahead.
    pub report: Mutex<PrepareReport>,
}

/// A position in a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Completed passes over the data.
    pub epoch: usize,
    /// Examples taken from the current pass.
    pub taken: usize,
}

enum Message {
    Example(Tree),
    /// The pass is complete.
    End,
    Failed(Error),
}

/// Examples in stream order, for an unlimited number of passes.
pub struct Stream {
    ready: Receiver<Message>,
    cursor: Cursor,
}

impl Stream {
    /// Starts preparing examples from `cursor` on, a position returned by an earlier stream of an equal origin. The
    /// preceding part of its pass is read and prepared again, and skipped.
    ///
    /// # Errors
    /// A dataset whose fraction is not a whole number: a stream does not know the number of rows. A name in `columns`
    /// that none of the first rows has.
    pub fn start(origin: &Arc<Origin>, cursor: Cursor) -> Result<Self> {
        origin.pipeline.check_streamable()?;
        let (send, ready) = sync_channel(READY);
        let draws = Draws::new(origin.pipeline.seed, "train/window");
        let producer = Producer { origin: Arc::clone(origin), draws, send };
        std::thread::Builder::new()
            .name("stream".to_owned())
            .spawn(move || producer.run(cursor))
            .map_err(Error::from)?;
        Ok(Self { ready, cursor })
    }

    /// The next examples: `count`, or fewer at the end of a pass, but at least one.
    ///
    /// # Errors
    /// As [`Pipeline::write`], after the examples before the failing row were returned.
    pub fn next(&mut self, count: usize) -> Result<Vec<Tree>> {
        let mut examples = Vec::with_capacity(count);
        while examples.len() < count {
            match self.ready.recv() {
                Ok(Message::Example(tree)) => {
                    examples.push(tree);
                    self.cursor.taken += 1;
                }
                Ok(Message::End) => {
                    self.cursor = Cursor { epoch: self.cursor.epoch + 1, taken: 0 };
                    if !examples.is_empty() {
                        break;
                    }
                }
                Ok(Message::Failed(error)) => return Err(error),
                Err(_) => return Err(Error::run("the thread that prepares examples has ended")),
            }
        }
        Ok(examples)
    }

    /// The position after the examples returned so far.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }
}

/// The producing end of a stream, on its own thread.
struct Producer {
    origin: Arc<Origin>,
    draws: Draws,
    send: SyncSender<Message>,
}

/// Why a producer stops: an error for the trainer, or `None` if the receiver is gone.
type Stop = Option<Error>;

impl Producer {
    fn run(&self, from: Cursor) {
        let mut skip = from.taken;
        for epoch in from.epoch.. {
            match self.pass(epoch, skip) {
                Ok(()) if self.send.send(Message::End).is_ok() => skip = 0,
                Err(Some(error)) => {
                    // If the trainer is gone, the error can be dropped.
                    let _ = self.send.send(Message::Failed(error));
                    return;
                }
                _ => return,
            }
        }
    }

    /// One pass over all rows, except the first `skip` examples in its order.
    fn pass(&self, epoch: usize, skip: usize) -> Result<(), Stop> {
        let pipeline = &self.origin.pipeline;
        let mut pass = Pass {
            window: Window {
                examples: Vec::new(),
                size: self.origin.window,
                draws: (&self.draws, epoch as u64),
                drawn: 0,
            },
            skip,
            examples: 0,
            report: PrepareReport::default(),
        };
        for (index, source) in pipeline.sources.iter().enumerate() {
            let share = source.share(index, pipeline.seed).map_err(Some)?;
            for _ in 0..share.whole {
                self.source(source, &mut pass)?;
            }
        }
        while let Some(tree) = pass.window.draw() {
            self.give(tree, &mut pass.skip)?;
        }
        if pass.examples == 0 { Err(Some(pass.report.nothing())) } else { Ok(()) }
    }

    /// All rows of one source, once.
    fn source(&self, source: &Source, pass: &mut Pass<'_>) -> Result<(), Stop> {
        let pipeline = &self.origin.pipeline;
        let mut unread = Skipped::default();
        let once = Share { whole: 1, part: Vec::new() };
        for batch in pipeline.batches(source, &once).map_err(Some)? {
            let batch = batch.map_err(Some)?;
            for (place, why) in batch.unread {
                unread.add(&place, why, 1);
            }
            let first = pass.report.rows;
            for (number, outcome) in batch.outcomes.into_iter().enumerate() {
                let tree = pipeline.tree(outcome, 1, &mut pass.report).map_err(Some)?;
                let Some(tree) = tree else { continue };
                pass.examples += 1;
                if let Some(drawn) = pass.window.swap(Tree { source: first + number, ..tree }) {
                    self.give(drawn, &mut pass.skip)?;
                }
            }
            pass.report.rows += batch.rows;
            self.publish(&pass.report, source, &unread);
        }
        if unread.count > 0 {
            pass.report.unread.push((source.path.clone(), unread));
        }
        Ok(())
    }

    /// Sends an example to the trainer, unless it had received it before it stopped.
    fn give(&self, tree: Tree, skip: &mut usize) -> Result<(), Stop> {
        if *skip > 0 {
            *skip -= 1;
            return Ok(());
        }
        self.send.send(Message::Example(tree)).map_err(|_| None)
    }

    /// Publishes the accounting so far to the trainer.
    fn publish(&self, report: &PrepareReport, source: &Source, unread: &Skipped) {
        let mut report = report.clone();
        if unread.count > 0 {
            report.unread.push((source.path.clone(), unread.clone()));
        }
        *self.origin.report.lock().unwrap_or_else(PoisonError::into_inner) = report;
    }
}

/// One pass over all rows.
struct Pass<'a> {
    window: Window<'a>,
    /// Number of examples still to skip.
    skip: usize,
    examples: usize,
    report: PrepareReport,
}

/// A shuffle window: examples are drawn at random as more arrive.
struct Window<'a> {
    examples: Vec<Tree>,
    size: usize,
    draws: (&'a Draws, u64),
    drawn: u64,
}

impl Window<'_> {
    /// Adds an example; returns one once the window is full.
    fn swap(&mut self, tree: Tree) -> Option<Tree> {
        self.examples.push(tree);
        if self.examples.len() > self.size { self.draw() } else { None }
    }

    fn draw(&mut self) -> Option<Tree> {
        if self.examples.is_empty() {
            return None;
        }
        let (draws, epoch) = self.draws;
        let at = draws.at(epoch, self.drawn).random_range(0..self.examples.len());
        self.drawn += 1;
        Some(self.examples.swap_remove(at))
    }
}
