//! RegisterDevice, UnregisterDevice, ListDevices.

use std::collections::BTreeMap;

use crate::domain::device::{Device, DeviceDetails, DeviceRef, MAX_TEXT_BYTES, Registered, Registration};
use crate::domain::ids::{DeviceId, Locale, RouteId};
use crate::domain::platform::{DeviceKind, DeviceToken, Environment, Permission, Platform};
use crate::domain::time::UnixMs;
use crate::domain::violation::Violations;

use super::apps::{App, DEFAULT_CREDENTIAL};
use super::page_token::PageScope;
use super::{Call, Result, Service, ServiceError, fields};

pub const DEFAULT_PAGE: usize = 50;
pub const MAX_PAGE: usize = 200;

/// Texts as they arrived; empty means absent.
pub struct RegisterDevice {
    pub user_id: String,
    pub platform: Option<Platform>,
    pub token: String,
    pub kind: DeviceKind,
    pub credential: String,
    pub environment: Option<Environment>,
    pub apns_topic: String,
    pub installation_id: String,
    pub device_id: String,
    pub locale: String,
    pub time_zone: String,
    pub app_version: String,
    pub os_version: String,
    pub permission: Permission,
    pub labels: BTreeMap<String, String>,
    pub observed_at: Option<UnixMs>,
}

/// Either `device_id`, or `platform` and `token`.
pub struct UnregisterDevice {
    pub user_id: String,
    pub device_id: String,
    pub platform: Option<Platform>,
    pub token: String,
    pub observed_at: Option<UnixMs>,
}

pub struct ListDevices {
    pub user_id: String,
    pub page_size: i32,
    pub page_token: String,
}

impl Service {
    pub async fn register_device(&self, call: Call<'_>, input: RegisterDevice) -> Result<Registered> {
        let now = self.runtime.now();
        let registration = registration(call, input, now)?;
        self.store.register_device(registration, now).await.map_err(|error| self.refused(error))
    }

    /// Whether an active device was retired.
    pub async fn unregister_device(&self, mut call: Call<'_>, input: UnregisterDevice) -> Result<bool> {
        let now = self.runtime.now();
        let violations = &mut call.violations;
        let user = fields::optional_user(violations, "user_id", &input.user_id);
        let by_token = input.platform.is_some() || violations.names("platform") || !input.token.is_empty();
        let device = match (input.device_id.is_empty(), by_token) {
            (false, true) => {
                violations.add("device_id", "is given together with platform and token; give one of the two");
                None
            }
            (true, false) => {
                violations.add("device_id", "is required, or platform and token instead");
                None
            }
            (false, false) => fields::device(violations, "device_id", &input.device_id).map(DeviceRef::Id),
            (true, true) => {
                if input.platform.is_none() && !violations.names("platform") {
                    violations.add("platform", "is required with token");
                }
                let token = token(violations, input.platform, &input.token);
                input.platform.zip(token).map(|(platform, token)| DeviceRef::Token(platform, token))
            }
        };
        let observed_at = fields::observed_at(violations, input.observed_at, now);
        let app = call.checked()?;
        let device = device.expect("a missing device is a violation");
        self.store.unregister_device(app.key, user, device, observed_at, now).await.map_err(|error| self.refused(error))
    }

    /// A page of a user's devices and the token of the next.
    pub async fn list_devices(&self, mut call: Call<'_>, input: ListDevices) -> Result<(Vec<Device>, String)> {
        let violations = &mut call.violations;
        let user = fields::user_id(violations, &input.user_id);
        let limit = fields::page_size(violations, input.page_size, DEFAULT_PAGE, MAX_PAGE);
        let scope = call
            .app
            .as_ref()
            .map(|app| PageScope::new(self.store.identity(), "ListDevices", app.key).with(input.user_id.as_bytes()));
        let after = scope.as_ref().and_then(|scope| scope.read(violations, &input.page_token)).map(|[id]| DeviceId(id));
        let app = call.checked()?;
        let (user, scope) = (user.expect("a missing user is a violation"), scope.expect("there is an app"));
        let page = self.store.list_devices(app.key, &user, after, limit).await.map_err(|error| self.refused(error))?;
        Ok((page.items, page.next.map_or_else(String::new, |next| scope.issue([next.0]))))
    }
}

