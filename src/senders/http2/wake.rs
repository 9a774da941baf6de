//! Who woke the driver: connections and exchanges, polled one by one and only when something happened to them.
//!
//! A driver is one task that owns all its connections and requests. Every connection slot and every exchange slot has a
//! waker of its own, made once and used again by whatever sits in the slot next, so that a push costs no allocation
//! here. A wake-up that reaches a slot's next occupant is a poll too many, never one too few.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};

use futures_util::task::AtomicWaker;

use crate::planted;

/// Connection slots of one driver: the bits of a word.
pub(super) const MAX_LINKS: usize = 64;

#[derive(Default)]
struct Woken {
    task: AtomicWaker,
    /// The driver is being polled and looks again before it sleeps, so waking its task would be a turn for nothing.
    in_turn: AtomicBool,
    links: AtomicU64,
    exchanges: Mutex<Vec<usize>>,
}

impl Woken {
    fn notify(&self) {
        if !self.in_turn.load(Ordering::SeqCst) {
            self.task.wake();
        }
    }

    fn is_pending(&self) -> bool {
        self.links.load(Ordering::SeqCst) != 0 || !self.exchanges.lock().expect("no panic while held").is_empty()
    }
}

struct LinkWake {
    at: usize,
    woken: Arc<Woken>,
}

impl Wake for LinkWake {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.links.fetch_or(1 << self.at, Ordering::SeqCst);
        self.woken.notify();
    }
}

struct ExchangeWake {
    at: usize,
    woken: Arc<Woken>,
}

impl Wake for ExchangeWake {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.woken.in_turn.load(Ordering::SeqCst) && planted::is("wake-up-lost") {
            return;
        }
        // h2 calls this with its own lock held; nothing below takes one of h2's.
        self.woken.exchanges.lock().expect("no panic while held").push(self.at);
        self.woken.notify();
    }
}

#[derive(Default)]
pub(super) struct Wakes {
    woken: Arc<Woken>,
    links: Vec<Waker>,
    exchanges: Vec<Waker>,
}

impl Wakes {
    /// The driver is being polled.
    pub(super) fn begin(&self, task: &Waker) {
        self.woken.task.register(task);
        self.woken.in_turn.store(true, Ordering::SeqCst);
    }

    /// The driver is about to sleep; true when something happened meanwhile.
    pub(super) fn end(&self) -> bool {
        self.woken.in_turn.store(false, Ordering::SeqCst);
        self.woken.is_pending()
    }

    pub(super) fn is_pending(&self) -> bool {
        self.woken.is_pending()
    }

    /// The connections woken since the last call, as bits.
    pub(super) fn take_links(&self) -> u64 {
        self.woken.links.swap(0, Ordering::SeqCst)
    }

    /// Marks a connection for a poll.
    pub(super) fn mark_link(&self, at: usize) {
        self.woken.links.fetch_or(1 << at, Ordering::SeqCst);
    }

    /// Moves the exchanges woken since the last call into `into`.
    pub(super) fn take_exchanges(&self, into: &mut Vec<usize>) {
        into.append(&mut self.woken.exchanges.lock().expect("no panic while held"));
    }

    pub(super) fn link(&mut self, at: usize) -> &Waker {
        while self.links.len() <= at {
            let wake = LinkWake { at: self.links.len(), woken: Arc::clone(&self.woken) };
            self.links.push(Waker::from(Arc::new(wake)));
        }
        &self.links[at]
    }

    pub(super) fn exchange(&mut self, at: usize) -> &Waker {
        while self.exchanges.len() <= at {
            let wake = ExchangeWake { at: self.exchanges.len(), woken: Arc::clone(&self.woken) };
            self.exchanges.push(Waker::from(Arc::new(wake)));
        }
        &self.exchanges[at]
    }
}
