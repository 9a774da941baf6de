//! The byte stream under a fake provider's HTTP/2 connection: gathers writes, and says what `h2` cannot.
//!
//! `h2`'s server can neither change SETTINGS_MAX_CONCURRENT_STREAMS during a connection nor send a GOAWAY with a chosen
//! last-stream-id or debug data, and both are things APNs does. Nor can it stand still or babble, as what lies between does.
//! So this layer follows the frames that leave: in a
//! SETTINGS frame it writes the limit that is wanted now, and between two frames it can put a GOAWAY.
//!
//! To change the limit later, the owner of the connection has `h2` announce the extended CONNECT protocol (a SETTINGS
//! frame with one parameter, whose acknowledgement `h2` keeps track of); that parameter is replaced here by the limit,
//! so the peer never sees it.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes gathered before a write pushes back; about what one TLS flush carries well.
const GATHER_BYTES: usize = 64 * 1024;

/// Read as a frame it is longer than any may be.
const NO_FRAME: &[u8] = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";

const FRAME_HEADER_BYTES: usize = 9;
const KIND_HEADERS: u8 = 1;
const KIND_SETTINGS: u8 = 4;
const KIND_PUSH_PROMISE: u8 = 5;
const KIND_GOAWAY: u8 = 7;
const KIND_CONTINUATION: u8 = 9;
const FLAG_ACK: u8 = 1;
const FLAG_END_HEADERS: u8 = 4;
const SETTING_MAX_CONCURRENT_STREAMS: u16 = 3;
const SETTING_ENABLE_CONNECT_PROTOCOL: u16 = 8;
const SETTING_BYTES: usize = 6;

/// What the connection's owner asks of this layer.
pub(super) struct Wire {
    max_streams: AtomicU32,
    waiting: AtomicBool,
    /// To be put between two frames: a frame, or what is none.
    between: Mutex<Option<Vec<u8>>>,
    is_frozen: AtomicBool,
}

impl Wire {
    /// `max_streams` goes out with the first SETTINGS frame.
    pub(super) fn new(max_streams: u32) -> Arc<Self> {
        Arc::new(Self {
            max_streams: AtomicU32::new(max_streams),
            waiting: AtomicBool::new(false),
            between: Mutex::new(None),
            is_frozen: AtomicBool::new(false),
        })
    }

    /// Takes effect with the next SETTINGS frame that `h2` writes.
    pub(super) fn set_max_streams(&self, streams: u32) {
        self.max_streams.store(streams, Ordering::Relaxed);
    }

    /// Takes effect with the next flush. `debug` is GOAWAY's opaque data.
    pub(super) fn send_goaway(&self, last_stream_id: u32, debug: &[u8]) {
        let length = u32::try_from(8 + debug.len()).expect("debug data is a short text");
        let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + 8 + debug.len());
        frame.put_slice(&length.to_be_bytes()[1..]);
        frame.put_slice(&[KIND_GOAWAY, 0]);
        frame.put_u32(0);
        frame.put_u32(last_stream_id & 0x7fff_ffff);
        frame.put_u32(0);
        frame.put_slice(debug);
        self.put_between(frame);
    }

    /// Takes effect with the next flush.
    pub(super) fn send_invalid(&self) {
        self.put_between(NO_FRAME.to_vec());
    }

    fn put_between(&self, bytes: Vec<u8>) {
        *self.between.lock().expect("no panic while held") = Some(bytes);
        self.waiting.store(true, Ordering::Release);
    }

    /// Nothing is read or written from now on.
    pub(super) fn freeze(&self) {
        self.is_frozen.store(true, Ordering::Release);
    }

    fn is_frozen(&self) -> bool {
        self.is_frozen.load(Ordering::Acquire)
    }
}

