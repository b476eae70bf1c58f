//! One thread that speaks TLS for every connection that the kernel does not: bytes of a socket pair on one side, records on the
//! other. Level-triggered epoll; what cannot be passed on is not read, so a slow side holds back the fast one and memory stays
//! bounded. The end of one direction is passed on by itself; a reset ends both.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rustls::Connection;

use crate::quota::Quota;
use crate::terminate::Counts;

/// Connections at once; beyond it a new one is refused. More than clients and peers together may have.
const CONNECTIONS_MAX: usize = 1 << 17;
/// Read from a side at once, and so what is held for the other: four records.
const CHUNK_BYTES: usize = 64 << 10;
/// How often each way is gone for one connection before the next has its turn.
const ROUNDS_MAX: usize = 4;
const EVENTS_MAX: usize = 256;
/// What is left to send when the local side has hung up has to move at least this often.
const LEAVE_TIME_MAX: Duration = Duration::from_secs(5);
/// Deadlines are looked at this often.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Commits and heartbeats pass through here, as through the cluster's thread.
const THREAD_NICE: libc::c_int = -10;
const WAKE: u64 = u64::MAX;

/// A connection to take over.
pub(crate) struct Job {
    pub(crate) tls: Connection,
    pub(crate) tcp: TcpStream,
    pub(crate) local: UnixStream,
    pub(crate) address: SocketAddr,
}

enum Order {
    Take(Box<Job>),
    /// End once every connection has, at the latest then.
    End(Instant),
}

/// The thread's other end.
#[derive(Debug)]
pub(crate) struct Relay {
    orders: Sender<Order>,
    wake: Arc<EventFd>,
    counts: Arc<Counts>,
    thread: JoinHandle<()>,
}

impl Relay {
    pub(crate) fn start(counts: Arc<Counts>) -> io::Result<Relay> {
        let (orders, inbox) = channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        let worker = Worker {
            epoll,
            inbox,
            wake: Arc::clone(&wake),
            lines: HashMap::new(),
            next: 0,
            chunk: vec![0; CHUNK_BYTES],
            quota: Quota::new(Instant::now()),
            counts: Arc::clone(&counts),
            end_at: None,
        };
        let thread = std::thread::Builder::new().name("tls-relay".to_owned()).spawn(move || worker.run())?;
        Ok(Relay { orders, wake, counts, thread })
    }

    pub(crate) fn take(&self, job: Job) -> io::Result<()> {
        if self.counts.relaying.load(Ordering::Relaxed) >= CONNECTIONS_MAX as u64 {
            return Err(io::Error::other(format!("{CONNECTIONS_MAX} TLS connections are relayed, which is the bound")));
        }
        self.counts.relaying.fetch_add(1, Ordering::Relaxed);
        self.order(Order::Take(Box::new(job)))
    }

    fn order(&self, order: Order) -> io::Result<()> {
        self.orders.send(order).map_err(|_| io::Error::other("the thread that relays TLS has ended"))?;
        self.wake.write(1)?;
        Ok(())
    }

    pub(crate) fn end(self, time_max: Duration) {
        if self.order(Order::End(Instant::now() + time_max)).is_ok() {
            let _ = self.thread.join();
        }
    }
}

/// One connection.
struct Line {
    tls: Connection,
    tcp: TcpStream,
    local: UnixStream,
    address: SocketAddr,
    /// Plain bytes for the local side, from `passed` on.
    inward: Vec<u8>,
    passed: usize,
    /// Nothing more comes from the local side.
    local_ended: bool,
    /// Nobody reads on the local side any more.
    local_gone: bool,
    /// Nothing more comes from the network.
    tcp_ended: bool,
    /// The ends were passed on.
    told_tcp: bool,
    told_local: bool,
    /// Sides that are closed both ways, though bytes may still be in them: epoll would report them for ever.
    hung_up: [bool; 2],
    /// What epoll was told to wait for; none when the side is not watched any more.
    waits: [Option<EpollFlags>; 2],
    moved_at: Instant,
}

