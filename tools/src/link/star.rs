//! Several namespaces around this process, which carries every packet between them: each pair of ends has a distance of its own
//! and can be cut, in one direction or both, while it runs. Used by `drill`. Needs root and iproute2.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::delay_line::{DelayLine, OnLoss};
use super::namespace::{Namespace, Plan, run};
use super::shape::{Direction, Percent, Shape};
use super::tun::{PACKET_BYTES_MAX, PACKETS_AT_ONCE, free_plan, open_device};

/// Ends of a star at most, this host included: their addresses share a byte.
pub const ENDS_MAX: usize = 100;
/// Where the destination stands in an IPv4 packet.
const DESTINATION: std::ops::Range<usize> = 16..20;
/// The thread looks for its end this often.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Which ways are cut, from and to; this host is end 0.
type Cuts = Arc<Mutex<Vec<Vec<bool>>>>;

/// A running star; dropping it removes devices and namespaces.
pub struct Star {
    plan: Plan,
    /// Of ends 1 and on.
    namespaces: Vec<Namespace>,
    cuts: Cuts,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Star {
    /// Makes `ends` namespaces, `distance` apart from each other; this host is near to all of them.
    pub fn start(ends: usize, distance: Duration) -> std::io::Result<Star> {
        assert!((1..ENDS_MAX).contains(&ends));
        let (plan, near) = free_plan()?;
        let network = format!("{}/24", plan.near());
        run("ip", &["addr", "add", &network, "dev", &plan.near_device()])?;
        run("ip", &["link", "set", &plan.near_device(), "up"])?;
        let (mut namespaces, mut devices) = (Vec::new(), vec![near]);
        for end in 1..=ends {
            let name = format!("{}n{end}", plan.near_device());
            let namespace = Namespace::create_named(plan, name.clone())?;
            devices.push(open_device(&name)?);
            run("ip", &["link", "set", &name, "netns", &name])?;
            run("ip", &["-n", &name, "addr", "add", &format!("{}/24", address(plan, end)), "dev", &name])?;
            run("ip", &["-n", &name, "link", "set", &name, "up"])?;
            namespaces.push(namespace);
        }
        let cuts: Cuts = Arc::new(Mutex::new(vec![vec![false; ends + 1]; ends + 1]));
        let stop = Arc::new(AtomicBool::new(false));
        let worker = Worker::new(devices, distance, Arc::clone(&cuts), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("star".to_owned()).spawn(move || worker.run())?;
        Ok(Star { plan, namespaces, cuts, stop, thread: Some(thread) })
    }

    /// The namespace of end `end`, from 1 on.
    pub fn namespace(&self, end: usize) -> &Namespace {
        &self.namespaces[end - 1]
    }

    /// The address of an end.
    pub fn address(&self, end: usize) -> Ipv4Addr {
        address(self.plan, end)
    }

    /// Lets nothing pass, or everything again, from one end to another.
    pub fn cut(&self, from: usize, to: usize, cut: bool) {
        self.cuts.lock().expect("nobody panics with it")[from][to] = cut;
    }

    /// Lets everything pass again.
    pub fn heal(&self) {
        self.cuts.lock().expect("nobody panics with it").iter_mut().flatten().for_each(|cut| *cut = false);
    }
}

impl Drop for Star {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so; its devices are closed either way.
            let _ = thread.join();
        }
    }
}

fn address(plan: Plan, end: usize) -> Ipv4Addr {
    let [a, b, c, near] = plan.near().octets();
    Ipv4Addr::new(a, b, c, near + end as u8)
}

struct Worker {
    devices: Vec<File>,
    /// By from and to.
    lines: Vec<Vec<DelayLine<Vec<u8>>>>,
    cuts: Cuts,
    stop: Arc<AtomicBool>,
    /// The last byte of end 0's address.
    first: u8,
    buffer: Vec<u8>,
}

impl Worker {
    fn new(devices: Vec<File>, distance: Duration, cuts: Cuts, stop: Arc<AtomicBool>) -> Worker {
        let now = Instant::now();
        let line = |from: usize, to: usize| {
            let rtt = if from == 0 || to == 0 { Duration::ZERO } else { distance };
            let shape = Shape {
                rtt,
                jitter: Duration::ZERO,
                loss: Percent(0.0),
                rate: None,
                buffer_bytes: 0,
                asymmetry: Percent(50.0),
            };
            let way = shape.way(Direction::Out);
            DelayLine::new(way, OnLoss::Drop, now, (from * ENDS_MAX + to) as u64)
        };
        let ends = devices.len();
        let lines = (0..ends).map(|from| (0..ends).map(|to| line(from, to)).collect()).collect();
        Worker { devices, lines, cuts, stop, first: 1, buffer: vec![0; PACKET_BYTES_MAX] }
    }

    fn run(mut self) {
        super::use_precise_timers();
        while !self.stop.load(Ordering::Relaxed) {
            let cuts = self.cuts.lock().expect("nobody panics with it").clone();
            for (from, cut) in cuts.iter().enumerate().take(self.devices.len()) {
                self.receive(from, cut);
            }
            self.deliver(&cuts);
            self.wait();
        }
    }

    fn receive(&mut self, from: usize, cut: &[bool]) {
        for _ in 0..PACKETS_AT_ONCE {
            // No packet waits, or the device is being taken down: both mean later.
            let Ok(count) = self.devices[from].read(&mut self.buffer) else { return };
            let packet = &self.buffer[..count];
            let last = packet.get(DESTINATION).map_or(0, |address| address[3]);
            let to = usize::from(last.wrapping_sub(self.first));
            // Neighbour discovery and the like have no end here.
            if to < self.devices.len() && to != from && !cut[to] {
                self.lines[from][to].offer(Instant::now(), packet.to_vec(), count as u64);
            }
        }
    }

    fn deliver(&mut self, cuts: &[Vec<bool>]) {
        for (from, lines) in self.lines.iter_mut().enumerate() {
            for (to, line) in lines.iter_mut().enumerate() {
                if cuts[from][to] {
                    // What is on its way when a cable is cut does not arrive.
                    line.clear();
                }
                while line.due(Instant::now()).is_some() {
                    let Some(packet) = line.pop() else { break };
                    // A receiver without memory drops packets, as a real one does.
                    let _ = self.devices[to].write(&packet);
                }
            }
        }
    }

    fn wait(&self) {
        let next = self.lines.iter().flatten().filter_map(DelayLine::next_due).min();
        let pause = next.map_or(LOOK_INTERVAL, |at| at.saturating_duration_since(Instant::now()).min(LOOK_INTERVAL));
        let mut fds: Vec<PollFd<'_>> =
            self.devices.iter().map(|device| PollFd::new(device.as_fd(), PollFlags::POLLIN)).collect();
        // An interrupted wait finds nothing ready and is repeated.
        let _ = ppoll(&mut fds, Some(TimeSpec::from(pause)), None);
    }
}
