//! What a round trip through a link takes: one byte there and back over TCP. Every report states this and not what was
//! asked for.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

/// Exchanges of one measurement, unless they would take longer than a second.
const EXCHANGES_MAX: u32 = 200;
/// Exchanges of one measurement, however long they take.
const EXCHANGES_MIN: u32 = 5;
/// How long a measurement goes on once it has enough.
const MEASURE_TIME: Duration = Duration::from_secs(1);
/// An answer that takes longer does not come.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Measured round trips, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rtt {
    /// How many.
    pub samples: u64,
    /// The fastest.
    pub min_us: f64,
    /// Half were faster.
    pub p50_us: f64,
    /// 99 % were faster.
    pub p99_us: f64,
}

impl std::fmt::Display for Rtt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |us: f64| us / 1e3;
        write!(f, "{:.3} ms (min {:.3}, p99 {:.3})", ms(self.p50_us), ms(self.min_us), ms(self.p99_us))
    }
}

/// Sends bytes to `address`, behind which `far` listens, and times their return.
pub fn measure(address: SocketAddr, far: TcpListener) -> std::io::Result<Rtt> {
    let echo = std::thread::Builder::new().name("link-echo".to_owned()).spawn(move || echo(&far))?;
    let measured = exchange(address);
    if measured.is_ok() {
        // It ended when the connection did; without one it waits for ever and is left behind.
        drop(echo.join());
    }
    measured
}

fn echo(listener: &TcpListener) {
    let Ok((mut socket, _)) = listener.accept() else { return };
    // Without it the answers are later, which the measurement then tells.
    let _ = socket.set_nodelay(true);
    let mut byte = [0];
    while matches!(socket.read(&mut byte), Ok(1)) && socket.write_all(&byte).is_ok() {}
}

fn exchange(address: SocketAddr) -> std::io::Result<Rtt> {
    let silent = |error: std::io::Error| {
        let seconds = ANSWER_TIMEOUT.as_secs();
        let text = format!("no byte came back through the link within {seconds} s ({error}): is it cut?");
        std::io::Error::other(text)
    };
    let mut socket = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT).map_err(silent)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    let longest_ns = ANSWER_TIMEOUT.as_nanos() as u64;
    let mut histogram = Histogram::<u64>::new_with_bounds(1, longest_ns, 3).map_err(std::io::Error::other)?;
    let mut byte = [b'w'];
    // The first one would pay for the handshake of what lies behind a proxy.
    for _ in 0..2 {
        socket.write_all(&byte)?;
        socket.read_exact(&mut byte).map_err(silent)?;
    }
    let began = Instant::now();
    for count in 0..EXCHANGES_MAX {
        if count >= EXCHANGES_MIN && began.elapsed() >= MEASURE_TIME {
            break;
        }
        let sent = Instant::now();
        socket.write_all(&byte)?;
        socket.read_exact(&mut byte).map_err(silent)?;
        histogram.saturating_record(sent.elapsed().as_nanos() as u64);
    }
    let us = |nanos: u64| nanos as f64 / 1e3;
    Ok(Rtt {
        samples: histogram.len(),
        min_us: us(histogram.min()),
        p50_us: us(histogram.value_at_quantile(0.5)),
        p99_us: us(histogram.value_at_quantile(0.99)),
    })
}
