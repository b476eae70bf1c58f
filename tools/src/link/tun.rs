//! A link between two TUN devices, one of them in a network namespace: the kernels' own TCP lives through the distance,
//! with its handshake, slow start, congestion control and retransmission. One thread carries packets between them.
//! Needs root and iproute2.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::control::Control;
use super::delay_line::{DelayLine, Fate, OnLoss};
use super::namespace::{LINKS_MAX, Namespace, Plan};
use super::shape::{Direction, Shape};

/// The largest packet that a device hands over.
pub(super) const PACKET_BYTES_MAX: usize = 64 << 10;
/// Packets read from one device before the other direction has its turn.
pub(super) const PACKETS_AT_ONCE: usize = 64;

/// A running link; dropping it removes devices and namespace.
#[derive(Debug)]
pub struct Tun {
    control: Control,
    namespace: Namespace,
    thread: Option<JoinHandle<()>>,
}

impl Tun {
    /// Makes the devices and the namespace and lets packets pass.
    pub fn start(shape: Shape) -> std::io::Result<Tun> {
        let control = Control::new(shape)?;
        let (plan, near) = free_plan()?;
        let namespace = Namespace::create(plan)?;
        let far = open_device(&plan.far_device())?;
        namespace.connect()?;
        let worker = Worker::new(control.clone(), [near, far]);
        let thread = std::thread::Builder::new().name("link".to_owned()).spawn(move || worker.run())?;
        Ok(Tun { control, namespace, thread: Some(thread) })
    }

    /// To change and watch it.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Its far end.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }
}

impl Drop for Tun {
    fn drop(&mut self) {
        self.control.stop();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so; its devices are closed either way.
            let _ = thread.join();
        }
    }
}

/// The first number whose near device nobody has; holding the device reserves the number.
pub(super) fn free_plan() -> std::io::Result<(Plan, File)> {
    for number in 0..LINKS_MAX {
        let plan = Plan::new(number);
        match open_device(&plan.near_device()) {
            Ok(device) => return Ok((plan, device)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(std::io::Error::other(format!("{LINKS_MAX} links run on this host already")))
}

/// Creates a TUN device; it goes with the descriptor.
pub(super) fn open_device(name: &str) -> std::io::Result<File> {
    let explain = |error: std::io::Error| match error.kind() {
        ErrorKind::PermissionDenied => {
            std::io::Error::other(format!("a TUN device needs root (CAP_NET_ADMIN): {error}; --kind proxy needs none"))
        }
        ErrorKind::NotFound => {
            std::io::Error::other("/dev/net/tun is missing: `modprobe tun`; --kind proxy works without")
        }
        _ => error,
    };
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let device = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun");
    let device = device.map_err(explain)?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the ifreq that it is given.
    if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &mut request) } < 0 {
        return Err(explain(std::io::Error::last_os_error()));
    }
    Ok(device)
}

struct Worker {
    control: Control,
    /// Near and far: sources of `Out` and `Back`.
    devices: [File; 2],
    lines: [DelayLine<Vec<u8>>; 2],
    buffer: Vec<u8>,
}

impl Worker {
    fn new(control: Control, devices: [File; 2]) -> Worker {
        let (shape, now) = (control.behaviour().shape, Instant::now());
        let line = |direction: Direction| DelayLine::new(shape.way(direction), OnLoss::Drop, now, direction as u64);
        Worker { control, devices, lines: Direction::BOTH.map(line), buffer: vec![0; PACKET_BYTES_MAX] }
    }

    fn run(mut self) {
        super::use_precise_timers();
        while !self.control.stopped() {
            let behaviour = self.control.behaviour();
            for direction in Direction::BOTH {
                let index = direction.index();
                self.lines[index].set_way(behaviour.shape.way(direction), OnLoss::Drop);
                if behaviour.cut[index] {
                    // What is on its way when a cable is cut does not arrive.
                    let lost = self.lines[index].clear();
                    self.control.counters(direction).lost.fetch_add(lost, Ordering::Relaxed);
                }
                self.receive(direction, behaviour.cut[index]);
                self.deliver(direction);
            }
            self.wait();
        }
    }

    fn wait(&self) {
        let next = self.lines.iter().filter_map(DelayLine::next_due).min();
        let timeout = next.map(|at| TimeSpec::from(at.saturating_duration_since(Instant::now())));
        let descriptors = [self.control.waker().as_fd(), self.devices[0].as_fd(), self.devices[1].as_fd()];
        let mut fds = descriptors.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        // An interrupted wait finds nothing ready and is repeated.
        let _ = ppoll(&mut fds, timeout, None);
        if fds[0].any() == Some(true) {
            let _ = self.control.waker().read();
        }
    }

    fn receive(&mut self, direction: Direction, cut: bool) {
        let line = &mut self.lines[direction.index()];
        let counters = self.control.counters(direction);
        for _ in 0..PACKETS_AT_ONCE {
            // No packet waits, or the device is being taken down: both mean later.
            let Ok(count) = self.devices[direction.index()].read(&mut self.buffer) else {
                return;
            };
            let fate =
                if cut { Fate::Lost } else { line.offer(Instant::now(), self.buffer[..count].to_vec(), count as u64) };
            match fate {
                Fate::Queued => {}
                Fate::Lost | Fate::Late => drop(counters.lost.fetch_add(1, Ordering::Relaxed)),
                Fate::Overflowed => drop(counters.overflowed.fetch_add(1, Ordering::Relaxed)),
            }
        }
    }

    fn deliver(&mut self, direction: Direction) {
        let line = &mut self.lines[direction.index()];
        let counters = self.control.counters(direction);
        while line.due(Instant::now()).is_some() {
            let Some(packet) = line.pop() else { return };
            match self.devices[1 - direction.index()].write(&packet) {
                Ok(bytes) => counters.deliver(bytes),
                // A receiver without memory drops packets, as a real one does.
                Err(_) => drop(counters.lost.fetch_add(1, Ordering::Relaxed)),
            }
        }
    }
}
