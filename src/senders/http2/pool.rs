//! The connections of one driver: when to open another, which one to use, which one to let go.
//!
//! Connections are filled in order, so that few are busy and the rest may go idle: requests that share a write are what
//! makes a push cheap. Another one is opened only when those there have been nearly full for a while, something waits,
//! and the sending thread has time to spare. One attempt at a time; failures back off with jitter, and a connection that
//! ended before it answered anything counts as a failure, so that a provider in trouble sees no storm.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use super::Settings;
use super::connect::{Connect, ConnectError};
use super::link::{Care, Link, Opened, State, open};
use super::slots::Slots;
use super::wake::{MAX_LINKS, Wakes};
use crate::planted;
use crate::runtime::Runtime;

/// Connections are nearly full from this share of their streams on, in percent.
const PRESSED_PERCENT: usize = 80;
/// How long they must be before another is opened.
const PRESSED_FOR: Duration = Duration::from_millis(100);
/// The first wait after a failure lies between half of this and this; doubled for each further failure.
const BACKOFF_BASE: Duration = Duration::from_secs(1);
const BACKOFF_CAP: Duration = Duration::from_secs(60);

type Attempt = Pin<Box<dyn Future<Output = Result<Opened, ConnectError>> + Send>>;

pub(super) struct Pool {
    name: Arc<str>,
    runtime: Runtime,
    settings: Settings,
    connector: Arc<dyn Connect>,
    links: Slots<Link>,
    connecting: Option<Attempt>,
    failures: u32,
    not_before: Option<Instant>,
    last_error: Option<Box<str>>,
    pressed_since: Option<Instant>,
    is_closed: bool,
}

impl Pool {
    pub(super) fn new(name: Arc<str>, runtime: Runtime, settings: Settings, connector: Arc<dyn Connect>) -> Self {
        Self {
            name,
            runtime,
            settings,
            connector,
            links: Slots::default(),
            connecting: None,
            failures: 0,
            not_before: None,
            last_error: None,
            pressed_since: None,
            is_closed: false,
        }
    }

    pub(super) fn link(&mut self, at: usize) -> Option<&mut Link> {
        self.links.get_mut(at)
    }

    pub(super) fn peek(&self, at: usize) -> Option<&Link> {
        self.links.get(at)
    }

    /// Cuts a connection that holds what is not to leave any more; its requests are in doubt.
    pub(super) fn recall(&mut self, at: usize, now: Instant) {
        let Some(link) = self.links.get_mut(at) else { return };
        if link.state == State::Ended || !link.is_to_be_cut(now) {
            return;
        }
        tracing::info!(driver = %self.name, in_flight = link.in_flight, "a stalled connection is cut for what a \"no\" recalls");
        let has_answered = link.has_answered;
        link.end();
        if !has_answered {
            self.failed("it takes no bytes".into(), now);
        }
        self.remove_if_over(at);
    }

    /// Connections that can be used.
    pub(super) fn open_count(&self) -> usize {
        self.links.iter().filter(|(_, link)| link.state == State::Open).count()
    }

    pub(super) fn has_usable(&self) -> bool {
        self.links.iter().any(|(_, link)| link.is_usable())
    }

    /// Neither a connection nor an attempt.
    pub(super) fn is_empty(&self) -> bool {
        self.links.len() == 0 && self.connecting.is_none()
    }

    /// Requests that all usable connections take together.
    pub(super) fn capacity(&self) -> usize {
        self.links.iter().map(|(_, link)| link.capacity()).sum()
    }

    pub(super) fn needs_close_look(&self) -> bool {
        let unsettled = |link: &Link| link.state != State::Open || link.is_stalled;
        self.connecting.is_some() || self.links.iter().any(|(_, link)| unsettled(link))
    }

    /// Why there is no connection, for the answers of those who waited for one.
    pub(super) fn why_unusable(&self) -> String {
        match &self.last_error {
            Some(error) => format!("connect failed: {error}"),
            None => "no connection took it in time".to_owned(),
        }
    }

    /// A connection that takes a request at once.
    pub(super) fn free_link(&mut self, now: Instant, wakes: &mut Wakes) -> Option<usize> {
        let has_room = |links: &Slots<Link>, at| links.get(at).is_some_and(|link: &Link| link.free(now) > 0);
        (0..self.links.end()).find(|at| has_room(&self.links, *at) && self.takes_one(*at, now, wakes))
    }

