//! The bounded queue. A request takes a place before its body is read, so reading, parsing and computing share one bound.
//! Dropping a place frees it, however its request ends.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::problem::Problem;

/// All places, free and taken.
#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    most: usize,
}

/// One place, or several if the request turned out to need more.
#[derive(Debug)]
pub(super) struct Place {
    taken: OwnedSemaphorePermit,
    most: usize,
}

impl Places {
    /// `most` free places.
    pub(super) fn new(most: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(most)), most }
    }

    /// Takes a place, or fails at once if none is free.
    ///
    /// # Errors
    /// Too many requests.
    pub(super) fn take(&self) -> Result<Place, Problem> {
        let taken = Arc::clone(&self.free).try_acquire_owned();
        let taken = taken.map_err(|_| Problem::busy(self.most))?;
        Ok(Place { taken, most: self.most })
    }

    /// Whether no place is taken.
    pub(super) fn are_all_free(&self) -> bool {
        self.free.available_permits() == self.most
    }
}

impl Place {
    /// Grows to hold this many prompts.
    ///
    /// # Errors
    /// More than there are places, or than are free.
    pub(super) fn hold(&mut self, prompts: usize) -> Result<(), Problem> {
        let most = self.most;
        if prompts > most {
            return Err(Problem::invalid(format!(
                "{prompts} prompts, and the server takes {most} at once"
            )));
        }
        let more = prompts.saturating_sub(self.taken.num_permits());
        let more = Arc::clone(self.taken.semaphore()).try_acquire_many_owned(more as u32);
        self.taken.merge(more.map_err(|_| Problem::busy(most))?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_released_on_drop() {
        let places = Places::new(3);
        let mut first = places.take().unwrap();
        first.hold(2).unwrap();
        first.hold(1).unwrap();
        let second = places.take().unwrap();
        assert!(places.take().unwrap_err().message().contains("3 requests are under way"));
        // A place that cannot grow keeps what it has.
        assert!(first.hold(3).unwrap_err().message().contains("the most; try again"));
        assert!(first.hold(4).unwrap_err().message().contains("the server takes 3 at once"));
        drop(second);
        first.hold(3).unwrap();
        assert!(places.take().is_err() && !places.are_all_free());
        drop(first);
        assert!(places.are_all_free());
    }
}
