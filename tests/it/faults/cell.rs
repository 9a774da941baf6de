//! One cell: a fault, a platform, a moment; an app with connections of its own, and what became of it all.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nudged::api::proto::admin_service_client::AdminServiceClient;
use nudged::api::proto::device::Platform;
use nudged::api::proto::get_provider_status_response::State;
use nudged::api::proto::push_service_client::PushServiceClient;
use nudged::api::proto::{
    Content, Delivery, GetProviderStatusRequest, ListDeliveriesRequest, ListDevicesRequest, NotifyEventRequest,
    RegisterDeviceRequest, SetOptInRequest, delivery, device,
};
use nudged::sandbox::{Action, Fault, Received, Sandbox};
use tonic::transport::Channel;

use super::script::{Moment, Script, goaway, script};
use super::table::{Connection, Ending, Route, Row, Token};

/// Nothing takes longer: the longest wait is a paused credential's first probe.
const PATIENCE: Duration = Duration::from_secs(50);
const LOOK: Duration = Duration::from_millis(250);

/// Who is in a cell: whom the fault hits, those beside, the one whose push the provider answers with GOAWAY where the
/// connection is to be draining, and the one that shows which connection is used before and after.
const VICTIM: &str = "a-victim";
const BESIDE: [&str; 3] = ["b-beside", "c-beside", "d-beside"];
const TRIGGER: &str = "e-trigger";
const WITNESS: &str = "w-witness";

#[derive(Clone, Debug)]
pub struct Cell {
    pub number: usize,
    pub row: Row,
    pub moment: Moment,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let platform = if self.row.platform == Platform::Apns { "APNs" } else { "FCM" };
        write!(f, "{platform} `{}` {:?}", self.row.fault, self.moment)
    }
}

impl Cell {
    pub fn app(&self) -> String {
        format!("cell-{:03}", self.number)
    }