const TCP: usize = 0;
const LOCAL: usize = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    GoesOn,
    Over,
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl Line {
    fn pump(&mut self, chunk: &mut [u8], counts: &Counts) -> io::Result<Verdict> {
        let mut rounds = 0;
        // A side that has hung up is not waited for any more; what its buffer holds is a bounded rest.
        while rounds < ROUNDS_MAX || self.hung_up != [false; 2] {
            rounds += 1;
            let outward = self.outward(chunk)?;
            let inward = self.inward(chunk)?;
            if outward + inward > 0 {
                // What comes for somebody who is gone is no reason to stay.
                if outward > 0 || !self.local_gone {
                    self.moved_at = Instant::now();
                }
                counts.relay_bytes.fetch_add((outward + inward) as u64, Ordering::Relaxed);
            }
            let both_told = self.told_tcp && self.told_local;
            if both_told || (self.told_tcp && self.local_gone && self.tcp_ended) {
                return Ok(Verdict::Over);
            }
            if outward + inward == 0 {
                break;
            }
        }
        Ok(Verdict::GoesOn)
    }

    /// From the local side to the network; the bytes that moved.
    fn outward(&mut self, chunk: &mut [u8]) -> io::Result<usize> {
        self.flush()?;
        let mut moved = 0;
        if !self.tls.wants_write() && !self.local_ended {
            match self.local.read(chunk) {
                Ok(0) => self.end_local(),
                Ok(bytes) => {
                    self.tls.writer().write_all(&chunk[..bytes])?;
                    moved = bytes;
                }
                Err(error) if would_block(&error) => {}
                // The local side closed its socket with bytes unread in it.
                Err(_) => self.end_local(),
            }
            self.flush()?;
        }
        if self.local_ended && !self.tls.wants_write() && !self.told_tcp {
            self.told_tcp = true;
            // Fails only when the connection is gone already, which reading will tell.
            let _ = self.tcp.shutdown(Shutdown::Write);
        }
        Ok(moved)
    }

    fn end_local(&mut self) {
        self.local_ended = true;
        self.tls.send_close_notify();
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.tcp) {
                Ok(_) => {}
                Err(error) if would_block(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// From the network to the local side; the bytes that moved.
    fn inward(&mut self, chunk: &mut [u8]) -> io::Result<usize> {
        let mut moved = self.pass_on();
        if self.inward.is_empty() && !self.tcp_ended {
            match self.tcp.read(chunk) {
                Ok(0) => self.tcp_ended = true,
                Ok(bytes) => {
                    self.decrypt(&chunk[..bytes])?;
                    moved += self.pass_on().max(1);
                }
                Err(error) if would_block(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if self.tcp_ended && self.inward.is_empty() && !self.told_local {
            self.told_local = true;
            let _ = self.local.shutdown(Shutdown::Write);
        }
        Ok(moved)
    }

    /// Hands what is there to the local side, as far as it takes it.
    fn pass_on(&mut self) -> usize {
        let mut moved = 0;
        while self.passed < self.inward.len() && !self.local_gone {
            match self.local.write(&self.inward[self.passed..]) {
                Ok(bytes) => {
                    self.passed += bytes;
                    moved += bytes;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return moved,
                Err(_) => self.local_gone = true,
            }
        }
        self.inward.clear();
        self.passed = 0;
        moved
    }

    fn decrypt(&mut self, mut records: &[u8]) -> io::Result<()> {
        while !records.is_empty() && !self.tcp_ended {
            if self.tls.read_tls(&mut records)? == 0 {
                self.tcp_ended = true;
            }
            if let Err(error) = self.tls.process_new_packets() {
                // The alert that tells the other side why.
                let _ = self.flush();
                return Err(io::Error::other(error));
            }
            match self.tls.reader().read_to_end(&mut self.inward) {
                // It said that it ends; what follows would be nobody's.
                Ok(_) => self.tcp_ended = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What is waited for on each side; none when nothing will come of it.
    fn interest(&self) -> [Option<EpollFlags>; 2] {
        let flags = |readable, writable| {
            let mut flags = EpollFlags::empty();
            flags.set(EpollFlags::EPOLLIN, readable);
            flags.set(EpollFlags::EPOLLOUT, writable);
            flags
        };
        let tcp = flags(self.inward.is_empty() && !self.tcp_ended, self.tls.wants_write());
        let local = flags(!self.tls.wants_write() && !self.local_ended, !self.inward.is_empty());
        [(TCP, tcp), (LOCAL, local)].map(|(side, flags)| (!self.hung_up[side]).then_some(flags))
    }

    fn handle_hang_up(&mut self, side: usize) {
        self.hung_up[side] = true;
        self.local_gone |= side == LOCAL;
    }

    fn is_late(&self, now: Instant) -> bool {
        self.local_gone && now.saturating_duration_since(self.moved_at) > LEAVE_TIME_MAX
    }
}

struct Worker {
    epoll: Epoll,
    inbox: Receiver<Order>,
    wake: Arc<EventFd>,
    lines: HashMap<u64, Line>,
    next: u64,
    chunk: Vec<u8>,
    quota: Quota,
    counts: Arc<Counts>,
    end_at: Option<Instant>,
}

impl Worker {
    fn run(mut self) {
        // SAFETY: a plain system call; 0 is the calling thread. Where it is refused, the thread goes on as any other.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, THREAD_NICE) };
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let mut looked = Instant::now();
        while !self.has_ended() {
            let timeout = EpollTimeout::try_from(LOOK_INTERVAL).expect("a short time");
            let ready = match self.epoll.wait(&mut events, timeout) {
                Ok(ready) => ready,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => {
                    return tracing::error!(%error, "the thread that relays TLS has ended: no TLS link works any more");
                }
            };
            for event in &events[..ready] {
                match event.data() {
                    WAKE => drop(self.wake.read()),
                    id => self.turn(id, event.events()),
                }
            }
            while let Ok(order) = self.inbox.try_recv() {
                match order {
                    Order::Take(job) => self.take(*job),
                    Order::End(at) => self.end_at = Some(at),
                }
            }
            if looked.elapsed() >= LOOK_INTERVAL {
                looked = Instant::now();
                let late: Vec<u64> =
                    self.lines.iter().filter(|(_, line)| line.is_late(looked)).map(|(id, _)| *id).collect();
                late.into_iter().for_each(|id| self.drop_line(id));
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.end_at.is_some_and(|at| self.lines.is_empty() || Instant::now() >= at)
    }

    fn take(&mut self, job: Job) {
        let Job { tls, tcp, local, address } = job;
        let id = self.next;
        self.next += 1;
        let line = Line {
            tls,
            tcp,
            local,
            address,
            inward: Vec::new(),
            passed: 0,
            local_ended: false,
            local_gone: false,
            tcp_ended: false,
            told_tcp: false,
            told_local: false,
            hung_up: [false; 2],
            waits: [Some(EpollFlags::empty()); 2],
            moved_at: Instant::now(),
        };
        let watch = |side: usize| EpollEvent::new(EpollFlags::empty(), id << 1 | side as u64);
        let watched = self.epoll.add(&line.tcp, watch(TCP)).and_then(|()| self.epoll.add(&line.local, watch(LOCAL)));
        self.lines.insert(id, line);
        match watched {
            Ok(()) => self.turn(id << 1, EpollFlags::empty()),
            Err(error) => {
                tracing::warn!(%address, %error, "a TLS connection cannot be relayed");
                self.drop_line(id);
            }
        }
    }

    /// One side of a line is ready.
    fn turn(&mut self, event: u64, what: EpollFlags) {
        let (id, side) = (event >> 1, (event & 1) as usize);
        let Some(line) = self.lines.get_mut(&id) else { return };
        if what.contains(EpollFlags::EPOLLHUP) {
            line.handle_hang_up(side);
        }
        match line.pump(&mut self.chunk, &self.counts) {
            Ok(Verdict::Over) => self.drop_line(id),
            Ok(Verdict::GoesOn) => self.watch(id),
            Err(error) => {
                let address = line.address;
                if self.quota.take(Instant::now()) {
                    tracing::info!(%address, "a TLS connection ended: {error}");
                }
                self.drop_line(id);
            }
        }
    }

    fn watch(&mut self, id: u64) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        let interest = line.interest();
        for side in [TCP, LOCAL] {
            let socket = if side == TCP { line.tcp.as_fd() } else { line.local.as_fd() };
            let outcome = match (line.waits[side], interest[side]) {
                (None, _) => Ok(()),
                (Some(_), None) => self.epoll.delete(socket),
                (Some(was), Some(is)) if was == is => Ok(()),
                (Some(_), Some(is)) => self.epoll.modify(socket, &mut EpollEvent::new(is, id << 1 | side as u64)),
            };
            if let Err(error) = outcome {
                tracing::warn!(address = %line.address, %error, "a TLS connection cannot be watched and ends");
                return self.drop_line(id);
            }
            line.waits[side] = line.waits[side].and(interest[side]);
        }
    }

    /// Closes both sides; epoll forgets them with their last descriptor.
    fn drop_line(&mut self, id: u64) {
        if self.lines.remove(&id).is_some() {
            self.counts.relaying.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
