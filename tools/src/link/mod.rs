//! `walferry link`: an emulated distance between two sides, to measure and to test over.
//!
//! ```text
//! mod (flags; Link = one of the kinds) ─┬─ proxy ──────┬─ delay_line (core) ── shape
//!      └─ socket (set, cut, heal)       ├─ tun ────────┘
//!         rtt (what it measures)        ├─ netem ── tc          control: what the threads share
//!                                       ├─ star: many namespaces, for `drill`
//!                                       └─ namespace ── ip
//! ```

mod control;
mod delay_line;
mod namespace;
mod netem;
mod proxy;
mod rtt;
mod shape;
mod socket;
mod star;
mod tun;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use clap::{Args, Subcommand, ValueEnum};
use nix::sys::signal::{SigSet, Signal};

use crate::failure::{Failure, say};
use walferry_node::units::{ByteSize, HostPort, Span};

pub use control::Control;
pub use rtt::Rtt;
pub use shape::{BitRate, Direction, Percent, Shape};
pub use star::Star;

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry link --rtt 50ms --listen 127.0.0.1:7401 --to 127.0.0.1:6401     a region away, for whoever connects to 7401
  walferry link --kind tun --rtt 1ms --jitter 50us --rate 1gbit            a namespace a rack away (root)
  ip netns exec walferry0 walferry start --data ./b --name b --follow 198.18.0.1:6401
  walferry link set rtt=50ms loss=0.1%                                     while it runs
  walferry link cut back && walferry link heal                             nothing comes back, then it does again

With --kind tun the leader listens on the near address that is printed (198.18.N.1), replicas run in the namespace.
A proxy's lost bytes are late by one round trip; in a tun link the packet is lost and the kernel's TCP repeats it.

Exit codes: 0 ended by SIGINT or SIGTERM, or the request was carried out; 1 it failed; 2 wrong usage.";

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// How the distance is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A TCP proxy in user space; needs no privileges
    Proxy,
    /// Two TUN devices, one in a network namespace: the kernels' own TCP crosses it; needs root
    Tun,
    /// A veth pair with the kernel's netem; needs root and sch_netem
    Netem,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().expect("no kind is hidden").get_name())
    }
}

/// What the link is like.
#[derive(Clone, Debug, Args)]
pub struct ShapeArgs {
    /// Round-trip time that is added, such as 1ms
    #[arg(long, value_name = "TIME", default_value = "1ms")]
    rtt: Span,
    /// Each direction takes up to so much more or less
    #[arg(long, value_name = "TIME", default_value = "0")]
    jitter: Span,
    /// Share of packets that are lost
    #[arg(long, value_name = "SHARE", default_value = "0%")]
    loss: Percent,
    /// Bits a second in each direction, such as 100mbit [default: unlimited]
    #[arg(long, value_name = "RATE")]
    rate: Option<BitRate>,
    /// What may wait before the bottleneck that --rate makes
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    buffer: ByteSize,
    /// The part of the round trip that the way out takes
    #[arg(long, value_name = "SHARE", default_value = "50%")]
    asymmetry: Percent,
}

impl ShapeArgs {
    fn shape(&self) -> Result<Shape, Failure> {
        let shape = Shape {
            rtt: self.rtt.0,
            jitter: self.jitter.0,
            loss: self.loss,
            rate: self.rate,
            buffer_bytes: self.buffer.0,
            asymmetry: self.asymmetry,
        };
        shape.checked().map_err(|error| Failure::Usage(format!("--{error}")))
    }
}

/// Flags of `walferry link`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct LinkArgs {
    #[command(subcommand)]
    request: Option<Request>,
    /// How the distance is made
    #[arg(long, value_enum, default_value = "proxy")]
    kind: Kind,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Proxy: where to listen
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    listen: HostPort,
    /// Proxy: where to connect to
    #[arg(long, value_name = "HOST:PORT")]
    to: Option<HostPort>,
    /// Where the control socket is made [default: in a directory of this user among the temporary files]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Asked of a link that runs.
