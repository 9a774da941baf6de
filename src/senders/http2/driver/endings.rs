//! How things end that do not end by an answer: deadlines, patience, a drain, a panic, a drop.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Command, Core, Hand, Shared, Stopping, TICK};
use crate::domain::sending::SendOutcome;
use crate::planted;
use crate::senders::http2::exchange::{End, Exchange};
use crate::senders::http2::lanes::Pick;
use crate::senders::http2::link::Whereabouts;
use crate::senders::http2::pool::Load;
use crate::senders::http2::wire::{Answer, Wire, maybe_sent, not_sent};

/// Above this share of its time the driver itself is the bottleneck, in percent.
const BUSY_PERCENT: u32 = 70;

impl<W: Wire> Core<W> {
    /// Hand-overs go on for half of the time, so that there is time for their answers.
    pub(super) fn stop(&mut self, now: Instant, deadline: Duration, done: Option<oneshot::Sender<()>>) {
        let stopping = self.stopping.get_or_insert(Stopping {
            hand_over_until: now + deadline / 2,
            until: now + deadline,
            done: Vec::new(),
        });
        stopping.done.extend(done);
        stopping.hand_over_until = stopping.hand_over_until.min(now + deadline / 2);
        stopping.until = stopping.until.min(now + deadline);
        self.look_around(now);
    }

    /// Deadlines, stalls, growth.
    pub(super) fn look_around(&mut self, now: Instant) {
        let overdue: Vec<usize> =
            self.exchanges.iter().filter(|(_, e)| now >= e.deadline).map(|(key, _)| key).collect();
        for key in overdue {
            self.time_out(key, "timeout");
        }
        let since = *self.effort.since.get_or_insert(now);
        if now >= since + 2 * TICK {
            self.effort.is_busy = self.effort.worked * 100 >= (now - since) * BUSY_PERCENT;
            self.effort.since = Some(now);
            self.effort.worked = Duration::ZERO;
        }
        self.recall(now);
        let load = Load { waiting: self.waiting(), in_flight: self.exchanges.len(), is_busy: self.effort.is_busy };
        self.pool.care(now, load, &self.wakes);
        if self.pool.has_usable() {
            self.unusable_since = None;
        } else if load.waiting > 0 {
            // What waited for streams until the last connection went waits for the next one like everybody else.
            let since = *self.unusable_since.get_or_insert(now);
            let patience = self.parts.settings.queue_patience;
            let outcome = not_sent(&self.pool.why_unusable());
            self.answer_queued(|work| now >= work.queued_at.max(since) + patience, &outcome);
        }
        if let Some(stopping) = &self.stopping {
            let (no_more, over) = (now >= stopping.hand_over_until, now >= stopping.until);
            if no_more {
                self.answer_queued(|_| true, &SendOutcome::NotAttempted);
            }
            if over {
                let open: Vec<usize> = self.exchanges.iter().map(|(key, _)| key).collect();
                for key in open {
                    self.time_out(key, "shut down before the answer");
                }
            }
        }
    }

    /// Takes back what a "no" has touched since its hand-over, as long as that is possible: as long as its bytes have not
    /// left. What h2 holds goes with its stream; what waits for the transport only with its connection, and only when it does
    /// not leave soon.
    fn recall(&mut self, now: Instant) {
        let is_complete = self.parts.deny.is_complete(now.into_std());
        let (mut held, mut gathered) = (Vec::new(), Vec::new());
        for (key, exchange) in self.exchanges.iter() {
            let Some(link) = self.pool.peek(exchange.link) else { continue };
            let list = match link.whereabouts(exchange.body_end) {
                Whereabouts::Left => continue,
                Whereabouts::Held => &mut held,
                Whereabouts::Gathered => &mut gathered,
            };
            let Some(work) = self.works.get(exchange.pick.work) else { continue };
            let (batch, target) = (&work.batch, &work.batch.targets[exchange.pick.at]);
            if !is_complete || self.parts.deny.hit(batch.gated, target.user, target.device, batch.notification) {
                list.push((key, exchange.link));
            }
        }
        if planted::is("handed-over-is-gone") {
            return;
        }
        for (key, _) in held {
            self.time_out(key, "called back before it had left");
        }
        for (_, link) in gathered {
            self.pool.recall(link, now);
        }
    }

    /// Dropping the exchange resets its stream.
    fn time_out(&mut self, key: usize, why: &str) {
        let Some(exchange) = self.exchanges.remove(key) else { return };
        let Exchange { pick, lane, link, body_len, body_end, .. } = exchange;
        self.current = Some((pick, Hand::Theirs));
        match exchange.give_up() {
            Some(End::Answer(head, body)) => {
                let wall = self.parts.runtime.now();
                let answer = Answer { status: head.status, headers: &head.headers, body: body.bytes() };
                let outcome = self.wire.classify(&answer, wall).outcome;
                self.answer(pick.work, pick.at, outcome);
            }
            Some(End::Failed(_)) | None => self.answer(pick.work, pick.at, maybe_sent(why)),
        }
        self.lane_in_flight[lane.index()] -= 1;
        self.pool.finished_one(link, body_len, body_end);
        self.wakes.mark_link(link);
    }

    pub(super) fn stop_if_done(&mut self) -> bool {
        if self.stopping.is_none() || self.works.len() > 0 {
            return false;
        }
        self.pool.close(&self.wakes);
        if !self.pool.is_empty() {
            return false;
        }
        self.shared.is_stopped.store(true, Ordering::Release);
        self.inbox.close();
        while let Ok(command) = self.inbox.try_recv() {
            refuse(command, &self.shared);
        }
        if let Some(stopping) = self.stopping.take() {
            for done in stopping.done {
                let _ = done.send(());
            }
        }
        true
    }

    /// Gives every target that has no outcome the one that is safe to assume.
    pub(in crate::senders::http2) fn abandon(&mut self, why: &str) {
        if let Some((pick, hand)) = self.current.take() {
            let outcome = if hand == Hand::Ours { SendOutcome::NotAttempted } else { maybe_sent(why) };
            self.answer(pick.work, pick.at, outcome);
        }
        self.answer_queued(|_| true, &SendOutcome::NotAttempted);
        let open: Vec<Pick> = self.exchanges.iter().map(|(_, exchange)| exchange.pick).collect();
        for pick in open {
            self.answer(pick.work, pick.at, maybe_sent(why));
        }
        self.flush();
    }
}

impl<W: Wire> Drop for Core<W> {
    fn drop(&mut self) {
        self.abandon("the sender was dropped before the answer");
        self.inbox.close();
        while let Ok(command) = self.inbox.try_recv() {
            refuse(command, &self.shared);
        }
    }
}

/// Answers a command that nobody will carry out.
pub(in crate::senders::http2) fn refuse(command: Command, shared: &Shared) {
    match command {
        Command::Batches(batches) => {
            for batch in batches {
                shared.queued.fetch_sub(batch.targets.len(), Ordering::Relaxed);
                let results = batch.targets.iter().map(|target| (target.index, SendOutcome::NotAttempted)).collect();
                batch.sink.send(results);
            }
        }
        Command::Drain { done, .. } => {
            let _ = done.send(());
        }
    }
}
