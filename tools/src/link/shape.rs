//! What an emulated link is like, as an operator writes it. Used by the command line, by the control socket and by
//! `distance`; knows no packet.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};

use walferry_node::units::{ByteSize, Span};

/// The longest round trip: a link to the moon takes 2.6 s.
const RTT_MAX: Duration = Duration::from_secs(10);
/// What `tc` calls the units of a rate; bits a second.
const RATE_UNITS: [(&str, u64); 4] = [("bit", 1), ("kbit", 1_000), ("mbit", 1_000_000), ("gbit", 1_000_000_000)];

/// A share of a whole, written `0.1%`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Percent(pub f64);

/// Bits a second, written as `tc` writes them: `100mbit`, `1gbit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BitRate(pub u64);

impl FromStr for Percent {
    type Err = String;
    fn from_str(text: &str) -> Result<Percent, String> {
        let number = text.trim().strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
        let number = number.filter(|number| (0.0..=100.0).contains(number));
        number.map(Percent).ok_or_else(|| format!("{text:?} is not a share: write 0% to 100%, such as 0.1%"))
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl FromStr for BitRate {
    type Err = String;
    fn from_str(text: &str) -> Result<BitRate, String> {
        let wrong = || format!("{text:?} is not a rate: write a number with bit, kbit, mbit or gbit, such as 100mbit");
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor = RATE_UNITS.iter().find(|(name, _)| unit.trim().eq_ignore_ascii_case(name)).ok_or_else(wrong)?.1;
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(factor).filter(|bits| *bits > 0).map(BitRate).ok_or_else(wrong)
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fitting = RATE_UNITS.iter().rev().find(|(_, factor)| self.0.is_multiple_of(*factor));
        let (unit, factor) = fitting.unwrap_or(&RATE_UNITS[0]);
        write!(f, "{}{unit}", self.0 / factor)
    }
}

/// A way through a link. `Out` leaves the side that opened the connection (proxy) or the host's own namespace (tun,
/// netem); `Back` returns to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Direction {
    /// Away from the near side.
    Out,
    /// Towards the near side.
    Back,
}

impl Direction {
    /// Both ways, in the order of `index`.
    pub const BOTH: [Direction; 2] = [Direction::Out, Direction::Back];

    /// 0 out, 1 back.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// What a link does to what passes through it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Added to every round trip.
    pub rtt: Duration,
    /// Each packet's way takes up to so much more or less; order is kept.
    pub jitter: Duration,
    /// Share of packets that are lost.
    pub loss: Percent,
    /// Bits a second in each direction; none is unlimited.
    pub rate: Option<BitRate>,
    /// What may wait before the bottleneck, in each direction; further packets are dropped.
    pub buffer_bytes: u64,
    /// The part of the round trip that the way out takes.
    pub asymmetry: Percent,
}

/// One direction of a shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Way {
    /// From entry to exit when nothing waits.
    pub delay: Duration,
    /// Up to so much more or less.
    pub jitter: Duration,
    /// 0 to 1.
    pub loss: f64,
    /// Bits a second.
    pub rate: Option<BitRate>,
    /// What may wait before the bottleneck.
    pub buffer_bytes: u64,
}

/// What may wait before the bottleneck unless told: a switch port's share of its buffer.
pub const BUFFER_BYTES_DEFAULT: u64 = 1 << 20;

impl Shape {
    /// A link that only takes time.
    pub fn with_rtt(rtt: Duration) -> Shape {
        Shape {
            rtt,
            jitter: Duration::ZERO,
            loss: Percent(0.0),
            rate: None,
            buffer_bytes: BUFFER_BYTES_DEFAULT,
            asymmetry: Percent(50.0),
        }
    }

    /// What no link can be, in words.
    pub fn checked(self) -> Result<Shape, String> {
        if self.rtt > RTT_MAX {
            return Err(format!("rtt {}: at most {} are possible", Span(self.rtt), Span(RTT_MAX)));
        }
        if self.loss.0 >= 100.0 {
            return Err(format!("loss {}: nothing would arrive; `walferry link cut` does that", self.loss));
        }
        let shorter = self.way(Direction::Out).delay.min(self.way(Direction::Back).delay);
        if self.jitter > shorter && !self.jitter.is_zero() {
            let (jitter, shorter) = (Span(self.jitter), Span(shorter));
            return Err(format!("jitter {jitter}: more than one direction's delay of {shorter}; choose less"));
        }
        Ok(self)
    }

