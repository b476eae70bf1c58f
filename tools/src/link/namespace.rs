//! A network namespace of its own at the far end of a link, with addresses on both sides. Set up with iproute2's `ip`,
//! as an operator would, so that `ip netns exec` reaches it. Used by the `tun` and the `netem` link.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

/// Links of one host.
pub const LINKS_MAX: u8 = 250;

/// Names and addresses of one link: 198.18.0.0/15 is set aside for measuring networks (RFC 2544).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    number: u8,
}

impl Plan {
    /// Of the link with this number.
    pub fn new(number: u8) -> Plan {
        Plan { number }
    }

    /// The device on this side.
    pub fn near_device(self) -> String {
        format!("walferry{}", self.number)
    }

    /// The device in the namespace.
    pub fn far_device(self) -> String {
        format!("walferry{}f", self.number)
    }

    /// The namespace.
    pub fn namespace(self) -> String {
        self.near_device()
    }

    /// The address on this side.
    pub fn near(self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 1)
    }

    /// The address in the namespace.
    pub fn far(self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 2)
    }
}

/// A namespace that lives as long as this.
#[derive(Debug)]
pub struct Namespace {
    plan: Plan,
    name: String,
}

/// Runs a tool of iproute2; its error names the command.
pub fn run(program: &str, arguments: &[&str]) -> std::io::Result<()> {
    let command = format!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().map_err(|error| {
        let install = if error.kind() == std::io::ErrorKind::NotFound { "; install iproute2" } else { "" };
        std::io::Error::other(format!("cannot run `{command}`: {error}{install}"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(std::io::Error::other(format!("`{command}` failed: {}", said.trim())))
}

impl Namespace {
    /// A new namespace of the plan's name; one that a killed process left behind is replaced.
    pub fn create(plan: Plan) -> std::io::Result<Namespace> {
        Namespace::create_named(plan, plan.namespace())
    }

    /// As `create`, one of several of the plan.
    pub fn create_named(plan: Plan, name: String) -> std::io::Result<Namespace> {
        // Usually there is none to delete.
        let _ = run("ip", &["netns", "delete", &name]);
        run("ip", &["netns", "add", &name])?;
        let namespace = Namespace { plan, name };
        run("ip", &["-n", &namespace.name, "link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Moves the plan's far device in and gives both devices their addresses.
    pub fn connect(&self) -> std::io::Result<()> {
        let (name, near_device, far_device) = (self.name(), self.plan.near_device(), self.plan.far_device());
        let (near, far) = (self.plan.near().to_string(), self.plan.far().to_string());
        run("ip", &["link", "set", &far_device, "netns", &name])?;
        run("ip", &["addr", "add", &near, "peer", &far, "dev", &near_device])?;
        run("ip", &["link", "set", &near_device, "up"])?;
        run("ip", &["-n", &name, "addr", "add", &far, "peer", &near, "dev", &far_device])?;
        run("ip", &["-n", &name, "link", "set", &far_device, "up"])
    }

    /// Names and addresses.
    pub fn plan(&self) -> Plan {
        self.plan
    }

    /// For `ip netns exec`.
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// A command that will run in the namespace; its process is the program itself, not a wrapper.
    pub fn command(&self, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name()]).arg(program);
        command
    }

    /// Does something, such as opening a socket, inside the namespace; sockets stay there until they are closed.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> std::io::Result<T> + Send) -> std::io::Result<T> {
        let file = File::open(format!("/run/netns/{}", self.name()))?;
        let inside = || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
            act()
        };
        // A thread of its own, because a thread that entered a namespace stays in it.
        let joined = std::thread::scope(|scope| scope.spawn(inside).join());
        joined.unwrap_or_else(|_| Err(std::io::Error::other("the thread in the namespace panicked")))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Nothing is left to be done when it fails: the next link of this number replaces it.
        let _ = run("ip", &["netns", "delete", &self.name()]);
    }
}
