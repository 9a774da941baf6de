//! How commands that call a running server reach it.

use std::path::PathBuf;

use anyhow::Context as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

/// The largest key file, in bytes.
const MAX_KEY_BYTES: usize = 4096;

#[derive(clap::Args, Clone)]
pub struct ClientArgs {
    /// Where the server listens
    #[arg(long, default_value = "http://127.0.0.1:50051", value_name = "URL")]
    pub address: String,
    /// File with the API key; none is needed where the server has none
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// File with the CA of the server's certificate, instead of the well-known ones
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// The app; may be left out when the key is bound to one or the server has a default
    #[arg(long, value_name = "APP")]
    pub app: Option<String>,
}

/// Adds the key, where there is one.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(key) = &self.0 {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}

pub type Connection = InterceptedService<Channel, Bearer>;

impl ClientArgs {
    /// A connection, and what adds the key to every call.
    pub async fn connect(&self) -> anyhow::Result<(Channel, Bearer)> {
        let mut endpoint = Endpoint::from_shared(self.address.clone())
            .with_context(|| format!("{:?} is no address such as http://127.0.0.1:50051", self.address))?;
        if self.address.starts_with("https://") {
            let tls = match &self.ca_file {
                Some(file) => {
                    let pem = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
                    ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem))
                }
                None => ClientTlsConfig::new().trust_anchors(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            };
            endpoint = endpoint.tls_config(tls).context("setting up TLS")?;
        }
        let channel = endpoint.connect().await.with_context(|| format!("reaching the server at {}", self.address))?;
        Ok((channel, Bearer(self.key()?)))
    }

    fn key(&self) -> anyhow::Result<Option<MetadataValue<Ascii>>> {
        let Some(file) = &self.key_file else { return Ok(None) };
        let text = std::fs::read_to_string(file).with_context(|| format!("reading the key in {}", file.display()))?;
        let key = text.trim();
        anyhow::ensure!(
            !key.is_empty() && key.len() <= MAX_KEY_BYTES,
            "{} must hold a key, and nothing else",
            file.display()
        );
        // The error of a bad value would quote it.
        let mut value: MetadataValue<Ascii> = format!("Bearer {key}")
            .parse()
            .map_err(|_| anyhow::anyhow!("{} holds characters that no key has", file.display()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

/// A refusal as a person reads it: the code, the message, and every wrong field.
pub fn refusal(status: &Status) -> anyhow::Error {
    anyhow::anyhow!("the server answers {:?}: {}", status.code(), status.message())
}
