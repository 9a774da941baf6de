//! API keys from the configuration to the server's ring.

use crate::api::auth::{ApiKey, BoundApps};
use crate::api::scopes::{self, Scopes};
use crate::config::{Key, Scope};

#[must_use]
pub fn api_keys(keys: &[Key]) -> Vec<ApiKey> {
    keys.iter()
        .map(|key| ApiKey {
            name: key.name.as_str().into(),
            sha256: key.sha256.as_ref().map(|digest| digest.0),
            client_cert_sha256: key.client_cert_sha256.as_ref().map(|digest| digest.0),
            apps: BoundApps::Only(key.apps.iter().cloned().collect()),
            scopes: key.scopes.iter().map(|scope| api_scope(*scope)).collect::<Scopes>(),
            expires_at: key.expires_at,
        })
        .collect()
}

fn api_scope(scope: Scope) -> scopes::Scope {
    match scope {
        Scope::Register => scopes::Scope::Register,
        Scope::Notify => scopes::Scope::Notify,
        Scope::Broadcast => scopes::Scope::Broadcast,
        Scope::Read => scopes::Scope::Read,
        Scope::ReadContent => scopes::Scope::ReadContent,
        Scope::Operate => scopes::Scope::Operate,
        Scope::Admin => scopes::Scope::Admin,
    }
}
