//! What is logged on this thread, for tests.

use std::io;
use std::sync::{Arc, Mutex};

use tracing::Dispatch;
use tracing::subscriber::DefaultGuard;

/// Collects until it is dropped.
pub struct Captured {
    log: Log,
    // While a single dispatcher is known, `tracing` asks that of the thread which meets a log line first whether anybody
    // wants it: another test's thread has none, and would silence the line for this one too. With two known, all are asked.
    _second: Dispatch,
    _guard: DefaultGuard,
}

/// One JSON object a line, with the innermost span.
pub fn capture() -> Captured {
    let second = Dispatch::new(tracing_subscriber::registry());
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_writer(move || writer.clone())
        .finish();
    Captured { log, _second: second, _guard: tracing::subscriber::set_default(subscriber) }
}

impl Captured {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.log.0.lock().expect("no panic while held")).into_owned()
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic while held").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() {
        tracing::info!("said by any thread");
    }

    /// Were the one dispatcher there is only asked for on the thread that is first, nothing would be seen here.
    #[test]
    fn a_line_first_met_by_another_thread_is_seen() {
        let captured = capture();
        std::thread::scope(|scope| {
            scope.spawn(line);
        });
        line();
        assert!(captured.text().contains("said by any thread"));
    }
}