/// Everything that can be said of a registration without the store.
pub(super) fn registration(mut call: Call<'_>, input: RegisterDevice, now: UnixMs) -> Result<Registration> {
    let violations = &mut call.violations;
    let user = fields::user_id(violations, &input.user_id);
    if input.platform.is_none() && !violations.names("platform") {
        violations.add("platform", "is required");
    }
    let token = token(violations, input.platform, &input.token);
    let route = match (&call.app, input.platform) {
        (Some(app), Some(platform)) => route(violations, app, platform, &input),
        _ => Chosen::Wrong,
    };
    let device = fields::optional_device(violations, &input.device_id);
    let installation_id = fields::optional_line(violations, "installation_id", input.installation_id, MAX_TEXT_BYTES);
    let details = DeviceDetails {
        locale: (!input.locale.is_empty()).then(|| violations.take(Locale::parse("locale", &input.locale))).flatten(),
        time_zone: time_zone(violations, input.time_zone),
        app_version: fields::optional_line(violations, "app_version", input.app_version, MAX_TEXT_BYTES),
        os_version: fields::optional_line(violations, "os_version", input.os_version, MAX_TEXT_BYTES),
        permission: input.permission,
        labels: fields::labels(violations, input.labels),
    };
    let observed_at = fields::observed_at(violations, input.observed_at, now);
    let app = call.checked()?;
    let (Some(user), Some(platform), Some(token)) = (user, input.platform, token) else {
        unreachable!("each of these is a violation when it is missing");
    };
    let route = match route {
        Chosen::Route(route) => route,
        Chosen::NotConfigured => return Err(ServiceError::PlatformNotConfigured { platform }),
        Chosen::Wrong => unreachable!("a wrong route is a violation"),
    };
    Ok(Registration {
        app: app.key,
        user,
        platform,
        kind: input.kind,
        token,
        route,
        device,
        installation_id,
        details,
        observed_at,
    })
}

fn token(violations: &mut Violations, platform: Option<Platform>, text: &str) -> Option<DeviceToken> {
    match platform {
        Some(platform) => violations.take(DeviceToken::parse("token", platform, text)),
        None if text.is_empty() => {
            violations.add("token", "must not be empty");
            None
        }
        // Its shape depends on the platform, which is already a violation.
        None => None,
    }
}

/// Which route a registration means.
enum Chosen {
    Route(RouteId),
    /// The app has no credential for the platform at all.
    NotConfigured,
    /// A field is wrong and was added to the violations.
    Wrong,
}

fn route(violations: &mut Violations, app: &App, platform: Platform, input: &RegisterDevice) -> Chosen {
    if platform != Platform::Apns {
        if input.environment.is_some() {
            violations.add("apns_environment", "is for APNS only");
        }
        if !input.apns_topic.is_empty() {
            violations.add("apns_topic", "is for APNS only");
        }
    }
    let Some(credentials) = app.credentials.get(&platform) else { return Chosen::NotConfigured };
    let name = if input.credential.is_empty() { DEFAULT_CREDENTIAL } else { &input.credential };
    let Some(credential) = credentials.get(name) else {
        let problem = if input.credential.is_empty() {
            "is required: the app has no credential named `default` for this platform"
        } else {
            "is not a configured credential of this platform"
        };
        violations.add("credential", problem);
        return Chosen::Wrong;
    };
    let (environment, bundle) = match platform {
        Platform::Apns => {
            let topic = input.apns_topic.as_str();
            let bundle = if topic.is_empty() { &*credential.default_bundle } else { topic };
            (input.environment.unwrap_or(credential.default_environment), bundle)
        }
        Platform::Fcm => (Environment::None, &*credential.default_bundle),
    };
    if let Some(route) = credential.route(environment, bundle) {
        return Chosen::Route(route);
    }
    if credential.has_bundle(bundle) {
        violations.add("apns_environment", "is not configured for this credential");
    } else {
        violations.add("apns_topic", "is not a configured bundle id of this credential");
    }
    Chosen::Wrong
}

/// An IANA name that this machine's time zone database knows; where there is no database, its shape must do.
fn time_zone(violations: &mut Violations, text: String) -> Option<String> {
    let name = fields::optional_line(violations, "time_zone", text, MAX_TEXT_BYTES)?;
    let shape = name.split('/').all(|part| {
        part.starts_with(|c: char| c.is_ascii_alphabetic())
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'+'))
    });
    let database = jiff::tz::db();
    if !shape || (!database.is_definitively_empty() && database.get(&name).is_err()) {
        violations.add("time_zone", "is not an IANA time zone name such as Asia/Seoul");
        return None;
    }
    Some(name)
}
