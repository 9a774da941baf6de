//! Connections that leave in few, large writes.
//!
//! h2 flushes its transport once per request as soon as a body is 256 bytes or more, and whenever the task that queues
//! a request is not the one that drives the connection. One TLS record and one system call per push double its cost.
//! Here h2 writes into a buffer that accepts every flush at once; [`Gathering::poll`] lets h2 write all it has and only
//! then moves the buffer to the transport, in one write where the transport takes it.
//!
//! What it guarantees:
//! - At most [`GATHER_LIMIT`] bytes wait here; past that h2's writes wait for the transport.
//! - The buffer is drained in the very call that polled h2 (elsewhere a wake-up can be lost), until the transport's own
//!   flush is done, and once more after h2 has ended: its last frames (GOAWAY) are still here then.
//! - A write error ends the connection at once, whatever h2 thinks.
//!
//! A driver hands over all its requests before it polls, in the same task; that takes the place of yielding once so
//! that other tasks may queue theirs.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The most bytes gathered; then h2 waits for the transport, so that a stalled peer cannot grow the buffer.
pub const GATHER_LIMIT: usize = 64 * 1024;

/// Anything that carries bytes both ways: TCP, TLS over it, a pipe in memory.
pub trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

struct Gathered<S> {
    transport: S,
    buffer: BytesMut,
    /// Written to us and not yet confirmed by a flush of the transport (TLS keeps records of its own).
    unflushed: bool,
    /// h2 was told to wait; it must be polled again once there is room.
    pushed_back: bool,
    bytes_read: u64,
    bytes_written: u64,
    frames: FrameCounter,
    /// Of the DATA, what had left when the transport's last flush was done.
    data_bytes_left: u64,
}

/// Counts the payload of DATA frames in what h2 writes (RFC 9113 section 4.1). What was handed to h2 and is not counted
/// here still sits in h2, for want of the peer's window: nothing h2 offers tells that.
struct FrameCounter {
    /// Bytes of the present frame (at first: of the connection preface) that are still to come.
    rest: usize,
    is_data: bool,
    head: [u8; FRAME_HEAD],
    head_len: usize,
    data_bytes: u64,
}

const FRAME_HEAD: usize = 9;
const PREFACE: usize = 24;
const DATA: u8 = 0;

impl FrameCounter {
    const fn new() -> Self {
        Self { rest: PREFACE, is_data: false, head: [0; FRAME_HEAD], head_len: 0, data_bytes: 0 }
    }

    fn count(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let taken = if self.rest > 0 {
                let taken = self.rest.min(bytes.len());
                self.rest -= taken;
                self.data_bytes += if self.is_data { taken as u64 } else { 0 };
                taken
            } else {
                let taken = (FRAME_HEAD - self.head_len).min(bytes.len());
                self.head[self.head_len..self.head_len + taken].copy_from_slice(&bytes[..taken]);
                self.head_len += taken;
                if self.head_len == FRAME_HEAD {
                    self.head_len = 0;
                    self.rest =
                        usize::from(self.head[0]) << 16 | usize::from(self.head[1]) << 8 | usize::from(self.head[2]);
                    self.is_data = self.head[3] == DATA;
                }
                taken
            };
            bytes = &bytes[taken..];
        }
    }
}

impl<S: AsyncWrite + Unpin> Gathered<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.buffer.is_empty() {
            let written = ready!(Pin::new(&mut self.transport).poll_write(cx, &self.buffer))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.buffer.advance(written);
            self.bytes_written += written as u64;
        }
        ready!(Pin::new(&mut self.transport).poll_flush(cx))?;
        self.unflushed = false;
        self.data_bytes_left = self.frames.data_bytes;
        Poll::Ready(Ok(()))
    }

    fn take(&mut self, bytes: &[u8]) {
        self.frames.count(bytes);
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes that may be gathered now, at least one.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.buffer.len() >= GATHER_LIMIT {
            self.pushed_back = true;
            ready!(self.poll_drain(cx))?;
            self.pushed_back = false;
        }
        Poll::Ready(Ok(GATHER_LIMIT - self.buffer.len()))
    }
}

