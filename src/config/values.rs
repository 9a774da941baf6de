//! Types of values that appear in more than one section.

use std::fmt;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use zeroize::{Zeroize as _, Zeroizing};

use crate::planted;

/// No credential is larger: a certificate chain has a few kilobytes.
const MAX_SECRET_BYTES: u64 = 256 * 1024;

/// A text that never shows itself.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText(String);

impl SecretText {
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The value itself, for the code that uses it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if planted::is("secret-printed") { &self.0 } else { "[redacted]" })
    }
}

impl Drop for SecretText {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// A secret given as `<key>` or as `<key>_file`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SecretSource {
    Inline(SecretText),
    File(PathBuf),
}

/// A file that a secret should come from could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}", path.display())]
pub struct SecretFileError {
    pub path: PathBuf,
    #[source]
    pub source: std::io::Error,
}

impl SecretSource {
    /// The secret's bytes, read anew on each call so that a rotated file is seen. At most 256 KiB. Blocks on the disk.
    pub fn read(&self) -> Result<Zeroizing<Vec<u8>>, SecretFileError> {
        match self {
            Self::Inline(text) => Ok(Zeroizing::new(text.expose().as_bytes().to_vec())),
            Self::File(path) => read_bounded(path).map_err(|source| SecretFileError { path: path.clone(), source }),
        }
    }

    /// The file's path, or the word `inline`: for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Inline(_) => "inline".to_owned(),
            Self::File(path) => path.display().to_string(),
        }
    }
}

/// A file's content; an error when it is larger than any credential.
pub(crate) fn read_bounded(path: &Path) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::new());
    std::fs::File::open(path)?.take(MAX_SECRET_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SECRET_BYTES {
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, "larger than 256 KiB"));
    }
    Ok(bytes)
}

/// Scheme, host and port of a provider. `http` only towards this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    https: bool,
    host: String,
    port: u16,
}

impl Endpoint {
    /// Reads `https://host[:port]`, no path.
    pub fn parse(text: &str) -> Result<Self, String> {
        let uri: http::Uri = text.parse().map_err(|_| "is not a URL".to_owned())?;
        let https = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err("does not begin with https://".to_owned()),
        };
        let authority = uri.authority().ok_or("has no host")?;
        if authority.as_str().contains('@') {
            return Err("holds a user name, which no provider takes".to_owned());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        if host.is_empty() {
            return Err("has no host".to_owned());
        }
        if uri.path_and_query().is_some_and(|rest| rest.as_str() != "/") {
            return Err("has a path; only scheme, host and port belong here".to_owned());
        }
        let port = match authority.port() {
            Some(port) if port.as_u16() > 0 => port.as_u16(),
            Some(_) => return Err("has port 0".to_owned()),
            // `Authority::port` hides what does not fit a u16.
            None if authority.as_str().rsplit(']').next().is_some_and(|rest| rest.contains(':')) => {
                return Err("has no valid port".to_owned());
            }
            None => {
                if https {
                    443
                } else {
                    80
                }
            }
        };
        let endpoint = Self { https, host, port };
        if !https && !endpoint.is_loopback() {
            return Err("is not encrypted: http:// is allowed only to this machine".to_owned());
        }
        Ok(endpoint)
    }

    #[must_use]
    pub fn is_https(&self) -> bool {
        self.https
    }

    /// A DNS name or an IP address without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `localhost` or a loopback address.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}

/// A SHA-256 value, written as 64 hexadecimal digits; colons, as tools print fingerprints, are allowed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Digest(pub [u8; 32]);

impl Sha256Digest {
    pub fn parse(text: &str) -> Result<Self, String> {
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
        if digits.len() != 64 {
            return Err(format!("has {} characters, a SHA-256 has 64 hexadecimal digits", digits.len()));
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
            let (Some(high), Some(low)) = (nibble(pair[0]), nibble(pair[1])) else {
                return Err("holds something else than hexadecimal digits".to_owned());
            };
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Digest {
    /// Enough to tell two apart, not enough to try keys against.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{:02x}{:02x}{:02x}…", self.0[0], self.0[1], self.0[2])
    }
}

/// Whether only this machine can reach it.
#[must_use]
pub fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// `address:port`; `localhost` stands for 127.0.0.1. Port 0 lets the system pick one.
pub(super) fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let text = text.strip_prefix("localhost:").map_or_else(|| text.to_owned(), |port| format!("127.0.0.1:{port}"));
    text.parse().map_err(|_| format!("`{text}` is not an IP address with a port"))
}
