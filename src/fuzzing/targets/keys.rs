//! Credentials as they come in files.

use crate::domain::time::UnixMs;
use crate::fuzzing::shape;
use crate::senders::{Secret, apns, fcm};

use super::text;

pub const WORDS: &[&str] = &[
    "-----BEGIN PRIVATE KEY-----",
    "-----END PRIVATE KEY-----",
    "-----BEGIN EC PRIVATE KEY-----",
    "-----BEGIN RSA PRIVATE KEY-----",
    "\"type\":\"service_account\"",
    "\"project_id\":\"pets\"",
    "\"private_key\":\"",
    "\"private_key_id\":\"k\"",
    "\"client_email\":\"a@b\"",
    "\"token_uri\":\"https://oauth2.googleapis.com/token\"",
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEH",
    "\\n",
];

/// A `.p8` file. One that is taken signs, the same bytes each time.
pub fn apns(input: &[u8]) -> u64 {
    let now = UnixMs(1_795_478_400_000);
    let header = |input: &[u8]| apns::fuzzing::provider_token(&Secret::new(input), now);
    let first = header(input);
    assert_eq!(first, header(input), "a deterministic signature");
    if let Some(header) = &first {
        let header = std::str::from_utf8(header).expect("ASCII");
        let token = header.strip_prefix("bearer ").expect("the scheme");
        assert_eq!(token.split('.').count(), 3);
        assert!(header.len() < 400);
    }
    let said = text(input);
    shape(&(first.is_some(), said.contains("-----BEGIN"), said.contains("PRIVATE KEY"), said.lines().count().min(8)))
}

/// Google's key file. What is wrong is said without a word of the key.
pub fn service_account(input: &[u8]) -> u64 {
    let settings = fcm::Settings::new(Secret::new(input));
    assert!(!format!("{settings:?}").contains("PRIVATE"), "never printed");
    let came_to = match settings.validate() {
        Ok(()) => "good".to_owned(),
        Err(error) => {
            let told = error.to_string();
            assert!(!told.is_empty() && told.len() < 500 && !told.contains("-----BEGIN"));
            told
        }
    };
    shape(&came_to)
}