    fn takes_one(&mut self, at: usize, now: Instant, wakes: &mut Wakes) -> bool {
        let Some(link) = self.links.get_mut(at) else { return false };
        match link.poll_ready(&mut Context::from_waker(wakes.link(at))) {
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
            Poll::Ready(Err(why)) => {
                self.ended_by_peer(at, &why, now);
                self.retire(at, wakes);
                false
            }
        }
    }

    /// Opens a connection if one is needed and may be opened now. True when an attempt began.
    pub(super) fn connect_if_needed(&mut self, now: Instant) -> bool {
        let is_needed = !self.links.iter().any(|(_, link)| link.is_usable() || link.state == State::Settling);
        is_needed && self.begin_connect(now)
    }

    fn begin_connect(&mut self, now: Instant) -> bool {
        let alive = self.links.iter().filter(|(_, l)| matches!(l.state, State::Settling | State::Open)).count();
        // A replacement may exceed the limit by one for a while; stalled ones are still connections.
        let may = self.connecting.is_none()
            && !self.is_closed
            && alive <= self.settings.max_connections
            && self.links.len() < MAX_LINKS
            && self.not_before.is_none_or(|at| now >= at);
        if may {
            self.pressed_since = None;
            self.connecting = Some(Box::pin(open(Arc::clone(&self.connector))));
        }
        may
    }

