//! `nudged check --live`: tries every credential at its platform, with what serves real pushes.
//!
//! One push each, to a token that cannot be a device's: a platform that takes the credential refuses the token, one that
//! does not says so before it looks. Nothing can be shown anywhere.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc;

use super::Findings;
use super::files::section;
use crate::app::senders::{CredentialError, apns_settings, fcm_settings};
use crate::config::{ApnsEnvironment, Config, Origin};
use crate::domain::deny::DenyFeed;
use crate::domain::ids::{AppKey, DeviceId, NotificationId, RouteId, UserKey};
use crate::domain::platform::{DeviceToken, Environment, Lane, Platform, Route, RouteSpec};
use crate::domain::sending::{Priority, SendOptions, SendOutcome};
use crate::runtime::Runtime;
use crate::senders::apns::ApnsSender;
use crate::senders::fcm::FcmSender;
use crate::senders::http2::SendingThreads;
use crate::senders::{Batch, EXAMPLE_ID, Message, SendTarget, Sender, Sink};

/// No device's token, but shaped like one: Apple's order of checks is not documented, and a token that is no token at all
/// might be refused before the credential is looked at.
const NO_APNS_TOKEN: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Google looks at the credential first.
const NO_FCM_TOKEN: &str = "nudged-check";
/// For one credential, connection and access token included.
const PATIENCE: Duration = Duration::from_secs(30);

/// Tries them one after the other; what is wrong goes to the findings, what is right to the returned lines.
pub(super) async fn credentials(
    config: &Config,
    runtime: &Runtime,
    findings: &mut Findings,
) -> anyhow::Result<Vec<String>> {
    let threads = SendingThreads::new(runtime, 1).context("starting a sending thread")?;
    let deny = Arc::new(DenyFeed::default());
    let mut fine = Vec::new();
    for (id, app) in &config.apps {
        for (name, credential) in &app.apns {
            let spec = RouteSpec {
                app: AppKey(1),
                platform: Platform::Apns,
                credential: name.as_str().into(),
                environment: match credential.environment {
                    ApnsEnvironment::Production => Environment::Production,
                    ApnsEnvironment::Sandbox => Environment::Sandbox,
                },
                bundle: credential.topics.first().map_or("", String::as_str).into(),
            };
            let sender = apns_settings(credential, &config.delivery)
                .and_then(|settings| Ok(ApnsSender::new(runtime, &threads, &deny, &settings)?));
            let place = section(id.as_str(), "apns", name);
            judge(runtime, &deny, &place, sender, spec, findings, &mut fine).await;
        }
        for (name, credential) in &app.fcm {
            let spec = RouteSpec {
                app: AppKey(1),
                platform: Platform::Fcm,
                credential: name.as_str().into(),
                environment: Environment::None,
                bundle: "".into(),
            };
            let sender = fcm_settings(credential, &config.delivery)
                .and_then(|settings| Ok(FcmSender::new(runtime, &threads, &deny, &settings)?));
            let place = section(id.as_str(), "fcm", name);
            judge(runtime, &deny, &place, sender, spec, findings, &mut fine).await;
        }
    }
    threads.shutdown().await;
    Ok(fine)
}

async fn judge(
    runtime: &Runtime,
    deny: &DenyFeed,
    place: &str,
    sender: Result<impl Sender, CredentialError>,
    spec: RouteSpec,
    findings: &mut Findings,
    fine: &mut Vec<String>,
) {
    // What is wrong with the files has been said already.
    let Ok(sender) = sender else { return };
    let outcome = runtime.timeout(PATIENCE, probe(runtime, deny, &sender, spec)).await;
    sender.drain(Duration::ZERO).await;
    let mut wrong = |wrong: String, remedy: &str| findings.error(place, Origin::Unset, wrong, remedy);
    match outcome {
        None => {
            wrong(format!("did not answer within {} s", PATIENCE.as_secs()), "look at the network and the endpoint");
        }
        Some(Err(why)) => wrong(format!("could not be tried: {why}"), "look at the section's keys"),
        Some(Ok(SendOutcome::SenderBroken { answer, .. })) => wrong(
            format!("the platform refuses it: {answer}"),
            "compare key, ids, topic, environment and project with the platform's console, or make a new key there",
        ),
        Some(Ok(SendOutcome::RetryLater { answer, .. } | SendOutcome::MaybeSent { answer })) => wrong(
            format!("could not be tried: {answer}"),
            "look at the network, the endpoint and its CA; try again later",
        ),
        Some(Ok(SendOutcome::Held | SendOutcome::NotAttempted)) => {
            wrong("could not be tried".to_owned(), "try again");
        }
        Some(Ok(SendOutcome::TokenGone { answer, .. } | SendOutcome::Rejected { answer })) => {
            fine.push(format!(
                "{place}: the platform takes the credential (it answered {answer} to a token that is none)"
            ));
        }
        Some(Ok(SendOutcome::Sent { .. })) => {
            fine.push(format!("{place}: the platform takes the credential, and took a token that is none"));
        }
    }
}

/// One push that cannot arrive. `Err`: it did not come to that.
async fn probe(
    runtime: &Runtime,
    deny: &DenyFeed,
    sender: &impl Sender,
    spec: RouteSpec,
) -> Result<SendOutcome, String> {
    let token = match spec.platform {
        Platform::Apns => NO_APNS_TOKEN,
        Platform::Fcm => NO_FCM_TOKEN,
    };
    let route = Route { id: RouteId(1), spec };
    let expires_at = runtime.now().plus(PATIENCE);
    let options = SendOptions { priority: Priority::Normal, collapse_key: None, expires_at, push_id: true };
    let message = Message { title: Some("nudged check".to_owned()), ..Message::default() };
    let encoded = sender.encode(&route, &message, &options).map_err(|error| error.to_string())?;
    let (outcomes, mut answers) = mpsc::unbounded_channel();
    let batch = Batch {
        route: Arc::new(route),
        lane: Lane::Interactive,
        notification: NotificationId(1),
        encoded: vec![encoded],
        targets: vec![SendTarget {
            index: 0,
            user: UserKey(1),
            device: DeviceId(1),
            token: DeviceToken::trusted(token),
            nudged_id: EXAMPLE_ID,
            variant: 0,
        }],
        expires_at,
        gated: deny.position(),
        gated_at: runtime.instant().into_std(),
        sink: Sink { ticket: 1, outcomes },
    };
    sender.submit(batch).map_err(|_| "the sender takes nothing".to_owned())?;
    let answer = answers.recv().await.and_then(|outcomes| outcomes.results.into_iter().next());
    answer.map(|(_, outcome)| outcome).ok_or_else(|| "the sender gave no answer".to_owned())
}
