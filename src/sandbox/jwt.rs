//! Compact JWS (RFC 7515) taken apart for verification. Written apart from the senders on purpose: a shared mistake
//! would go unnoticed.

use aws_lc_rs::signature::{self, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// A token longer than this is none.
const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// The three parts of a token, not verified yet.
pub(super) struct Jws<'a> {
    pub header: Map<String, Value>,
    pub claims: Map<String, Value>,
    signed: &'a [u8],
    signature: Vec<u8>,
}

impl<'a> Jws<'a> {
    pub(super) fn parse(token: &'a str) -> Option<Self> {
        if token.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let object = |part: &str| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok();
        Some(Self {
            header: object(header)?,
            claims: object(claims)?,
            signed: signed.as_bytes(),
            signature: URL_SAFE_NO_PAD.decode(signature).ok()?,
        })
    }

    /// ES256: the raw 64 bytes r‖s, not the DER form that OpenSSL makes. `public_key` is an uncompressed point.
    pub(super) fn verify_es256(&self, public_key: &[u8]) -> bool {
        self.header.get("alg").and_then(Value::as_str) == Some("ES256")
            && self.signature.len() == 64
            && UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, public_key)
                .verify(self.signed, &self.signature)
                .is_ok()
    }

    /// RS256. `public_key` is a DER RSAPublicKey.
    pub(super) fn verify_rs256(&self, public_key: &[u8]) -> bool {
        self.header.get("alg").and_then(Value::as_str) == Some("RS256")
            && UnparsedPublicKey::new(&signature::RSA_PKCS1_2048_8192_SHA256, public_key)
                .verify(self.signed, &self.signature)
                .is_ok()
    }

    pub(super) fn header_text(&self, name: &str) -> Option<&str> {
        self.header.get(name)?.as_str()
    }

    pub(super) fn text(&self, claim: &str) -> Option<&str> {
        self.claims.get(claim)?.as_str()
    }

    pub(super) fn seconds(&self, claim: &str) -> Option<i64> {
        self.claims.get(claim)?.as_i64()
    }
}

/// Sixteen hex digits that tell tokens apart without giving them away.
pub(super) fn token_hash(token: &[u8]) -> String {
    use std::fmt::Write as _;
    let digest = Sha256::digest(token);
    digest[..8].iter().fold(String::with_capacity(16), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
