//! A barrier that can break: whoever waits in it learns that somebody will not come.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Failed;

/// How long who waits spins before it sleeps: longer than ranks are apart in a step, shorter than anybody would notice.
const SPIN: Duration = Duration::from_micros(100);

pub(crate) struct Barrier {
    world: usize,
    /// How long who waits spins: not at all where there are fewer processors than ranks, so that the others can run.
    spin: Duration,
    /// How often all have arrived. Changes under the lock only.
    crossings: AtomicUsize,
    /// Whether `failed` is set, for those who spin.
    broken: AtomicBool,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    arrived: usize,
    sleepers: usize,
    failed: Option<Failed>,
}

impl Barrier {
    pub fn new(world: usize) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            world,
            spin: if world <= processors { SPIN } else { Duration::ZERO },
            crossings: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            state: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    /// How often all ranks have crossed since the start or the last mending.
    pub fn crossings(&self) -> usize {
        self.crossings.load(Ordering::Acquire)
    }

    /// Waits until all ranks have arrived.
    pub fn wait(&self) -> Result<(), Failed> {
        let mut state = self.lock();
        if let Some(failed) = &state.failed {
            return Err(failed.clone());
        }
        let crossing = self.crossings.load(Ordering::Relaxed);
        state.arrived += 1;
        if state.arrived == self.world {
            state.arrived = 0;
            self.crossings.store(crossing.wrapping_add(1), Ordering::Release);
            if state.sleepers > 0 {
                self.wake.notify_all();
            }
            return Ok(());
        }
        drop(state);
        let crossed = || self.crossings.load(Ordering::Acquire) != crossing;
        let began = Instant::now();
        while !crossed() && !self.broken.load(Ordering::Relaxed) && began.elapsed() < self.spin {
            for _ in 0..32 {
                std::hint::spin_loop();
            }
        }
        if crossed() {
            return Ok(());
        }
        let mut state = self.lock();
        state.sleepers += 1;
        while !crossed() && state.failed.is_none() {
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.sleepers -= 1;
        match &state.failed {
            Some(failed) if !crossed() => Err(failed.clone()),
            _ => Ok(()),
        }
    }

    /// Breaks the barrier; the first reason stays.
    pub fn fail(&self, failed: Failed) {
        self.lock().failed.get_or_insert(failed);
        self.broken.store(true, Ordering::Relaxed);
        self.wake.notify_all();
    }

    /// Why it is broken, if it is.
    pub fn failed(&self) -> Option<Failed> {
        self.lock().failed.clone()
    }

    /// Makes it whole again if it is broken; nobody may be waiting.
    pub fn mend(&self) -> Option<Failed> {
        let mut state = self.lock();
        state.arrived = 0;
        if state.failed.is_some() {
            self.crossings.store(0, Ordering::Release);
        }
        self.broken.store(false, Ordering::Relaxed);
        state.failed.take()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_long_sleeps_and_wakes_when_all_are_there_or_one_fails() {
        let barrier = Barrier::new(2);
        let sleeps = || {
            while barrier.lock().sleepers == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        std::thread::scope(|scope| {
            let first = scope.spawn(|| barrier.wait());
            sleeps();
            assert_eq!(barrier.wait(), Ok(()));
            assert_eq!(first.join().unwrap(), Ok(()));
            assert_eq!(barrier.crossings(), 1);
        });
        let failed = Failed { rank: 1, reason: "gone".into() };
        std::thread::scope(|scope| {
            let first = scope.spawn(|| barrier.wait());
            sleeps();
            barrier.fail(failed.clone());
            assert_eq!(first.join().unwrap(), Err(failed.clone()));
        });
        assert_eq!((barrier.mend(), barrier.lock().sleepers), (Some(failed), 0));
    }
}
