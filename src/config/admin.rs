//! `[admin]`: metrics and health over HTTP.

use std::net::{Ipv4Addr, SocketAddr};

use super::section::Section;
use super::values::listen_address;

#[derive(Clone, Debug)]
pub struct Admin {
    /// Default 127.0.0.1:9464. Serves numbers and health only, so any address is allowed.
    pub listen: SocketAddr,
}

impl Admin {
    pub(super) fn read(mut section: Section<'_>) -> Self {
        let listen = section
            .parsed("listen", "write address:port, e.g. 127.0.0.1:9464", listen_address)
            .unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 9464)));
        section.finish();
        Self { listen }
    }
}
