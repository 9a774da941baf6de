//! What waits to be handed over: two lanes, in each the routes take turns, in each route the batches.

use std::collections::VecDeque;

use tokio::time::Instant;

use super::slots::Slots;
use crate::domain::ids::RouteId;
use crate::domain::sending::SendOutcome;
use crate::senders::Batch;

/// Targets one batch may hand over before the next batch has its turn. Large enough that answers come back in lots.
const QUANTUM: usize = 64;

/// Outcomes of one batch that are kept back at most, while the driver's turn lasts.
pub(super) const RESULTS_AT_ONCE: usize = 64;

/// A batch and what is known of its targets.
pub(super) struct Work {
    pub(super) batch: Batch,
    pub(super) queued_at: Instant,
    /// The first target that was never picked.
    pub(super) next: usize,
    /// Targets without an outcome.
    pub(super) unanswered: usize,
    pub(super) results: Vec<(u32, SendOutcome)>,
}

impl Work {
    pub(super) fn new(batch: Batch, queued_at: Instant) -> Self {
        let unanswered = batch.targets.len();
        Self { batch, queued_at, next: 0, unanswered, results: Vec::new() }
    }

    pub(super) fn answer(&mut self, at: usize, outcome: SendOutcome) {
        self.results.push((self.batch.targets[at].index, outcome));
        self.unanswered -= 1;
        if self.results.len() >= RESULTS_AT_ONCE {
            self.flush();
        }
    }

    pub(super) fn flush(&mut self) {
        self.batch.sink.send(std::mem::take(&mut self.results));
    }
}

/// What a target went through before it is picked (again).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Past {
    /// How often it was sent in vain and surely not processed.
    pub(super) resends: u8,
    /// It was sent once with a credential the provider found stale.
    pub(super) reauthed: bool,
}

/// A target by its batch and place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pick {
    pub(super) work: usize,
    pub(super) at: usize,
    pub(super) past: Past,
}

struct RouteQueue {
    route: RouteId,
    works: VecDeque<usize>,
}

#[derive(Default)]
pub(super) struct LaneQueue {
    /// Goes first: these were picked before.
    again: VecDeque<Pick>,
    routes: VecDeque<RouteQueue>,
    /// Taken from the front batch in its present turn.
    taken: usize,
    waiting: usize,
}

impl LaneQueue {
    /// Targets that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    pub(super) fn push(&mut self, key: usize, work: &Work) {
        self.waiting += work.batch.targets.len();
        let route = work.batch.route.id;
        match self.routes.iter_mut().find(|queue| queue.route == route) {
            Some(queue) => queue.works.push_back(key),
            None => self.routes.push_back(RouteQueue { route, works: VecDeque::from([key]) }),
        }
    }

    /// Back to the front: it could not be handed over after all.
    pub(super) fn put_back(&mut self, pick: Pick) {
        self.waiting += 1;
        self.again.push_front(pick);
    }

    pub(super) fn push_again(&mut self, pick: Pick) {
        self.waiting += 1;
        self.again.push_back(pick);
    }

    pub(super) fn pick(&mut self, works: &mut Slots<Work>) -> Option<Pick> {
        if let Some(pick) = self.again.pop_front() {
            self.waiting -= 1;
            return Some(pick);
        }
        let queue = self.routes.front_mut()?;
        let key = *queue.works.front().expect("a route without batches is removed");
        let work = works.get_mut(key).expect("a batch stays until its last target is answered");
        let pick = Pick { work: key, at: work.next, past: Past::default() };
        work.next += 1;
        self.waiting -= 1;
        self.taken += 1;
        let is_over = work.next == work.batch.targets.len();
        if is_over || self.taken >= QUANTUM {
            self.taken = 0;
            queue.works.pop_front();
            if !is_over {
                queue.works.push_back(key);
            }
            if queue.works.is_empty() {
                self.routes.pop_front();
            } else {
                self.routes.rotate_left(1);
            }
        }
        Some(pick)
    }

    /// Takes everything out that waits and belongs to a batch chosen by `is_chosen`.
    pub(super) fn take(&mut self, works: &mut Slots<Work>, is_chosen: impl Fn(&Work) -> bool) -> Vec<Pick> {
        let mut taken = Vec::new();
        let chosen = |works: &Slots<Work>, key| works.get(key).is_some_and(&is_chosen);
        self.again.retain(|pick| {
            let take = chosen(works, pick.work);
            if take {
                taken.push(*pick);
            }
            !take
        });
        for queue in &mut self.routes {
            queue.works.retain(|key| {
                let take = chosen(works, *key);
                if take && let Some(work) = works.get_mut(*key) {
                    let rest = work.next..work.batch.targets.len();
                    work.next = rest.end;
                    taken.extend(rest.map(|at| Pick { work: *key, at, past: Past::default() }));
                }
                !take
            });
        }
        self.routes.retain(|queue| !queue.works.is_empty());
        self.taken = 0;
        self.waiting -= taken.len();
        taken
    }
}
