//! Requests of one kind that are done together.
//!
//! Each waits in a queue of bounded count and bytes; one task takes all that wait, up to a limit, and while their
//! statements run the next group gathers: a transaction's fixed cost, most of what one change costs, is shared. Whoever
//! asks is answered once the group's transaction is durable.
//!
//! - Two that touch the same row: the later waits for the next group, so that no statement meets a row twice.
//! - One that the server refuses: the group is halved until it is alone.
//! - A refusal of timing or a lost answer is [`super::tx`]'s matter: the whole group runs again.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use diesel::result::Error as DieselError;

use super::Inner;
use super::fail::unavailable;
use super::inbox::{self, Groups, Inbox};
use super::tx::{Remedy, remedy};
use crate::storage::{Result, StoreError};
use crate::telemetry::names;

/// The bytes that waiting requests may hold.
const MAX_BYTES: usize = 16 * 1024 * 1024;
/// How long the parts of a group are tried before those left are told to come again: below a call's default deadline.
const PATIENCE: Duration = Duration::from_secs(4);

/// The answers of a group, in its order. `None`: it touches what an earlier one of the group does, and comes with the next.
/// The first of a group always has one.
pub(super) type Answers<A> = Vec<Option<Result<A>>>;

/// A kind of request.
pub(super) trait Work: Send + Sync + Sized + 'static {
    type Answer: Send + 'static;
    const DOING: &'static str;

    /// What it holds, for the queue's bound.
    fn bytes(&self) -> usize;

    /// All of them at once.
    fn run(inner: &Inner, group: &[&Self]) -> impl Future<Output = Result<Answers<Self::Answer>>> + Send;
}

type Waiting<W> = inbox::Waiting<W, <W as Work>::Answer>;

/// Where requests wait.
pub(super) struct Gatherer<W: Work>(Inbox<W, W::Answer>);

impl<W: Work> Gatherer<W> {
    pub fn new() -> (Self, Gathering<W>) {
        let (inbox, groups) = inbox::inbox(MAX_BYTES);
        (Self(inbox), Gathering(groups))
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.0.waiting()
    }

    /// Once queued it happens, whether or not anybody waits for the answer.
    pub async fn ask(&self, request: W) -> Result<W::Answer> {
        let bytes = size_of::<W>() + request.bytes();
        self.0.ask(request, bytes, W::DOING).await
    }
}

/// The task that does them.
pub(super) struct Gathering<W: Work>(Groups<W, W::Answer>);

impl<W: Work> Gathering<W> {
    /// Until the store is closed and the queue is empty.
    pub async fn run(mut self, inner: Arc<Inner>) {
        while let Some(group) = self.0.next(&inner.context.stopping).await {
            finish(&inner, group).await;
        }
    }
}

async fn finish<W: Work>(inner: &Inner, group: Vec<Waiting<W>>) {
    let runtime = &inner.context.runtime;
    let deadline = runtime.instant() + PATIENCE;
    let mut groups = VecDeque::from([group]);
    while let Some(mut group) = groups.pop_front() {
        let requests: Vec<&W> = group.iter().map(|waiting| &waiting.request).collect();
        #[expect(clippy::cast_precision_loss, reason = "a small count")]
        metrics::histogram!(names::WRITER_GROUP_SIZE).record(requests.len() as f64);
        match W::run(inner, &requests).await {
            Ok(answers) => {
                let mut later = Vec::new();
                for (waiting, answer) in group.into_iter().zip(answers) {
                    match answer {
                        Some(answer) => waiting.answer(answer),
                        None => later.push(waiting),
                    }
                }
                if !later.is_empty() {
                    groups.push_front(later);
                }
            }
            Err(error) if group.len() > 1 && is_of_one(&error) => {
                let second = group.split_off(group.len() / 2);
                groups.push_front(second);
                groups.push_front(group);
            }
            Err(error) => refuse(group, error),
        }
        if runtime.instant() >= deadline {
            for group in groups.drain(..) {
                refuse(group, unavailable(W::DOING));
            }
        }
    }
}

fn refuse<W: Work>(group: Vec<Waiting<W>>, error: StoreError) {
    let again: fn() -> StoreError = match &error {
        StoreError::DiskFull => || StoreError::DiskFull,
        StoreError::Overloaded { .. } => || StoreError::Overloaded { what: "the database is busy" },
        _ => || unavailable(W::DOING),
    };
    let mut error = Some(error);
    for waiting in group {
        waiting.answer(Err(error.take().unwrap_or_else(again)));
    }
}

/// What may be wrong with one of a group only.
fn is_of_one(error: &StoreError) -> bool {
    match error {
        StoreError::Corrupt { .. } => true,
        StoreError::Unavailable { source: Some(source), .. } => {
            source.downcast_ref::<DieselError>().is_some_and(|error| remedy(error) != Remedy::Reconnect)
        }
        _ => false,
    }
}
