//! A small blocking RESP client for the operator's tools: one request, one answer, bounded in time.
//! Used by `status`, `promote`, `demo` and the checks of `load`; knows nothing of what the commands mean.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::time::Duration;

use redis_protocol::resp2::decode::decode;
use redis_protocol::resp2::types::OwnedFrame;

/// The port of a URL that names none.
const PORT_DEFAULT: u16 = 6400;
/// How long a connection may take to open.
const CONNECT_MS_MAX: u64 = 3_000;
/// How long an answer may take, unless the caller says otherwise.
const ANSWER_MS_MAX: u64 = 10_000;
/// Read from the socket at once.
const READ_BYTES: usize = 256 << 10;
/// A larger answer is refused; the tools ask in pages that stay far below.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Where a node listens for clients: `redis://[USER[:PASSWORD]@]HOST[:PORT]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// Name or address.
    pub host: String,
    /// Port for clients.
    pub port: u16,
    /// User for AUTH, if given.
    pub user: Option<String>,
    /// Password for AUTH, if given.
    pub password: Option<String>,
}

impl Url {
    /// The URL of a node at this address, with the credentials of this one.
    pub fn with_address(&self, address: &str) -> Result<Url, String> {
        let other: Url = format!("redis://{address}").parse()?;
        Ok(Url { user: self.user.clone(), password: self.password.clone(), ..other })
    }

    /// The first address that the host stands for.
    pub fn resolve(&self) -> Result<SocketAddr, ClientError> {
        let failed = |source| ClientError::Connect { address: self.address(), source };
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let no_address = || failed(std::io::Error::other("the name has no address"));
        (host, self.port).to_socket_addrs().map_err(failed)?.next().ok_or_else(no_address)
    }

    /// `HOST:PORT`, without credentials.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

impl FromStr for Url {
    type Err = String;
    fn from_str(text: &str) -> Result<Url, String> {
        let wrong = |why: &str| format!("{text:?} {why}; expected redis://HOST:PORT, such as redis://127.0.0.1:6400");
        let rest = match text.split_once("://") {
            Some(("redis", rest)) => rest,
            Some((scheme, _)) => return Err(wrong(&format!("has the scheme {scheme:?}"))),
            None => return Err(wrong("has no scheme")),
        };
        let (credentials, rest) = rest.rsplit_once('@').map_or((None, rest), |(left, right)| (Some(left), right));
        let (address, database) = rest.split_once('/').unwrap_or((rest, ""));
        if !matches!(database, "" | "0") {
            return Err(wrong("names a database; a node has only database 0"));
        }
        let v6_end = address.rfind(']').map_or(0, |at| at + 1);
        let (host, port) = match address[v6_end..].rfind(':') {
            Some(at) => (&address[..v6_end + at], &address[v6_end + at + 1..]),
            None => (address, ""),
        };
        let port = if port.is_empty() { Ok(PORT_DEFAULT) } else { port.parse() };
        let port = port.map_err(|_| wrong("has a wrong port"))?;
        if host.is_empty() {
            return Err(wrong("names no host"));
        }
        let (user, password) =
            credentials.map_or(("", None), |c| c.split_once(':').map_or((c, None), |(u, p)| (u, Some(p))));
        let user = Some(user.to_owned()).filter(|user| !user.is_empty());
        Ok(Url { host: host.to_owned(), port, user, password: password.map(str::to_owned) })
    }
}

impl fmt::Display for Url {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "redis://{}:{}", self.host, self.port)
    }
}

/// What a node answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Nothing there.
    Nil,
    /// A number.
    Int(i64),
    /// A status or a value.
    Text(Vec<u8>),
    /// An error inside of an array.
    Error(String),
    /// Several answers.
    Array(Vec<Reply>),
}

