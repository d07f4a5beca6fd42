//! Threads that stay awake between short tasks.
//!
//! A product of one row takes some ten microseconds, and waking a sleeping thread takes longer. Rayon's threads sleep when
//! they find nothing to do, and a caller from outside its pool sleeps too until its work is done.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::Yield;

/// How long to wait for the other threads to come: they may be busy with someone else's work.
const PATIENCE: Duration = Duration::from_micros(200);

/// Runs `work` on a thread of rayon's pool while the others look for its tasks without falling asleep. For work of many
/// short parallel pieces that waits for nobody outside the pool.
///
/// What others put into the pool is done too, so `work` takes no thread away from them for longer than it runs.
pub fn awake<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let others = rayon::current_num_threads() - 1;
    if others == 0 {
        return work();
    }
    let company = Company::default();
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
        work()
    })
}

/// Who has come, and whether the work still goes on.
#[derive(Default)]
struct Company {
    came: AtomicUsize,
    started: AtomicBool,
    ended: AtomicBool,
}

impl Company {
    /// Looks for tasks until the work has ended. Who comes late leaves at once: it may be in the middle of one of the work's
    /// own tasks, which would then wait for the end of the work.
    fn keep(&self) {
        if self.started.load(Ordering::Acquire) {
            return;
        }
        self.came.fetch_add(1, Ordering::AcqRel);
        // Nothing else is begun here yet: the others shall come, each on a thread of its own.
        while !self.started.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        while !self.ended.load(Ordering::Acquire) {
            if rayon::yield_now() != Some(Yield::Executed) {
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

/// Ends the company when dropped, also where the work panics.
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

    /// Many short parallel pieces, one after the other.
    fn sums(rounds: usize) -> usize {
        let piece = || (0..1000_usize).into_par_iter().with_min_len(10).sum::<usize>();
        (0..rounds).map(|round| piece() + round).sum()
    }

    #[test]
    fn work_is_done_for_any_number_of_threads_and_inside_of_itself() {
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

    /// A thread of the pool may wait for the caller's next message: work must not wait for that thread.
    #[test]
    fn threads_that_are_busy_elsewhere_are_not_waited_for() {
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
    fn a_panic_passes_through_and_lets_the_others_go() {
        let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let fall = || pool.install(|| awake(|| -> usize { panic!("as asked") }));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(fall)).is_err());
        pool.install(|| assert_eq!(awake(|| sums(10)), 10 * 499_500 + 45));
    }
}
