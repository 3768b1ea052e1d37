//! A fixed pool of threads that splits one op into parts.
//!
//! An op lasts tens of microseconds, so handing work over must cost about one. Workers spin for a
//! short while after each op and sleep when none follows. Parts are claimed one by one, so a
//! thread the system has put aside delays at most the part it holds, and which thread runs a part
//! is left open: a job must give the same result whoever runs it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps. Longer than the gaps between the ops of one
/// step, shorter than a person would notice on an idle machine.
const SPIN: Duration = Duration::from_micros(100);

/// Worker threads and the caller's own.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs: one job at a time.
    running: Mutex<()>,
}

/// What the workers and the caller see.
struct Shared {
    /// High half: which job; low half: parts of it that nobody has claimed. A part is claimed by
    /// decrementing it, which fails when the job is no longer the one that was looked at.
    ticket: AtomicU64,
    /// The job's closure, its type-erased caller and its number of parts. They are valid for a
    /// thread that has claimed a part, until that part is counted in `done`.
    closure: AtomicPtr<()>,
    call: AtomicPtr<()>,
    parts: AtomicUsize,
    done: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

type Call = unsafe fn(*const (), usize);

impl Pool {
    /// A pool of `threads` threads (at least one), the caller's among them.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            closure: AtomicPtr::new(std::ptr::null_mut()),
            call: AtomicPtr::new(std::ptr::null_mut()),
            parts: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads)
            .filter_map(|index| {
                let shared = shared.clone();
                let thread = std::thread::Builder::new().name(format!("ops-{index}"));
                match thread.spawn(move || shared.work()) {
                    Ok(handle) => Some(handle),
                    Err(error) => {
                        tracing::warn!(%error, "cannot start worker thread {index}; going on with fewer");
                        None
                    }
                }
            })
            .collect();
        Self { shared, workers, running: Mutex::new(()) }
    }

    /// Threads that work on a job, the caller's among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(i)` exactly once for each `i` in `0..parts`, spread over the threads, and returns
    /// when all are done. While another job runs (a nested call, or one from a second thread)
    /// the parts run on the calling thread alone.
    ///
    /// # Panics
    /// If a part panics: the other parts are still run, then the first panic goes on in the
    /// caller. The pool stays usable.
    pub fn run<F: Fn(usize) + Sync>(&self, parts: usize, job: F) {
        let free = match self.running.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        };
        if parts <= 1 || self.workers.is_empty() || free.is_none() || parts > u32::MAX as usize {
            (0..parts).for_each(job);
            return;
        }
        let shared = &*self.shared;
        shared.publish(&job, parts);
        while shared.run_part() {}
        shared.wait_done(parts);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(free);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_sleepers();
        for worker in self.workers.drain(..) {
            let _ = worker.join(); // a worker does not panic: jobs are caught
        }
    }
}

impl Shared {
    /// Makes `job` the current job. The previous one is complete.
    fn publish<F: Fn(usize) + Sync>(&self, job: &F, parts: usize) {
        self.closure.store(std::ptr::from_ref(job).cast_mut().cast(), Ordering::Relaxed);
        self.call.store(call::<F> as Call as *mut (), Ordering::Relaxed);
        self.parts.store(parts, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        let generation = (self.ticket.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        self.ticket.store(generation << 32 | parts as u64, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake_sleepers();
        }
    }

    fn wake_sleepers(&self) {
        let _guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.wake.notify_all();
    }

    /// Claims and runs one part; false if none is left.
    fn run_part(&self) -> bool {
        let mut ticket = self.ticket.load(Ordering::Acquire);
        loop {
            let left = ticket as u32 as usize;
            if left == 0 {
                return false;
            }
            let closure = self.closure.load(Ordering::Relaxed);
            let call = self.call.load(Ordering::Relaxed);
            let parts = self.parts.load(Ordering::Relaxed);
            match self.ticket.compare_exchange_weak(ticket, ticket - 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    // SAFETY: the exchange succeeded, so the job looked at is the current one and, with
                    // this part claimed and not yet counted, its `run` has not returned: what was
                    // read above belongs to it and the closure is alive. `call` was stored from a `Call`.
                    let result = catch_unwind(AssertUnwindSafe(|| unsafe {
                        std::mem::transmute::<*mut (), Call>(call)(closure, parts - left)
                    }));
                    if let Err(payload) = result {
                        self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
                    }
                    self.done.fetch_add(1, Ordering::Release);
                    return true;
                }
                Err(now) => ticket = now,
            }
        }
    }

    /// Waits for the parts that other threads still run.
    fn wait_done(&self, parts: usize) {
        let mut spins = 0u32;
        while self.done.load(Ordering::Acquire) < parts {
            spins += 1;
            if spins < 20_000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now(); // the worker may need this core
            }
        }
    }

    /// A worker's life.
    fn work(&self) {
        let mut idle_since = None;
        while !self.stop.load(Ordering::Relaxed) {
            if self.run_part() {
                idle_since = None;
                continue;
            }
            for _ in 0..32 {
                std::hint::spin_loop();
            }
            if idle_since.get_or_insert_with(Instant::now).elapsed() > SPIN {
                self.sleep();
                idle_since = None;
            }
        }
    }

    /// Sleeps until a job with unclaimed parts is there.
    fn sleep(&self) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.ticket.load(Ordering::SeqCst) as u32 == 0 && !self.stop.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Calls part `part` of the job that `closure` points to.
///
/// # Safety
/// `closure` points to a live `F`.
unsafe fn call<F: Fn(usize) + Sync>(closure: *const (), part: usize) {
    // SAFETY: as the caller promises.
    unsafe { (*closure.cast::<F>())(part) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_exactly_once_however_many_threads() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for parts in [0, 1, 2, 7, 100] {
                for _ in 0..200 {
                    let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(parts, |i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_for_a_job() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(pool.shared.sleepers.load(Ordering::SeqCst), 1);
            // Each part waits for the other, so both threads have to take one.
            let barrier = std::sync::Barrier::new(2);
            pool.run(2, |_| {
                barrier.wait();
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_parts_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        let ran = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(10, |i| {
                ran.fetch_add(1, Ordering::Relaxed);
                assert_ne!(i, 4, "part four");
            });
        }));
        let payload = result.expect_err("the panic is passed on");
        assert!(payload.downcast_ref::<String>().is_some_and(|m| m.contains("part four")));
        assert_eq!(ran.load(Ordering::Relaxed), 10);
        pool.run(10, |_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 20);
    }

    #[test]
    fn nested_and_concurrent_runs_complete() {
        let pool = Pool::new(2);
        let ran = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(4, |_| {
                            pool.run(3, |_| {
                                ran.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(ran.load(Ordering::Relaxed), 2 * 50 * 4 * 3);
    }
}
