//! The reference's own gathering of writes: one `h2` connection, driven so that all requests that are ready leave in
//! one TLS write. Not the senders' (`senders::http2::gather`): a measure must not move with what it measures.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Past so many buffered bytes h2's writes wait for the transport.
const LIMIT: usize = 64 * 1024;

struct Shared<S> {
    transport: S,
    buffer: BytesMut,
    is_dirty: bool,
}

impl<S: AsyncWrite + Unpin> Shared<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.buffer.is_empty() {
            match ready!(Pin::new(&mut self.transport).poll_write(cx, &self.buffer))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.buffer.advance(written),
            }
        }
        ready!(Pin::new(&mut self.transport).poll_flush(cx))?;
        self.is_dirty = false;
        Poll::Ready(Ok(()))
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.buffer.len() < LIMIT { Poll::Ready(Ok(())) } else { self.poll_drain(cx) }
    }
}

/// What h2 writes to.
pub struct Gathering<S>(Arc<Mutex<Shared<S>>>);

impl<S: AsyncRead + Unpin> AsyncRead for Gathering<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.lock().expect("no panic while held").transport).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathering<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut shared = self.0.lock().expect("no panic while held");
        ready!(shared.poll_room(cx))?;
        shared.buffer.extend_from_slice(data);
        shared.is_dirty = true;
        Poll::Ready(Ok(data.len()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut shared = self.0.lock().expect("no panic while held");
        ready!(shared.poll_room(cx))?;
        let before = shared.buffer.len();
        for slice in data {
            shared.buffer.extend_from_slice(slice);
        }
        shared.is_dirty = true;
        Poll::Ready(Ok(shared.buffer.len() - before))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = self.0.lock().expect("no panic while held");
        ready!(shared.poll_drain(cx))?;
        Pin::new(&mut shared.transport).poll_shutdown(cx)
    }
}

/// Drives a connection, one gathered write per turn.
pub struct Turn<S, F> {
    connection: Pin<Box<F>>,
    shared: Arc<Mutex<Shared<S>>>,
    has_yielded: bool,
}

impl<S: AsyncWrite + Unpin, F: Future> Future for Turn<S, F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if !self.has_yielded {
            // All who are ready to send do so first.
            self.has_yielded = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.has_yielded = false;
        let outcome = self.connection.as_mut().poll(cx);
        let mut shared = self.shared.lock().expect("no panic while held");
        if shared.is_dirty {
            let _ = shared.poll_drain(cx);
        }
        drop(shared);
        outcome
    }
}

pub struct Driver<S>(Arc<Mutex<Shared<S>>>);

impl<S> Driver<S> {
    pub fn drive<F: Future>(self, connection: F) -> Turn<S, F> {
        Turn { connection: Box::pin(connection), shared: self.0, has_yielded: false }
    }
}

pub fn gather<S>(transport: S) -> (Gathering<S>, Driver<S>) {
    let shared = Shared { transport, buffer: BytesMut::with_capacity(2 * LIMIT), is_dirty: false };
    let shared = Arc::new(Mutex::new(shared));
    (Gathering(Arc::clone(&shared)), Driver(shared))
}
