//! A session's token: the position in the log that its reads may not fall behind. Written by the nodes, carried by clients.
//!
//! ```text
//! w1.9f31c2aa.3.16/B374D848        version, first digits of the cluster's id, epoch, LSN of that epoch
//! ```
//!
//! The epoch of a node that leads without a register has a tag, as in `3-9f21c4aa`.

use std::fmt;
use std::str::FromStr;

const VERSION: &str = "w1";

/// A position that a session has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    cluster: String,
    epoch: String,
    lsn: u64,
}

impl Token {
    /// Where it stands in the log: the end of what was seen, in bytes.
    pub fn lsn(&self) -> u64 {
        self.lsn
    }

    /// True when a session that has seen `other` may go on from here. A token of the same cluster that is behind was taken
    /// before `other` was.
    pub fn is_past(&self, other: &Token) -> bool {
        self.cluster == other.cluster && self.lsn >= other.lsn
    }
}

impl FromStr for Token {
    type Err = String;
    fn from_str(text: &str) -> Result<Token, String> {
        let wrong = || format!("{text:?} is not a token such as w1.9f31c2aa.3.16/B374D848");
        let parts: Vec<&str> = text.split('.').collect();
        let [VERSION, cluster, epoch, lsn] = parts[..] else { return Err(wrong()) };
        let hex = |digits: &str| !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let (high, low) = lsn.split_once('/').filter(|(high, low)| hex(high) && hex(low)).ok_or_else(wrong)?;
        let half = |digits| u32::from_str_radix(digits, 16).map(u64::from).map_err(|_| wrong());
        let (number, tag) = epoch.split_once('-').unwrap_or((epoch, "00000000"));
        let decimal = number.bytes().all(|digit| digit.is_ascii_digit()) && number.parse::<u32>().is_ok();
        if !hex(cluster) || cluster.len() != 8 || !decimal || !hex(tag) || tag.len() != 8 {
            return Err(wrong());
        }
        Ok(Token { cluster: cluster.to_owned(), epoch: epoch.to_owned(), lsn: half(high)? << 32 | half(low)? })
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{VERSION}.{}.{}.{:X}/{:X}", self.cluster, self.epoch, self.lsn >> 32, self.lsn & 0xFFFF_FFFF)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_parse_print_and_compare() {
        let token: Token = "w1.9f31c2aa.3.16/B374D848".parse().unwrap();
        assert_eq!((token.to_string().as_str(), token.lsn()), ("w1.9f31c2aa.3.16/B374D848", 0x16_B374_D848));
        let later: Token = "w1.9f31c2aa.4-0badcafe.16/B374E000".parse().unwrap();
        assert!(later.is_past(&token) && token.is_past(&token) && !token.is_past(&later));
        let foreign: Token = "w1.00000000.4.17/0".parse().unwrap();
        assert!(!foreign.is_past(&token));
    }

    #[test]
    fn anything_else_is_refused() {
        for wrong in [
            "",
            "w1",
            "w2.9f31c2aa.3.16/B374D848",
            "w1.9f31c2aa.3",
            "w1.9f31c2aa.3.16",
            "w1.9f31c2aa.x.16/0",
            "w1.9f31c2aa.3-.16/0",
            "w1.9f31c2aa.3-12345.16/0",
            "w1.9f31c2aa.3.16/0.1",
            "w1.9f31c2a.3.16/0",
            "w1.9f31c2aa..16/0",
            "w1.9f31c2aa.3.+6/0",
            "w1.9f31c2aa.3.100000000/0",
            "w1.9f31c2aa.3./0",
        ] {
            assert!(wrong.parse::<Token>().is_err(), "{wrong}");
        }
    }
}