/// What h2 is given as its transport.
pub struct GatherIo<S>(Arc<Mutex<Gathered<S>>>);

impl<S: AsyncRead + Unpin> AsyncRead for GatherIo<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut gathered = self.0.lock().expect("no panic while held");
        let before = into.filled().len();
        ready!(Pin::new(&mut gathered.transport).poll_read(cx, into))?;
        gathered.bytes_read += (into.filled().len() - before) as u64;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for GatherIo<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut gathered = self.0.lock().expect("no panic while held");
        let taken = data.len().min(ready!(gathered.poll_room(cx))?);
        gathered.take(&data[..taken]);
        gathered.unflushed = true;
        Poll::Ready(Ok(taken))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut gathered = self.0.lock().expect("no panic while held");
        let mut room = ready!(gathered.poll_room(cx))?;
        let mut taken = 0;
        for slice in data {
            let part = slice.len().min(room);
            gathered.take(&slice[..part]);
            (taken, room) = (taken + part, room - part);
        }
        gathered.unflushed = true;
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut gathered = self.0.lock().expect("no panic while held");
        ready!(gathered.poll_drain(cx))?;
        Pin::new(&mut gathered.transport).poll_shutdown(cx)
    }
}

/// How far a connection's bytes have come; two looks tell whether anything moved between them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// Payload of the DATA frames h2 wrote.
    pub data_bytes: u64,
    /// How much of it has surely left this process.
    pub data_bytes_left: u64,
    /// Bytes are waiting for the transport.
    pub waiting: bool,
}

/// Watches the buffer from outside.
pub struct Gauge<S>(Arc<Mutex<Gathered<S>>>);

impl<S> Gauge<S> {
    pub fn progress(&self) -> Progress {
        let gathered = self.0.lock().expect("no panic while held");
        Progress {
            bytes_read: gathered.bytes_read,
            bytes_written: gathered.bytes_written,
            data_bytes: gathered.frames.data_bytes,
            data_bytes_left: gathered.data_bytes_left,
            waiting: gathered.unflushed,
        }
    }
}

/// A connection made over a [`GatherIo`], with the duty to drain what it wrote.
pub struct Gathering<S, C> {
    connection: Pin<Box<C>>,
    gathered: Arc<Mutex<Gathered<S>>>,
    ended: Option<Result<(), h2::Error>>,
}