    pub fn script(&self) -> Script {
        script(&self.row.fault, self.row.platform)
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
            app_id: self.app(),
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

/// What the cells share.
pub struct Stage {
    pub sandbox: Sandbox,
    pub client: PushServiceClient<Channel>,
    pub admin: AdminServiceClient<Channel>,
}

/// What was found otherwise than the table says.
pub type Findings = Vec<String>;

pub async fn play(cell: Cell, stage: Arc<Stage>) -> (Cell, Findings) {
    let mut player =
        Player { client: stage.client.clone(), admin: stage.admin.clone(), stage, cell, findings: Vec::new() };
    player.play().await;
    (player.cell, player.findings)
}

struct Player {
    client: PushServiceClient<Channel>,
    admin: AdminServiceClient<Channel>,
    stage: Arc<Stage>,
    cell: Cell,
    findings: Findings,
}

impl Player {
    async fn play(&mut self) {
        let Script { door: _, answers, ttl_secs } = self.cell.script();
        let (row, moment) = (self.cell.row.clone(), self.cell.moment);
        // Rows of people ascend in this order, and a job's targets with them.
        let everybody: Vec<&str> = [VICTIM].into_iter().chain(BESIDE).chain([TRIGGER, WITNESS]).collect();
        for who in &everybody {
            self.person(who).await;
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
        let id = self.client.notify_event(event).await.unwrap().into_inner().notification_id;
        let (ended, route) = self.watch(&id).await;
        self.expect("route", &row.route, &route);
        let Some(ended) = ended else {
            self.findings.push(format!("it does not end within {} s", PATIENCE.as_secs()));
            return;
        };
        for delivery in &ended {
            self.judge(&row, delivery);
        }
        let (token, moved) = self.device().await;
        let found = if !token {
            Token::Retired
        } else if moved {
            Token::Moved
        } else {
            Token::Kept
        };
        self.expect("token", &row.token, &found);
        if row.connection == Connection::None {
            self.expect("pushes", &0, &self.pushes(VICTIM).len());
        } else {
            self.sent("after", WITNESS).await;
            let first = before.or_else(|| self.pushes(VICTIM).first().map(|push| push.connection));
            let last = self.pushes(WITNESS).last().map(|push| push.connection);
            // A draining connection is replaced in any case.
            if moment != Moment::Draining {
                let found = if first == last { Connection::Kept } else { Connection::Replaced };
                self.expect("connection", &row.connection, &found);
            }
        }
    }

    fn expect<T: PartialEq + fmt::Debug>(&mut self, what: &str, wanted: &T, found: &T) {
        if wanted != found {
            self.findings.push(format!("{what}: {found:?} instead of {wanted:?}"));
        }
    }

    async fn person(&mut self, who: &str) {
        let request = RegisterDeviceRequest {
            app_id: self.cell.app(),
            user_id: who.into(),
            platform: self.cell.row.platform.into(),
            token: self.cell.token(who),
            ..RegisterDeviceRequest::default()
        };
        self.client.register_device(request).await.unwrap();
        let choice = SetOptInRequest {
            app_id: self.cell.app(),
            user_id: who.into(),
            opted_in: Some(true),
            ..SetOptInRequest::default()
        };
        self.client.set_opt_in(choice).await.unwrap();
    }

    fn fault(&self, who: &str, action: Action) {
        self.stage.sandbox.add_fault(Fault::new(action).token(self.cell.token(who))).unwrap();
    }

    /// What the provider was handed for somebody.
    fn pushes(&self, who: &str) -> Vec<Arc<Received>> {
        let token = self.cell.token(who);
        self.stage.sandbox.received().into_iter().filter(|push| push.token == token).collect()
    }

    async fn deliveries(&mut self, id: &str) -> Vec<Delivery> {
        let request = ListDeliveriesRequest {
            app_id: self.cell.app(),
            notification_id: id.into(),
            ..ListDeliveriesRequest::default()
        };
        self.client.list_deliveries(request).await.unwrap().into_inner().deliveries
    }

    /// A push to one person, which must arrive.
    async fn sent(&mut self, key: &str, who: &str) {
        let event = self.cell.event(key, &[who], None);
        let id = self.client.notify_event(event).await.unwrap().into_inner().notification_id;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.deliveries(&id).await;
            if found.iter().any(|one| one.state() == delivery::State::Sent) {
                return;
            }
            if Instant::now() > deadline {
                self.findings.push(format!("{key}: {found:?}"));
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Until every delivery has ended; and the worst that was seen of the route meanwhile.
    async fn watch(&mut self, id: &str) -> (Option<Vec<Delivery>>, Route) {
        let deadline = Instant::now() + PATIENCE;
        let mut worst = Route::Works;
        loop {
            let request = GetProviderStatusRequest { app_id: self.cell.app() };
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
            if Instant::now() > deadline {
                return (None, worst);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The victim as the table says, everybody else sent; each with one identity at all its attempts.
    fn judge(&mut self, row: &Row, delivery: &Delivery) {
        let who = delivery.user_id.as_str();
        let pushes = self.pushes(who);
        let identities: BTreeSet<Option<&str>> = pushes.iter().map(|push| push.nudged_id.as_deref()).collect();
        let ours = [Some(delivery.nudged_id.as_str())].into_iter().collect();
        if !pushes.is_empty() && identities != ours {
            self.findings.push(format!("{who}: identities {identities:?}"));
        }
        let stands = (delivery.state(), delivery.reason.as_str());
        let sent = stands.0 == delivery::State::Sent;
        if who != VICTIM {
            // Nobody was sent anything where there is no connection.
            if sent == (row.connection == Connection::None) {
                self.findings.push(format!("{who}: {stands:?}"));
            }
            return;
        }
        let found = match stands {
            (delivery::State::Sent, _) if pushes.len() == 1 => Ending::Sent,
            (delivery::State::Sent, _) => Ending::SentAgain,
            (delivery::State::Expired, _) => Ending::Expired,
            (delivery::State::Dead, reason) => Ending::Dead(reason.to_owned()),
            other => {
                self.findings.push(format!("it ends as {other:?}"));
                return;
            }
        };
        if found != row.ending {
            let last = delivery.last_attempt.as_ref().map(|last| (last.status, last.platform_reason.clone()));
            self.findings.push(format!(
                "delivery: {found:?} instead of {:?} ({} pushes, {last:?})",
                row.ending,
                pushes.len()
            ));
        }
    }

    /// Whether the victim's device is active, and whether it is in APNs' production environment, where none was registered.
    async fn device(&mut self) -> (bool, bool) {
        let request =
            ListDevicesRequest { app_id: self.cell.app(), user_id: VICTIM.into(), ..ListDevicesRequest::default() };
        let devices = self.client.list_devices(request).await.unwrap().into_inner().devices;
        let device = devices.first().expect("it was registered");
        (device.active(), device.apns_environment() == device::ApnsEnvironment::Production)
    }
}
