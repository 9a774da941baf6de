//! Page tokens: where the next page begins, sealed with the installation's key.
//!
//! A token is good for the RPC, the app and the parameters it was issued for; anything else, and anything we did not
//! make, is a violation of `page_token`. Shape: base64url of version (1 byte), cursor (8 bytes a number), seal (8 bytes).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use subtle::ConstantTimeEq as _;

use crate::domain::identity::IdentityKey;
use crate::domain::ids::AppKey;
use crate::domain::violation::Violations;
use crate::planted;

const VERSION: u8 = 1;
const NUMBER_BYTES: usize = 8;
/// No token of ours is longer: two numbers, version and seal are 34 characters.
const MAX_TOKEN_BYTES: usize = 64;

/// What a token is bound to.
pub struct PageScope<'a> {
    identity: &'a IdentityKey,
    bound: Vec<u8>,
}

impl<'a> PageScope<'a> {
    #[must_use]
    pub fn new(identity: &'a IdentityKey, rpc: &str, app: AppKey) -> Self {
        let scope = Self { identity, bound: Vec::with_capacity(64) };
        let app = if planted::is("page-token-of-any-app") { AppKey(0) } else { app };
        scope.with(rpc.as_bytes()).with(&app.0.to_be_bytes())
    }

    /// Binds the token to one more parameter of the request.
    #[must_use]
    pub fn with(mut self, parameter: &[u8]) -> Self {
        self.bound.extend((parameter.len() as u64).to_be_bytes());
        self.bound.extend(parameter);
        self
    }

    #[must_use]
    pub fn issue<const N: usize>(&self, cursor: [i64; N]) -> String {
        let mut bytes = vec![VERSION];
        for number in cursor {
            bytes.extend(number.to_be_bytes());
        }
        let seal = self.seal(&bytes);
        bytes.extend(seal);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The cursor of a token; `None` for the first page (no token) and, with a violation, for a token that is not ours.
    pub fn read<const N: usize>(&self, violations: &mut Violations, token: &str) -> Option<[i64; N]> {
        if token.is_empty() {
            return None;
        }
        let cursor = self.open(token);
        if cursor.is_none() {
            violations.add("page_token", "is not a token of this list; the rest of the request must stay the same");
        }
        cursor
    }

    fn open<const N: usize>(&self, token: &str) -> Option<[i64; N]> {
        if token.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (sealed, seal) = bytes.split_at_checked(bytes.len().checked_sub(NUMBER_BYTES)?)?;
        let genuine = self.seal(sealed).ct_eq(seal);
        let (version, numbers) = sealed.split_first()?;
        if !bool::from(genuine) || *version != VERSION || numbers.len() != N * NUMBER_BYTES {
            return None;
        }
        let mut cursor = [0; N];
        for (number, bytes) in cursor.iter_mut().zip(numbers.chunks_exact(NUMBER_BYTES)) {
            *number = i64::from_be_bytes(bytes.try_into().ok()?);
        }
        Some(cursor)
    }

    fn seal(&self, bytes: &[u8]) -> [u8; NUMBER_BYTES] {
        let mut sealed = Vec::with_capacity(self.bound.len() + bytes.len());
        sealed.extend(&self.bound);
        sealed.extend(bytes);
        self.identity.seal(&sealed).to_be_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scope<'a>(identity: &'a IdentityKey, rpc: &str, app: i64, parameter: &str) -> PageScope<'a> {
        PageScope::new(identity, rpc, AppKey(app)).with(parameter.as_bytes())
    }

    proptest! {
        #[test]
        fn a_token_reads_back_and_no_altered_one_does(first: i64, second: i64, at in 0usize..33, change in 1u8..64) {
            let identity = IdentityKey::new([7; 32]);
            let ours = scope(&identity, "ListX", 1, "choco");
            let token = ours.issue([first, second]);
            let mut violations = Violations::default();
            prop_assert_eq!(ours.read(&mut violations, &token), Some([first, second]));
            prop_assert!(violations.is_empty());

            let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
            let mut altered = token.into_bytes();
            let old = alphabet.iter().position(|b| *b == altered[at]).expect("base64url");
            altered[at] = alphabet[(old + usize::from(change)) % 64];
            let altered = String::from_utf8(altered).expect("ASCII");
            prop_assert_eq!(ours.read::<2>(&mut violations, &altered), None);
            prop_assert!(violations.names("page_token"));
        }

        #[test]
        fn any_text_is_read_without_panic(text: String) {
            let identity = IdentityKey::new([7; 32]);
            let _ = scope(&identity, "ListX", 1, "").read::<1>(&mut Violations::default(), &text);
        }
    }

    #[test]
    fn a_token_is_good_for_its_own_list_only() {
        let (identity, other) = (IdentityKey::new([7; 32]), IdentityKey::new([8; 32]));
        let token = scope(&identity, "ListX", 1, "choco").issue([5]);
        let foreign = [
            scope(&identity, "ListY", 1, "choco"),
            scope(&identity, "ListX", 2, "choco"),
            scope(&identity, "ListX", 1, "mocha"),
            scope(&other, "ListX", 1, "choco"),
        ];
        for scope in foreign {
            let mut violations = Violations::default();
            assert_eq!(scope.read::<1>(&mut violations, &token), None);
            assert!(violations.names("page_token"));
        }
        assert_eq!(scope(&identity, "ListX", 1, "choco").read::<2>(&mut Violations::default(), &token), None);
        assert_eq!(scope(&identity, "ListX", 1, "choco").read::<1>(&mut Violations::default(), ""), None);
    }
}
