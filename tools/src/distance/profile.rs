//! A distance with a name: one of those that operators know, or their own.

use std::str::FromStr;
use std::time::Duration;

use walferry_node::units::Span;

/// The distances that have a name, and what a round trip takes there.
pub const KNOWN: [(&str, Duration); 5] = [
    ("same-host", Duration::ZERO),
    ("rack", Duration::from_millis(1)),
    ("zone", Duration::from_millis(2)),
    ("region", Duration::from_millis(50)),
    ("ocean", Duration::from_millis(150)),
];
/// A longer name would break the tables.
const NAME_CHARS_MAX: usize = 16;

/// One distance to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// What it is called.
    pub name: String,
    /// What a round trip takes; zero is no link at all.
    pub rtt: Duration,
}

impl FromStr for Profile {
    type Err = String;
    fn from_str(text: &str) -> Result<Profile, String> {
        let (name, rtt) = match text.split_once('=') {
            Some((name, rtt)) => (name, rtt.parse::<Span>()?.0),
            None => {
                let known = KNOWN.iter().find(|(name, _)| *name == text);
                let names = || KNOWN.map(|(name, _)| name).join(", ");
                let wrong = || format!("{text:?}: there are {}; or NAME=RTT, such as paris=9ms", names());
                *known.ok_or_else(wrong)?
            }
        };
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.chars().all(fits) {
            return Err(format!("{name:?}: a name has 1 to {NAME_CHARS_MAX} letters, digits, - and _"));
        }
        Ok(Profile { name: name.to_owned(), rtt })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_have_a_known_name_or_their_own_round_trip() {
        let ms = Duration::from_millis;
        let profile = |text: &str| text.parse::<Profile>().map(|profile| (profile.name, profile.rtt));
        assert_eq!(profile("region"), Ok(("region".to_owned(), ms(50))));
        assert_eq!(profile("paris=9ms"), Ok(("paris".to_owned(), ms(9))));
        assert_eq!(profile("rack=3ms"), Ok(("rack".to_owned(), ms(3))), "one's own wins");
        for (wrong, says) in
            [("moon", "such as paris=9ms"), ("a=9", "9"), ("=1ms", "a name has"), ("a b=1ms", "a name has")]
        {
            let error = profile(wrong).unwrap_err();
            assert!(error.contains(says), "{wrong}: {error}");
        }
    }
}
