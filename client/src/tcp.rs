//! A blocking connection to one node: one request, one answer, or several sent ahead; bounded in time.
//! Used by `pool`, and by the operator's tools on its own; knows nothing of what the commands mean.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use redis_protocol::resp2::decode::decode;

use walferry_tls::ClientStream;
use walferry_tls::rustls::ClientConfig;

use crate::reply::Reply;
use crate::url::Url;

/// How long a connection may take to open, unless the caller says otherwise.
pub const CONNECT_TIME_MAX_DEFAULT: Duration = Duration::from_millis(3_000);
/// How long an answer may take, unless the caller says otherwise.
pub const ANSWER_TIME_MAX_DEFAULT: Duration = Duration::from_millis(10_000);
/// Read from the socket at once.
const READ_BYTES: usize = 256 << 10;
/// A larger answer is refused; ask in pages that stay far below.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error("cannot connect to {address}: {source}; is the node running there?")]
    Connect {
        /// The node's address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The connection broke, or no answer came in time.
    #[error("{address} did not answer {command}: {text}")]
    Lost {
        /// The node's address.
        address: String,
        /// The command.
        command: String,
        /// What happened.
        text: String,
    },
    /// The node answered with an error.
    #[error("{address} answered {command} with: {text}")]
    Refused {
        /// The node's address.
        address: String,
        /// The command.
        command: String,
        /// The error, its code first.
        text: String,
    },
}

/// What carries a connection.
enum Stream {
    Plain(TcpStream),
    Tls(Box<ClientStream>),
}

impl Stream {
    fn open(stream: TcpStream, host: &str, tls: Option<Arc<ClientConfig>>) -> std::io::Result<Stream> {
        let Some(config) = tls else { return Ok(Stream::Plain(stream)) };
        let mut stream = ClientStream::new(config, host, stream)?;
        stream.shake_hands()?;
        Ok(Stream::Tls(Box::new(stream)))
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Stream::Plain(stream) => stream,
            Stream::Tls(stream) => stream.socket(),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Stream::Plain(stream) => stream.write_all(bytes),
            Stream::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Stream::Plain(stream) => stream.read(buffer),
            Stream::Tls(stream) => stream.read(buffer),
        }
    }
}

/// A connection to one node.
pub struct Client {
    stream: Stream,
    address: String,
    unread: Vec<u8>,
}

/// Writes one command in RESP.
pub fn encode_command(out: &mut Vec<u8>, arguments: &[&[u8]]) {
    // Writing into a Vec cannot fail.
    let _ = write!(out, "*{}\r\n", arguments.len());
    for argument in arguments {
        let _ = write!(out, "${}\r\n", argument.len());
        out.extend_from_slice(argument);
        out.extend_from_slice(b"\r\n");
    }
}

impl Client {
    /// Connects and, if the URL or the process has a password, authenticates.
    pub fn connect(url: &Url) -> Result<Client, ClientError> {
        Client::open(url, CONNECT_TIME_MAX_DEFAULT, ANSWER_TIME_MAX_DEFAULT)
    }

    /// As `connect`, for a node that may not be there: to connect, and each answer, may take so long.
    pub fn connect_within(url: &Url, time_max: Duration) -> Result<Client, ClientError> {
        Client::open(url, time_max, time_max)
    }

    /// As `connect`, with a bound for the connection and one for each answer.
    pub fn open(url: &Url, connect_time_max: Duration, answer_time_max: Duration) -> Result<Client, ClientError> {
        let address = url.address();
        let failed = |source| ClientError::Connect { address: address.clone(), source };
        let tls = url.tls_config()?;
        let open = |to| {
            let stream = TcpStream::connect_timeout(&to, connect_time_max)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(answer_time_max))?;
            stream.set_write_timeout(Some(ANSWER_TIME_MAX_DEFAULT))?;
            Stream::open(stream, &url.host, tls)
        };
        let stream = open(url.resolve()?).map_err(failed)?;
        let mut client = Client { stream, address, unread: Vec::new() };
        if let Some(auth) = url.auth() {
            client.call(&auth)?;
        }
        Ok(client)
    }

    /// The node's address, for messages.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Changes how long an answer may take.
    pub fn set_answer_time_max(&mut self, time: Duration) -> Result<(), ClientError> {
        let failed = |source| ClientError::Connect { address: self.address.clone(), source };
        self.stream.socket().set_read_timeout(Some(time)).map_err(failed)
    }

    /// True while nothing says that the connection is of no use: the node has neither closed it nor sent what nobody asked for.
    pub fn is_idle(&self) -> bool {
        let look = || {
            let socket = self.stream.socket();
            socket.set_nonblocking(true)?;
            let looked = socket.peek(&mut [0]);
            socket.set_nonblocking(false)?;
            looked
        };
        self.unread.is_empty() && look().is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// One command and its answer; an error answer is an `Err`.
    pub fn call(&mut self, arguments: &[&str]) -> Result<Reply, ClientError> {
        let mut request = Vec::new();
        encode_command(&mut request, &arguments.iter().map(|a| a.as_bytes()).collect::<Vec<_>>());
        let command = arguments.first().copied().unwrap_or_default();
        self.send(&request, command)?;
        self.receive(command)
    }

    /// Sends bytes that are encoded commands; `command` is for messages.
    pub fn send(&mut self, request: &[u8], command: &str) -> Result<(), ClientError> {
        self.stream.write_all(request).map_err(|error| self.lost(command, error))
    }

    /// The next answer; an error answer is an `Err`.
    pub fn receive(&mut self, command: &str) -> Result<Reply, ClientError> {
        match self.receive_any(command)? {
            Reply::Error(text) => {
                let (address, command) = (self.address.clone(), command.to_owned());
                Err(ClientError::Refused { address, command, text })
            }
            reply => Ok(reply),
        }
    }

    /// The next answer, an error answer as well.
    pub fn receive_any(&mut self, command: &str) -> Result<Reply, ClientError> {
        loop {
            match decode(&self.unread).map_err(|error| self.lost(command, error))? {
                Some((frame, length)) => {
                    self.unread.drain(..length);
                    return Ok(frame.into());
                }
                None => self.fill(command)?,
            }
        }
    }

    fn fill(&mut self, command: &str) -> Result<(), ClientError> {
        let held = self.unread.len();
        if held > ANSWER_BYTES_MAX {
            return Err(self.lost(command, format!("the answer is larger than {ANSWER_BYTES_MAX} bytes")));
        }
        self.unread.resize(held + READ_BYTES, 0);
        let got = self.stream.read(&mut self.unread[held..]);
        self.unread.truncate(held + got.as_ref().copied().unwrap_or(0));
        match got {
            Ok(0) => Err(self.lost(command, "the node closed the connection")),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(self.lost(command, "no answer in time"))
            }
            Err(error) => Err(self.lost(command, error)),
        }
    }

    fn lost(&self, command: &str, text: impl fmt::Display) -> ClientError {
        ClientError::Lost { address: self.address.clone(), command: command.to_owned(), text: text.to_string() }
    }
}
