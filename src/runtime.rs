//! The only owner of clock, sleep, randomness, spawn and connect.
//!
//! Why: a history of the engine can be replayed from one seed only if nothing else decides when or in which order
//! things happen. clippy's `disallowed-methods` forbids the originals everywhere else, each with its reason.
//!
//! Two modes. *Production*: the system clock, the operating system's randomness, real threads. *Simulated*: the wall
//! clock is a start time plus tokio's (pausable) clock, randomness comes from one seed, and what would be a thread
//! runs inline in the caller's runtime. Monotonic time is tokio's in both, so a paused test clock moves timers and
//! deadlines alike.
#![expect(clippy::disallowed_methods, reason = "this module is the seam through which everyone else gets these")]

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use tokio::task::JoinHandle;
pub use tokio::time::Instant;

use crate::domain::time::UnixMs;

/// Clock, randomness and tasks. Cheap to clone; every component is handed one.
#[derive(Clone)]
pub struct Runtime {
    mode: Arc<Mode>,
}

enum Mode {
    Production {
        rng: Mutex<SmallRng>,
    },
    Simulated {
        start: UnixMs,
        origin: Instant,
        /// By how much the wall clock was set since.
        jumped_ms: AtomicI64,
        /// One poll of a task in so many is put behind those of the others; 0: none.
        reorder_one_in: AtomicU32,
        /// Nothing of it runs any more.
        has_crashed: AtomicBool,
        rng: Mutex<SmallRng>,
    },
}

impl Runtime {
    /// The real thing.
    #[must_use]
    pub fn production() -> Self {
        Self { mode: Arc::new(Mode::Production { rng: Mutex::new(SmallRng::from_os_rng()) }) }
    }

    /// Everything decided by `seed`; the wall clock starts at `start` and follows tokio's clock.
    #[must_use]
    pub fn simulated(seed: u64, start: UnixMs) -> Self {
        let rng = Mutex::new(SmallRng::seed_from_u64(seed));
        let (jumped_ms, reorder_one_in, has_crashed) = (AtomicI64::new(0), AtomicU32::new(0), AtomicBool::new(false));
        let origin = Instant::now();
        Self { mode: Arc::new(Mode::Simulated { start, origin, jumped_ms, reorder_one_in, has_crashed, rng }) }
    }

    /// A simulated crash of one process among several in one tokio runtime: none of its tasks runs on. A task is dropped when
    /// it is next woken, or with tokio's runtime; whoever waits for one waits for ever.
    pub fn crash(&self) {
        if let Mode::Simulated { has_crashed, .. } = &*self.mode {
            has_crashed.store(true, Ordering::Relaxed);
        }
    }

    fn has_crashed(&self) -> bool {
        matches!(&*self.mode, Mode::Simulated { has_crashed, .. } if has_crashed.load(Ordering::Relaxed))
    }

    /// Sets the simulated wall clock forward or back, as an operator or NTP may; deadlines do not move.
    pub fn jump(&self, by_ms: i64) {
        if let Mode::Simulated { jumped_ms, .. } = &*self.mode {
            jumped_ms.fetch_add(by_ms, Ordering::Relaxed);
        }
    }

    /// From now on one poll of a simulated task in `one_in` comes after those of the tasks that are ready with it: what is
    /// woken together runs in any order, as it does on several threads. 0 for none.
    pub fn reorder(&self, one_in: u32) {
        if let Mode::Simulated { reorder_one_in, .. } = &*self.mode {
            reorder_one_in.store(one_in, Ordering::Relaxed);
        }
    }

    /// Whether this poll is put off.
    fn puts_off(&self) -> bool {
        match &*self.mode {
            Mode::Production { .. } => false,
            Mode::Simulated { reorder_one_in, .. } => {
                let one_in = u64::from(reorder_one_in.load(Ordering::Relaxed));
                one_in > 0 && self.random_u64().is_multiple_of(one_in)
            }
        }
    }

    /// Whether threads are to be left out and their work run inline.
    #[must_use]
    pub fn is_simulated(&self) -> bool {
        matches!(*self.mode, Mode::Simulated { .. })
    }

