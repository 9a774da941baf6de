//! ImportDevices, ImportOptIns, ImportSubscriptions: one driver for the three streams.
//!
//! It gathers what arrives into batches, writes one at a time, and answers after each commit: a client that does not read
//! its answers is not read from either, and what is unanswered is bounded by one batch and HTTP/2's window. A batch ends
//! when it is full, or when nothing has arrived for [`LINGER`]. Nothing is spawned: the connection's own task polls it.
//!
//! Ends: the client closes its side (a last answer with `done`, then OK); the server shuts down (what was gathered is
//! written and answered, then UNAVAILABLE, so that nobody takes it for the end); the caller's deadline, a key that is no
//! longer good, or a failing database (that error; what was not acknowledged may have happened, and is to be sent again).

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, Stream};
use prost::Message;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::domain::violation::Violation;
use crate::service::imports::{Import, ImportKind, Item, MAX_BATCH};
use crate::service::{Call, Service, ServiceError};

use super::auth::{AuthError, Caller, KeyRing};
use super::limits::Deadline;
use super::scopes::Scope;
use super::status::{self, ApiError};
use super::{access, convert, proto};

/// How long a batch that is not full waits for more.
const LINGER: Duration = Duration::from_millis(10);
/// A batch is full at so many bytes of messages, too.
const MAX_BATCH_BYTES: usize = 256 * 1024;

/// The answers of one stream.
pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What a message of a stream is.
pub enum Step<T> {
    Start(proto::ImportStart),
    /// With its sequence.
    Item(u64, T),
    /// Neither field is set.
    Nothing,
}

/// One of the three.
pub trait Kind: Send + 'static {
    const KIND: ImportKind;
    type Request: Message + Default + 'static;
    type Response: 'static;
    type Item: Send;

    fn step(request: Self::Request) -> Step<Self::Item>;
    /// As far as possible without the store.
    fn check(service: &Service, call: Call<'_>, item: Self::Item) -> Result<Item, ServiceError>;
    /// The item's own `app_id`.
    fn app_id(item: &Self::Item) -> &str;
    fn response(progress: proto::ImportProgress) -> Self::Response;
}

/// What every stream needs of the server.
pub struct Parts {
    pub service: Arc<Service>,
    pub keys: Arc<KeyRing>,
    pub caller: Caller,
    pub deadline: Option<Deadline>,
    pub shutdown: CancellationToken,
    #[expect(dead_code, reason = "a place among the open imports, given back when the stream ends")]
    pub place: OwnedSemaphorePermit,
}

pub fn answers<K: Kind>(parts: Parts, incoming: Streaming<K::Request>) -> Answers<K::Response> {
    let driver = Driver::<K> { parts, incoming, open: None, end: None, totals: proto::ImportProgress::default() };
    Box::pin(stream::unfold(driver, |mut driver| async move {
        let answer = driver.next().await?;
        Some((answer.map(K::response), driver))
    }))
}

struct Driver<K: Kind> {
    parts: Parts,
    incoming: Streaming<K::Request>,
    /// After the first message.
    open: Option<Opened>,
    /// Nothing more is read.
    end: Option<End>,
    /// What the next answer says, but for those refused.
    totals: proto::ImportProgress,
}

struct Opened {
    import: Import,
    app_id: String,
    /// Of the last item read.
    sequence: u64,
}

/// How a stream ends once everything gathered is answered.
enum End {
    Done,
    Failed(Status),
    /// Everything is said.
    Over,
}

/// What is written and acknowledged at once.
#[derive(Default)]
struct Gathered {
    items: Vec<Item>,
    sequences: Vec<u64>,
    refused: Vec<proto::import_progress::Refused>,
    bytes: usize,
}

impl Gathered {
    fn len(&self) -> usize {
        self.items.len() + self.refused.len()
    }

    fn is_full(&self) -> bool {
        self.len() >= MAX_BATCH || self.bytes >= MAX_BATCH_BYTES
    }
}

enum Read<T> {
    Message(T),
    /// The client has closed its side.
    Closed,
    /// Nothing came for a while.
    Silence,
    Failed(Status),
}

impl<K: Kind> Driver<K> {
    async fn next(&mut self) -> Option<Result<proto::ImportProgress, Status>> {
        if self.open.is_none() && self.end.is_none() {
            return Some(match self.begin().await {
                Ok(position) => {
                    self.totals.acknowledged_up_to = position;
                    Ok(self.totals.clone())
                }
                Err(status) => self.fail(status),
            });
        }
        let mut gathered = Gathered::default();
        while self.end.is_none() && !gathered.is_full() {
            match self.read(gathered.len() > 0).await {
                Read::Message(message) => {
                    gathered.bytes += message.encoded_len();
                    if let Err(status) = self.take(&mut gathered, message) {
                        self.end = Some(End::Failed(status));
                    }
                }
                Read::Closed => self.end = Some(End::Done),
                Read::Failed(status) => self.end = Some(End::Failed(status)),
                Read::Silence => break,
            }
        }
        if gathered.len() > 0 {
            return Some(match self.write(gathered).await {
                Ok(progress) => Ok(progress),
                Err(error) => {
                    let status = self.status(&error);
                    self.fail(status)
                }
            });
        }
        match self.end.replace(End::Over)? {
            End::Done => Some(Ok(proto::ImportProgress { done: Some(true), ..self.totals.clone() })),
            End::Failed(status) => Some(Err(status)),
            End::Over => None,
        }
    }

