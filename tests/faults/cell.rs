//! One cell: a fault, a platform, a moment; an app with connections of its own, and what became of it all.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::device::Platform;
use nudged::api::proto::get_provider_status_response::State;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{
    Content, Delivery, GetProviderStatusRequest, ListDeliveriesRequest, ListDevicesRequest, NotifyEventRequest,
    RegisterDeviceRequest, SetOptInRequest, delivery, device,
};
use nudged::domain::time::UnixMs;
use nudged::runtime::{Instant, Runtime};
use nudged::sandbox::{Action, Fault, Pipes, Received, Sandbox, Target};
use tonic::transport::Channel;

use super::script::{Door, Moment, Script, goaway, script};
use super::table::{Connection, Ending, Route, Row, Token};

/// The first look at what became of a delivery comes so long after it was asked for; the others later and later.
const FIRST_LOOK: Duration = Duration::from_millis(250);

/// Who is in a cell: whom the fault hits, those beside, the one whose push the provider answers with GOAWAY where the
/// connection is to be draining, and the one that shows which connection is used before and after.
const VICTIM: &str = "a-victim";
const BESIDE: [&str; 3] = ["b-beside", "c-beside", "d-beside"];
const TRIGGER: &str = "e-trigger";
const WITNESS: &str = "w-witness";