#[derive(Debug, Subcommand)]
enum Request {
    /// Change the running link: rtt=50ms jitter=1ms loss=0.1% rate=100mbit|unlimited buffer=4MiB asymmetry=60%
    Set {
        /// What to change
        #[arg(value_name = "KEY=VALUE", required = true)]
        changes: Vec<String>,
        #[command(flatten)]
        at: At,
    },
    /// Let nothing pass
    Cut {
        /// Only in this direction
        #[arg(value_enum)]
        direction: Option<Direction>,
        #[command(flatten)]
        at: At,
    },
    /// Let everything pass again
    Heal {
        /// Only in this direction
        #[arg(value_enum)]
        direction: Option<Direction>,
        #[command(flatten)]
        at: At,
    },
    /// Measure a round trip through the link
    Rtt {
        #[command(flatten)]
        at: At,
    },
    /// Print shape, cuts and counters as JSON
    Status {
        #[command(flatten)]
        at: At,
    },
}

#[derive(Debug, Args)]
struct At {
    /// The control socket of the link [default: of the only link that runs here]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// A running link of any kind; dropping it takes it down.
#[derive(Debug)]
pub enum Link {
    /// Through a proxy on loopback.
    Proxy(proxy::Proxy),
    /// Through TUN devices.
    Tun(tun::Tun),
    /// Through netem.
    Netem(netem::Netem),
}

impl Link {
    /// Starts one.
    pub fn start(kind: Kind, shape: Shape) -> std::io::Result<Link> {
        Ok(match kind {
            Kind::Proxy => Link::Proxy(proxy::Proxy::start(shape)?),
            Kind::Tun => Link::Tun(tun::Tun::start(shape)?),
            Kind::Netem => Link::Netem(netem::Netem::start(shape)?),
        })
    }

    /// To watch it.
    pub fn control(&self) -> &Control {
        match self {
            Link::Proxy(proxy) => proxy.control(),
            Link::Tun(tun) => tun.control(),
            Link::Netem(netem) => netem.control(),
        }
    }

    fn namespace(&self) -> Option<&namespace::Namespace> {
        match self {
            Link::Proxy(_) => None,
            Link::Tun(tun) => Some(tun.namespace()),
            Link::Netem(netem) => Some(netem.namespace()),
        }
    }

    fn update(&self) -> std::io::Result<()> {
        match self {
            Link::Netem(netem) => netem.update(),
            // Their threads look by themselves.
            Link::Proxy(_) | Link::Tun(_) => Ok(()),
        }
    }

    /// Gives it another shape.
    pub fn set(&self, shape: Shape) -> std::io::Result<()> {
        self.control().set(shape);
        self.update()
    }

    /// Lets nothing pass in these directions.
    pub fn cut(&self, directions: &[Direction]) -> std::io::Result<()> {
        directions.iter().for_each(|direction| self.control().cut(*direction));
        self.update()
    }

    /// Lets pass again.
    pub fn heal(&self, directions: &[Direction]) -> std::io::Result<()> {
        directions.iter().for_each(|direction| self.control().heal(*direction));
        self.update()
    }

    /// The address on which the near side listens to be reached through the link.
    pub fn near_host(&self) -> IpAddr {
        self.namespace().map_or(LOOPBACK, |namespace| namespace.plan().near().into())
    }

    /// The address of the far side as the near side sees it.
    pub fn far_host(&self) -> IpAddr {
        self.namespace().map_or(LOOPBACK, |namespace| namespace.plan().far().into())
    }

    /// How the far side reaches what listens on the near side.
    pub fn reach(&mut self, near: SocketAddr) -> std::io::Result<SocketAddr> {
        match self {
            Link::Proxy(proxy) => proxy.add_route((LOOPBACK, 0).into(), near),
            Link::Tun(_) | Link::Netem(_) => Ok(near),
        }
    }

    /// A command that runs on the far side.
    pub fn far_command(&self, program: &Path) -> Command {
        self.namespace().map_or_else(|| Command::new(program), |namespace| namespace.command(program))
    }

    /// Measures a round trip.
    pub fn measure_rtt(&mut self) -> std::io::Result<Rtt> {
        let far = SocketAddr::from((self.far_host(), 0));
        match self {
            Link::Proxy(proxy) => {
                let listener = TcpListener::bind(far)?;
                let through = proxy.add_route(far, listener.local_addr()?)?;
                let measured = rtt::measure(through, listener);
                proxy.remove_route(through)?;
                measured
            }
            Link::Tun(_) | Link::Netem(_) => {
                let namespace = self.namespace().expect("these kinds have one");
                let listener = namespace.enter(|| TcpListener::bind(far))?;
                rtt::measure(listener.local_addr()?, listener)
            }
        }
    }

