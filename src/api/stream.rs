//! NotifyEvents: many events over one stream, each answered as NotifyEvent would answer it.
//!
//! One driver per stream, polled by the connection's own task: nothing is spawned. It reads as long as the window has
//! room, so that many events reach the store's group commit together, and hands out answers as they come. A client that
//! does not read its answers is not read from either.
//!
//! Ends, each after every event that was read has been answered: the client closes its side (OK); the server shuts down
//! (OK: what has already arrived is still read, up to one window, and answered); a message cannot be read (its error).
//! The caller's deadline ends it at once.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::stream::{FuturesUnordered, Stream};
use prost::Message as _;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, Streaming};

use crate::domain::violation::Violation;
use crate::service::events::Checked;
use crate::service::{Service, ServiceError};

use super::auth::{AuthError, Caller, KeyRing};
use super::limits::Deadline;
use super::proto::notify_events_response::Outcome;
use super::scopes::Scope;
use super::status::{self, ApiError};
use super::{access, convert, proto};

/// How much may be unanswered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    pub events: usize,
    pub bytes: usize,
}

/// An answer and the bytes its request took of the window.
type Pending = Pin<Box<dyn Future<Output = (proto::NotifyEventsResponse, usize)> + Send>>;
type Waiting = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What may still be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reading {
    Open,
    /// Shutting down: only what has already arrived, at most so many.
    Rest(usize),
    Done,
}

/// The answers of one stream.
pub struct EventStream {
    service: Arc<Service>,
    keys: Arc<KeyRing>,
    caller: Caller,
    incoming: Streaming<proto::NotifyEventsRequest>,
    reading: Reading,
    /// How the stream ends once everything is answered.
    end: Option<Status>,
    pending: FuturesUnordered<Pending>,
    pending_bytes: usize,
    window: Window,
    deadline: Option<Waiting>,
    shutdown: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    _place: OwnedSemaphorePermit,
}

impl EventStream {
    #[expect(clippy::too_many_arguments, reason = "one caller; each is a part of its own")]
    pub(super) fn new(
        service: Arc<Service>,
        keys: Arc<KeyRing>,
        caller: Caller,
        incoming: Streaming<proto::NotifyEventsRequest>,
        window: Window,
        deadline: Option<Deadline>,
        shutdown: CancellationToken,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let deadline = deadline.map(|Deadline(at)| {
            let runtime = service.runtime().clone();
            Box::pin(async move { runtime.sleep_until(at).await }) as Waiting
        });
        Self {
            service,
            keys,
            caller,
            incoming,
            reading: Reading::Open,
            end: None,
            pending: FuturesUnordered::new(),
            pending_bytes: 0,
            window,
            deadline,
            shutdown: Some(Box::pin(shutdown.cancelled_owned())),
            _place: place,
        }
    }

    /// Reads while the window has room. Afterwards the incoming side is either done or has our waker, or the window is
    /// full and an answer will wake us.
    fn read(&mut self, cx: &mut Context<'_>) {
        loop {
            let room = self.pending.len() < self.window.events && self.pending_bytes < self.window.bytes;
            if self.reading == Reading::Done || !room {
                return;
            }
            match Pin::new(&mut self.incoming).poll_next(cx) {
                Poll::Ready(Some(Ok(message))) => self.begin(message),
                Poll::Ready(Some(Err(status))) => {
                    self.end = Some(status);
                    self.reading = Reading::Done;
                }
                Poll::Ready(None) => self.reading = Reading::Done,
                Poll::Pending => {
                    if matches!(self.reading, Reading::Rest(_)) {
                        self.reading = Reading::Done;
                    }
                    return;
                }
            }
        }
    }

    fn begin(&mut self, message: proto::NotifyEventsRequest) {
        let bytes = message.encoded_len();
        self.pending_bytes += bytes;
        if let Reading::Rest(left) = self.reading {
            self.reading = if left > 1 { Reading::Rest(left - 1) } else { Reading::Done };
        }
        let service = Arc::clone(&self.service);
        let caller = match self.keys.refresh(&self.caller, service.runtime().now()) {
            Ok(caller) => {
                self.caller = caller.clone();
                Ok(caller)
            }
            Err(error) => Err(error),
        };
        let sequence = message.sequence;
        let checked = checked(&service, caller, message.event);
        self.pending.push(Box::pin(async move {
            let accepted = match checked {
                Ok(checked) => service.notify(checked).await.map_err(ApiError::from),
                Err(error) => Err(error),
            };
            let outcome = match accepted {
                Ok(accepted) => Outcome::Result(convert::accepted(service.identity(), accepted)),
                Err(error) => Outcome::Error(status::as_message(&status::status(&error, service.runtime()))),
            };
            (proto::NotifyEventsResponse { sequence, outcome: Some(outcome) }, bytes)
        }));
    }
}

/// As the unary call, with the key looked up anew and an idempotency key required.
fn checked(
    service: &Service,
    caller: Result<Caller, AuthError>,
    event: Option<proto::NotifyEventRequest>,
) -> Result<Box<Checked>, ApiError> {
    let caller = caller?;
    if !caller.has(Scope::Notify) {
        return Err(AuthError::ScopeMissing(Scope::Notify).into());
    }
    let Some(event) = event else {
        return Err(ServiceError::Invalid(vec![Violation::new("event", "is required")]).into());
    };
    let mut call = access::call(&service.apps(), &caller, &event.app_id)?;
    if event.idempotency_key.is_empty() {
        call.violations().add("idempotency_key", "is required in a stream");
    }
    let input = convert::notify_event(call.violations(), event);
    Ok(service.checked(call, input)?)
}

impl Stream for EventStream {
    type Item = Result<proto::NotifyEventsResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            this.deadline = None;
            this.reading = Reading::Done;
            this.pending.clear();
            this.end = None;
            return Poll::Ready(Some(Err(status::status(&ApiError::DeadlineExceeded, this.service.runtime()))));
        }
        if let Some(shutdown) = &mut this.shutdown
            && shutdown.as_mut().poll(cx).is_ready()
        {
            this.shutdown = None;
            if this.reading == Reading::Open {
                this.reading = Reading::Rest(this.window.events);
            }
        }
        this.read(cx);
        match Pin::new(&mut this.pending).poll_next(cx) {
            Poll::Ready(Some((answer, bytes))) => {
                this.pending_bytes -= bytes;
                Poll::Ready(Some(Ok(answer)))
            }
            // Nothing is unanswered.
            Poll::Ready(None) if this.reading == Reading::Done => Poll::Ready(this.end.take().map(Err)),
            // Nothing is unanswered and nothing has arrived: the incoming side, shutdown and deadline have our waker.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}
