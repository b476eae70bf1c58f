//! The metrics endpoint: HTTP on a thread of its own, because a scraper may be slow and the ring thread may not wait for it.
//! Asks the ring thread for a view and renders it here. Decides nothing.

pub mod text;
pub mod waterfall;
pub mod waterfall_report;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use walferry_engine::waker::Waker;
use walferry_engine::world;

use crate::metrics::text::{MetricsView, render};

/// A request that is longer is refused.
const REQUEST_BYTES_MAX: usize = 8 << 10;
const HEADERS_MAX: usize = 64;
/// A scraper must have sent its request, and taken the answer, within this time.
const SCRAPE_MS_MAX: u64 = 2_000;
/// The ring thread must have answered within this time.
const SNAPSHOT_MS_MAX: u64 = 1_000;
/// Bytes that a refused scraper may still be sending; read, so that it sees the answer and not a reset.
const REST_BYTES_MAX: usize = 1 << 20;

type Ask = SyncSender<MetricsView>;

/// The ring thread's end.
#[derive(Debug)]
pub struct Metrics {
    asks: Receiver<Ask>,
    address: SocketAddr,
}

impl Metrics {
    /// Listens on `address`; `waker` tells the ring thread that a view is asked for.
    pub fn start(address: SocketAddr, waker: Waker) -> std::io::Result<Metrics> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        // One scrape at a time, so never more than one ask.
        let (asks_in, asks) = sync_channel::<Ask>(1);
        let view = move || {
            let (answer_in, answer) = sync_channel(1);
            asks_in.try_send(answer_in).ok()?;
            waker.wake();
            answer.recv_timeout(Duration::from_millis(SNAPSHOT_MS_MAX)).ok()
        };
        let serve = move || {
            for stream in listener.incoming() {
                // A scraper that left, or descriptors that ran out: the next scrape comes in seconds.
                let served = stream.and_then(|stream| serve(stream, &view));
                if let Err(error) = served {
                    tracing::debug!(%error, "a scrape failed");
                }
            }
        };
        std::thread::Builder::new().name("metrics".to_owned()).spawn(serve)?;
        Ok(Metrics { asks, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers whoever asks.
    pub fn answer(&self, view: impl Fn() -> MetricsView) {
        for ask in self.asks.try_iter() {
            // Whoever no longer waits needs no answer.
            let _ = ask.try_send(view());
        }
    }
}

/// Reads what a scraper still sends, within the bounds of size and time: whoever sends a byte now and then holds up the others no
/// longer than that.
fn skip_rest(stream: &mut TcpStream) -> std::io::Result<()> {
    let deadline = world::now() + Duration::from_millis(SCRAPE_MS_MAX);
    let (mut chunk, mut bytes) = ([0; 1024], 0);
    while bytes < REST_BYTES_MAX {
        let left = deadline.saturating_duration_since(world::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk)? {
            0 => break,
            count => bytes += count,
        }
    }
    Ok(())
}

/// One request, one answer, and the connection ends.
fn serve(mut stream: TcpStream, view: impl Fn() -> Option<MetricsView>) -> std::io::Result<()> {
    stream.set_write_timeout(Some(Duration::from_millis(SCRAPE_MS_MAX)))?;
    let (status, body) = match read_request(&mut stream)? {
        Request::Scrape { head } => match view() {
            Some(_) if head => ("200 OK", String::new()),
            Some(view) => ("200 OK", render(&view)),
            None => ("503 Service Unavailable", "the node is busy; ask again\n".to_owned()),
        },
        Request::Elsewhere => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        Request::Method => ("405 Method Not Allowed", "only GET and HEAD are answered\n".to_owned()),
        Request::Bad => ("400 Bad Request", "this is no HTTP request of at most 8 KiB\n".to_owned()),
    };
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let bytes = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {bytes}\r\n{allow}Connection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    skip_rest(&mut stream)
}

#[derive(Debug, PartialEq, Eq)]
enum Request {
    Scrape { head: bool },
    Elsewhere,
    Method,
    Bad,
}

fn read_request(stream: &mut TcpStream) -> std::io::Result<Request> {
    let deadline = world::now() + Duration::from_millis(SCRAPE_MS_MAX);
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        if let Some(request) = parse(&bytes) {
            return Ok(request);
        }
        let left = deadline.saturating_duration_since(world::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

/// `None` while the head of the request is incomplete.
fn parse(bytes: &[u8]) -> Option<Request> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) if bytes.len() < REQUEST_BYTES_MAX => None,
        Ok(httparse::Status::Partial) | Err(_) => Some(Request::Bad),
        Ok(httparse::Status::Complete(_)) => {
            let path = request.path.unwrap_or_default().split('?').next();
            Some(match (request.method, path) {
                (Some(method @ ("GET" | "HEAD")), Some("/metrics")) => Request::Scrape { head: method == "HEAD" },
                (Some("GET" | "HEAD"), _) => Request::Elsewhere,
                _ => Request::Method,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let parsed = |text: &str| parse(text.as_bytes());
        assert_eq!(parsed("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"), Some(Request::Scrape { head: false }));
        assert_eq!(parsed("GET /metrics?x=1 HTTP/1.0\r\n\r\n"), Some(Request::Scrape { head: false }));
        assert_eq!(parsed("HEAD /metrics HTTP/1.1\r\n\r\n"), Some(Request::Scrape { head: true }));
        assert_eq!(parsed("GET / HTTP/1.1\r\n\r\n"), Some(Request::Elsewhere));
        assert_eq!(parsed("POST /metrics HTTP/1.1\r\n\r\n"), Some(Request::Method));
        assert_eq!(parsed("*1\r\n$4\r\nPING\r\n"), Some(Request::Bad));
        assert_eq!(parsed("GET /metrics HTTP/1.1\r\nHost"), None);
        let long = format!("GET /{} ", "x".repeat(REQUEST_BYTES_MAX));
        assert_eq!(parsed(&long), Some(Request::Bad));
    }
}
