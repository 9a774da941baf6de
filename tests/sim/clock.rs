//! True time: one line through all lives of a process, whatever its own wall clock was set to.

use std::sync::Mutex;
use std::time::Duration;

use nudged::runtime::{Instant, Runtime};

use super::facts::Ms;

/// When every history begins: 2026-01-01.
pub const START_MS: i64 = 1_767_225_600_000;

#[derive(Default)]
pub struct Clock {
    life: Mutex<Option<Life>>,
}

struct Life {
    runtime: Runtime,
    began: Instant,
    began_at: Ms,
}

impl Clock {
    /// A process starts at this true time.
    pub fn begin(&self, runtime: &Runtime, at: Ms) {
        let life = Life { runtime: runtime.clone(), began: runtime.instant(), began_at: at };
        *self.life.lock().unwrap() = Some(life);
    }

    pub fn now(&self) -> Ms {
        let life = self.life.lock().unwrap();
        let Some(Life { runtime, began, began_at }) = &*life else { return 0 };
        began_at + millis(runtime.instant() - *began)
    }

    /// As a clock on the wall that nobody touches.
    pub fn true_wall(&self) -> i64 {
        START_MS + self.now()
    }
}

pub fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
