//! Devices and choices: calls that send nothing.

use tonic::Status;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::Bench;
use crate::api::proto::{RegisterDeviceRequest, SetOptInRequest, device};
use crate::commands::bench::load::{self, Client};
use crate::commands::bench::people;
use crate::commands::bench::report::Budget;
use crate::commands::bench::world::APP;
use crate::domain::platform::Platform;

/// Callers at once.
const CALLERS: usize = 64;

/// As the seeder wrote it, so that a second call changes nothing.
fn registration(user: String, platform: Platform, token: String) -> RegisterDeviceRequest {
    let platform = match platform {
        Platform::Apns => device::Platform::Apns,
        Platform::Fcm => device::Platform::Fcm,
    };
    RegisterDeviceRequest {
        app_id: APP.to_owned(),
        user_id: user,
        platform: platform.into(),
        token,
        locale: "ko-KR".to_owned(),
        app_version: "3.14.0".to_owned(),
        os_version: "18.1".to_owned(),
        ..RegisterDeviceRequest::default()
    }
}

impl Bench {
    pub(super) async fn calls(&mut self, repeat: u32) -> anyhow::Result<()> {
        let (devices, count) = (self.world.plan.devices, self.world.plan.pushes);
        let salt = self.salt;

        let channel: Channel = self.world.channel().await?;
        let empty = self
            .call_row("empty call (health)", count, move |_, _| {
                let mut client = HealthClient::new(channel.clone());
                async move { client.check(HealthCheckRequest::default()).await.map(drop) }
            })
            .await?;
        let register = move |mut client: Client, at: u32| {
            let number = people::someone(devices, salt, at);
            let request = registration(people::name(number), people::platform(number), people::token(number));
            async move { client.register_device(request).await.map(drop) }
        };
        // A registration seen long ago is written anew; the second time within the hour nothing is.
        self.call_row("RegisterDevice, seen long ago", count, register).await?;
        let unchanged = self.call_row("RegisterDevice, unchanged", count, register).await?;
        let first = devices + repeat * count;
        let register_new = move |mut client: Client, at: u32| {
            let number = first + at;
            let (platform, token) = (people::platform(number), people::token(number));
            let request = registration(format!("new-{number}"), platform, token);
            async move { client.register_device(request).await.map(drop) }
        };
        let new = self.call_row("RegisterDevice, new", count, register_new).await?;
        let set = move |mut client: Client, at: u32| {
            let request = SetOptInRequest {
                app_id: APP.to_owned(),
                user_id: people::name(people::someone(devices, salt, at)),
                event_type: Some("friend.joined".to_owned()),
                opted_in: Some(at.is_multiple_of(2)),
                source: "settings-screen".to_owned(),
                ..SetOptInRequest::default()
            };
            async move { client.set_opt_in(request).await.map(drop) }
        };
        let choice = self.call_row("SetOptIn", count, set).await?;
        for (name, cost, goal) in [
            ("RegisterDevice, unchanged, beyond an empty call", unchanged, 5.0),
            ("RegisterDevice, new, beyond an empty call", new, 20.0),
            ("SetOptIn, beyond an empty call", choice, 15.0),
        ] {
            self.report.fact(name, "us CPU", &[("", cost - empty)], "", Budget::goal(goal));
        }
        Ok(())
    }

    async fn call_row<F, Called>(&mut self, name: &str, count: u32, call: F) -> anyhow::Result<f64>
    where
        F: Fn(Client, u32) -> Called + Clone + Send + 'static,
        Called: Future<Output = Result<(), Status>> + Send,
    {
        let clients = self.clients(CALLERS).await?;
        let runtime = self.world.runtime.clone();
        let mark = self.mark()?;
        let latencies = load::calls(&runtime, &clients, CALLERS, count, call).await?;
        let sample = self.since(&mark, u64::from(count))?.answered(&latencies);
        drop(mark);
        let cost = sample.cost();
        self.report.sample(name, Budget::default(), sample);
        Ok(cost)
    }
}