/// A transport whose outgoing HTTP/2 frames are gathered and, where [`Wire`] asks for it, edited.
pub(super) struct FrameIo<T> {
    io: T,
    out: BytesMut,
    wire: Arc<Wire>,
    header: [u8; FRAME_HEADER_BYTES],
    header_bytes: usize,
    payload_left: usize,
    /// Where in `out` the payload of a SETTINGS frame starts that is not complete yet; nothing from there on may leave.
    settings_at: Option<usize>,
    /// Inside a header block, where no other frame may stand (RFC 9113 §6.10).
    in_header_block: bool,
}

impl<T> FrameIo<T> {
    pub(super) fn new(io: T, wire: Arc<Wire>) -> Self {
        Self {
            io,
            out: BytesMut::with_capacity(16 * 1024),
            wire,
            header: [0; FRAME_HEADER_BYTES],
            header_bytes: 0,
            payload_left: 0,
            settings_at: None,
            in_header_block: false,
        }
    }

    /// Follows the frames in `out[from..]`.
    fn track(&mut self, from: usize) {
        let mut at = from;
        while at < self.out.len() {
            if self.payload_left > 0 {
                let step = self.payload_left.min(self.out.len() - at);
                at += step;
                self.payload_left -= step;
                if self.payload_left == 0 {
                    self.frame_done(at);
                }
                continue;
            }
            let step = (FRAME_HEADER_BYTES - self.header_bytes).min(self.out.len() - at);
            self.header[self.header_bytes..self.header_bytes + step].copy_from_slice(&self.out[at..at + step]);
            self.header_bytes += step;
            at += step;
            if self.header_bytes == FRAME_HEADER_BYTES {
                self.header_bytes = 0;
                let [a, b, c, kind, flags, ..] = self.header;
                self.payload_left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                if matches!(kind, KIND_HEADERS | KIND_PUSH_PROMISE | KIND_CONTINUATION) {
                    self.in_header_block = flags & FLAG_END_HEADERS == 0;
                }
                if kind == KIND_SETTINGS && flags & FLAG_ACK == 0 && self.payload_left > 0 {
                    self.settings_at = Some(at);
                }
            }
        }
    }

    fn frame_done(&mut self, end: usize) {
        let Some(start) = self.settings_at.take() else { return };
        let limit = self.wire.max_streams.load(Ordering::Relaxed);
        for setting in self.out[start..end].chunks_exact_mut(SETTING_BYTES) {
            let id = u16::from_be_bytes([setting[0], setting[1]]);
            if id == SETTING_MAX_CONCURRENT_STREAMS || id == SETTING_ENABLE_CONNECT_PROTOCOL {
                setting[..2].copy_from_slice(&SETTING_MAX_CONCURRENT_STREAMS.to_be_bytes());
                setting[2..].copy_from_slice(&limit.to_be_bytes());
            }
        }
    }

    fn between_frames(&self) -> bool {
        self.header_bytes == 0 && self.payload_left == 0 && !self.in_header_block
    }

    fn insert(&mut self) {
        if !self.wire.waiting.load(Ordering::Acquire) || !self.between_frames() {
            return;
        }
        self.wire.waiting.store(false, Ordering::Release);
        if let Some(bytes) = self.wire.between.lock().expect("no panic while held").take() {
            self.out.put_slice(&bytes);
        }
    }
}

impl<T: AsyncWrite + Unpin> FrameIo<T> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nobody is to be woken: there is no end to it.
        if self.wire.is_frozen() {
            return Poll::Pending;
        }
        loop {
            let end = self.settings_at.unwrap_or(self.out.len());
            if end == 0 {
                return Poll::Ready(Ok(()));
            }
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.out[..end]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.advance(written);
            self.settings_at = self.settings_at.map(|at| at - written);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for FrameIo<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.wire.is_frozen() {
            return Poll::Pending;
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for FrameIo<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.out.len() >= GATHER_BYTES {
            ready!(self.poll_drain(cx))?;
        }
        let from = self.out.len();
        self.out.extend_from_slice(buf);
        self.track(from);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.insert();
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