    fn status(&self, error: &ApiError) -> Status {
        status::status(error, self.parts.service.runtime())
    }

    fn fail<T>(&mut self, status: Status) -> Result<T, Status> {
        self.end = Some(End::Over);
        Err(status)
    }

    /// Reads `start` and answers where to go on.
    async fn begin(&mut self) -> Result<u64, Status> {
        let message = match self.read(false).await {
            Read::Message(message) => K::step(message),
            Read::Failed(status) => return Err(status),
            Read::Closed | Read::Silence => Step::Nothing,
        };
        let Step::Start(start) = message else {
            return Err(self.misused("start", "must be the first message"));
        };
        let proto::ImportStart { app_id, import_id, dry_run } = start;
        let service = Arc::clone(&self.parts.service);
        let opened = async {
            let call = access::call(&service.apps(), &self.parts.caller, &app_id)?;
            service.open_import(call, K::KIND, &import_id, dry_run).await
        };
        let (import, position) = opened.await.map_err(|error| self.status(&error.into()))?;
        self.open = Some(Opened { import, app_id, sequence: 0 });
        Ok(position)
    }

    /// A message out of place ends the stream: what follows cannot be trusted to mean what it says.
    fn misused(&self, field: &str, description: &str) -> Status {
        self.status(&ServiceError::Invalid(vec![Violation::new(field, description)]).into())
    }