#[derive(Clone, Debug)]
pub struct Cell {
    pub number: usize,
    /// The app that it has for itself.
    pub app: String,
    pub row: Row,
    pub moment: Moment,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}` {:?}", self.row.platform_name(), self.row.fault, self.moment)
    }
}

impl Cell {
    pub fn door(&self) -> Door {
        self.script(UnixMs(0)).door
    }

    pub fn script(&self, now: UnixMs) -> Script {
        script(&self.row.fault, self.row.platform, now)
    }

    fn token(&self, who: &str) -> String {
        let who = u64::from(who.as_bytes()[0]);
        match self.row.platform {
            Platform::Fcm => format!("c{:05}x{who:03}:APA91bExampleExampleExample", self.number),
            _ => format!("{:08x}{who:056x}", self.number),
        }
    }

    fn event(&self, key: &str, users: &[&str], ttl_secs: Option<i64>) -> NotifyEventRequest {
        NotifyEventRequest {
            app_id: self.app.clone(),
            event_type: "comment.created".into(),
            idempotency_key: key.into(),
            user_ids: users.iter().map(|user| (*user).to_owned()).collect(),
            content: Some(Content {
                title: Some("새 댓글".into()),
                body: Some("귀여워요".into()),
                ..Content::default()
            }),
            ttl: ttl_secs.map(|seconds| prost_types::Duration { seconds, nanos: 0 }),
            ..NotifyEventRequest::default()
        }
    }
}

/// The fake providers, over whatever they are reached.
pub trait Providers: Send + Sync {
    fn fault(&self, fault: Fault);
    fn received(&self) -> Vec<Arc<Received>>;
}

impl Providers for Sandbox {
    fn fault(&self, fault: Fault) {
        self.add_fault(fault).unwrap();
    }

    fn received(&self) -> Vec<Arc<Received>> {
        self.received()
    }
}

impl Providers for Pipes {
    fn fault(&self, fault: Fault) {
        self.add_fault(fault).unwrap();
    }

    fn received(&self) -> Vec<Arc<Received>> {
        self.received()
    }
}

/// The least that is waited after an answer, as the documents promise it.
#[derive(Clone, Copy)]
pub struct Floors {
    /// After a 5xx of APNs.
    pub apns_error: Duration,
    /// … and of FCM.
    pub fcm_error: Duration,
    /// After a 429.
    pub throttled: Duration,
}

impl Floors {
    /// What the provider asks for itself takes their place. Its dates have whole seconds.
    fn after(&self, row: &Row, status: u16) -> Duration {
        let hint = row.fault.split_once("; Retry-After: ").map(|(_, hint)| hint.parse().unwrap_or(1));
        match (status, hint, row.platform) {
            (429 | 500.., Some(secs), _) => Duration::from_secs(secs),
            (429, None, _) => self.throttled,
            (500.., None, Platform::Fcm) => self.fcm_error,
            (500.., None, _) => self.apns_error,
            _ => Duration::ZERO,
        }
    }
}

/// Where cells are played.
pub struct Stage {
    pub providers: Arc<dyn Providers>,
    pub client: PushServiceClient<Channel>,
    pub admin: AdminServiceClient<Channel>,
    /// Whose clock it is.
    pub runtime: Runtime,
    /// Longer than the longest wait that nudged is configured with.
    pub patience: Duration,
    pub floors: Floors,
    /// In the first minute. Shorter than the shortest pause of a route, which is to be seen.
    pub slowest_look: Duration,
}

/// What became of a cell. Nothing that was not come to is known.
#[derive(Default)]
pub struct Found {
    pub ending: Option<Ending>,
    pub token: Option<Token>,
    pub route: Option<Route>,
    pub connection: Option<Connection>,
    /// From the event to its end.
    pub took: Duration,
    /// What is otherwise than the table says.
    pub wrong: Vec<String>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn word(known: Option<&impl fmt::Display>) -> String {
            known.map_or_else(|| "-".to_owned(), ToString::to_string)
        }
        let Self { ending, token, route, connection, took, wrong } = self;
        let (ending, token, route) = (word(ending.as_ref()), word(token.as_ref()), word(route.as_ref()));
        let connection = word(connection.as_ref());
        write!(f, "{ending} | {token} | {route} | {connection} | {:.1} s", took.as_secs_f64())?;
        if wrong.is_empty() { Ok(()) } else { write!(f, " | {}", wrong.join("; ")) }
    }
}

pub async fn play(cell: Cell, stage: Arc<Stage>) -> (Cell, Found) {
    let (client, admin) = (stage.client.clone(), stage.admin.clone());
    let mut player = Player { client, admin, stage, cell, found: Found::default() };
    player.play().await;
    (player.cell, player.found)
}

struct Player {
    client: PushServiceClient<Channel>,
    admin: AdminServiceClient<Channel>,
    stage: Arc<Stage>,
    cell: Cell,
    found: Found,
}

impl Player {
    async fn play(&mut self) {
        let Script { door: _, answers, token_endpoint, ttl_secs } = self.cell.script(self.stage.runtime.now());
        let (row, moment) = (self.cell.row.clone(), self.cell.moment);
        // Rows of people ascend in this order, and a job's targets with them.
        let everybody: Vec<&str> = [VICTIM].into_iter().chain(BESIDE).chain([TRIGGER, WITNESS]).collect();
        for who in &everybody {
            self.person(who).await;
        }
        for action in token_endpoint {
            // The first token is fetched before anything can be refused.
            self.stage.providers.fault(Fault::new(action).on(Target::Oauth).skip(1));
        }
        let mut before = None;
        if moment != Moment::First {
            self.sent("warm", WITNESS).await;
            before = self.pushes(WITNESS).first().map(|push| push.connection);
        }
        for action in answers {
            self.fault(VICTIM, action);
        }
        let mut users: Vec<&str> = [VICTIM].into_iter().chain(BESIDE).collect();
        if moment == Moment::Draining {
            self.fault(TRIGGER, goaway(false, false));
            users.push(TRIGGER);
        }
        let event = self.cell.event("hit", &users, ttl_secs);
        let begun = self.stage.runtime.instant();
        let id = self.client.notify_event(event).await.unwrap().into_inner().notification_id;
        let (ended, route) = self.watch(&id).await;
        self.found.took = self.stage.runtime.instant() - begun;
        self.expect("route", &row.route, &route);
        self.found.route = Some(route);
        let Some(ended) = ended else {
            self.wrong(format!("it does not end within {} s", self.stage.patience.as_secs()));
            return;
        };
        if ended.len() != users.len() {
            self.wrong(format!("{} deliveries instead of {}", ended.len(), users.len()));
        }
        for delivery in &ended {
            self.judge(&row, delivery);
        }
        let (is_active, is_moved) = self.device().await;
        let token = match (is_active, is_moved) {
            (false, _) => Token::Retired,
            (true, true) => Token::Moved,
            (true, false) => Token::Kept,
        };
        self.expect("token", &row.token, &token);
        self.found.token = Some(token);
        self.connection(&row, before).await;
    }

    /// Which of its connections a platform is sent to before and after, told by their numbers.
    async fn connection(&mut self, row: &Row, before: Option<u64>) {
        let connection = if row.connection == Connection::None {
            self.expect("pushes", &0, &self.pushes(VICTIM).len());
            Connection::None
        } else {
            self.sent("after", WITNESS).await;
            let first = before.or_else(|| self.pushes(VICTIM).first().map(|push| push.connection));
            let last = self.pushes(WITNESS).last().map(|push| push.connection);
            if first == last { Connection::Kept } else { Connection::Replaced }
        };
        // A draining one is replaced in any case.
        if self.cell.moment != Moment::Draining {
            self.expect("connection", &row.connection, &connection);
            self.found.connection = Some(connection);
        }
    }

    fn wrong(&mut self, what: String) {
        self.found.wrong.push(what);
    }

    fn expect<T: PartialEq + fmt::Display>(&mut self, what: &str, wanted: &T, found: &T) {
        if wanted != found {
            self.wrong(format!("{what}: {found} instead of {wanted}"));
        }
    }

    async fn person(&mut self, who: &str) {
        // The one that a token can be found to be of the other of.
        let environment = match self.cell.row.platform {
            Platform::Apns => device::ApnsEnvironment::Sandbox,
            _ => device::ApnsEnvironment::Unspecified,
        };
        let request = RegisterDeviceRequest {
            app_id: self.cell.app.clone(),
            user_id: who.into(),
            platform: self.cell.row.platform.into(),
            token: self.cell.token(who),
            apns_environment: environment.into(),
            ..RegisterDeviceRequest::default()
        };
        self.client.register_device(request).await.unwrap();
        let choice = SetOptInRequest {
            app_id: self.cell.app.clone(),
            user_id: who.into(),
            opted_in: Some(true),
            ..SetOptInRequest::default()
        };
        self.client.set_opt_in(choice).await.unwrap();
    }

    fn fault(&self, who: &str, action: Action) {
        self.stage.providers.fault(Fault::new(action).token(self.cell.token(who)));
    }

    /// What the provider was handed for somebody.
    fn pushes(&self, who: &str) -> Vec<Arc<Received>> {
        let token = self.cell.token(who);
        self.stage.providers.received().into_iter().filter(|push| push.token == token).collect()
    }

    async fn deliveries(&mut self, id: &str) -> Vec<Delivery> {
        let request = ListDeliveriesRequest {
            app_id: self.cell.app.clone(),
            notification_id: id.into(),
            ..ListDeliveriesRequest::default()
        };
        self.client.list_deliveries(request).await.unwrap().into_inner().deliveries
    }

    /// A push to one person, which must arrive.
    async fn sent(&mut self, key: &str, who: &str) {
        let event = self.cell.event(key, &[who], None);
        let id = self.client.notify_event(event).await.unwrap().into_inner().notification_id;
        let mut looks = Looks::new(&self.stage);
        loop {
            let found = self.deliveries(&id).await;
            if found.iter().any(|one| one.state() == delivery::State::Sent) {
                return;
            }
            if !looks.next(&self.stage).await {
                self.wrong(format!("{key}: {found:?}"));
                return;
            }
        }
    }

    /// Until every delivery has ended; and the worst that was seen of the route meanwhile.
    async fn watch(&mut self, id: &str) -> (Option<Vec<Delivery>>, Route) {
        let mut looks = Looks::new(&self.stage);
        let mut worst = Route::Works;
        loop {
            let request = GetProviderStatusRequest { app_id: self.cell.app.clone() };
            for route in self.admin.get_provider_status(request).await.unwrap().into_inner().routes {
                match route.state() {
                    State::Paused => worst = Route::Paused,
                    State::Slowed if worst == Route::Works => worst = Route::Slowed,
                    _ => {}
                }
            }
            let found = self.deliveries(id).await;
            if !found.is_empty() && found.iter().all(|one| one.state() != delivery::State::Open) {
                return (Some(found), worst);
            }
            if !looks.next(&self.stage).await {
                return (None, worst);
            }
        }
    }

    /// The victim as the table says, everybody else sent; each with one identity at all its attempts.
    fn judge(&mut self, row: &Row, delivery: &Delivery) {
        let who = delivery.user_id.as_str();
        let pushes = self.pushes(who);
        let identities: BTreeSet<Option<&str>> = pushes.iter().map(|push| push.nudged_id.as_deref()).collect();
        let ours = [Some(delivery.nudged_id.as_str())].into_iter().collect();
        if !pushes.is_empty() && identities != ours {
            self.wrong(format!("{who}: identities {identities:?}"));
        }
        let stands = (delivery.state(), delivery.reason.as_str());
        let sent = stands.0 == delivery::State::Sent;
        if who != VICTIM {
            // Nobody was sent anything where there is no connection.
            if sent == (row.connection == Connection::None) {
                self.wrong(format!("{who}: {stands:?}"));
            }
            return;
        }
        for (push, next) in pushes.iter().zip(pushes.iter().skip(1)) {
            let floor = self.stage.floors.after(row, push.status);
            let waited = next.at.since(push.at);
            if waited < floor {
                self.wrong(format!("tried again {waited:?} after a {}, not {floor:?}", push.status));
            }
        }
        let found = match stands {
            (delivery::State::Sent, _) if pushes.len() == 1 => Ending::Sent,
            (delivery::State::Sent, _) => Ending::SentAgain,
            (delivery::State::Expired, _) => Ending::Expired,
            (delivery::State::Dead, reason) => Ending::Dead(reason.to_owned()),
            other => {
                self.wrong(format!("it ends as {other:?}"));
                return;
            }
        };
        if found != row.ending {
            let last = delivery.last_attempt.as_ref().map(|last| (last.status, last.platform_reason.clone()));
            let pushes = pushes.len();
            self.wrong(format!("delivery: {found} instead of {} ({pushes} pushes, {last:?})", row.ending));
        }
        self.found.ending = Some(found);
    }

    /// Whether the victim's device is active, and whether it is in APNs' production environment, where none was registered.
    async fn device(&mut self) -> (bool, bool) {
        let request = ListDevicesRequest {
            app_id: self.cell.app.clone(),
            user_id: VICTIM.into(),
            ..ListDevicesRequest::default()
        };
        let devices = self.client.list_devices(request).await.unwrap().into_inner().devices;
        let device = devices.first().expect("it was registered");
        (device.active(), device.apns_environment() == device::ApnsEnvironment::Production)
    }
}

/// When to look again: soon at first, when most has ended and what a route does passes quickly; later and later where it is a
/// quarter of an hour until something happens.
struct Looks {
    begun: Instant,
    wait: Duration,
}

impl Looks {
    fn new(stage: &Stage) -> Self {
        Self { begun: stage.runtime.instant(), wait: FIRST_LOOK }
    }

    /// False when it has been too long.
    async fn next(&mut self, stage: &Stage) -> bool {
        stage.runtime.sleep(self.wait).await;
        let waited = stage.runtime.instant() - self.begun;
        self.wait = (self.wait * 5 / 4).min(stage.slowest_look.max(waited / 16));
        waited < stage.patience
    }
}
