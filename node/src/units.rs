//! Values with a unit as people write them: sizes (`64MiB`), times (`100us`, `5s`), addresses (`host:port`).
//! Used by the flags and by `walferry.toml`; knows no key.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

const SIZE_UNITS: [(&str, u64); 5] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
const TIME_UNITS: [(&str, u64); 6] = [
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("min", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// A number of bytes, written `4096`, `64KiB`, `1GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A length of time, written `100us`, `5s`, `2min`; `0` needs no unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// `host:port`, checked for its form; the name is looked up only by `resolve`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort(String);

/// Splits `64 MiB` into its whole number and its unit.
fn split(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim()))
}

/// The largest unit that divides `value`, and how often it does.
fn largest_unit(value: u64, units: &[(&'static str, u64)]) -> (u64, &'static str) {
    let fitting = units.iter().rev().find(|(_, factor)| value != 0 && value.is_multiple_of(*factor));
    let (unit, factor) = fitting.unwrap_or(&units[0]);
    (value / factor, unit)
}

impl FromStr for ByteSize {
    type Err = String;
    fn from_str(text: &str) -> Result<ByteSize, String> {
        let wrong = || format!("{text:?} is not a size: write bytes or KiB, MiB, GiB, TiB, such as 64MiB");
        let (number, unit) = split(text).ok_or_else(wrong)?;
        if unit.is_empty() {
            return Ok(ByteSize(number));
        }
        let (_, factor) = SIZE_UNITS.iter().find(|(name, _)| unit.eq_ignore_ascii_case(name)).ok_or_else(wrong)?;
        number.checked_mul(*factor).map(ByteSize).ok_or_else(|| format!("{text:?} is more than 64 bits can count"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, unit) = largest_unit(self.0, &SIZE_UNITS);
        if unit == "B" { write!(f, "{number}") } else { write!(f, "{number}{unit}") }
    }
}

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Span, String> {
        let wrong =
            || format!("{text:?} is not a time: write a number with ns, us, ms, s, min or h, such as 100us or 5s");
        let (number, unit) = split(text).ok_or_else(wrong)?;
        if number == 0 && unit.is_empty() {
            return Ok(Span(Duration::ZERO));
        }
        let (_, factor) = TIME_UNITS.iter().find(|(name, _)| unit == *name).ok_or_else(wrong)?;
        let nanos = number.checked_mul(*factor).ok_or_else(|| format!("{text:?} is longer than 500 years"))?;
        Ok(Span(Duration::from_nanos(nanos)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_zero() {
            return f.write_str("0s");
        }
        let (number, unit) = largest_unit(u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX), &TIME_UNITS);
        write!(f, "{number}{unit}")
    }
}

impl HostPort {
    /// The first address that the name stands for.
    pub fn resolve(&self) -> std::io::Result<SocketAddr> {
        let not_found = || std::io::Error::other("the name has no address");
        self.0.to_socket_addrs()?.next().ok_or_else(not_found)
    }
}

impl FromStr for HostPort {
    type Err = String;
    fn from_str(text: &str) -> Result<HostPort, String> {
        let fits = |(host, port): (&str, &str)| {
            let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
            !host.is_empty() && !bare_v6 && port.parse::<u16>().is_ok()
        };
        if text.rsplit_once(':').is_some_and(fits) {
            return Ok(HostPort(text.to_owned()));
        }
        Err(format!("{text:?} is not HOST:PORT, such as 127.0.0.1:6400 or [::1]:6400"))
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Serialises as text, deserialises from text by `FromStr`.
macro_rules! as_text {
    ($type:ty, $what:literal, $number:expr) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$type, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($what)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$type, E> {
                        let from_number: fn(i64) -> Option<$type> = $number;
                        let wrong = || E::invalid_value(de::Unexpected::Signed(number), &self);
                        from_number(number).ok_or_else(wrong)
                    }
                }
                deserializer.deserialize_any(Text)
            }
        }
    };
}

as_text!(ByteSize, "a size such as 4096 or \"64MiB\"", |number| { u64::try_from(number).ok().map(ByteSize) });
as_text!(Span, "a time in quotes with its unit, such as \"100us\" or \"5s\"", |number| {
    (number == 0).then_some(Span(Duration::ZERO))
});
as_text!(HostPort, "an address such as \"127.0.0.1:6400\"", |_| None);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print() {
        for (text, bytes, printed) in [
            ("0", 0, "0"),
            ("4096", 4096, "4KiB"),
            ("64MiB", 64 << 20, "64MiB"),
            ("1 gib", 1 << 30, "1GiB"),
            ("1000", 1000, "1000"),
            ("3B", 3, "3"),
        ] {
            let size = text.parse::<ByteSize>().unwrap();
            assert_eq!(size, ByteSize(bytes), "{text}");
            assert_eq!(size.to_string(), printed);
            assert_eq!(size.to_string().parse(), Ok(size));
        }
        for wrong in ["", "MiB", "64MB", "-1", "1.5MiB", "99999999TiB", "64 M"] {
            assert!(wrong.parse::<ByteSize>().is_err(), "{wrong:?} must not parse");
        }
        assert!("64MB".parse::<ByteSize>().unwrap_err().contains("such as 64MiB"));
    }

    #[test]
    fn times_parse_and_print() {
        for (text, nanos, printed) in [
            ("0", 0, "0s"),
            ("100us", 100_000, "100us"),
            ("5s", 5_000_000_000, "5s"),
            ("90s", 90_000_000_000, "90s"),
            ("120s", 120_000_000_000, "2min"),
            ("1 h", 3_600_000_000_000, "1h"),
            ("1500ms", 1_500_000_000, "1500ms"),
        ] {
            let span = text.parse::<Span>().unwrap();
            assert_eq!(span.0, Duration::from_nanos(nanos), "{text}");
            assert_eq!(span.to_string(), printed);
            assert_eq!(span.to_string().parse(), Ok(span));
        }
        for wrong in ["", "5", "5 sec", "-1s", "99999999999h", "s"] {
            assert!(wrong.parse::<Span>().is_err(), "{wrong:?} must not parse");
        }
    }

    #[test]
    fn addresses_need_host_and_port() {
        for right in ["127.0.0.1:0", "localhost:6400", "[::1]:6400", "node-1.example:65535"] {
            assert_eq!(right.parse::<HostPort>().unwrap().to_string(), right);
        }
        for wrong in ["", ":6400", "localhost", "localhost:", "localhost:70000", "::1:6400", "redis://a:1x"] {
            assert!(wrong.parse::<HostPort>().is_err(), "{wrong:?} must not parse");
        }
    }
}
