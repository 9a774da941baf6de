//! Certificates in PEM files: are they there, do they fit their key, are they still valid.
//!
//! rustls checks a peer's validity, never one's own, and exposes no dates; so the four DER fields that lead to them are
//! walked here (RFC 5280 §4.1).

use std::sync::Arc;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::domain::time::UnixMs;

/// From when to when a certificate holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Validity {
    pub not_before: UnixMs,
    pub not_after: UnixMs,
}

/// All certificates of a PEM text, at least one.
pub(crate) fn parse_chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match chain {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        _ => Err("holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)"),
    }
}

/// Whether the key is the one of the chain's first certificate.
pub(crate) fn check_pair(chain: Vec<CertificateDer<'static>>, key_pem: &[u8]) -> Result<(), &'static str> {
    let key = PrivateKeyDer::from_pem_slice(key_pem)
        .map_err(|_| "holds no private key in PEM form (PKCS#8, PKCS#1 or SEC1, not encrypted)")?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    match rustls::sign::CertifiedKey::from_der(chain, key, &provider) {
        Ok(_) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => Err("is not the key of the certificate"),
        Err(_) => Err("is of a kind that is not supported, or the certificate is damaged"),
    }
}

/// `None` when it is not an X.509 certificate.
pub(crate) fn validity(certificate: &[u8]) -> Option<Validity> {
    const SEQUENCE: u8 = 0x30;
    const VERSION: u8 = 0xa0;
    let (certificate, _) = element(certificate, SEQUENCE)?;
    let (to_be_signed, _) = element(certificate, SEQUENCE)?;
    let mut rest = to_be_signed;
    if rest.first() == Some(&VERSION) {
        rest = skip(rest)?;
    }
    // Serial number, signature algorithm, issuer.
    for _ in 0..3 {
        rest = skip(rest)?;
    }
    let (dates, _) = element(rest, SEQUENCE)?;
    let (not_before, rest) = time(dates)?;
    let (not_after, _) = time(rest)?;
    Some(Validity { not_before, not_after })
}

/// UTCTime (two-digit year, 1950 to 2049) or GeneralizedTime, both in UTC with seconds.
fn time(bytes: &[u8]) -> Option<(UnixMs, &[u8])> {
    let (tag, content, rest) = next(bytes)?;
    let text = std::str::from_utf8(content).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let text = match (tag, text.len()) {
        (0x17, 12) => format!("{}{text}", if text < "50" { "20" } else { "19" }),
        (0x18, 14) => text.to_owned(),
        _ => return None,
    };
    let at =
        format!("{}-{}-{}T{}:{}:{}Z", &text[..4], &text[4..6], &text[6..8], &text[8..10], &text[10..12], &text[12..14]);
    let at: jiff::Timestamp = at.parse().ok()?;
    Some((UnixMs(at.as_millisecond()), rest))
}

fn element(bytes: &[u8], expected: u8) -> Option<(&[u8], &[u8])> {
    let (tag, content, rest) = next(bytes)?;
    (tag == expected).then_some((content, rest))
}

fn skip(bytes: &[u8]) -> Option<&[u8]> {
    next(bytes).map(|(_, _, rest)| rest)
}

/// Tag, content and what follows. Lengths of up to four bytes: no certificate is longer than 4 GiB.
fn next(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let digits = usize::from(first & 0x7f);
        if !(1..=4).contains(&digits) {
            return None;
        }
        let (digits, rest) = rest.split_at_checked(digits)?;
        (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(from: i32, to: i32) -> (rcgen::Certificate, rcgen::KeyPair) {
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        params.not_before = rcgen::date_time_ymd(from, 1, 1);
        params.not_after = rcgen::date_time_ymd(to, 12, 31);
        let key = rcgen::KeyPair::generate().expect("a key");
        (params.self_signed(&key).expect("a certificate"), key)
    }

    #[test]
    fn the_dates_are_read_in_both_of_their_forms() {
        for (from, to) in [(1999, 2026), (2040, 2051)] {
            let (certificate, _) = made(from, to);
            let validity = validity(certificate.der()).expect("a certificate");
            assert_eq!(validity.not_before.to_string(), format!("{from}-01-01T00:00:00Z"));
            assert_eq!(validity.not_after.to_string(), format!("{to}-12-31T00:00:00Z"));
        }
    }

    #[test]
    fn damaged_certificates_have_no_dates_and_do_not_panic() {
        let (certificate, _) = made(2020, 2030);
        for end in 0..120 {
            assert_eq!(validity(&certificate.der()[..end]), None);
        }
        assert_eq!(validity(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]), None);
    }

    #[test]
    fn a_key_of_another_certificate_is_noticed() {
        let (certificate, key) = made(2020, 2030);
        let other = rcgen::KeyPair::generate().expect("a key");
        let chain = || parse_chain(certificate.pem().as_bytes()).expect("a chain");
        assert_eq!(check_pair(chain(), key.serialize_pem().as_bytes()), Ok(()));
        assert!(check_pair(chain(), other.serialize_pem().as_bytes()).is_err());
        assert!(check_pair(chain(), certificate.pem().as_bytes()).is_err());
        assert!(parse_chain(key.serialize_pem().as_bytes()).is_err());
    }
}
