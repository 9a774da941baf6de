//! What a key may do, and which RPC needs what: one table, compared with the service descriptor by a test.

/// One permission of an API key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Scope {
    /// Devices, choices, subscriptions.
    Register = 0,
    /// Events.
    Notify = 1,
    /// Everyone, and audiences of more than 500 people.
    Broadcast = 2,
    /// Look-ups, with content and tokens masked.
    Read = 3,
    /// Look-ups show content too.
    ReadContent = 4,
    /// Redrive, pause, resume.
    Operate = 5,
    /// The event catalogue, export and erasure.
    Admin = 6,
}

impl Scope {
    pub const ALL: [Self; 7] =
        [Self::Register, Self::Notify, Self::Broadcast, Self::Read, Self::ReadContent, Self::Operate, Self::Admin];

    /// The word used in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::Notify => "notify",
            Self::Broadcast => crate::service::events::BROADCAST_SCOPE,
            Self::Read => "read",
            Self::ReadContent => "read_content",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }

    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == text)
    }
}

/// A set of scopes. None implies another.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Scopes(u8);

impl Scopes {
    pub const NONE: Self = Self(0);

    #[must_use]
    pub fn all() -> Self {
        Scope::ALL.into_iter().collect()
    }

    #[must_use]
    pub const fn has(self, scope: Scope) -> bool {
        self.0 & (1 << scope as u8) != 0
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |bits, scope| bits | (1 << scope as u8)))
    }
}

/// What a path needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Nothing: health checks come from load balancers without a key.
    Open,
    /// Any valid key.
    AnyKey,
    Scope(Scope),
}

/// Every RPC of ours. What is not here is refused.
pub const TABLE: &[(&str, Scope)] = &[
    ("/nudged.v1.PushService/RegisterDevice", Scope::Register),
    ("/nudged.v1.PushService/UnregisterDevice", Scope::Register),
    ("/nudged.v1.PushService/ListDevices", Scope::Read),
    ("/nudged.v1.PushService/SetOptIn", Scope::Register),
    ("/nudged.v1.PushService/ListOptIns", Scope::Read),
    ("/nudged.v1.PushService/Subscribe", Scope::Register),
    ("/nudged.v1.PushService/Unsubscribe", Scope::Register),
    ("/nudged.v1.PushService/ListSubscriptions", Scope::Read),
    // An import can do nothing that the calls above cannot do one by one.
    (IMPORTS[0], Scope::Register),
    (IMPORTS[1], Scope::Register),
    (IMPORTS[2], Scope::Register),
    ("/nudged.v1.PushService/NotifyEvent", Scope::Notify),
    (NOTIFY_EVENTS, Scope::Notify),
    ("/nudged.v1.PushService/GetNotification", Scope::Read),
    ("/nudged.v1.PushService/ListNotifications", Scope::Read),
    ("/nudged.v1.PushService/CancelNotification", Scope::Notify),
    ("/nudged.v1.PushService/ListDeliveries", Scope::Read),
    (WATCH_DELIVERIES, Scope::Read),
    ("/nudged.v1.PushService/ExplainDelivery", Scope::Read),
    ("/nudged.v1.AdminService/PutEventType", Scope::Admin),
    ("/nudged.v1.AdminService/GetEventType", Scope::Read),
    ("/nudged.v1.AdminService/ListEventTypes", Scope::Read),
    ("/nudged.v1.AdminService/DeleteEventType", Scope::Admin),
    ("/nudged.v1.AdminService/Preview", Scope::Read),
    ("/nudged.v1.AdminService/PauseDelivery", Scope::Operate),
    ("/nudged.v1.AdminService/ResumeDelivery", Scope::Operate),
    ("/nudged.v1.AdminService/ListPauses", Scope::Operate),
    ("/nudged.v1.AdminService/GetProviderStatus", Scope::Operate),
    ("/nudged.v1.AdminService/ConfirmRetirements", Scope::Operate),
    ("/nudged.v1.AdminService/RedriveDeliveries", Scope::Operate),
    ("/nudged.v1.AdminService/ConfirmRestore", Scope::Admin),
];

/// The long-lived RPCs of ours.
pub const NOTIFY_EVENTS: &str = "/nudged.v1.PushService/NotifyEvents";
const WATCH_DELIVERIES: &str = "/nudged.v1.PushService/WatchDeliveries";
const IMPORTS: [&str; 3] = [
    "/nudged.v1.PushService/ImportDevices",
    "/nudged.v1.PushService/ImportOptIns",
    "/nudged.v1.PushService/ImportSubscriptions",
];

const HEALTH: [&str; 3] =
    ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List", "/grpc.health.v1.Health/Watch"];
const REFLECTION: [&str; 2] = [
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// What a path needs; `None`: there is no such RPC.
#[must_use]
pub fn needed(path: &str) -> Option<Access> {
    if let Some((_, scope)) = TABLE.iter().find(|(known, _)| *known == path) {
        return Some(Access::Scope(*scope));
    }
    if HEALTH.contains(&path) {
        return Some(Access::Open);
    }
    REFLECTION.contains(&path).then_some(Access::AnyKey)
}

/// Health checks are never shed and streams have no deadline of the server's.
#[must_use]
pub fn is_health(path: &str) -> bool {
    HEALTH.contains(&path)
}

/// Streams may stay open as long as both sides like.
#[must_use]
pub fn is_stream(path: &str) -> bool {
    path == NOTIFY_EVENTS
        || path == WATCH_DELIVERIES
        || IMPORTS.contains(&path)
        || path == HEALTH[2]
        || REFLECTION.contains(&path)
}
