//! Accepted connections: counted, and without Nagle's delay.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, Stream, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::tls::Tls;
use crate::runtime::Runtime;

/// How long to wait when the system has no more descriptors: an accept that fails at once would spin.
const AFTER_ACCEPT_ERROR: Duration = Duration::from_millis(50);

/// TLS handshakes at once on one listener; more connections wait.
const MAX_HANDSHAKES: usize = 256;

/// A byte stream that a caller came in by.
pub trait Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Socket for S {}

/// What HTTP/2 is spoken over.
pub(super) trait Link: Socket {
    /// Of what the caller sends.
    fn heard(&self) -> Heard;

    /// What the caller showed.
    fn certificate(&self) -> Option<ClientCertificate>;
}

/// Whether anything came.
#[derive(Clone, Default)]
pub(super) struct Heard(Arc<AtomicBool>);

impl Heard {
    /// Since it was asked last.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

/// The DER of a client's certificate, in the extensions of its requests.
#[derive(Clone)]
pub(super) struct ClientCertificate(Arc<[u8]>);

impl ClientCertificate {
    pub fn der(&self) -> &[u8] {
        &self.0
    }
}

/// One connection. Gives its place back when dropped.
pub struct Accepted<S> {
    socket: S,
    heard: Heard,
    _place: OwnedSemaphorePermit,
}

/// What comes in by a TCP listener.
pub fn tcp(listener: TcpListener, runtime: Runtime) -> impl Stream<Item = TcpStream> + Send {
    Box::pin(stream::unfold((listener, runtime), |(listener, runtime)| async move {
        let socket = loop {
            match listener.accept().await {
                Ok((socket, _)) => break socket,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    runtime.sleep(AFTER_ACCEPT_ERROR).await;
                }
            }
        };
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        Some((socket, (listener, runtime)))
    }))
}

/// Connections, each taking one of `places` before it is looked for.
pub fn accept<S: Socket>(
    sockets: impl Stream<Item = S> + Send,
    places: Arc<Semaphore>,
) -> impl Stream<Item = Accepted<S>> + Send {
    Box::pin(stream::unfold((Box::pin(sockets), places), |(mut sockets, places)| async move {
        let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
        let socket = sockets.next().await?;
        Some((Accepted { socket, heard: Heard::default(), _place: place }, (sockets, places)))
    }))
}

/// TLS over accepted connections: many handshakes at once, each with the certificate that holds when it begins. One that
/// fails, or takes too long, is dropped.
pub fn greet<S: Socket>(
    connections: impl Stream<Item = Accepted<S>> + Send,
    tls: Arc<Tls>,
    handshake: Duration,
    runtime: Runtime,
) -> impl Stream<Item = TlsStream<Accepted<S>>> + Send {
    let greeted = connections.map(move |accepted| {
        let (acceptor, runtime) = (TlsAcceptor::from(tls.current()), runtime.clone());
        async move {
            match runtime.timeout(handshake, acceptor.accept(accepted)).await {
                Some(Ok(stream)) => Some(stream),
                Some(Err(error)) => {
                    tracing::debug!(%error, "a TLS handshake failed");
                    None
                }
                None => {
                    tracing::debug!("a TLS handshake took too long");
                    None
                }
            }
        }
    });
    Box::pin(greeted.buffer_unordered(MAX_HANDSHAKES).filter_map(std::future::ready))
}

impl<S: Socket> Link for Accepted<S> {
    fn heard(&self) -> Heard {
        self.heard.clone()
    }

    fn certificate(&self) -> Option<ClientCertificate> {
        None
    }
}

impl<S: Socket> Link for TlsStream<Accepted<S>> {
    fn heard(&self) -> Heard {
        self.get_ref().0.heard()
    }

    fn certificate(&self) -> Option<ClientCertificate> {
        let shown = self.get_ref().1.peer_certificates()?.first()?;
        Some(ClientCertificate(Arc::from(shown.as_ref())))
    }
}

impl<S: Socket> AsyncRead for Accepted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.socket).poll_read(cx, buf);
        if read.is_ready() {
            self.heard.0.store(true, Ordering::Relaxed);
        }
        read
    }
}

impl<S: Socket> AsyncWrite for Accepted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}