    /// The wall clock.
    #[must_use]
    pub fn now(&self) -> UnixMs {
        match &*self.mode {
            Mode::Production { .. } => {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                UnixMs(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
            }
            Mode::Simulated { start, origin, jumped_ms, .. } => {
                let at = start.plus(Instant::now() - *origin);
                UnixMs(at.0.saturating_add(jumped_ms.load(Ordering::Relaxed)))
            }
        }
    }

    /// The wall clock in microseconds since 1970, for measurements within one machine.
    #[must_use]
    pub fn now_us(&self) -> i64 {
        match &*self.mode {
            Mode::Production { .. } => {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
            }
            Mode::Simulated { .. } => self.now().0.saturating_mul(1000),
        }
    }

    /// The monotonic clock: for deadlines, leases and latencies.
    #[must_use]
    pub fn instant(&self) -> Instant {
        Instant::now()
    }

    pub async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    pub async fn sleep_until(&self, deadline: Instant) {
        tokio::time::sleep_until(deadline).await;
    }

    /// `None` when `duration` passed first; the future is dropped then.
    pub async fn timeout<F: Future>(&self, duration: Duration, future: F) -> Option<F::Output> {
        tokio::time::timeout(duration, future).await.ok()
    }

    /// A number for jitter and sampling; not for secrets (see [`Runtime::secret_bytes`]).
    #[must_use]
    pub fn random_u64(&self) -> u64 {
        self.rng().lock().expect("no panic while held").next_u64()
    }

    /// Evenly spread in `0.0..1.0`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "53 random bits fit an f64 exactly")]
    pub fn random_unit(&self) -> f64 {
        (self.random_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Bytes nobody can guess in production; from the seed in simulation.
    ///
    /// # Panics
    /// When the operating system has no randomness: going on would hand out guessable keys.
    #[must_use]
    pub fn secret_bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        match &*self.mode {
            Mode::Production { .. } => {
                aws_lc_rs::rand::fill(&mut bytes).expect("the operating system provides randomness");
            }
            Mode::Simulated { rng, .. } => rng.lock().expect("no panic while held").fill_bytes(&mut bytes),
        }
        bytes
    }

    /// A random (version 4) UUID: boot ids and request ids.
    #[must_use]
    pub fn uuid(&self) -> uuid::Uuid {
        uuid::Builder::from_random_bytes(self.secret_bytes()).into_uuid()
    }

    /// A task on the current tokio runtime. The caller owns the handle and joins it.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        match &*self.mode {
            Mode::Production { .. } => tokio::spawn(future),
            Mode::Simulated { .. } => {
                let (runtime, mut future) = (self.clone(), Some(Box::pin(future)));
                tokio::spawn(poll_fn(move |cx| {
                    if runtime.has_crashed() {
                        future = None;
                    }
                    let Some(future) = &mut future else { return Poll::Pending };
                    if runtime.puts_off() {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    future.as_mut().poll(cx)
                }))
            }
        }
    }

    /// A task on the current thread's `LocalSet`.
    pub fn spawn_local<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + 'static,
        F::Output: 'static,
    {
        tokio::task::spawn_local(future)
    }

    /// Work that blocks: on a blocking thread in production, inline in simulation.
    ///
    /// # Panics
    /// When `work` panics, and when the runtime is shutting down before it ran.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        if self.is_simulated() {
            return work();
        }
        match tokio::task::spawn_blocking(work).await {
            Ok(value) => value,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(error) => panic!("blocking work was cancelled: {error}"),
        }
    }

    /// A named operating-system thread. Simulation has none: ask [`Runtime::is_simulated`] first and run inline.
    ///
    /// # Errors
    /// When the operating system refuses another thread.
    ///
    /// # Panics
    /// In simulation.
    pub fn thread<T: Send + 'static>(
        &self,
        name: &str,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<std::thread::JoinHandle<T>> {
        assert!(!self.is_simulated(), "a simulated runtime has no threads");
        std::thread::Builder::new().name(name.to_owned()).spawn(body)
    }

    /// A TCP connection.
    ///
    /// # Errors
    /// As the operating system answers.
    pub async fn connect(&self, address: SocketAddr) -> io::Result<tokio::net::TcpStream> {
        tokio::net::TcpStream::connect(address).await
    }

    fn rng(&self) -> &Mutex<SmallRng> {
        match &*self.mode {
            Mode::Production { rng } | Mode::Simulated { rng, .. } => rng,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn simulated_wall_clock_follows_the_paused_clock() {
        let runtime = Runtime::simulated(1, UnixMs(1_000_000));
        runtime.sleep(Duration::from_secs(90)).await;
        assert_eq!(runtime.now(), UnixMs(1_090_000));
    }

    #[tokio::test(start_paused = true)]
    async fn the_wall_clock_can_be_set_and_deadlines_stay() {
        let runtime = Runtime::simulated(1, UnixMs(1_000_000));
        let before = runtime.instant();
        runtime.jump(-5_000);
        assert_eq!((runtime.now(), runtime.instant()), (UnixMs(995_000), before));
        runtime.jump(6_000);
        assert_eq!(runtime.now(), UnixMs(1_001_000));
    }

    #[tokio::test(start_paused = true)]
    async fn reordered_tasks_run_in_an_order_of_the_seeds() {
        let order = async |seed| {
            let runtime = Runtime::simulated(seed, UnixMs(0));
            runtime.reorder(2);
            let seen = Arc::<Mutex<Vec<u32>>>::default();
            let tasks: Vec<_> = (0..8)
                .map(|task| {
                    let seen = Arc::clone(&seen);
                    runtime.spawn(async move { seen.lock().unwrap().push(task) })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            seen.lock().unwrap().clone()
        };
        assert_eq!(order(1).await, order(1).await);
        assert_ne!(order(1).await, order(2).await);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_runs_on_after_a_crash() {
        let (runtime, other) = (Runtime::simulated(1, UnixMs(0)), Runtime::simulated(2, UnixMs(0)));
        let count = Arc::new(AtomicI64::new(0));
        for runtime in [&runtime, &other] {
            let (theirs, count) = (runtime.clone(), Arc::clone(&count));
            drop(runtime.spawn(async move {
                loop {
                    theirs.sleep(Duration::from_secs(1)).await;
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        other.sleep(Duration::from_millis(2_500)).await;
        runtime.crash();
        other.sleep(Duration::from_secs(2)).await;
        assert_eq!(count.load(Ordering::Relaxed), 2 * 2 + 2);
        assert_eq!(Arc::strong_count(&count), 2, "its task is dropped");
    }

    #[tokio::test(start_paused = true)]
    async fn one_seed_gives_one_sequence() {
        let (a, b) = (Runtime::simulated(7, UnixMs(0)), Runtime::simulated(7, UnixMs(0)));
        assert_eq!(a.secret_bytes::<16>(), b.secret_bytes::<16>());
        assert_eq!(a.random_u64(), b.random_u64());
    }
}
