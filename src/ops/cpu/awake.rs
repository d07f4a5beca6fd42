//! Keeps threads spinning between short tasks, which are distributed on a dedicated board.
//!
//! A one-row product takes some ten microseconds, less than waking a sleeping thread. Rayon's threads sleep when idle,
//! and so does a caller from outside the pool until its work is done.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::Yield;
use rayon::prelude::*;

use super::board::Board;

/// How long to wait for the other threads, which may be busy with other work.
const PATIENCE: Duration = Duration::from_micros(200);
/// Polls of the board per poll of rayon's queues, which is slower.
const GLANCES: usize = 32;

thread_local! {
    /// The company working for this thread, unless one of its board's tasks is running here.
    static LED: Cell<Option<Arc<Company>>> = const { Cell::new(None) };
}

/// Runs `work` on a thread of rayon's pool while the others poll for its tasks without sleeping. For many short
/// parallel pieces; `work` must not wait for anything outside the pool.
///
/// Other work in the pool is still executed, so threads are kept from it no longer than `work` runs.
pub fn awake<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let others = rayon::current_num_threads() - 1;
    if others == 0 {
        return work();
    }
    let company = Arc::new(Company::of(others + 1));
    rayon::scope(|scope| {
        let owner = rayon::current_thread_index();
        let company = &company;
        for _ in 0..others {
            scope.spawn(move |_| {
                if rayon::current_thread_index() != owner {
                    company.keep();
                }
            });
        }
        let _end = End(company);
        company.wait_for(others);
        let _led = Led::lead(Some(Arc::clone(company)));
        work()
    })
}

/// Calls `task` with `0..count` on all threads: those [`awake`] keeps for this thread, or rayon's. Neighbouring tasks
/// mostly run on one thread, in order.
///
/// # Panics
/// If a task panics.
pub fn share(count: usize, task: impl Fn(usize) + Sync + Send) {
    // A task that distributes its own work must not use the same board.
    let led = Led::lead(None);
    match &led.0 {
        Some(company) => company.board.run(count, &task),
        None => (0..count).into_par_iter().for_each(task),
    }
}

/// The previously led company, restored on drop.
struct Led(Option<Arc<Company>>);

impl Led {
    fn lead(company: Option<Arc<Company>>) -> Self {
        Self(LED.replace(company))
    }
}

impl Drop for Led {
    fn drop(&mut self) {
        LED.set(self.0.take());
    }
}

/// The threads that have joined, and the state of the work.
struct Company {
    came: AtomicUsize,
    started: AtomicBool,
    ended: AtomicBool,
    board: Board,
}

impl Company {
    fn of(threads: usize) -> Self {
        Self {
            came: AtomicUsize::new(0),
            started: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            board: Board::of(threads),
        }
    }

    /// Polls for tasks until the work has ended. A late thread leaves at once: it may be in the middle of one of the
    /// work's own tasks, which would then wait for the end of the work.
    fn keep(&self) {
        if self.started.load(Ordering::Acquire) {
            return;
        }
        let place = self.came.fetch_add(1, Ordering::AcqRel) + 1;
        // Start nothing else yet, so that the others can join, each on its own thread.
        while !self.started.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        let mut glances = 0_usize;
        while !self.ended.load(Ordering::Acquire) {
            glances += 1;
            let found = self.board.help(place)
                || glances.is_multiple_of(GLANCES) && rayon::yield_now() == Some(Yield::Executed);
            if !found {
                std::hint::spin_loop();
            }
        }
    }

    fn wait_for(&self, others: usize) {
        let begun = Instant::now();
        while self.came.load(Ordering::Acquire) < others && begun.elapsed() < PATIENCE {
            std::hint::spin_loop();
        }
        self.started.store(true, Ordering::Release);
    }
}

/// Ends the company on drop, even if the work panics.
struct End<'a>(&'a Company);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use rayon::ThreadPoolBuilder;
    use rayon::prelude::*;

    use super::*;

    /// Many short parallel pieces in sequence: with rayon, shared out, and nested.
    fn sums(rounds: usize) -> usize {
        let by_rayon = || (0..1000_usize).into_par_iter().with_min_len(10).sum::<usize>();
        let shared = |nested: bool| {
            let sum = AtomicUsize::new(0);
            share(10, |ten| {
                let add = |one: usize| {
                    sum.fetch_add(100 * ten + one, Ordering::Relaxed);
                };
                if nested { share(100, add) } else { (0..100).for_each(add) }
            });
            sum.into_inner()
        };
        let piece = |round: usize| match round % 3 {
            0 => by_rayon(),
            kind => shared(kind == 1),
        };
        (0..rounds).map(|round| piece(round) + round).sum()
    }

    #[test]
    fn work_completes_on_any_number_of_threads_and_when_nested() {
        let expected = 200 * 499_500 + 199 * 100;
        for threads in [1, 2, 3, 5] {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                assert_eq!(awake(|| sums(200)), expected);
                assert_eq!(awake(|| awake(|| sums(200))), expected);
                let many: Vec<usize> =
                    (0..8).into_par_iter().map(|_| awake(|| sums(200))).collect();
                assert!(many.into_iter().all(|sum| sum == expected));
            });
        }
        assert_eq!(awake(|| sums(200)), expected);
    }

    /// A pool thread may be waiting for the caller's next message: work must not wait for that thread.
    #[test]
    fn work_does_not_wait_for_threads_busy_elsewhere() {
        let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        let (came, has_come) = std::sync::mpsc::channel();
        pool.spawn(move || {
            came.send(()).unwrap();
            let () = receive.recv().unwrap();
            came.send(()).unwrap();
        });
        has_come.recv().unwrap();
        pool.install(|| assert_eq!(awake(|| sums(10)), 10 * 499_500 + 45));
        send.send(()).unwrap();
        has_come.recv().unwrap();
    }

    #[test]
    fn panic_propagates_and_releases_the_other_threads() {
        let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let fall = || pool.install(|| awake(|| -> usize { panic!("as asked") }));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(fall)).is_err());
        pool.install(|| assert_eq!(awake(|| sums(10)), 10 * 499_500 + 45));
        // The same holds for a task's panic; the threads remain available.
        pool.install(|| {
            awake(|| {
                let fall = || share(20, |task| assert!(task != 13, "as asked"));
                assert!(std::panic::catch_unwind(fall).is_err());
                assert_eq!(sums(10), 10 * 499_500 + 45);
                let led = Led::lead(None);
                assert!(led.0.is_some());
            });
            assert!(LED.take().is_none());
        });
    }
}