    /// Polls the attempt and every connection that was woken. True when something changed.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, wakes: &mut Wakes, make: impl FnOnce(Opened) -> Link) -> bool {
        let mut changed = false;
        if let Some(attempt) = &mut self.connecting
            && let Poll::Ready(result) = attempt.as_mut().poll(cx)
        {
            self.connecting = None;
            changed = true;
            match result {
                Ok(opened) if !self.is_closed => {
                    let at = self.links.insert(make(opened));
                    wakes.mark_link(at);
                }
                Ok(_) => {}
                Err(error) => self.failed(error.to_string().into(), self.runtime.instant()),
            }
        }
        let mut woken = wakes.take_links();
        while woken != 0 {
            let at = woken.trailing_zeros() as usize;
            woken &= woken - 1;
            changed |= self.poll_link(at, wakes);
        }
        changed
    }

    fn poll_link(&mut self, at: usize, wakes: &mut Wakes) -> bool {
        let Some(link) = self.links.get_mut(at) else { return false };
        let before = (link.state, link.limit);
        let mut cx = Context::from_waker(wakes.link(at));
        match link.poll(&mut cx, self.settings.max_streams) {
            Poll::Ready(why) => {
                let now = self.runtime.instant();
                match before.0 {
                    State::Settling => self.failed(ConnectError::NoSettings(why).to_string().into(), now),
                    State::Open => self.ended_by_peer(at, &why, now),
                    State::Draining | State::Ended => {}
                }
                self.remove_if_over(at);
                true
            }
            Poll::Pending => {
                let after = (link.state, link.limit);
                if before.0 == State::Settling && after.0 == State::Open {
                    tracing::debug!(driver = %self.name, max_streams = link.limit, "connected");
                    self.retire_aged(at, wakes);
                }
                before != after
            }
        }
    }

    /// A request of this connection is over.
    pub(super) fn finished_one(&mut self, at: usize, body_len: usize, body_end: u64) {
        if let Some(link) = self.links.get_mut(at) {
            link.gave_back(body_len, body_end);
        }
        self.remove_if_over(at);
    }

    /// A provider answers: connecting works.
    pub(super) fn answered(&mut self, at: usize) {
        if let Some(link) = self.links.get_mut(at)
            && !link.has_answered
        {
            link.has_answered = true;
            self.failures = 0;
            self.not_before = None;
            self.last_error = None;
        }
    }

    pub(super) fn retire(&mut self, at: usize, wakes: &Wakes) {
        if let Some(link) = self.links.get_mut(at) {
            link.retire();
            wakes.mark_link(at);
        }
    }

    /// Retires all that were opened with this credential or an older one.
    pub(super) fn retire_up_to(&mut self, generation: u32, wakes: &Wakes) {
        for (at, link) in self.links.iter_mut().filter(|(_, link)| link.generation <= generation) {
            link.retire();
            wakes.mark_link(at);
        }
    }

    /// Retires all and opens no more.
    pub(super) fn close(&mut self, wakes: &Wakes) {
        if self.is_closed {
            return;
        }
        self.is_closed = true;
        self.connecting = None;
        self.retire_up_to(u32::MAX, wakes);
    }

    /// The regular look at every connection, and at whether there are enough.
    pub(super) fn care(&mut self, now: Instant, load: Load, wakes: &Wakes) {
        let mut over = Vec::new();
        let mut late = false;
        for (at, link) in self.links.iter_mut() {
            match link.care(now, &self.settings) {
                Care::Nothing => {}
                Care::Poll => wakes.mark_link(at),
                Care::Idle => {
                    link.retire();
                    wakes.mark_link(at);
                }
                Care::Dead => {
                    if link.state != State::Draining {
                        tracing::info!(driver = %self.name, in_flight = link.in_flight, "connection without sign of life");
                    }
                    link.end();
                    over.push(at);
                }
                Care::Late => {
                    late = true;
                    link.end();
                    over.push(at);
                }
            }
        }
        if late {
            let error = ConnectError::Timeout { after: self.settings.connect_timeout };
            self.failed(error.to_string().into(), now);
        }
        for at in over {
            self.remove_if_over(at);
        }
        self.grow(now, load);
    }

    fn grow(&mut self, now: Instant, load: Load) {
        let is_aged = |link: &Link| link.state == State::Open && now >= link.opened_at + self.settings.max_age;
        let capacity = self.capacity();
        let is_pressed = load.waiting > 0
            && capacity > 0
            && load.in_flight * 100 >= capacity * PRESSED_PERCENT
            && self.links.iter().all(|(_, link)| link.state != State::Settling && link.is_proven);
        if !is_pressed {
            self.pressed_since = None;
        }
        let pressed_since = if is_pressed { Some(*self.pressed_since.get_or_insert(now)) } else { None };
        let wants_more = pressed_since.is_some_and(|at| now >= at + PRESSED_FOR)
            && !load.is_busy
            && self.links.iter().filter(|(_, l)| l.state == State::Open).count() < self.settings.max_connections;
        let wants_younger = self.links.iter().any(|(_, link)| is_aged(link))
            && !self.links.iter().any(|(_, link)| link.state == State::Settling);
        if wants_more || wants_younger {
            self.begin_connect(now);
        } else if load.waiting > 0 {
            self.connect_if_needed(now);
        }
    }

    /// A new connection takes over from those that are too old.
    fn retire_aged(&mut self, newest: usize, wakes: &Wakes) {
        let now = self.runtime.instant();
        let max_age = self.settings.max_age;
        for (at, link) in self.links.iter_mut() {
            if at != newest && link.state == State::Open && now >= link.opened_at + max_age {
                link.retire();
                wakes.mark_link(at);
            }
        }
    }

    fn ended_by_peer(&mut self, at: usize, why: &str, now: Instant) {
        let Some(link) = self.links.get_mut(at) else { return };
        if link.state == State::Draining {
            return;
        }
        tracing::info!(driver = %self.name, in_flight = link.in_flight, why, "connection ended by the peer");
        if !link.has_answered {
            self.failed(why.into(), now);
        }
    }

    fn failed(&mut self, why: Box<str>, now: Instant) {
        let doublings = self.failures.min(6);
        let longest = (BACKOFF_BASE * (1 << doublings)).min(BACKOFF_CAP);
        let wait = longest.mul_f64(0.5 + self.runtime.random_unit() / 2.0);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(if planted::is("connect-storm") { now } else { now + wait });
        tracing::warn!(driver = %self.name, failures = self.failures, wait_ms = wait.as_millis(), why = &*why, "no connection");
        self.last_error = Some(why);
    }

    fn remove_if_over(&mut self, at: usize) {
        if self.links.get(at).is_some_and(|link| link.state == State::Ended && link.in_flight == 0) {
            self.links.remove(at);
        }
    }
}

/// What the driver has to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Load {
    /// Targets that wait for a stream.
    pub(super) waiting: usize,
    pub(super) in_flight: usize,
    /// The driver itself is what takes the time; more connections would not help.
    pub(super) is_busy: bool,
}
