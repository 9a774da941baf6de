//! The backend of the story: a plain gRPC client.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::api::proto::content::Texts;
use crate::api::proto::push_service_client::PushServiceClient;
use crate::api::proto::{
    Content, Delivery, ExplainDeliveryRequest, ExplainDeliveryResponse, ListDeliveriesRequest, NotifyEventRequest,
    NotifyEventResponse, RegisterDeviceRequest, RegisterDeviceResponse, SetOptInRequest, SubscribeRequest, delivery,
    device,
};
use crate::api::transport::Channel;
use crate::runtime::Runtime;

pub const APP: &str = "ifriendspet";
/// How long any delivery of the story may take; the slowest waits for FCM's Retry-After.
const PATIENCE: Duration = Duration::from_secs(45);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

#[derive(Clone)]
pub struct Backend {
    client: PushServiceClient<Channel>,
    runtime: Runtime,
}

/// Words in three languages.
pub struct Words {
    pub english: (&'static str, &'static str),
    pub korean: (&'static str, &'static str),
    pub japanese: (&'static str, &'static str),
}

impl Words {
    pub fn content(&self) -> Content {
        let texts = |(title, body): (&str, &str)| Texts {
            title: Some(title.to_owned()),
            subtitle: None,
            body: Some(body.to_owned()),
        };
        Content {
            title: Some(self.english.0.to_owned()),
            body: Some(self.english.1.to_owned()),
            sound: Some("default".to_owned()),
            localized: HashMap::from([("ko".to_owned(), texts(self.korean)), ("ja".to_owned(), texts(self.japanese))]),
            ..Content::default()
        }
    }
}

impl Backend {
    pub async fn connect(address: SocketAddr, runtime: Runtime) -> anyhow::Result<Self> {
        let client = PushServiceClient::connect(format!("http://{address}")).await.context("calling the server")?;
        Ok(Self { client, runtime })
    }

    pub async fn register(
        &self,
        user: &str,
        platform: device::Platform,
        token: &str,
        locale: &str,
    ) -> anyhow::Result<RegisterDeviceResponse> {
        let request = RegisterDeviceRequest {
            app_id: APP.to_owned(),
            user_id: user.to_owned(),
            platform: platform.into(),
            token: token.to_owned(),
            locale: locale.to_owned(),
            permission: device::Permission::Granted.into(),
            ..RegisterDeviceRequest::default()
        };
        Ok(self.client.clone().register_device(request).await?.into_inner())
    }

    pub async fn opt_in(&self, user: &str, opted_in: bool) -> anyhow::Result<()> {
        let request = SetOptInRequest {
            app_id: APP.to_owned(),
            user_id: user.to_owned(),
            opted_in: Some(opted_in),
            source: "settings-screen".to_owned(),
            policy_version: "2026-11".to_owned(),
            ..SetOptInRequest::default()
        };
        self.client.clone().set_opt_in(request).await?;
        Ok(())
    }

    pub async fn subscribe(&self, user: &str, topic: &str) -> anyhow::Result<()> {
        let request = SubscribeRequest {
            app_id: APP.to_owned(),
            user_id: user.to_owned(),
            topic: topic.to_owned(),
            ..SubscribeRequest::default()
        };
        self.client.clone().subscribe(request).await?;
        Ok(())
    }

    pub async fn notify(&self, event: NotifyEventRequest) -> anyhow::Result<NotifyEventResponse> {
        let event = NotifyEventRequest { app_id: APP.to_owned(), ..event };
        Ok(self.client.clone().notify_event(event).await?.into_inner())
    }

    pub async fn deliveries(&self, notification: &str) -> anyhow::Result<Vec<Delivery>> {
        let request = ListDeliveriesRequest {
            app_id: APP.to_owned(),
            notification_id: notification.to_owned(),
            ..ListDeliveriesRequest::default()
        };
        Ok(self.client.clone().list_deliveries(request).await?.into_inner().deliveries)
    }

    /// The deliveries, as soon as `enough` says so.
    pub async fn deliveries_when(
        &self,
        notification: &str,
        enough: impl Fn(&[Delivery]) -> bool,
    ) -> anyhow::Result<Vec<Delivery>> {
        let deadline = self.runtime.instant() + PATIENCE;
        loop {
            let deliveries = self.deliveries(notification).await?;
            if enough(&deliveries) {
                return Ok(deliveries);
            }
            if self.runtime.instant() > deadline {
                bail!("the deliveries of {notification} do not come to their end: {deliveries:?}");
            }
            self.runtime.sleep(LOOK_AGAIN).await;
        }
    }

    pub async fn explain(&self, notification: &str, user: &str) -> anyhow::Result<ExplainDeliveryResponse> {
        let request = ExplainDeliveryRequest {
            app_id: APP.to_owned(),
            notification_id: notification.to_owned(),
            user_id: user.to_owned(),
            nudged_id: String::new(),
        };
        Ok(self.client.clone().explain_delivery(request).await?.into_inner())
    }
}

/// Every delivery has ended, and there are this many.
pub fn all_ended(count: usize) -> impl Fn(&[Delivery]) -> bool {
    move |deliveries| deliveries.len() == count && deliveries.iter().all(|one| one.state() != delivery::State::Open)
}