impl Reply {
    /// The text of a status, a value or a number.
    pub fn text(&self) -> Option<String> {
        match self {
            Reply::Text(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            Reply::Int(number) => Some(number.to_string()),
            _ => None,
        }
    }

    /// The number of a number, or of a value that is one.
    pub fn int(&self) -> Option<i64> {
        match self {
            Reply::Int(number) => Some(*number),
            Reply::Text(bytes) => std::str::from_utf8(bytes).ok()?.parse().ok(),
            _ => None,
        }
    }

    /// The elements of an array; of anything else none.
    pub fn items(&self) -> &[Reply] {
        match self {
            Reply::Array(items) => items,
            _ => &[],
        }
    }

    /// The value that stands after `key` in a flat list of keys and values.
    pub fn field(&self, key: &str) -> Option<&Reply> {
        self.items().chunks_exact(2).find(|pair| pair[0].text().as_deref() == Some(key)).map(|pair| &pair[1])
    }
}

impl From<OwnedFrame> for Reply {
    fn from(frame: OwnedFrame) -> Reply {
        match frame {
            OwnedFrame::SimpleString(bytes) | OwnedFrame::BulkString(bytes) => Reply::Text(bytes),
            OwnedFrame::Error(text) => Reply::Error(text),
            OwnedFrame::Integer(number) => Reply::Int(number),
            OwnedFrame::Array(items) => Reply::Array(items.into_iter().map(Reply::from).collect()),
            OwnedFrame::Null => Reply::Nil,
        }
    }
}

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

/// A connection to one node.
pub struct Client {
    stream: TcpStream,
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
    /// Connects and, if the URL has a password, authenticates.
    pub fn connect(url: &Url) -> Result<Client, ClientError> {
        let address = url.address();
        let failed = |source| ClientError::Connect { address: address.clone(), source };
        let open = |to| {
            let stream = TcpStream::connect_timeout(&to, Duration::from_millis(CONNECT_MS_MAX))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_millis(ANSWER_MS_MAX)))?;
            stream.set_write_timeout(Some(Duration::from_millis(ANSWER_MS_MAX)))?;
            Ok(stream)
        };
        let stream = open(url.resolve()?).map_err(failed)?;
        let mut client = Client { stream, address, unread: Vec::new() };
        match (&url.user, &url.password) {
            (Some(user), Some(password)) => client.call(&["AUTH", user, password])?,
            (None, Some(password)) => client.call(&["AUTH", password])?,
            (_, None) => return Ok(client),
        };
        Ok(client)
    }

    /// The node's address, for messages.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Changes how long an answer may take.
    pub fn set_answer_time_max(&mut self, time: Duration) -> Result<(), ClientError> {
        let failed = |source| ClientError::Connect { address: self.address.clone(), source };
        self.stream.set_read_timeout(Some(time)).map_err(failed)
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
        loop {
            let decoded = decode(&self.unread).map_err(|error| self.lost(command, error))?;
            let Some((frame, length)) = decoded else {
                self.fill(command)?;
                continue;
            };
            self.unread.drain(..length);
            return match frame {
                OwnedFrame::Error(text) => {
                    let (address, command) = (self.address.clone(), command.to_owned());
                    Err(ClientError::Refused { address, command, text })
                }
                frame => Ok(frame.into()),
            };
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

/// The value of `key` in the text that INFO answers (`key:value` lines).
pub fn info_field<'a>(info: &'a str, key: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.trim_end().strip_prefix(key)?.strip_prefix(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_parse() {
        let url: Url = "redis://127.0.0.1:6410".parse().unwrap();
        assert_eq!((url.host.as_str(), url.port, url.password), ("127.0.0.1", 6410, None));
        let url: Url = "redis://:s3:cr@t@node-1/0".parse().unwrap();
        assert_eq!((url.host.as_str(), url.port), ("node-1", PORT_DEFAULT));
        assert_eq!((url.user.as_deref(), url.password.as_deref()), (None, Some("s3:cr@t")));
        let url: Url = "redis://ann:pw@[::1]:7000".parse().unwrap();
        assert_eq!((url.host.as_str(), url.port, url.user.as_deref()), ("[::1]", 7000, Some("ann")));
        assert_eq!(url.to_string(), "redis://[::1]:7000", "a printed URL tells no password");
        assert_eq!("redis://[::1]".parse::<Url>().unwrap().port, PORT_DEFAULT);
        for wrong in ["127.0.0.1:6400", "http://a:1", "redis://", "redis://a:b", "redis://a:1/3", "redis://:6400"] {
            let error = wrong.parse::<Url>().unwrap_err();
            assert!(error.contains("such as redis://"), "{wrong}: {error}");
        }
    }

    #[test]
    fn fields_are_found_in_info_and_in_flat_lists() {
        let info = "# Server\r\nrole:leader\r\nrole_since:5\r\n";
        assert_eq!(info_field(info, "role"), Some("leader"));
        assert_eq!(info_field(info, "rol"), None);
        let text = |t: &'static str| Reply::Text(t.into());
        let row = Reply::Array(vec![text("name"), text("b"), text("lag_bytes"), Reply::Int(7)]);
        assert_eq!(row.field("lag_bytes").and_then(Reply::int), Some(7));
        assert_eq!(row.field("b"), None, "a value is not a key");
    }
}
