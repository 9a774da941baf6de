//! Keys for the senders, made once a process: nothing that happens depends on them.

use std::sync::LazyLock;

use nudged::senders::Secret;
use nudged::senders::{apns, fcm, http2};

pub const BUNDLE: &str = "com.example.simulated";

struct Keys {
    apns_key_pem: String,
    certificate_pem: String,
    service_account_json: String,
}

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let key = rcgen::KeyPair::generate().expect("a P-256 key");
    let params = rcgen::CertificateParams::new(vec!["simulated".to_owned()]).expect("a name");
    let certificate_pem = params.self_signed(&key).expect("a certificate").pem();
    let account = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).expect("an RSA key");
    let service_account_json = serde_json::json!({
        "type": "service_account",
        "project_id": "simulated",
        "private_key_id": "simulated",
        "private_key": account.serialize_pem(),
        "client_email": "nudged@simulated.iam.gserviceaccount.com",
        "token_uri": "https://localhost/token",
    });
    Keys { apns_key_pem: key.serialize_pem(), certificate_pem, service_account_json: service_account_json.to_string() }
});

/// Endpoints are names only: every byte goes through a pipe.
pub fn apns(with_token: bool, http2: http2::Settings) -> apns::Settings {
    let key = Secret::new(KEYS.apns_key_pem.as_bytes());
    let auth = if with_token {
        let (key_id, team_id) = ("SIMULATED1".to_owned(), "SIMULATED2".to_owned());
        apns::Auth::Token { p8_pem: key, key_id, team_id }
    } else {
        apns::Auth::Certificate { cert_pem: KEYS.certificate_pem.clone().into_bytes(), key_pem: key }
    };
    let ca_pem = Some(KEYS.certificate_pem.clone().into_bytes());
    apns::Settings { ca_pem, http2, ..apns::Settings::new(auth, vec![BUNDLE.to_owned()]) }
}

pub fn fcm(http2: http2::Settings) -> fcm::Settings {
    let ca_pem = Some(KEYS.certificate_pem.clone().into_bytes());
    fcm::Settings { ca_pem, http2, ..fcm::Settings::new(Secret::new(KEYS.service_account_json.as_bytes())) }
}
