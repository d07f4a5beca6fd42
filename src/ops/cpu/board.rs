//! A board on which one thread posts work split into tasks for others to take: some hundred nanoseconds of overhead for
//! work of a few microseconds.
//!
//! Each thread has a contiguous range of tasks and takes from its front, so that prefetched data is its own; a thread
//! without tasks steals from the back of another's range.

#![expect(unsafe_code, reason = "tasks borrow from a caller who waits until they are done")]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Spins while waiting for the last tasks before yielding.
const SPINS: usize = 1 << 12;

/// The posted work, called with each task's number.
struct Job<'a>(&'a (dyn Fn(usize) + Sync));

/// Holds one piece of work at a time, posted by one thread.
pub(super) struct Board {
    job: AtomicPtr<Job<'static>>,
    ranges: Box<[Range]>,
    done: AtomicUsize,
    busy: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Untaken tasks: the first, and one past the last. Alone on its cache lines.
#[repr(align(128))]
#[derive(Default)]
struct Range(AtomicU64);

impl Range {
    fn put(&self, start: usize, end: usize) {
        self.0.store((start as u64) << 32 | end as u64, Ordering::Release);
    }

    fn take(&self, from_front: bool) -> Option<usize> {
        let parts = |range: u64| ((range >> 32) as usize, (range & u64::from(u32::MAX)) as usize);
        let taken = |range: u64| {
            let (start, end) = parts(range);
            (start < end).then(|| if from_front { range + (1 << 32) } else { range - 1 })
        };
        let before = self.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, taken).ok()?;
        let (start, end) = parts(before);
        Some(if from_front { start } else { end - 1 })
    }
}

impl Board {
    /// A board for this many threads.
    pub(super) fn of(threads: usize) -> Self {
        Self {
            job: AtomicPtr::new(null_mut()),
            ranges: (0..threads).map(|_| Range::default()).collect(),
            done: AtomicUsize::new(0),
            busy: AtomicBool::new(false),
            panic: Mutex::new(None),
        }
    }

    /// Calls `task` with `0..count`, on this thread (place 0) and on all helping threads.
    ///
    /// # Panics
    /// If a task panics: after all are done, with the first payload. If work is already posted, as when a task calls
    /// this; if `count` exceeds 32 bits.
    pub(super) fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        assert!(u32::try_from(count).is_ok(), "{count} tasks");
        assert!(!self.busy.swap(true, Ordering::Acquire), "two pieces of work on one board");
        let mut job = Job(task);
        self.done.store(0, Ordering::Relaxed);
        // The lifetime ends with this call, and so does the last use: see `help`.
        self.job.store((&raw mut job).cast(), Ordering::Relaxed);
        let threads = self.ranges.len();
        for (place, range) in self.ranges.iter().enumerate() {
            range.put(place * count / threads, (place + 1) * count / threads);
        }
        while self.help(0) {}
        let mut spins = 0_usize;
        while self.done.load(Ordering::Acquire) < count {
            spins += 1;
            // The thread with the last task may be waiting for this core.
            if spins.is_multiple_of(SPINS) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        self.busy.store(false, Ordering::Release);
        if let Some(payload) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(payload);
        }
    }

    /// Runs one task, if any is left: from this place's range, otherwise from another's.
    pub(super) fn help(&self, place: usize) -> bool {
        let threads = self.ranges.len();
        let range = |offset: usize| &self.ranges[(place + offset) % threads];
        let Some(number) = (0..threads).find_map(|offset| range(offset).take(offset == 0)) else {
            return false;
        };
        // SAFETY: whoever put up the job waits in `run` until this task is counted as done, so the job is still there; taking
        // the task came after it was put up, in the order of `put` and `take`.
        let task = unsafe { (*self.job.load(Ordering::Relaxed)).0 };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(number))) {
            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            // Dropping a payload might panic again, before the task is counted.
            match &*first {
                None => *first = Some(payload),
                Some(_) => std::mem::forget(payload),
            }
        }
        self.done.fetch_add(1, Ordering::Release);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work` with `others` helping threads.
    fn helped(others: usize, work: impl FnOnce(&Board)) {
        let (board, ended) = (Board::of(others + 1), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for place in 1..=others {
                let (board, ended) = (&board, &ended);
                scope.spawn(move || {
                    while !ended.load(Ordering::Acquire) {
                        board.help(place);
                        std::hint::spin_loop();
                    }
                });
            }
            let result = catch_unwind(AssertUnwindSafe(|| work(&board)));
            ended.store(true, Ordering::Release);
            if let Err(payload) = result {
                resume_unwind(payload);
            }
        });
    }

    #[test]
    fn every_task_runs_once_before_the_next_piece_begins() {
        for others in [0, 1, 3] {
            helped(others, |board| {
                for count in (0..40).chain([1000]).cycle().take(2000) {
                    let calls: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                    board.run(count, &|task| {
                        calls[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(
                        calls.into_iter().all(|calls| calls.into_inner() == 1),
                        "{count} tasks"
                    );
                }
            });
        }
    }

    #[test]
    fn panicking_task_does_not_stop_the_other_tasks() {
        helped(2, |board| {
            for round in 0..50 {
                let done = AtomicUsize::new(0);
                let fall = || {
                    board.run(20, &|task| {
                        assert!(task != round % 20, "as asked");
                        done.fetch_add(1, Ordering::Relaxed);
                    });
                };
                assert!(catch_unwind(AssertUnwindSafe(fall)).is_err());
                assert_eq!(done.into_inner(), 19);
            }
            let nested = || board.run(1, &|_| board.run(1, &|_| {}));
            assert!(catch_unwind(AssertUnwindSafe(nested)).is_err());
            let all = || board.run(9, &|task| panic!("task {task}"));
            assert!(catch_unwind(AssertUnwindSafe(all)).is_err());
            board.run(3, &|_| {});
        });
    }
}
