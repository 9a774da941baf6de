//! The link to Apple, which stands still on command: it takes what the server sends and passes nothing on, in either
//! direction, as a network does that has lost its way. It notes when each push left the server, so that a hand-over is
//! told from an arrival. To read along it takes plain HTTP/2 and speaks TLS to the provider.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use nudged::sandbox::Sandbox;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsConnector;

use super::{key_of, now_ms};

/// A push that left the server.
pub struct Left {
    pub nudged_id: String,
    pub key: String,
    pub at: i64,
}

pub struct Link {
    pub port: u16,
    left: Arc<Mutex<Vec<Left>>>,
    stalled: watch::Sender<bool>,
}

impl Link {
    pub async fn new(sandbox: &Sandbox) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(sandbox.ca_pem().as_bytes()).unwrap()).unwrap();
        let mut tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let tls = TlsConnector::from(Arc::new(tls));
        let provider = sandbox.apns_endpoint().trim_start_matches("https://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (left, stalled) = (Arc::default(), watch::Sender::new(false));
        let (noted, stall) = (Arc::clone(&left), stalled.subscribe());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (tls, provider, noted, stall) = (tls.clone(), provider.clone(), Arc::clone(&noted), stall.clone());
                tokio::spawn(async move {
                    let Ok(tcp) = TcpStream::connect(provider).await else { return };
                    let Ok(server) = tls.connect(ServerName::try_from("localhost").unwrap(), tcp).await else { return };
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = tokio::io::split(server);
                    tokio::join!(
                        pass(from_client, to_server, stall.clone(), Some(noted)),
                        pass(from_server, to_client, stall, None)
                    );
                });
            }
        });
        Self { port, left, stalled }
    }

    /// Passes nothing on until [`Link::flow`]; connections stay.
    pub fn stall(&self) {
        self.stalled.send_replace(true);
    }

    pub fn flow(&self) {
        self.stalled.send_replace(false);
    }

    /// What left the server since the last call.
    pub fn take_left(&self) -> Vec<Left> {
        std::mem::take(&mut *self.left.lock().unwrap())
    }
}

/// One direction, to its end. What is read while the link stands still waits here.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut stalled: watch::Receiver<bool>,
    noted: Option<Arc<Mutex<Vec<Left>>>>,
) {
    let (chunks, mut waiting) = mpsc::unbounded_channel::<Vec<u8>>();
    let read = async move {
        let mut frames = Frames::default();
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            if let Some(noted) = &noted {
                frames.read(&buffer[..read], &mut noted.lock().unwrap());
            }
            let _ = chunks.send(buffer[..read].to_vec());
        }
    };
    let write = async move {
        while let Some(chunk) = waiting.recv().await {
            let _ = stalled.wait_for(|stalled| !stalled).await;
            if to.write_all(&chunk).await.is_err() || to.flush().await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}

const PREFACE: usize = 24;
const HEAD: usize = 9;
const DATA: u8 = 0;
const RST_STREAM: u8 = 3;
const END_STREAM: u8 = 1;

/// Finds whole bodies among a client's frames (RFC 9113 section 4.1).
#[derive(Default)]
struct Frames {
    seen_preface: bool,
    bytes: Vec<u8>,
    bodies: HashMap<u32, Vec<u8>>,
}

impl Frames {
    fn read(&mut self, bytes: &[u8], left: &mut Vec<Left>) {
        self.bytes.extend_from_slice(bytes);
        let mut at = 0;
        if !self.seen_preface && self.bytes.len() >= PREFACE {
            (self.seen_preface, at) = (true, PREFACE);
        }
        while self.seen_preface && self.bytes.len() >= at + HEAD {
            let head = &self.bytes[at..at + HEAD];
            let end = at + HEAD + u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            if self.bytes.len() < end {
                break;
            }
            let (kind, flags, stream) = (head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]));
            if kind == DATA {
                self.bodies.entry(stream).or_default().extend_from_slice(&self.bytes[at + HEAD..end]);
                if flags & END_STREAM != 0 {
                    let body = self.bodies.remove(&stream).unwrap_or_default();
                    left.push(Left { nudged_id: id_of(&body), key: key_of(&body), at: now_ms() });
                }
            } else if kind == RST_STREAM {
                self.bodies.remove(&stream);
            }
            at = end;
        }
        self.bytes.drain(..at);
    }
}

fn id_of(body: &[u8]) -> String {
    let payload: serde_json::Value = serde_json::from_slice(body).expect("Apple is sent JSON");
    payload["nudged_id"].as_str().expect("every push has its identity").to_owned()
}