    /// Shape, cuts and counters.
    pub fn status(&self) -> serde_json::Value {
        let behaviour = self.control().behaviour();
        let way = |direction: Direction| {
            serde_json::json!({
                "cut": behaviour.cut[direction.index()],
                "passed": self.control().passed(direction),
            })
        };
        serde_json::json!({
            "shape": behaviour.shape,
            "near": self.near_host(),
            "far": self.far_host(),
            "namespace": self.namespace().map(namespace::Namespace::name),
            "out": way(Direction::Out),
            "back": way(Direction::Back),
        })
    }
}

/// Measures a round trip without a link.
pub fn measure_loopback() -> std::io::Result<Rtt> {
    let listener = TcpListener::bind((LOOPBACK, 0))?;
    rtt::measure(listener.local_addr()?, listener)
}

/// Lets the calling thread wake when it asked to, not up to 50 us later.
fn use_precise_timers() {
    // SAFETY: a plain system call that only concerns the calling thread. If it fails, times are less exact.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

/// Runs `walferry link`.
pub fn run(args: &LinkArgs) -> Result<(), Failure> {
    match &args.request {
        None => run_link(args),
        Some(request) => {
            let word = |direction: &Option<Direction>| match direction {
                None => "both",
                Some(Direction::Out) => "out",
                Some(Direction::Back) => "back",
            };
            let (at, line) = match request {
                Request::Set { changes, at } => (at, format!("set {}", changes.join(" "))),
                Request::Cut { direction, at } => (at, format!("cut {}", word(direction))),
                Request::Heal { direction, at } => (at, format!("heal {}", word(direction))),
                Request::Rtt { at } => (at, "rtt".to_owned()),
                Request::Status { at } => (at, "status".to_owned()),
            };
            say(socket::ask(at.control.as_deref(), &line).map_err(Failure::Failed)?)
        }
    }
}

fn run_link(args: &LinkArgs) -> Result<(), Failure> {
    let shape = args.shape.shape()?;
    let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
    match (args.kind, &args.to) {
        (Kind::Proxy, None) => return usage("a proxy needs --to HOST:PORT, such as a leader's --peer-listen address"),
        (Kind::Tun | Kind::Netem, Some(_)) => {
            return usage("--to is for --kind proxy; a namespace reaches the near address");
        }
        _ => {}
    }
    // Blocked in every thread, so that this one can wait for them.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().map_err(Failure::failed)?;
    let path = args.control.clone().map_or_else(socket::default_path, Ok).map_err(Failure::failed)?;
    let listener = UnixListener::bind(&path)
        .map_err(|error| Failure::failed(format_args!("--control {}: {error}", path.display())))?;
    let link = Arc::new(Mutex::new(None));
    let ended = start_link(args, shape, &path).and_then(|started| {
        link.lock().expect("nobody else has it yet").replace(started);
        let shared = Arc::clone(&link);
        std::thread::Builder::new().name("link-control".to_owned()).spawn(move || socket::serve(&listener, &shared))?;
        signals.wait().map_err(Failure::failed)
    });
    // Taken down here, because the thread of the control socket never ends. A panic there has nothing to do with it.
    drop(link.lock().unwrap_or_else(PoisonError::into_inner).take());
    // If it is gone already, that is what was wanted.
    let _ = std::fs::remove_file(&path);
    ended.map(drop)
}

/// Starts the link and tells what it is.
fn start_link(args: &LinkArgs, shape: Shape, path: &Path) -> Result<Link, Failure> {
    let failed = |error: std::io::Error| Failure::failed(format_args!("cannot start the link: {error}"));
    let mut link = Link::start(args.kind, shape).map_err(failed)?;
    let mut route = None;
    if let (Link::Proxy(proxy), Some(to)) = (&mut link, &args.to) {
        let resolve = |flag: &str, address: &HostPort| {
            address.resolve().map_err(|error| Failure::Usage(format!("{flag} {address}: {error}")))
        };
        let (listen, target) = (resolve("--listen", &args.listen)?, resolve("--to", to)?);
        route = Some(proxy.add_route(listen, target).map_err(failed)?);
    }
    let rtt = link.measure_rtt().map_err(failed)?;
    say(format_args!("link {shape}"))?;
    if let Some(address) = route {
        say(format_args!("listens on {address}"))?;
    }
    if let Some(namespace) = link.namespace() {
        let plan = namespace.plan();
        say(format_args!("near {}, far {} in namespace {}", plan.near(), plan.far(), namespace.name()))?;
    }
    say(format_args!("measured round trip {rtt}"))?;
    say(format_args!("control socket {}", path.display()))?;
    Ok(link)
}
