//! Real nodes as child processes, and a plain client to talk to them: what the process tests share.

#![allow(dead_code, reason = "each test binary uses its part of this")]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub mod cluster;

/// A bound for everything that a test waits for; far beyond what is normal, so that only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a test looks whether what it waits for has come.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// A reply of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+text`
    Simple(String),
    /// `-text`
    Error(String),
    /// `:number`
    Integer(i64),
    /// `$bytes`, as text
    Bulk(String),
    /// nil
    Nil,
    /// `*n` and its items
    Array(Vec<Reply>),
}

impl Reply {
    /// The text of a simple or bulk string.
    pub fn text(&self) -> &str {
        match self {
            Reply::Simple(text) | Reply::Bulk(text) => text,
            other => panic!("expected text, got {other:?}"),
        }
    }
}

/// A connection to a node.
pub struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    /// Connects.
    pub fn connect(address: SocketAddr) -> std::io::Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Client { reader: BufReader::new(stream) })
    }

    /// From now on a reply that does not come in time is an error.
    pub fn give_up_after(&mut self, time: Duration) {
        self.reader.get_mut().set_read_timeout(Some(time)).expect("a timeout that is not zero");
    }

    /// Sends a command without waiting for its reply.
    pub fn send(&mut self, words: &[&str]) -> std::io::Result<()> {
        let mut bytes = format!("*{}\r\n", words.len());
        for word in words {
            bytes.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.reader.get_mut().write_all(bytes.as_bytes())
    }

    /// Sends a command and reads its reply.
    pub fn try_command(&mut self, words: &[&str]) -> std::io::Result<Reply> {
        self.send(words)?;
        self.reply()
    }

    /// As `try_command`; a broken connection fails the test.
    pub fn command(&mut self, words: &[&str]) -> Reply {
        self.try_command(words).unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    /// Reads one reply.
    pub fn reply(&mut self) -> std::io::Result<Reply> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        let (kind, rest) = line.split_at(1);
        let number = || rest.parse::<i64>().expect("a number in a reply");
        Ok(match kind {
            "+" => Reply::Simple(rest.to_owned()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Integer(number()),
            "$" if number() < 0 => Reply::Nil,
            "$" => {
                let mut bytes = vec![0; number() as usize + 2];
                self.reader.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Reply::Bulk(String::from_utf8_lossy(&bytes).into_owned())
            }
            "*" if number() < 0 => Reply::Nil,
            "*" => Reply::Array((0..number()).map(|_| self.reply()).collect::<Result<_, _>>()?),
            other => panic!("reply of unknown kind {other:?}: {line}"),
        })
    }
}

/// A directory for data on a disk that takes O_DIRECT, removed at the end.
pub fn directory() -> tempfile::TempDir {
    tempfile::Builder::new()
        .disable_cleanup(std::env::var_os("WALFERRY_KEEP").is_some())
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .expect("the target directory takes a temporary one")
}

/// A running node.
pub struct Node {
    child: Child,
    /// Its data directory.
    pub data: PathBuf,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where replicas connect.
    pub peer_listen: SocketAddr,
    /// Where clients connect over TLS, with `--tls-listen`.
    pub tls_listen: Option<SocketAddr>,
    /// Where Prometheus is answered, with `--metrics-listen`.
    pub metrics_listen: Option<SocketAddr>,
}

impl Node {
    /// Starts a node called `name` with data under `root/name` and waits until it says that it serves.
    pub fn start(root: &Path, name: &str, flags: &[&str]) -> Node {
        Node::try_start(root, name, flags).unwrap_or_else(|log| panic!("{name} did not start:\n{log}"))
    }

    /// As `start`; a node that ends instead gives its log.
    pub fn try_start(root: &Path, name: &str, flags: &[&str]) -> Result<Node, String> {
        Node::try_start_by(Command::new(env!("CARGO_BIN_EXE_walferry")), root, name, flags)
    }

    /// As `start`, in a network namespace.
    pub fn start_in(namespace: &str, root: &Path, name: &str, flags: &[&str]) -> Node {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace, env!("CARGO_BIN_EXE_walferry")]);
        Node::try_start_by(command, root, name, flags).unwrap_or_else(|log| panic!("{name} did not start:\n{log}"))
    }

    /// As `start`, by a command that ends in running the binary with the arguments that it is given.
    pub fn start_by(command: Command, root: &Path, name: &str, flags: &[&str]) -> Node {
        Node::try_start_by(command, root, name, flags).unwrap_or_else(|log| panic!("{name} did not start:\n{log}"))
    }

    /// As `start_by`; a node that ends instead gives its log.
    pub fn try_start_by(mut command: Command, root: &Path, name: &str, flags: &[&str]) -> Result<Node, String> {
        let data = root.join(name);
        let ready_file = root.join(format!("{name}.ready"));
        let socket = root.join(format!("{name}.notify"));
        let _ = std::fs::remove_file(&ready_file);
        let _ = std::fs::remove_file(&socket);
        let notify = UnixDatagram::bind(&socket).expect("a datagram socket for the readiness of a node");
        notify.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        let log = root.join(format!("{name}.log"));
        let log_file = std::fs::OpenOptions::new().create(true).append(true).open(&log).expect("a log file");
        let mut child = command
            .args(["start", "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"])
            .args(["--segment-bytes", "16MiB", "--sync-method", "dsync", "--write-depth", "4", "--name", name])
            .arg("--data")
            .arg(&data)
            .arg("--ready-file")
            .arg(&ready_file)
            .args(peer_secret(root, flags))
            .args(flags)
            .env("NOTIFY_SOCKET", &socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .expect("the binary starts");
        let deadline = Instant::now() + PATIENCE;
        let mut message = [0; 4096];
        loop {
            if let Ok(length) = notify.recv(&mut message)
                && String::from_utf8_lossy(&message[..length]).contains("READY=1")
            {
                break;
            }
            let ended = child.try_wait().expect("a child can be asked");
            if ended.is_some() || Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(std::fs::read_to_string(&log).unwrap_or_default());
            }
        }
        let ready = std::fs::read_to_string(&ready_file).expect("a ready file once the node serves");
        let found = |key: &str| {
            let line = ready.lines().find_map(|line| line.strip_prefix(key))?;
            Some(line.parse().expect("an address"))
        };
        let address = |key: &str| found(key).expect("an address in the ready file");
        Ok(Node {
            child,
            data,
            listen: address("listen="),
            peer_listen: address("peer_listen="),
            tls_listen: found("tls_listen="),
            metrics_listen: found("metrics_listen="),
        })
    }

    /// A new connection to it.
    pub fn client(&self) -> Client {
        Client::connect(self.listen).expect("a running node takes connections")
    }

    /// Waits until the node ends by itself; its exit code.
    pub fn end(mut self) -> Option<i32> {
        let mut status = None;
        until("the node ends by itself", || {
            status = self.child.try_wait().expect("a child can be asked");
            status.is_some()
        });
        status.and_then(|status| status.code())
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a killed child ends");
    }

    /// `kill -9`, and its addresses are free: the kernel closes a ring's sockets a moment after its process.
    pub fn kill_and_free(self) {
        let addresses = [self.listen, self.peer_listen];
        self.kill();
        for address in addresses {
            let taken = || matches!(TcpListener::bind(address), Err(error) if error.kind() == ErrorKind::AddrInUse);
            until("its address is free", || !taken());
        }
    }

    /// SIGTERM; the exit code and how long it took.
    pub fn stop(mut self) -> (Option<i32>, Duration) {
        let begun = Instant::now();
        // SAFETY: signals a process that is our child and not yet waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let status = self.child.wait().expect("a child ends");
        (status.code(), begun.elapsed())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running `walferry link`.
pub struct Link {
    child: Child,
    control: PathBuf,
    /// What it printed at its start.
    pub lines: Vec<String>,
}

impl Link {
    /// Starts one with its control socket at `root/link.sock`; a link that cannot start gives its error.
    pub fn try_start(root: &Path, flags: &[&str]) -> Result<Link, String> {
        let control = root.join("link.sock");
        let mut child = Command::new(env!("CARGO_BIN_EXE_walferry"))
            .arg("link")
            .args(flags)
            .arg("--control")
            .arg(&control)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut lines = Vec::new();
        for line in BufReader::new(child.stdout.take().expect("a pipe")).lines() {
            lines.push(line.expect("a line of text"));
            if lines.last().is_some_and(|line| line.starts_with("control socket")) {
                return Ok(Link { child, control, lines });
            }
        }
        let output = child.wait_with_output().expect("a child ends");
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// What follows `prefix` in the line that begins with it.
    pub fn printed(&self, prefix: &str) -> &str {
        let found = self.lines.iter().find_map(|line| line.strip_prefix(prefix));
        found.unwrap_or_else(|| panic!("the link prints {prefix:?}: {:?}", self.lines))
    }

    /// `walferry link REQUEST`; the output, or the error.
    pub fn ask(&self, request: &[&str]) -> Result<String, String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        let output = command.arg("link").args(request).arg("--control").arg(&self.control).output();
        let output = output.expect("the binary starts");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    /// SIGTERM; the exit code.
    pub fn stop(mut self) -> Option<i32> {
        // SAFETY: signals a process that is our child and not yet waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        self.child.wait().expect("a child ends").code()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // SIGTERM and not SIGKILL: a namespace is to be taken down.
            // SAFETY: signals a process that is our child and not yet waited for.
            unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
            let _ = self.child.wait();
        }
    }
}

/// Asks `question` again and again until it says yes; PATIENCE bounds it.
pub fn until(what: &str, mut question: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !question() {
        assert!(Instant::now() < deadline, "gave up waiting until {what}");
        // The processes that are waited for need the processors more.
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Waits until the node's store holds everything up to `lsn`.
pub fn wait_applied(client: &mut Client, lsn: &str) {
    let reply = client.command(&["WAITLSN", lsn, &PATIENCE.as_millis().to_string()]);
    assert!(!matches!(reply, Reply::Error(_)), "WAITLSN {lsn}: {reply:?}");
}

/// The bytes of a node's log up to `end` (bytes), put together from its segments, from `start` on.
pub fn log_bytes(data: &Path, start: u64, end: u64) -> Vec<u8> {
    const SEGMENT_BYTES: u64 = 16 << 20;
    let mut bytes = Vec::new();
    for number in start / SEGMENT_BYTES..end.div_ceil(SEGMENT_BYTES) {
        let file = data.join("log").join(format!("{number:016X}.wal"));
        let segment = std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let from = start.saturating_sub(number * SEGMENT_BYTES) as usize;
        let to = (end - number * SEGMENT_BYTES).min(SEGMENT_BYTES) as usize;
        bytes.extend_from_slice(&segment[from..to]);
    }
    bytes
}

/// An LSN as bytes from the beginning of the log.
pub fn lsn_bytes(lsn: &str) -> u64 {
    let (high, low) = lsn.split_once('/').expect("an LSN");
    let half = |digits| u64::from_str_radix(digits, 16).expect("hexadecimal digits");
    half(high) << 32 | half(low)
}

/// The secret of all nodes in a test's directory, for a start that does not say otherwise.
pub fn peer_secret(root: &Path, flags: &[&str]) -> Vec<String> {
    if flags.iter().any(|flag| flag.starts_with("--peer-auth") || flag.starts_with("--peer-secret")) {
        return Vec::new();
    }
    let file = root.join("peer.secret");
    // Nodes are started side by side: the file is whole when it appears, and the same whoever makes it.
    if !file.exists() {
        let partial = root.join(format!("peer.secret.{:?}", std::thread::current().id()));
        std::fs::write(&partial, "a secret that every node of this test holds\n").expect("a secret");
        std::fs::set_permissions(&partial, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("a mode");
        std::fs::rename(&partial, &file).expect("a secret");
    }
    vec!["--peer-secret".to_owned(), file.display().to_string()]
}
