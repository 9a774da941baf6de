//! Apple's provider token: a JWT (ES256) that names a team and the minute it was made.
//!
//! The token is one per *team*, not per process, and Apple counts how often it changes. So it is the same bytes
//! everywhere: `iat` is rounded down to a grid of 40 minutes and the signature is deterministic (RFC 6979), which gives
//! every replica and every restart the same token without a word between them. At a step of the grid the new one takes
//! over: it is fresh, and the old one is 40 of its 60 minutes old.
//!
//! Limits kept (Apple, "Establishing a token-based connection to APNs", read 2026-11): a token is used for at most
//! 60 minutes, and no more than one is made in 20.

use std::sync::Mutex;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderValue;
use p256::ecdsa::signature::Signer;
use p256::ecdsa::{Signature, SigningKey};
use p256::pkcs8::DecodePrivateKey;
use serde_json::json;

use crate::domain::time::UnixMs;
use crate::planted;
use crate::senders::secret::Secret;

/// The distance of one token from the next.
const GRID_SECS: i64 = 40 * 60;
/// The finer grid for a token that Apple found stale before its time: our clock is behind.
const EARLY_GRID_SECS: i64 = 20 * 60;
/// The least distance between two tokens this process makes.
const MINT_EVERY: Duration = Duration::from_secs(20 * 60);
/// Apple refuses tokens older than an hour; clocks differ.
const OLDEST_SECS: i64 = 55 * 60;
/// A token from further in the future was made by a clock that has been set back since.
const CLOCK_SLACK_SECS: i64 = 60;

#[derive(Clone)]
struct Token {
    issued_at_secs: i64,
    made_at: UnixMs,
    header: HeaderValue,
}

impl Token {
    fn age_secs(&self, now: UnixMs) -> i64 {
        now.secs() - self.issued_at_secs
    }
}

#[derive(Default)]
struct State {
    current: Option<Token>,
    previous: Option<Token>,
    generation: u32,
}

/// The provider tokens of one key, shared by all its connections.
pub(super) struct ProviderTokens {
    key: SigningKey,
    key_id: Box<str>,
    team_id: Box<str>,
    state: Mutex<State>,
}

impl ProviderTokens {
    /// `None`: the text is no P-256 key in PKCS#8 PEM form.
    pub(super) fn new(p8_pem: &Secret, key_id: &str, team_id: &str) -> Option<Self> {
        let pem = std::str::from_utf8(p8_pem.expose()).ok()?;
        let key = SigningKey::from_pkcs8_pem(pem.trim()).ok()?;
        Some(Self { key, key_id: key_id.into(), team_id: team_id.into(), state: Mutex::default() })
    }

    /// The `authorization` header for now, marked sensitive, and which credential it is.
    pub(super) fn header(&self, now: UnixMs) -> (HeaderValue, u32) {
        let mut state = self.state.lock().expect("no panic while held");
        let grid_secs = if planted::is("jwt-off-the-grid") { 7 } else { GRID_SECS };
        let grid = now.secs().div_euclid(grid_secs) * grid_secs;
        if let Some(token) = &state.current {
            let age = token.age_secs(now);
            let is_of_this_step = token.issued_at_secs >= grid && age >= -CLOCK_SLACK_SECS;
            let may_not_mint = now.since(token.made_at) < MINT_EVERY && (0..=OLDEST_SECS).contains(&age);
            if is_of_this_step || may_not_mint {
                return (token.header.clone(), state.generation);
            }
        }
        let header = self.mint_into(&mut state, grid, now);
        (header, state.generation)
    }

    pub(super) fn generation(&self) -> u32 {
        self.state.lock().expect("no panic while held").generation
    }

    /// Apple called the token of `generation` stale. Another one is made if 20 minutes have passed; in any case
    /// connections opened from now on are of a new generation.
    pub(super) fn rejected(&self, generation: u32, now: UnixMs) {
        let mut state = self.state.lock().expect("no panic while held");
        if generation != state.generation {
            return;
        }
        state.generation = state.generation.wrapping_add(1);
        let early = now.secs().div_euclid(EARLY_GRID_SECS) * EARLY_GRID_SECS;
        if let Some(token) = &state.current
            && (now.since(token.made_at) >= MINT_EVERY || planted::is("jwt-minted-at-every-complaint"))
            && early > token.issued_at_secs
        {
            self.mint_into(&mut state, early, now);
        }
    }

    /// Apple saw too many tokens of this team: back to the older one while it is good, and no new one for 20 minutes.
    pub(super) fn too_many(&self, now: UnixMs) {
        let mut state = self.state.lock().expect("no panic while held");
        if let Some(previous) = state.previous.take()
            && (0..=OLDEST_SECS).contains(&previous.age_secs(now))
        {
            state.current = Some(previous);
        }
        if let Some(token) = &mut state.current {
            token.made_at = now;
        }
    }

    fn mint_into(&self, state: &mut State, issued_at_secs: i64, now: UnixMs) -> HeaderValue {
        let header = self.mint(issued_at_secs);
        state.previous = state.current.replace(Token { issued_at_secs, made_at: now, header: header.clone() });
        header
    }

