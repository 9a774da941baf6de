//! The third port: what is known of the providers, and what they said of devices. Apart from the queue, for a queue of
//! another kind would leave it where it is.

use super::{Result, StoreError};
use crate::domain::ids::{AppKey, DeviceId, NotificationId, RouteId, UserId, UserKey};
use crate::domain::outcome::{ResultCode, State};
use crate::domain::pacing::{PermitBlock, PermitRequest};
use crate::domain::platform::{Environment, Lane, Platform};
use crate::domain::time::UnixMs;

/// Why a credential or a route is not used now. The numbers are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TroubleCause {
    /// The platform refuses the credential, project or configuration.
    Configuration = 1,
    /// So many tokens were called dead that the configuration is the likelier fault.
    Tokens = 2,
}

impl TroubleCause {
    #[must_use]
    pub const fn code(self) -> i16 {
        self as i16
    }

    #[must_use]
    pub const fn from_code(code: i16) -> Option<Self> {
        match code {
            1 => Some(Self::Configuration),
            2 => Some(Self::Tokens),
            _ => None,
        }
    }

    /// A metric label, and what callers see.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Configuration => "configuration",
            Self::Tokens => "tokens",
        }
    }
}

/// What stops a credential or a route.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trouble {
    /// `credential/<app>/<platform>/<name>` or `route/<id>`.
    pub name: String,
    pub cause: TroubleCause,
    /// The platform's words.
    pub reason: String,
    pub since: UnixMs,
    /// Refreshed by whoever still meets it; one not seen for [`TROUBLE_KEPT_MS`] is over.
    pub seen_at: UnixMs,
    /// An operator says that these tokens are dead indeed.
    pub confirmed_until: Option<UnixMs>,
}

/// A trouble that nobody has met for so long is forgotten: the replica that met it is gone.
pub const TROUBLE_KEPT_MS: i64 = 5 * 60_000;

/// What decides about a token that a platform calls gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceTimes {
    pub confirmed_at: UnixMs,
    /// It was called gone within the hour after `confirmed_at`, and is asked once more.
    pub doubted_at: Option<UnixMs>,
}

/// Which dead deliveries to send again.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RedriveFilter {
    pub notification: Option<NotificationId>,
    pub user: Option<UserId>,
    pub device: Option<DeviceId>,
    /// Empty: every reason.
    pub reasons: Vec<ResultCode>,
    /// Died at or after this.
    pub died_from: Option<UnixMs>,
    /// Died before this.
    pub died_before: Option<UnixMs>,
}

impl RedriveFilter {
    pub(super) fn takes(
        &self,
        user: UserKey,
        wanted_user: Option<UserKey>,
        device: DeviceId,
        code: ResultCode,
    ) -> bool {
        code.state() == State::Dead
            && wanted_user.is_none_or(|wanted| wanted == user)
            && self.device.is_none_or(|wanted| wanted == device)
            && (self.reasons.is_empty() || self.reasons.contains(&code))
    }
}

/// One bounded step of a redrive.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RedriveBatch {
    pub app: AppKey,
    pub filter: RedriveFilter,
    /// From the answer before; 0 at first. History is walked by its ids.
    pub after: i64,
    /// Blocks of history looked at.
    pub max_blocks: usize,
}

/// What a step came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Redriven {
    /// Deliveries that are open again: they pass the gates before they are sent.
    pub redriven: u64,
    /// Their time to live is over, or their notification was cancelled: left as they are.
    pub too_late: u64,
    /// Where jobs became due.
    pub routes: Vec<(RouteId, Lane)>,
    pub after: i64,
    pub done: bool,
}

/// See the module.
#[async_trait::async_trait]
pub trait Providers: Send + Sync {
    /// Permits of a credential's rate, which every process on the store shares. One round trip.
    async fn lease_permits(&self, credential: &str, request: PermitRequest, now: UnixMs) -> Result<PermitBlock>;

    /// What stops credentials and routes on any process, by name.
    async fn troubles(&self, now: UnixMs) -> Result<Vec<Trouble>>;

    /// Met, or met again: `since` and `confirmed_until` of one that stands stay.
    async fn report_trouble(&self, trouble: Trouble) -> Result<()>;

    /// It works again. A confirmation that still holds stays known.
    async fn end_trouble(&self, name: &str, now: UnixMs) -> Result<()>;

    /// Lets a route's tokens be retired until then. Whether the trouble was known.
    async fn confirm_trouble(&self, name: &str, until: UnixMs) -> Result<bool>;

    /// Active devices that are to be left alone for now, at most `limit`, those held longest first.
    async fn held_devices(&self, now: UnixMs, limit: usize) -> Result<Vec<(DeviceId, UnixMs)>>;

    /// In the order asked; `None` for a device that is gone.
    async fn device_times(&self, devices: &[DeviceId]) -> Result<Vec<Option<DeviceTimes>>>;

    /// Opens dead deliveries again, where they died last and their time is not over. Harmless to repeat.
    async fn redrive(&self, batch: RedriveBatch, now: UnixMs) -> Result<Redriven, StoreError>;
}

/// What an operator reads of a trouble, from rows as both stores have them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TroubleRow {
    pub trouble: Trouble,
    /// The app's name and the route's credential, environment and bundle, where the rows are still there.
    pub place: String,
}

impl TroubleRow {
    pub(super) fn new(trouble: Trouble, apps: &[(i64, String)], routes: &[RouteRow]) -> Self {
        let app = |key: i64| apps.iter().find(|(id, _)| *id == key).map_or("?", |(_, name)| name);
        let place = match trouble.name.split('/').collect::<Vec<_>>()[..] {
            ["credential", key, platform, name] => {
                format!("apps.{}.{platform}, credential `{name}`", app(key.parse().unwrap_or(0)))
            }
            ["route", id] => match routes.iter().find(|route| route.id.to_string() == id) {
                Some(route) => {
                    let platform = Platform::from_code(route.platform).map_or("?", Platform::name);
                    let environment = match Environment::from_code(route.environment) {
                        Some(Environment::Production) => ", production",
                        Some(Environment::Sandbox) => ", sandbox",
                        Some(Environment::None) | None => "",
                    };
                    format!("apps.{}.{platform}, credential `{}`{environment}", app(route.app), route.credential)
                }
                None => format!("route {id}"),
            },
            _ => trouble.name.clone(),
        };
        Self { trouble, place }
    }
}

/// What of a route names it.
pub(super) struct RouteRow {
    pub id: i64,
    pub app: i64,
    pub platform: i16,
    pub credential: String,
    pub environment: i16,
}
