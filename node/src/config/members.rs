//! `members`: who takes part in a cluster and where each is reached, the same text on every node.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use walferry_cluster::MemberName;
use walferry_cluster::register::MEMBERS_MAX;

use crate::units::HostPort;

/// Members with their peer addresses, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberList(BTreeMap<MemberName, HostPort>);

impl MemberList {
    /// Every member and its peer address, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&MemberName, &HostPort)> {
        self.0.iter()
    }

    /// Every member.
    pub fn names(&self) -> impl Iterator<Item = &MemberName> + Clone {
        self.0.keys()
    }

    /// The peer address of one.
    pub fn peer(&self, name: &MemberName) -> Option<&HostPort> {
        self.0.get(name)
    }

    /// The peer address of each, as text.
    pub fn peers(&self) -> BTreeMap<MemberName, String> {
        self.0.iter().map(|(name, peer)| (name.clone(), peer.to_string())).collect()
    }
}

/// Nodes without names: their peer addresses, PEERS_MAX at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerList(pub Vec<HostPort>);

/// Addresses that one list may name.
const PEERS_MAX: usize = 16;

impl FromStr for PeerList {
    type Err = String;

    fn from_str(text: &str) -> Result<PeerList, String> {
        let peers: Vec<HostPort> = text.split(',').map(|peer| peer.trim().parse()).collect::<Result<_, _>>()?;
        if peers.len() > PEERS_MAX {
            return Err(format!("{} addresses: at most {PEERS_MAX}", peers.len()));
        }
        Ok(PeerList(peers))
    }
}

impl FromStr for MemberList {
    type Err = String;

    fn from_str(text: &str) -> Result<MemberList, String> {
        let mut members = BTreeMap::new();
        for entry in text.split(',').map(str::trim) {
            let (name, peer) = entry
                .split_once('=')
                .ok_or_else(|| format!("{entry:?} is not NAME=PEER_HOST:PORT, such as a=10.0.0.1:6401"))?;
            let name: MemberName = name.trim().parse().map_err(|error| format!("{error}"))?;
            let peer: HostPort = peer.trim().parse()?;
            if members.values().any(|other| *other == peer) {
                return Err(format!("two members have the peer address {peer}"));
            }
            if members.insert(name.clone(), peer).is_some() {
                return Err(format!("{name} is named twice"));
            }
        }
        if members.len() > MEMBERS_MAX {
            return Err(format!("{} members: a cluster has at most {MEMBERS_MAX}", members.len()));
        }
        Ok(MemberList(members))
    }
}

impl fmt::Display for MemberList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.0.iter().map(|(name, peer)| format!("{name}={peer}")).collect();
        f.write_str(&texts.join(","))
    }
}