impl<S, C> Gathering<S, C>
where
    S: AsyncWrite + Unpin,
    C: Future<Output = Result<(), h2::Error>>,
{
    /// `connection` must write to the [`GatherIo`] that came with `gauge`.
    pub fn new(connection: C, gauge: &Gauge<S>) -> Self {
        Self { connection: Box::pin(connection), gathered: Arc::clone(&gauge.0), ended: None }
    }

    /// Drives the connection one step. Ready once it is over and its last bytes have left, or a write failed. Not to be
    /// polled again after that.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        if self.ended.is_none()
            && let Poll::Ready(result) = self.connection.as_mut().poll(cx)
        {
            self.ended = Some(result);
        }
        let mut gathered = self.gathered.lock().expect("no panic while held");
        if gathered.unflushed {
            match gathered.poll_drain(cx) {
                Poll::Ready(Ok(())) => {
                    if gathered.pushed_back {
                        gathered.pushed_back = false;
                        cx.waker().wake_by_ref();
                    }
                }
                // h2 may still wait for an answer that cannot come. Its own error, where it has one, says more.
                Poll::Ready(Err(_)) => {
                    return Poll::Ready(self.ended.take().unwrap_or_else(|| Err(h2::Reason::CANCEL.into())));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        match self.ended.take() {
            Some(result) => Poll::Ready(result),
            None => Poll::Pending,
        }
    }
}

/// Splits a transport into what h2 writes to and the means to watch and drain it.
pub fn gather<S>(transport: S) -> (GatherIo<S>, Gauge<S>) {
    let gathered = Arc::new(Mutex::new(Gathered {
        transport,
        buffer: BytesMut::new(),
        unflushed: false,
        pushed_back: false,
        bytes_read: 0,
        bytes_written: 0,
        frames: FrameCounter::new(),
        data_bytes_left: 0,
    }));
    (GatherIo(Arc::clone(&gathered)), Gauge(gathered))
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Takes writes as told, and has nothing to read.
    #[derive(Default)]
    struct Fussy {
        refused_polls: usize,
        is_broken: bool,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl AsyncRead for Fussy {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Fussy {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
            if self.is_broken {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if self.refused_polls > 0 {
                self.refused_polls -= 1;
                return Poll::Pending;
            }
            self.written.lock().expect("lock").extend_from_slice(data);
            Poll::Ready(Ok(data.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_write_error_ends_the_connection_although_h2_still_waits() {
        let (io, gauge) = gather(Fussy { is_broken: true, ..Fussy::default() });
        let (_sender, connection) = h2::client::handshake(io).await.expect("only gathered so far");
        let mut gathering = Gathering::new(connection, &gauge);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(matches!(gathering.poll(&mut cx), Poll::Ready(Err(_))));
    }

    #[tokio::test]
    async fn the_last_bytes_leave_after_the_connection_has_ended() {
        let written = Arc::new(Mutex::new(Vec::new()));
        let fussy = Fussy { refused_polls: 2, written: Arc::clone(&written), ..Fussy::default() };
        let (mut io, gauge) = gather(fussy);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut io).poll_write(&mut cx, b"goodbye").is_ready());
        let mut gathering = Gathering::new(std::future::ready(Ok(())), &gauge);
        assert!(gathering.poll(&mut cx).is_pending());
        assert!(gathering.poll(&mut cx).is_pending());
        assert!(written.lock().expect("lock").is_empty() && gauge.progress().waiting);
        assert!(matches!(gathering.poll(&mut cx), Poll::Ready(Ok(()))));
        assert_eq!(*written.lock().expect("lock"), b"goodbye");
    }

    #[test]
    fn the_buffer_is_bounded() {
        let (mut io, gauge) = gather(Fussy { refused_polls: usize::MAX, ..Fussy::default() });
        let mut cx = Context::from_waker(Waker::noop());
        let data = vec![0; GATHER_LIMIT - 10];
        assert!(matches!(Pin::new(&mut io).poll_write(&mut cx, &data), Poll::Ready(Ok(n)) if n == data.len()));
        assert!(matches!(Pin::new(&mut io).poll_write(&mut cx, &data), Poll::Ready(Ok(10))));
        assert!(Pin::new(&mut io).poll_write(&mut cx, &data).is_pending());
        assert_eq!(gauge.progress().bytes_written, 0);
    }

    #[test]
    fn data_is_counted_however_the_bytes_are_cut() {
        let mut bytes = vec![b'P'; PREFACE];
        for (kind, length) in [(4, 6_u16), (1, 300), (DATA, 1000), (DATA, 0), (1, 5), (DATA, 70)] {
            let [high, low] = length.to_be_bytes();
            bytes.extend_from_slice(&[0, high, low, kind, 0, 0, 0, 0, 1]);
            bytes.extend(std::iter::repeat_n(0_u8, usize::from(length)));
        }
        for size in [1, 2, 7, 100, 5000] {
            let mut counter = FrameCounter::new();
            bytes.chunks(size).for_each(|chunk| counter.count(chunk));
            assert_eq!((counter.data_bytes, counter.rest, counter.head_len), (1070, 0, 0), "{size}");
        }
    }
}
