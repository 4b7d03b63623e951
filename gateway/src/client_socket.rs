//! A client's connection: closed without taking its last answer with it, and given up when the client stops reading.

use std::future::Future;
use std::io::{ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// Longest wait for the other side to take notice of the end.
const FAREWELL: Duration = Duration::from_millis(500);
/// Most that is thrown away meanwhile.
const DISCARDED_BYTES_MAX: usize = 1 << 20;

/// Closes its side, then reads and discards for a moment what the client is still sending.
///
/// A socket that is closed over unread bytes resets the connection, and a client in the middle of sending too much
/// would see the reset instead of the answer that says so. And a client that neither reads nor hangs up must not hold
/// an upstream's answer open: nobody polls an answer that cannot be written, so its own time limits do not run.
pub(crate) struct ClientSocket<S> {
    inner: S,
    /// Longest time that nothing can be written.
    stall_max: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
    ended: bool,
    discarded: usize,
    closing: Option<Pin<Box<Sleep>>>,
}

impl<S> ClientSocket<S> {
    pub fn new(inner: S, stall_max: Duration) -> ClientSocket<S> {
        ClientSocket { inner, stall_max, stalled: None, ended: false, discarded: 0, closing: None }
    }

    /// Passes on what a write came to; one that has been pending for too long is an error.
    fn patiently<T>(&mut self, written: Poll<Result<T>>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stall_max = self.stall_max;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall_max)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ClientSocket<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let (before, room) = (buffer.filled().len(), buffer.remaining());
        let read = ready!(Pin::new(&mut self.inner).poll_read(cx, buffer));
        self.ended |= read.is_err() || (room > 0 && buffer.filled().len() == before);
        Poll::Ready(read)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ClientSocket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.patiently(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, bytes);
        self.patiently(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        self.patiently(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let this = &mut *self;
        if this.closing.is_none() {
            ready!(Pin::new(&mut this.inner).poll_shutdown(cx))?;
            this.closing = Some(Box::pin(tokio::time::sleep(FAREWELL)));
        }
        while !this.ended && this.discarded < DISCARDED_BYTES_MAX {
            let mut scratch = [0; 4_096];
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut this.inner).poll_read(cx, &mut buffer) {
                Poll::Ready(read) => {
                    this.ended = read.is_err() || buffer.filled().is_empty();
                    this.discarded += buffer.filled().len();
                }
                Poll::Pending => {
                    let over = this.closing.as_mut().map_or(Poll::Ready(()), |closing| closing.as_mut().poll(cx));
                    return over.map(Ok);
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}
