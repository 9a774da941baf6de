//! What a simulation does to the calls of its store: they take time, meet a busy database, or lose their answers.
//!
//! Whoever uses a store must cope with each of these, and inline calls on one connection would show none of them.
//! Production has no disturbance.

use std::sync::Arc;
use std::time::Duration;

use super::fail::unavailable;
use crate::runtime::Runtime;
use crate::storage::Result;

/// Decides, for every call.
pub trait Disturb: Send + Sync {
    /// Of the call that comes now, by what it does.
    fn next(&self, doing: &'static str) -> Disturbance;
}

/// Of one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Disturbance {
    /// How long it waits for its turn.
    pub before: Duration,
    pub fate: Fate,
    /// How long its answer is on its way.
    pub after: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Fate {
    #[default]
    Answered,
    /// The database stayed busy: nothing happened, and the caller is told `Unavailable`.
    Busy,
    /// It happened, and the caller is told `Unavailable`.
    AnswerLost,
}

/// Does a call under its disturbance.
pub(super) async fn disturbed<T>(
    runtime: &Runtime,
    by: Option<&Arc<dyn Disturb>>,
    doing: &'static str,
    call: impl Future<Output = Result<T>>,
) -> Result<T> {
    let Some(by) = by else { return call.await };
    let Disturbance { before, fate, after } = by.next(doing);
    if !before.is_zero() {
        runtime.sleep(before).await;
    }
    if fate == Fate::Busy {
        return Err(unavailable(doing));
    }
    let answer = call.await;
    if !after.is_zero() {
        runtime.sleep(after).await;
    }
    match fate {
        Fate::AnswerLost if answer.is_ok() => Err(unavailable(doing)),
        _ => answer,
    }
}
