//! The three RPCs, as one kind of target for rows.

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::api::proto::push_service_client::PushServiceClient;
use crate::api::proto::{
    self, ImportDevicesRequest, ImportDevicesResponse, ImportOptInsRequest, ImportOptInsResponse, ImportProgress,
    ImportStart, ImportSubscriptionsRequest, ImportSubscriptionsResponse,
};
use crate::commands::client::Connection;
use crate::domain::violation::Violation;

use super::rows::Row;

pub trait Target {
    const COLUMNS: &'static [&'static str];
    type Request: Send + 'static;
    type Response;

    fn start(start: ImportStart) -> Self::Request;
    fn item(sequence: u64, row: Row) -> Result<Self::Request, Vec<Violation>>;
    async fn open(
        client: &mut PushServiceClient<Connection>,
        requests: ReceiverStream<Self::Request>,
    ) -> Result<Streaming<Self::Response>, Status>;
    fn progress(response: Self::Response) -> ImportProgress;
}

pub struct Devices;

impl Target for Devices {
    const COLUMNS: &'static [&'static str] = &[
        "user_id",
        "platform",
        "token",
        "kind",
        "credential",
        "apns_environment",
        "apns_topic",
        "installation_id",
        "device_id",
        "locale",
        "time_zone",
        "app_version",
        "os_version",
        "permission",
        "labels",
        "observed_at",
        "created_at",
    ];
    type Request = ImportDevicesRequest;
    type Response = ImportDevicesResponse;

    fn start(start: ImportStart) -> Self::Request {
        ImportDevicesRequest { message: Some(proto::import_devices_request::Message::Start(start)) }
    }

    fn item(sequence: u64, mut row: Row) -> Result<Self::Request, Vec<Violation>> {
        use proto::device::{ApnsEnvironment, Kind, Permission, Platform};
        let device = proto::RegisterDeviceRequest {
            app_id: String::new(),
            user_id: row.text("user_id"),
            platform: row.choice("platform", |name| {
                // What FCM was called, and still is in many a table.
                Platform::from_str_name(if name == "GCM" { "FCM" } else { name })
            }),
            token: row.text("token"),
            kind: row.choice("kind", Kind::from_str_name),
            credential: row.text("credential"),
            apns_environment: row.choice("apns_environment", ApnsEnvironment::from_str_name),
            apns_topic: row.text("apns_topic"),
            installation_id: row.text("installation_id"),
            device_id: row.text("device_id"),
            locale: row.text("locale"),
            time_zone: row.text("time_zone"),
            app_version: row.text("app_version"),
            os_version: row.text("os_version"),
            permission: row.choice("permission", Permission::from_str_name),
            labels: row.labels("labels"),
            observed_at: row.observed_at(),
        };
        let item = proto::ImportedDevice { sequence, device: Some(device), created_at: row.time("created_at") };
        row.finish(ImportDevicesRequest { message: Some(proto::import_devices_request::Message::Item(item)) })
    }

    async fn open(
        client: &mut PushServiceClient<Connection>,
        requests: ReceiverStream<Self::Request>,
    ) -> Result<Streaming<Self::Response>, Status> {
        client.import_devices(requests).await.map(tonic::Response::into_inner)
    }

    fn progress(response: Self::Response) -> ImportProgress {
        response.progress.unwrap_or_default()
    }
}

pub struct OptIns;

impl Target for OptIns {
    const COLUMNS: &'static [&'static str] =
        &["user_id", "event_type", "device_id", "opted_in", "source", "policy_version", "evidence", "observed_at"];
    type Request = ImportOptInsRequest;
    type Response = ImportOptInsResponse;

    fn start(start: ImportStart) -> Self::Request {
        ImportOptInsRequest { message: Some(proto::import_opt_ins_request::Message::Start(start)) }
    }

    fn item(sequence: u64, mut row: Row) -> Result<Self::Request, Vec<Violation>> {
        let choice = proto::SetOptInRequest {
            app_id: String::new(),
            user_id: row.text("user_id"),
            event_type: row.optional_text("event_type").filter(|name| name != "*"),
            device_id: row.text("device_id"),
            opted_in: row.flag("opted_in"),
            source: row.text("source"),
            policy_version: row.text("policy_version"),
            evidence: row.text("evidence"),
            observed_at: row.observed_at(),
        };
        let item = proto::ImportedOptIn { sequence, opt_in: Some(choice) };
        row.finish(ImportOptInsRequest { message: Some(proto::import_opt_ins_request::Message::Item(item)) })
    }

    async fn open(
        client: &mut PushServiceClient<Connection>,
        requests: ReceiverStream<Self::Request>,
    ) -> Result<Streaming<Self::Response>, Status> {
        client.import_opt_ins(requests).await.map(tonic::Response::into_inner)
    }

    fn progress(response: Self::Response) -> ImportProgress {
        response.progress.unwrap_or_default()
    }
}

pub struct Subscriptions;

impl Target for Subscriptions {
    const COLUMNS: &'static [&'static str] = &["user_id", "topic", "active", "observed_at"];
    type Request = ImportSubscriptionsRequest;
    type Response = ImportSubscriptionsResponse;

    fn start(start: ImportStart) -> Self::Request {
        ImportSubscriptionsRequest { message: Some(proto::import_subscriptions_request::Message::Start(start)) }
    }

    fn item(sequence: u64, mut row: Row) -> Result<Self::Request, Vec<Violation>> {
        let subscription = proto::SubscribeRequest {
            app_id: String::new(),
            user_id: row.text("user_id"),
            topic: row.text("topic"),
            observed_at: row.observed_at(),
        };
        let active = row.flag("active");
        let item = proto::ImportedSubscription { sequence, subscription: Some(subscription), active };
        row.finish(ImportSubscriptionsRequest {
            message: Some(proto::import_subscriptions_request::Message::Item(item)),
        })
    }

    async fn open(
        client: &mut PushServiceClient<Connection>,
        requests: ReceiverStream<Self::Request>,
    ) -> Result<Streaming<Self::Response>, Status> {
        client.import_subscriptions(requests).await.map(tonic::Response::into_inner)
    }

    fn progress(response: Self::Response) -> ImportProgress {
        response.progress.unwrap_or_default()
    }
}
