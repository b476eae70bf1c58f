//! Closed-loop clients on epoll, on one thread: each sends `pipeline` requests, waits for all replies, and sends again. The
//! same for all three servers; knows only the protocol.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::protocol::{REPLY, request};

const EVENTS_MAX: usize = 256;
/// A server that answers nothing for so long has failed.
const REPLY_WAIT_MAX_MS: u16 = 10_000;

/// What to send.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Connections.
    pub clients: usize,
    /// Requests that a client sends before it waits.
    pub pipeline: usize,
    /// Length of each value.
    pub value_bytes: usize,
    /// Not measured, before the rest.
    pub warm_up: Duration,
    /// How long to measure.
    pub measured: Duration,
}

/// What came of it.
#[derive(Debug)]
pub struct Measured {
    /// Requests answered, warm-up included.
    pub requests: u64,
    /// Of the measured time.
    pub per_second: f64,
    /// From the send to the last reply of a pipeline.
    pub latency_us: Histogram<u64>,
}

struct Client {
    socket: TcpStream,
    began: Instant,
    received_bytes: usize,
}

impl Client {
    fn send(&mut self, requests: &[u8]) -> io::Result<()> {
        self.began = Instant::now();
        self.received_bytes = 0;
        // One pipeline fits into the socket's buffer, for which the server makes space before it replies.
        self.socket.write_all(requests)
    }
}

/// Sends to `server` until the time is over. Every reply is checked.
pub fn run(server: SocketAddr, load: &Load) -> io::Result<Measured> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let expected = REPLY.repeat(load.pipeline);
    let mut clients = Vec::with_capacity(load.clients);
    let requests: Vec<Vec<u8>> = (0..load.clients)
        .map(|number| request(&format!("key:{number:08}"), &vec![b'x'; load.value_bytes]).repeat(load.pipeline))
        .collect();
    for number in 0..load.clients {
        let socket = TcpStream::connect(server)?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
        clients.push(Client { socket, began: Instant::now(), received_bytes: 0 });
    }
    let measured_from = Instant::now() + load.warm_up;
    let end = measured_from + load.measured;
    for (client, requests) in clients.iter_mut().zip(&requests) {
        client.send(requests)?;
    }
    let mut latency_us = Histogram::new_with_bounds(1, 60_000_000, 3).expect("constant bounds");
    let (mut answered, mut answered_measured) = (0, 0);
    let mut events = [EpollEvent::empty(); EVENTS_MAX];
    let mut memory = vec![0; expected.len()];
    loop {
        let count = epoll.wait(&mut events, REPLY_WAIT_MAX_MS)?;
        if count == 0 {
            return Err(io::Error::new(ErrorKind::TimedOut, "no reply"));
        }
        for event in &events[..count] {
            let number = event.data() as usize;
            let client = &mut clients[number];
            let missing = &expected[client.received_bytes..];
            let bytes = client.socket.read(&mut memory[..missing.len()])?;
            if bytes == 0 || memory[..bytes] != missing[..bytes] {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    format!("client {number}: closed or a wrong reply"),
                ));
            }
            client.received_bytes += bytes;
            if client.received_bytes < expected.len() {
                continue;
            }
            let now = Instant::now();
            answered += load.pipeline as u64;
            if now >= end {
                let per_second = answered_measured as f64 / load.measured.as_secs_f64();
                return Ok(Measured { requests: answered, per_second, latency_us });
            }
            if now >= measured_from {
                answered_measured += load.pipeline as u64;
                latency_us.saturating_record((now - client.began).as_micros() as u64);
            }
            client.send(&requests[number])?;
        }
    }
}
