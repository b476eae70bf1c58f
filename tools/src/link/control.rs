//! What is shared between a link's thread and those who change or watch it: shape, cuts, counters, a waker.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;

use super::shape::{Direction, Shape};

/// How a link is to behave now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Behaviour {
    /// What it does to what passes.
    pub shape: Shape,
    /// By direction: nothing passes.
    pub cut: [bool; 2],
}

/// What passed in one direction since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets, or pieces of a stream, that arrived.
    pub delivered: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// Lost at random, or because the direction was cut.
    pub lost: AtomicU64,
    /// Found the buffer full.
    pub overflowed: AtomicU64,
}

/// A reading of `Counters`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Passed {
    /// Packets, or pieces of a stream, that arrived.
    pub delivered: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Lost at random, or because the direction was cut.
    pub lost: u64,
    /// Found the buffer full.
    pub overflowed: u64,
}

#[derive(Debug)]
struct Shared {
    behaviour: Mutex<Behaviour>,
    counters: [Counters; 2],
    waker: EventFd,
    stopped: AtomicBool,
}

/// A handle to a running link; clones mean the same link.
#[derive(Clone, Debug)]
pub struct Control(Arc<Shared>);

impl Control {
    /// For a link that is about to start.
    pub fn new(shape: Shape) -> std::io::Result<Control> {
        let waker = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let behaviour = Mutex::new(Behaviour { shape, cut: [false; 2] });
        Ok(Control(Arc::new(Shared {
            behaviour,
            counters: Default::default(),
            waker,
            stopped: AtomicBool::new(false),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Behaviour> {
        self.0.behaviour.lock().expect("whoever holds this lock only copies values")
    }

    /// How the link behaves now.
    pub fn behaviour(&self) -> Behaviour {
        *self.lock()
    }

    fn change(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.lock());
        self.wake();
    }

    /// From now on the link has this shape; what is on its way keeps its time.
    pub fn set(&self, shape: Shape) {
        self.change(|behaviour| behaviour.shape = shape);
    }

    /// Nothing passes in this direction until it is healed.
    pub fn cut(&self, direction: Direction) {
        self.change(|behaviour| behaviour.cut[direction.index()] = true);
    }

    /// What enters in this direction passes again.
    pub fn heal(&self, direction: Direction) {
        self.change(|behaviour| behaviour.cut[direction.index()] = false);
    }

    /// Ends the link's thread soon.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::Release);
        self.wake();
    }

    /// True once `stop` was called.
    pub fn stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Acquire)
    }

    /// Lets the link's thread look again.
    pub fn wake(&self) {
        // It fails only when it was woken 2^64 - 2 times without looking.
        let _ = self.0.waker.write(1);
    }

    /// Readable when the thread is to look again.
    pub fn waker(&self) -> &EventFd {
        &self.0.waker
    }

    /// What the link's thread counts into.
    pub fn counters(&self, direction: Direction) -> &Counters {
        &self.0.counters[direction.index()]
    }

    /// What passed so far.
    pub fn passed(&self, direction: Direction) -> Passed {
        let counters = self.counters(direction);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Passed {
            delivered: read(&counters.delivered),
            bytes: read(&counters.bytes),
            lost: read(&counters.lost),
            overflowed: read(&counters.overflowed),
        }
    }
}

impl Counters {
    /// Something arrived.
    pub fn deliver(&self, bytes: usize) {
        self.delivered.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}
