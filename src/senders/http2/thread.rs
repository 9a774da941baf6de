//! The threads that send.
//!
//! One current-thread runtime per sending core: requests that are ready together leave together, and no wake-up crosses
//! cores. All senders of the process share them; a driver stays on the thread it was given. In simulation there are no
//! threads, and drivers are tasks of the caller's runtime.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Mutex;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use crate::runtime::Runtime;

pub(super) type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The most threads, whatever is asked for.
const MAX_THREADS: usize = 64;

pub struct SendingThreads {
    runtime: Runtime,
    state: Mutex<State>,
}

struct State {
    threads: Vec<Thread>,
    /// In simulation.
    tasks: Vec<JoinHandle<()>>,
    next: usize,
}

struct Thread {
    /// As long as there are drivers.
    jobs: mpsc::UnboundedSender<Job>,
    handle: std::thread::JoinHandle<()>,
    tokio: Handle,
}

impl SendingThreads {
    /// `count` is brought into 1 to 64; one carries some 100 000 pushes a second.
    ///
    /// # Errors
    /// When the operating system refuses a thread or its event queue.
    pub fn new(runtime: &Runtime, count: usize) -> io::Result<Self> {
        let mut threads = Vec::new();
        if !runtime.is_simulated() {
            for number in 0..count.clamp(1, MAX_THREADS) {
                threads.push(start(runtime, number)?);
            }
        }
        let state = Mutex::new(State { threads, tasks: Vec::new(), next: 0 });
        Ok(Self { runtime: runtime.clone(), state })
    }

    /// The threads' runtimes, to be looked at; none in simulation and after [`SendingThreads::shutdown`].
    pub fn runtimes(&self) -> Vec<Handle> {
        let state = self.state.lock().expect("no panic while held");
        state.threads.iter().map(|thread| thread.tokio.clone()).collect()
    }

    /// Runs a driver until it is done. After [`SendingThreads::shutdown`] it is dropped at once.
    pub(super) fn run(&self, job: Job) {
        let mut state = self.state.lock().expect("no panic while held");
        if self.runtime.is_simulated() {
            state.tasks.retain(|task| !task.is_finished());
            state.tasks.push(self.runtime.spawn(job));
            return;
        }
        if state.threads.is_empty() {
            return;
        }
        let at = state.next % state.threads.len();
        state.next += 1;
        // A thread ends only with its channel.
        let _ = state.threads[at].jobs.send(job);
    }

    /// Waits for the drivers, which must have been drained, and joins the threads.
    pub async fn shutdown(&self) {
        let (threads, tasks) = {
            let mut state = self.state.lock().expect("no panic while held");
            (std::mem::take(&mut state.threads), std::mem::take(&mut state.tasks))
        };
        for task in tasks {
            let _ = task.await;
        }
        let handles: Vec<_> = threads.into_iter().map(|thread| thread.handle).collect();
        self.runtime
            .blocking(move || {
                for handle in handles {
                    let _ = handle.join();
                }
            })
            .await;
    }
}

impl Drop for SendingThreads {
    /// Real threads go on until their drivers are done; simulated ones stop here, as in a crash.
    fn drop(&mut self) {
        if let Ok(state) = self.state.get_mut() {
            for task in &state.tasks {
                task.abort();
            }
        }
    }
}

fn start(runtime: &Runtime, number: usize) -> io::Result<Thread> {
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tokio = executor.handle().clone();
    let (jobs, mut queue) = mpsc::unbounded_channel();
    let handle = runtime.thread(&format!("send-{number}"), move || {
        // Drivers catch their own panics; this is the net below.
        while catch_unwind(AssertUnwindSafe(|| executor.block_on(serve(&mut queue)))).is_err() {
            tracing::error!(number, "a sending thread panicked; it goes on");
        }
    })?;
    Ok(Thread { jobs, handle, tokio })
}

async fn serve(queue: &mut mpsc::UnboundedReceiver<Job>) {
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            job = queue.recv() => match job {
                Some(job) => drop(running.spawn(job)),
                None => break,
            },
            Some(_) = running.join_next() => {}
        }
    }
    while running.join_next().await.is_some() {}
}
