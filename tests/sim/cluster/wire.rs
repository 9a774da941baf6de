//! What lies between hosts: byte streams that a partition silences and a crash breaks, and the way to the store.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use nudged::senders::http2::Io;
use nudged::storage::sqlite::shared::Link;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// All connections between two hosts.
#[derive(Default)]
pub struct Wire(Mutex<Lines>);

#[derive(Default)]
struct Lines {
    is_cut: bool,
    next: u64,
    open: BTreeMap<u64, Line>,
}

struct Line {
    inner: Arc<Mutex<Option<Io>>>,
    reader: Option<Waker>,
}

impl Wire {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap()
    }

    pub fn is_cut(&self) -> bool {
        self.lines().is_cut
    }

    /// Nothing passes any more: what is sent is lost, what is waited for never comes. The far ends are gone.
    pub fn cut(&self) {
        self.lines().is_cut = true;
        self.reset();
    }

    /// New connections can be made; those of before turn out to be broken.
    pub fn heal(&self) {
        self.lines().is_cut = false;
        self.wake();
    }

    /// Breaks every connection.
    pub fn reset(&self) {
        let inner: Vec<_> = self.lines().open.values().map(|line| Arc::clone(&line.inner)).collect();
        for inner in inner {
            let broken = inner.lock().unwrap().take();
            drop(broken);
        }
        self.wake();
    }

    fn wake(&self) {
        let wakers: Vec<Waker> = self.lines().open.values_mut().filter_map(|line| line.reader.take()).collect();
        for waker in wakers {
            waker.wake();
        }
    }

    /// One end of a connection over this wire.
    pub fn end(self: &Arc<Self>, io: Io) -> End {
        let inner = Arc::new(Mutex::new(Some(io)));
        let mut lines = self.lines();
        lines.next += 1;
        let number = lines.next;
        lines.open.insert(number, Line { inner: Arc::clone(&inner), reader: None });
        End { wire: Arc::clone(self), number, inner }
    }
}

pub struct End {
    wire: Arc<Wire>,
    number: u64,
    inner: Arc<Mutex<Option<Io>>>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.wire.lines().open.remove(&self.number);
    }
}

impl End {
    /// Of a connection that was broken: silent as long as the wire is cut.
    fn broken(&self, reader: Option<&Context<'_>>) -> Poll<io::Result<()>> {
        let mut lines = self.wire.lines();
        if !lines.is_cut {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if let (Some(cx), Some(line)) = (reader, lines.open.get_mut(&self.number)) {
            line.reader = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.inner.lock().unwrap();
        let Some(io) = &mut *inner else { return self.broken(Some(cx)) };
        let read = Pin::new(io).poll_read(cx, into);
        if read.is_pending()
            && let Some(line) = self.wire.lines().open.get_mut(&self.number)
        {
            line.reader = Some(cx.waker().clone());
        }
        read
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut inner = self.inner.lock().unwrap();
        match &mut *inner {
            Some(io) => Pin::new(io).poll_write(cx, bytes),
            // The kernel takes it, and nobody gets it.
            None => match self.broken(None) {
                Poll::Pending => Poll::Ready(Ok(bytes.len())),
                Poll::Ready(broken) => Poll::Ready(broken.map(|()| 0)),
            },
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.inner.lock().unwrap();
        inner.as_mut().map_or(Poll::Ready(Ok(())), |io| Pin::new(io).poll_shutdown(cx))
    }
}

/// How well a replica reaches the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Quality {
    /// Of a hundred requests, and of as many answers.
    pub lost: u32,
    pub slowest_ms: u32,
}

/// A replica's way to the store, through all its lives.
#[derive(Default)]
pub struct StoreWay {
    quality: Mutex<Quality>,
    is_cut: AtomicBool,
    /// Nothing comes back.
    is_deaf: AtomicBool,
}

impl StoreWay {
    pub fn set_deaf(&self, is_deaf: bool) {
        self.is_deaf.store(is_deaf, Ordering::Relaxed);
    }

    pub fn set_cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::Relaxed);
    }

    pub fn set_quality(&self, quality: Quality) {
        *self.quality.lock().unwrap() = quality;
    }
}

/// One life's.
pub struct StoreLink {
    rng: Mutex<SmallRng>,
    way: Arc<StoreWay>,
    /// The store itself; for all replicas.
    is_down: Arc<AtomicBool>,
    is_dead: AtomicBool,
}

impl StoreLink {
    pub fn new(seed: u64, way: &Arc<StoreWay>, is_down: &Arc<AtomicBool>) -> Self {
        Self {
            rng: Mutex::new(SmallRng::seed_from_u64(seed)),
            way: Arc::clone(way),
            is_down: Arc::clone(is_down),
            is_dead: AtomicBool::new(false),
        }
    }

    /// The process is gone: nothing of it reaches the store any more.
    pub fn die(&self) {
        self.is_dead.store(true, Ordering::Relaxed);
    }

    fn pass(&self) -> Option<Duration> {
        if [&self.way.is_cut, &*self.is_down, &self.is_dead].iter().any(|closed| closed.load(Ordering::Relaxed)) {
            return None;
        }
        let Quality { lost, slowest_ms } = *self.way.quality.lock().unwrap();
        let mut rng = self.rng.lock().unwrap();
        if lost > 0 && rng.random_range(0..100) < lost {
            return None;
        }
        Some(Duration::from_millis(u64::from(rng.random_range(0..=slowest_ms))))
    }
}

impl Link for StoreLink {
    fn there(&self) -> Option<Duration> {
        self.pass()
    }

    fn back(&self) -> Option<Duration> {
        if self.way.is_deaf.load(Ordering::Relaxed) { None } else { self.pass() }
    }
}