    /// What one direction is like.
    pub fn way(&self, direction: Direction) -> Way {
        let out = self.rtt.mul_f64(self.asymmetry.0 / 100.0);
        let delay = match direction {
            Direction::Out => out,
            Direction::Back => self.rtt - out,
        };
        let (jitter, rate, buffer_bytes) = (self.jitter, self.rate, self.buffer_bytes);
        Way { delay, jitter, loss: self.loss.0 / 100.0, rate, buffer_bytes }
    }

    /// Changes what `key=value` says; the keys are the flags' names.
    pub fn assign(&mut self, assignment: &str) -> Result<(), String> {
        let wrong = || format!("{assignment:?}: expected KEY=VALUE with rtt, jitter, loss, rate, buffer or asymmetry");
        let (key, value) = assignment.split_once('=').ok_or_else(wrong)?;
        match key {
            "rtt" => self.rtt = value.parse::<Span>()?.0,
            "jitter" => self.jitter = value.parse::<Span>()?.0,
            "loss" => self.loss = value.parse()?,
            "rate" if value == "unlimited" => self.rate = None,
            "rate" => self.rate = Some(value.parse()?),
            "buffer" => self.buffer_bytes = value.parse::<ByteSize>()?.0,
            "asymmetry" => self.asymmetry = value.parse()?,
            _ => return Err(wrong()),
        }
        Ok(())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rtt={} jitter={} loss={}", Span(self.rtt), Span(self.jitter), self.loss)?;
        match self.rate {
            Some(rate) => write!(f, " rate={rate}")?,
            None => f.write_str(" rate=unlimited")?,
        }
        write!(f, " buffer={} asymmetry={}", ByteSize(self.buffer_bytes), self.asymmetry)
    }
}

impl Serialize for Shape {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_written_as_it_is_read() {
        let mut shape = Shape::with_rtt(Duration::ZERO);
        for assignment in ["rtt=50ms", "jitter=100us", "loss=0.1%", "rate=1gbit", "buffer=4MiB", "asymmetry=70%"] {
            shape.assign(assignment).unwrap();
        }
        assert_eq!(shape.to_string(), "rtt=50ms jitter=100us loss=0.1% rate=1gbit buffer=4MiB asymmetry=70%");
        assert_eq!(shape.way(Direction::Out).delay, Duration::from_millis(35));
        assert_eq!(shape.way(Direction::Back).delay, Duration::from_millis(15));
        shape.assign("rate=unlimited").unwrap();
        let mut same = Shape::with_rtt(Duration::ZERO);
        shape.to_string().split(' ').for_each(|assignment| same.assign(assignment).unwrap());
        assert_eq!(same, shape);
    }

    #[test]
    fn what_no_link_can_be_is_said() {
        let shape = |assignments: &str| {
            let mut shape = Shape::with_rtt(Duration::from_millis(10));
            assignments.split(' ').try_for_each(|assignment| shape.assign(assignment))?;
            shape.checked()
        };
        for (assignments, says) in [
            ("rtt=1", "such as 100us"),
            ("rtt=11s", "at most 10s"),
            ("loss=0.1", "such as 0.1%"),
            ("loss=101%", "0% to 100%"),
            ("loss=100%", "`walferry link cut`"),
            ("rate=100", "such as 100mbit"),
            ("rate=0bit", "such as 100mbit"),
            ("jitter=6ms", "more than one direction's delay of 5ms"),
            ("jitter=2ms asymmetry=90%", "delay of 1ms"),
            ("delay=1ms", "expected KEY=VALUE"),
        ] {
            let error = shape(assignments).unwrap_err();
            assert!(error.contains(says), "{assignments}: {error}");
        }
        assert_eq!("250kbit".parse::<BitRate>().unwrap().to_string(), "250kbit");
    }
}
