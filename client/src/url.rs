//! Where a node is, as people write it: `redis://[USER[:PASSWORD]@]HOST[:PORT]`, and `rediss://` for TLS, with the files that
//! it takes: `?ca=FILE&cert=FILE&key=FILE`. Connects nowhere; looks names up when asked.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use walferry_tls::rustls::ClientConfig;
use walferry_tls::{NamedFile, client_config};

use crate::credentials::Credentials;
use crate::tcp::ClientError;

/// The port of a URL that names none.
const PORT_DEFAULT: u16 = 6400;

/// The environment's names for the files of a `rediss://` URL that does not name them: CA, certificate, key.
const TLS_FILES: [(&str, &str); 3] =
    [("ca", "WALFERRY_TLS_CA"), ("cert", "WALFERRY_TLS_CERT"), ("key", "WALFERRY_TLS_KEY")];

/// Where a node listens for clients: `redis://[USER[:PASSWORD]@]HOST[:PORT]`.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    /// Name or address.
    pub host: String,
    /// Port for clients.
    pub port: u16,
    /// User for AUTH, if given.
    pub user: Option<String>,
    /// Password for AUTH, if given.
    pub password: Option<String>,
    /// The files of a connection over TLS (CA, certificate, key), as far as they are named; `None` for plain TCP.
    pub tls: Option<[Option<PathBuf>; 3]>,
}

/// Without the password.
impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Url {
    /// The AUTH that a connection begins with: the URL's credentials, or else those of the process; none without a password.
    pub fn auth(&self) -> Option<Vec<&str>> {
        let own = Credentials::by_default();
        let password = self.password.as_deref().or(own.map(|own| own.password.as_str()))?;
        // Whose password it is goes with the password, unless the URL names somebody.
        let user = match &self.password {
            Some(_) => self.user.as_deref(),
            None => self.user.as_deref().or(own.and_then(|own| own.user.as_deref())),
        };
        Some(["AUTH"].into_iter().chain(user).chain([password]).collect())
    }

    /// The URL of a node at this address, with the credentials of this one.
    pub fn with_address(&self, address: &str) -> Result<Url, String> {
        let other: Url = format!("redis://{address}").parse()?;
        Ok(Url { user: self.user.clone(), password: self.password.clone(), tls: self.tls.clone(), ..other })
    }

    /// The first address that the host stands for.
    pub fn resolve(&self) -> Result<SocketAddr, ClientError> {
        let failed = |source| ClientError::Connect { address: self.address(), source };
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let no_address = || failed(std::io::Error::other("the name has no address"));
        (host, self.port).to_socket_addrs().map_err(failed)?.next().ok_or_else(no_address)
    }

    /// The settings of TLS, for a URL that asks for it: whose word is taken, and what is shown to a node that asks.
    pub fn tls_config(&self) -> Result<Option<Arc<ClientConfig>>, ClientError> {
        let Some(files) = &self.tls else { return Ok(None) };
        let failed = |text: String| ClientError::Connect {
            address: self.address(),
            source: std::io::Error::new(std::io::ErrorKind::InvalidInput, text),
        };
        let file = |index: usize| {
            let (option, variable) = TLS_FILES[index];
            let named = files[index].clone().or_else(|| std::env::var_os(variable).map(PathBuf::from));
            named.map(|path: PathBuf| NamedFile::new(option, Path::new(&path)))
        };
        let (Some(ca), own) = (file(0), file(1).zip(file(2))) else {
            let (option, variable) = TLS_FILES[0];
            return Err(failed(format!(
                "a rediss:// URL needs the CA of the nodes: ?{option}=FILE, or {variable}=FILE"
            )));
        };
        client_config(&ca, own).map(Some).map_err(|error| failed(error.to_string()))
    }

    /// `HOST:PORT`, without credentials.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

impl FromStr for Url {
    type Err = String;
    fn from_str(text: &str) -> Result<Url, String> {
        // What stands before an @ may be a password.
        let shown = text.rsplit_once('@').map_or(text, |(_, address)| address);
        let wrong = |why: &str| format!("{shown:?} {why}; expected redis://HOST:PORT, such as redis://127.0.0.1:6400");
        let (rest, is_tls) = match text.split_once("://") {
            Some(("redis", rest)) => (rest, false),
            Some(("rediss", rest)) => (rest, true),
            Some((scheme, _)) => return Err(wrong(&format!("has the scheme {scheme:?}"))),
            None => return Err(wrong("has no scheme")),
        };
        let (credentials, rest) = rest.rsplit_once('@').map_or((None, rest), |(left, right)| (Some(left), right));
        let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
        let mut tls = is_tls.then(<[Option<PathBuf>; 3]>::default);
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let file = TLS_FILES.iter().position(|(option, _)| *option == key);
            match (file, &mut tls) {
                (Some(index), Some(files)) if !value.is_empty() => files[index] = Some(PathBuf::from(value)),
                (Some(_), None) => return Err(wrong("names files of TLS; rediss:// asks for it")),
                _ => return Err(wrong("has a parameter that is none of ca=FILE, cert=FILE, key=FILE")),
            }
        }
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
        Ok(Url { host: host.to_owned(), port, user, password: password.map(str::to_owned), tls })
    }
}

impl fmt::Display for Url {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls.is_some() { "rediss" } else { "redis" };
        write!(f, "{scheme}://{}:{}", self.host, self.port)
    }
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
        assert_eq!(url.auth(), Some(vec!["AUTH", "ann", "pw"]));
        assert_eq!("redis://:pw@a".parse::<Url>().unwrap().auth(), Some(vec!["AUTH", "pw"]));
        assert_eq!("redis://ann@a".parse::<Url>().unwrap().auth(), None, "no password, no AUTH");
        let error = "redis://ann:secret@a:b".parse::<Url>().unwrap_err();
        assert!(!error.contains("secret"), "{error}");
        let url: Url = "rediss://h:7000?ca=/etc/ca.pem&key=k".parse().unwrap();
        assert_eq!(url.tls, Some([Some("/etc/ca.pem".into()), None, Some("k".into())]));
        let other = url.with_address("i:7001").unwrap();
        assert_eq!(
            (other.to_string().as_str(), &other.tls),
            ("rediss://i:7001", &url.tls),
            "the leader is TLS as well"
        );
        assert_eq!("redis://[::1]".parse::<Url>().unwrap().port, PORT_DEFAULT);
        for wrong in [
            "127.0.0.1:6400",
            "http://a:1",
            "redis://",
            "redis://a:b",
            "redis://a:1/3",
            "redis://:6400",
            "redis://a?ca=f",
            "rediss://a?x=f",
        ] {
            let error = wrong.parse::<Url>().unwrap_err();
            assert!(error.contains("such as redis://"), "{wrong}: {error}");
        }
    }
}
