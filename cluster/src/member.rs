//! Who takes part: names of nodes and the id of their cluster. Plain values; nothing here knows who is connected.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The longest name of a node; PostgreSQL's bound for identifiers.
pub const MEMBER_NAME_BYTES_MAX: usize = 63;
/// Digits of a cluster id as text.
const CLUSTER_ID_DIGITS: usize = 32;

/// The name of a node: 1 to 63 of `a-z 0-9 _ -`. A replica's name is also the name of its slot. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemberName(Arc<str>);

impl MemberName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Who opened a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Where it comes from.
    pub address: SocketAddr,
    /// The names that it has proved to be; none where peers prove nothing.
    pub proved: Option<Proved>,
}

impl Caller {
    /// A caller that proved no name.
    pub fn unproved(address: SocketAddr) -> Caller {
        Caller { address, proved: None }
    }

    /// It may say that it is `name`.
    pub fn check(&self, name: &MemberName) -> Result<(), Impersonation> {
        self.proved.as_ref().map_or(Ok(()), |proved| proved.check(name))
    }
}

/// The names under which a node may speak: the one that it proved with the peer secret, or those of its certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proved(Vec<MemberName>);

impl Proved {
    /// Of what `names` are names of nodes; the others are left out.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Proved {
        Proved(names.into_iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// The node may say that it is `name`.
    pub fn check(&self, name: &MemberName) -> Result<(), Impersonation> {
        if self.0.contains(name) {
            return Ok(());
        }
        Err(Impersonation { proved: self.clone(), said: name.clone() })
    }

    /// One of the names is among these.
    pub fn is_one_of(&self, mut is_there: impl FnMut(&MemberName) -> bool) -> bool {
        self.0.iter().any(&mut is_there)
    }
}

impl fmt::Display for Proved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f
                .write_str("a node whose certificate names no node (a DNS name among its subject alternative names)");
        }
        for (number, name) in self.0.iter().enumerate() {
            write!(f, "{}{name}", if number == 0 { "" } else { " or " })?;
        }
        Ok(())
    }
}

/// A node proved one name and says another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{proved} says that it is {said}: a node speaks under the name that it proved")]
pub struct Impersonation {
    /// What it proved.
    pub proved: Proved,
    /// What it says.
    pub said: MemberName,
}

/// Where clients reach a node that says it listens on `client_address` and whose link comes from `link`: a node that listens on
/// every address is reached where its link is. `None` for text that is no address, such as none: the link's port is for peers.
pub fn reachable(client_address: &str, link: SocketAddr) -> Option<String> {
    client_address.parse::<SocketAddr>().is_ok().then(|| reachable_at(client_address, Some(link.ip())))
}

/// `address` of a node that somebody has reached at `ip`: every address (`0.0.0.0`, `[::]`) stands for that one. An IPv4
/// address that a dual-stack socket reports as IPv6 is returned as IPv4.
pub fn reachable_at(address: &str, ip: Option<IpAddr>) -> String {
    match (address.parse::<SocketAddr>(), ip) {
        (Ok(address), Some(ip)) if address.ip().is_unspecified() => {
            SocketAddr::new(ip.to_canonical(), address.port()).to_string()
        }
        _ => address.to_owned(),
    }
}

/// Where clients reach a member that listens on `client_address` and is known to the others as `peer`, `HOST:PORT`: one that listens
/// on every address is reached at the host where its peers reach it.
pub fn reachable_member(client_address: SocketAddr, peer: &str) -> String {
    match peer.rsplit_once(':') {
        Some((host, _)) if client_address.ip().is_unspecified() => format!("{host}:{}", client_address.port()),
        _ => client_address.to_string(),
    }
}

/// What was given is not a node's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a node name: expected 1 to 63 of a-z, 0-9, _ and -")]
pub struct NameSyntax(String);

impl FromStr for MemberName {
    type Err = NameSyntax;

    fn from_str(text: &str) -> Result<MemberName, NameSyntax> {
        let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_' || byte == b'-';
        if (1..=MEMBER_NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(known) {
            return Ok(MemberName(text.into()));
        }
        Err(NameSyntax(text.chars().take(MEMBER_NAME_BYTES_MAX + 1).collect()))
    }
}

/// The id that every node of a cluster carries, random, made when its first node was initialised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterId(pub u128);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What was given is not a cluster id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a cluster id: expected 32 hexadecimal digits")]
pub struct ClusterIdSyntax(String);

impl FromStr for ClusterId {
    type Err = ClusterIdSyntax;

    fn from_str(text: &str) -> Result<ClusterId, ClusterIdSyntax> {
        let digits = text.len() == CLUSTER_ID_DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit());
        let id = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        id.map(ClusterId).ok_or_else(|| ClusterIdSyntax(text.chars().take(CLUSTER_ID_DIGITS + 1).collect()))
    }
}

impl TryFrom<String> for MemberName {
    type Error = NameSyntax;

    fn try_from(text: String) -> Result<MemberName, NameSyntax> {
        text.parse()
    }
}

impl From<MemberName> for String {
    fn from(name: MemberName) -> String {
        name.to_string()
    }
}

impl TryFrom<String> for ClusterId {
    type Error = ClusterIdSyntax;

    fn try_from(text: String) -> Result<ClusterId, ClusterIdSyntax> {
        text.parse()
    }
}

impl From<ClusterId> for String {
    fn from(id: ClusterId) -> String {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded() {
        for right in ["a", "node-1", "r_2", &"x".repeat(63)] {
            assert_eq!(right.parse::<MemberName>().map(|n| n.to_string()), Ok(right.to_owned()));
        }
        for wrong in ["", "A", "a b", "é", "a.b", &"x".repeat(64)] {
            assert!(wrong.parse::<MemberName>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn cluster_ids_round_trip() {
        let id = ClusterId(0xAB);
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in ["", "ab", "+0000000000000000000000000000000", &"g".repeat(32)] {
            assert!(wrong.parse::<ClusterId>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_node_that_listens_everywhere_is_reached_where_its_link_is() {
        let link = "10.0.0.7:50000".parse().unwrap();
        for (said, reached) in [
            ("10.1.1.1:6400", Some("10.1.1.1:6400")),
            ("0.0.0.0:6400", Some("10.0.0.7:6400")),
            ("[::]:6400", Some("10.0.0.7:6400")),
            ("", None),
        ] {
            assert_eq!(reachable(said, link).as_deref(), reached);
        }
        // As a socket for IPv4 and IPv6 sees a link of IPv4.
        assert_eq!(
            reachable("[::]:6400", "[::ffff:10.0.0.7]:50000".parse().unwrap()).as_deref(),
            Some("10.0.0.7:6400")
        );
        assert_eq!(reachable("[::]:6400", "[fd00::7]:50000".parse().unwrap()).as_deref(), Some("[fd00::7]:6400"));
        assert_eq!(reachable_at("0.0.0.0:6400", None), "0.0.0.0:6400");
        for (listens, reached) in
            [("0.0.0.0:6400", "db-1:6400"), ("[::]:6400", "db-1:6400"), ("10.1.1.1:6400", "10.1.1.1:6400")]
        {
            assert_eq!(reachable_member(listens.parse().unwrap(), "db-1:6401"), reached);
        }
    }
}