    /// The next message. `briefly`: silence ends the wait.
    async fn read(&mut self, briefly: bool) -> Read<K::Request> {
        let runtime = self.parts.service.runtime();
        let deadline = self.parts.deadline.map(|Deadline(at)| at);
        let expired = async {
            match deadline {
                Some(at) => runtime.sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let silence = async { if briefly { runtime.sleep(LINGER).await } else { std::future::pending().await } };
        tokio::select! {
            biased;
            () = expired => Read::Failed(status::status(&ApiError::DeadlineExceeded, runtime)),
            () = self.parts.shutdown.cancelled() => Read::Failed(status::status(&ApiError::ShuttingDown, runtime)),
            message = self.incoming.message() => match message {
                Ok(Some(message)) => Read::Message(message),
                Ok(None) => Read::Closed,
                Err(status) => Read::Failed(status),
            },
            () = silence => Read::Silence,
        }
    }

    /// Checks an item. `Err`: the stream cannot go on.
    fn take(&mut self, gathered: &mut Gathered, message: K::Request) -> Result<(), Status> {
        let opened = self.open.as_ref().expect("the first message has opened it");
        let (sequence, item) = match K::step(message) {
            Step::Item(sequence, item) => (sequence, item),
            Step::Start(_) => return Err(self.misused("start", "is the first message only")),
            Step::Nothing => return Err(self.misused("item", "is required")),
        };
        if sequence <= opened.sequence || i64::try_from(sequence).is_err() {
            let rule = format!("{sequence} does not ascend: it follows {}", opened.sequence);
            return Err(self.misused("item.sequence", &rule));
        }
        let service = &self.parts.service;
        let checked = access::call(&service.apps(), &self.parts.caller, &opened.app_id).and_then(|mut call| {
            let app_id = K::app_id(&item);
            if !app_id.is_empty() && !call.is_for(app_id) {
                call.violations().add("app_id", "is another app than the import's");
            }
            K::check(service, call, item)
        });
        match checked {
            Ok(item) => {
                gathered.items.push(item);
                gathered.sequences.push(sequence);
            }
            Err(error) => gathered.refused.push(refused(sequence, &self.status(&error.into()))),
        }
        self.open.as_mut().expect("as above").sequence = sequence;
        Ok(())
    }

    async fn write(&mut self, gathered: Gathered) -> Result<proto::ImportProgress, ApiError> {
        let Parts { service, keys, caller, .. } = &mut self.parts;
        *caller = keys.refresh(caller, service.runtime().now())?;
        if !caller.has(Scope::Register) {
            return Err(AuthError::ScopeMissing(Scope::Register).into());
        }
        let opened = self.open.as_ref().expect("only an open import has items");
        let Gathered { items, sequences, mut refused, .. } = gathered;
        let outcomes = service.import(&opened.import, items, opened.sequence).await?;
        for (sequence, outcome) in sequences.into_iter().zip(outcomes) {
            match outcome {
                Ok(true) => self.totals.applied += 1,
                Ok(false) => self.totals.unchanged += 1,
                Err(error) => {
                    refused.push(self::refused(sequence, &status::status(&error.into(), service.runtime())));
                }
            }
        }
        refused.sort_unstable_by_key(|refused| refused.sequence);
        self.totals.refused_count += refused.len() as u64;
        // One that begins again, from before, never goes back.
        self.totals.acknowledged_up_to = self.totals.acknowledged_up_to.max(opened.sequence);
        Ok(proto::ImportProgress { refused, ..self.totals.clone() })
    }
}

/// The reason and the fields of a refusal, bounded.
fn refused(sequence: u64, status: &Status) -> proto::import_progress::Refused {
    const MOST: usize = 8;
    let (reason, violations) = status::reason_and_violations(status);
    let violations = violations
        .into_iter()
        .take(MOST)
        .map(|Violation { field, description }| proto::import_progress::refused::Violation { field, description })
        .collect();
    proto::import_progress::Refused { sequence, reason, violations }
}

/// ImportDevices.
pub struct Devices;

impl Kind for Devices {
    const KIND: ImportKind = ImportKind::Devices;
    type Request = proto::ImportDevicesRequest;
    type Response = proto::ImportDevicesResponse;
    type Item = (proto::RegisterDeviceRequest, Option<prost_types::Timestamp>);

    fn step(request: Self::Request) -> Step<Self::Item> {
        use proto::import_devices_request::Message as One;
        match request.message {
            Some(One::Start(start)) => Step::Start(start),
            Some(One::Item(item)) => Step::Item(item.sequence, (item.device.unwrap_or_default(), item.created_at)),
            None => Step::Nothing,
        }
    }

    fn check(service: &Service, mut call: Call<'_>, (device, created_at): Self::Item) -> Result<Item, ServiceError> {
        let created_at = convert::created_at(call.violations(), created_at);
        let input = convert::register_device(call.violations(), device);
        service.import_device(call, input, created_at)
    }

    fn app_id(item: &Self::Item) -> &str {
        &item.0.app_id
    }

    fn response(progress: proto::ImportProgress) -> Self::Response {
        proto::ImportDevicesResponse { progress: Some(progress) }
    }
}

/// ImportOptIns.
pub struct OptIns;

impl Kind for OptIns {
    const KIND: ImportKind = ImportKind::OptIns;
    type Request = proto::ImportOptInsRequest;
    type Response = proto::ImportOptInsResponse;
    type Item = proto::SetOptInRequest;

    fn step(request: Self::Request) -> Step<Self::Item> {
        use proto::import_opt_ins_request::Message as One;
        match request.message {
            Some(One::Start(start)) => Step::Start(start),
            Some(One::Item(item)) => Step::Item(item.sequence, item.opt_in.unwrap_or_default()),
            None => Step::Nothing,
        }
    }

    fn check(service: &Service, mut call: Call<'_>, item: Self::Item) -> Result<Item, ServiceError> {
        let input = convert::set_opt_in(call.violations(), item);
        service.import_opt_in(call, input)
    }

    fn app_id(item: &Self::Item) -> &str {
        &item.app_id
    }

    fn response(progress: proto::ImportProgress) -> Self::Response {
        proto::ImportOptInsResponse { progress: Some(progress) }
    }
}

/// ImportSubscriptions.
pub struct Subscriptions;

impl Kind for Subscriptions {
    const KIND: ImportKind = ImportKind::Subscriptions;
    type Request = proto::ImportSubscriptionsRequest;
    type Response = proto::ImportSubscriptionsResponse;
    type Item = (proto::SubscribeRequest, bool);

    fn step(request: Self::Request) -> Step<Self::Item> {
        use proto::import_subscriptions_request::Message as One;
        match request.message {
            Some(One::Start(start)) => Step::Start(start),
            Some(One::Item(item)) => {
                Step::Item(item.sequence, (item.subscription.unwrap_or_default(), item.active.unwrap_or(true)))
            }
            None => Step::Nothing,
        }
    }

    fn check(service: &Service, mut call: Call<'_>, (item, active): Self::Item) -> Result<Item, ServiceError> {
        let proto::SubscribeRequest { user_id, topic, observed_at, .. } = item;
        let input = convert::set_subscription(call.violations(), user_id, topic, active, observed_at);
        service.import_subscription(call, &input)
    }

    fn app_id(item: &Self::Item) -> &str {
        &item.0.app_id
    }

    fn response(progress: proto::ImportProgress) -> Self::Response {
        proto::ImportSubscriptionsResponse { progress: Some(progress) }
    }
}