    fn mint(&self, issued_at_secs: i64) -> HeaderValue {
        let encode = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let header = encode(json!({ "alg": "ES256", "kid": &*self.key_id }));
        let claims = encode(json!({ "iss": &*self.team_id, "iat": issued_at_secs }));
        let signed = format!("{header}.{claims}");
        let signature: Signature = self.key.sign(signed.as_bytes());
        let token = format!("bearer {signed}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()));
        let mut value = HeaderValue::try_from(token).expect("base64url and dots are ASCII");
        value.set_sensitive(true);
        value
    }
}

#[cfg(test)]
pub(super) mod tests {
    use p256::ecdsa::signature::Verifier;
    use p256::pkcs8::{EncodePrivateKey, LineEnding};
    use serde_json::Value;

    use super::*;

    /// A key that is only good for tests.
    pub(in crate::senders) fn p8() -> Secret {
        let key = p256::SecretKey::from_slice(&[7; 32]).expect("a scalar below the order");
        Secret::new(key.to_pkcs8_pem(LineEnding::LF).expect("encodes").as_bytes())
    }

    fn tokens() -> ProviderTokens {
        ProviderTokens::new(&p8(), "ABC123DEFG", "DEF123GHIJ").expect("a key")
    }

    fn parts(header: &HeaderValue) -> (Value, Value, Vec<u8>, String) {
        let text = header.to_str().expect("ASCII").strip_prefix("bearer ").expect("scheme");
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).expect("base64url");
        let parts: Vec<&str> = text.split('.').collect();
        let json = |part: &str| serde_json::from_slice(&decode(part)).expect("JSON");
        (json(parts[0]), json(parts[1]), decode(parts[2]), format!("{}.{}", parts[0], parts[1]))
    }

    const START: UnixMs = UnixMs(2400 * 1000 * 748_115);

    fn after(minutes: u64) -> UnixMs {
        START.plus(Duration::from_secs(minutes * 60))
    }

    #[test]
    fn a_token_has_only_apples_keys_and_a_raw_signature() {
        let tokens = tokens();
        let (header, _) = tokens.header(after(7));
        assert!(header.is_sensitive());
        let (head, claims, signature, signed) = parts(&header);
        assert_eq!(head, json!({"alg": "ES256", "kid": "ABC123DEFG"}));
        assert_eq!(claims, json!({"iss": "DEF123GHIJ", "iat": START.secs()}), "rounded down to the grid");
        assert_eq!(signature.len(), 64);
        let signature = Signature::from_slice(&signature).expect("r and s");
        tokens.key.verifying_key().verify(signed.as_bytes(), &signature).expect("our signature");
    }

    #[test]
    fn every_replica_and_every_restart_has_the_same_bytes() {
        let first = tokens().header(after(1)).0;
        assert_eq!(tokens().header(after(39)).0, first);
        assert_ne!(tokens().header(after(40)).0, first);
    }

    #[test]
    fn the_next_token_takes_over_at_the_step_but_never_within_twenty_minutes() {
        let tokens = tokens();
        let first = tokens.header(after(30)).0;
        assert_eq!(tokens.header(after(41)).0, first, "made 11 minutes ago, 41 old");
        let second = tokens.header(after(50)).0;
        assert_ne!(second, first);
        assert_eq!(parts(&second).1["iat"], after(40).secs());
        assert_eq!(tokens.header(after(79)).0, second);
    }

    #[test]
    fn a_stale_token_is_replaced_once_and_only_after_twenty_minutes() {
        let tokens = tokens();
        let (first, generation) = tokens.header(after(0));
        tokens.rejected(generation, after(10));
        let (same, next) = tokens.header(after(10));
        assert_eq!(same, first, "too early for another");
        assert_ne!(next, generation, "but connections are to be new");
        tokens.rejected(next, after(25));
        tokens.rejected(next, after(25));
        let (second, last) = tokens.header(after(25));
        assert_eq!(parts(&second).1["iat"], after(20).secs());
        assert_eq!(last, next + 1, "many answers to one token count once");
    }

    #[test]
    fn a_complaint_about_a_token_made_just_now_makes_no_other() {
        let tokens = tokens();
        let (first, generation) = tokens.header(after(19));
        tokens.rejected(generation, after(21));
        assert_eq!(tokens.header(after(21)).0, first, "it is two minutes old, though of an older step");
    }

    #[test]
    fn too_many_updates_bring_the_older_token_back() {
        let tokens = tokens();
        let first = tokens.header(after(20)).0;
        assert_ne!(tokens.header(after(41)).0, first);
        tokens.too_many(after(42));
        assert_eq!(tokens.header(after(42)).0, first);
        assert_eq!(tokens.header(after(54)).0, first, "nothing new for 20 minutes");
        assert_ne!(tokens.header(after(62)).0, first, "its hour is over");
    }

    #[test]
    fn a_clock_set_back_does_not_keep_a_token_of_the_future() {
        let tokens = tokens();
        let future = tokens.header(after(400)).0;
        assert_ne!(tokens.header(after(1)).0, future);
    }
}
