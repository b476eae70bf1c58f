//! Histories of values that only grow: strings that are appended to, and streams. Whoever appends, appends something of its own,
//! so the value at the end says in which order everything happened, and whether it can have happened so needs no search: what was
//! answered before something else was asked comes before it.

use std::collections::{BTreeMap, BTreeSet};

/// What became of an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Became {
    /// The answer is lost: it is unknown whether the change was made.
    Unknown,
    Done,
    /// The change was refused and not made.
    Refused,
}

/// Something that was asked of one key.
#[derive(Clone, Debug)]
struct Asked {
    asked_us: u64,
    /// When the answer came; `None`: it never did, or says nothing.
    answered_us: Option<u64>,
}

/// One token on its way to a key.
#[derive(Clone, Debug)]
struct Append {
    key: String,
    asked: Asked,
    became: Became,
    /// Of the same transaction, as a token of another key.
    with: Option<String>,
    /// What the key held when it was watched: it is to be appended to this and to nothing else.
    upon: Option<String>,
    /// The id that it was given, or the length that the value had with it.
    place: Option<String>,
}

/// What a reader saw of one key or of several at one moment.
#[derive(Clone, Debug)]
struct Look {
    asked: Asked,
    /// The number of tokens in each.
    saw: BTreeMap<String, Vec<String>>,
}

/// What a reader saw who asked for a state of a certain age; it may hold what is taken back later.
#[derive(Clone, Debug)]
struct Recent {
    key: String,
    saw: Vec<String>,
    /// What was done by then has to be in it.
    as_of_us: u64,
}

/// All appends and looks.
#[derive(Default)]
pub struct Growing {
    appends: BTreeMap<String, Append>,
    looks: Vec<Look>,
    recent: Vec<Recent>,
}

/// What stands behind each token in a string.
pub const END: char = ';';

/// The tokens of a string.
pub fn tokens(value: &str) -> Vec<String> {
    value.split_terminator(END).map(str::to_owned).collect()
}

impl Growing {
    pub fn ask(&mut self, key: &str, token: &str, now_us: u64, with: Option<&str>, upon: Option<&str>) {
        let append = Append {
            key: key.to_owned(),
            asked: Asked { asked_us: now_us, answered_us: None },
            became: Became::Unknown,
            with: with.map(str::to_owned),
            upon: upon.map(str::to_owned),
            place: None,
        };
        let before = self.appends.insert(token.to_owned(), append);
        assert!(before.is_none(), "{token} is appended once");
    }

    pub fn answer(&mut self, token: &str, became: Became, place: Option<String>, now_us: u64) {
        let append = self.appends.get_mut(token).expect("it was asked for");
        (append.became, append.place) = (became, place);
        append.asked.answered_us = (became == Became::Done).then_some(now_us);
    }

    /// A strong read of these keys at one moment.
    pub fn look(&mut self, saw: BTreeMap<String, Vec<String>>, asked_us: u64, now_us: u64) {
        self.looks.push(Look { asked: Asked { asked_us, answered_us: Some(now_us) }, saw });
    }

    /// A read of this key as it was at some time.
    pub fn look_committed(&mut self, key: &str, saw: Vec<String>) {
        let saw = BTreeMap::from([(key.to_owned(), saw)]);
        self.looks.push(Look { asked: Asked { asked_us: 0, answered_us: None }, saw });
    }

    /// A read of this key that has to show everything that was done before `as_of_us`.
    pub fn look_back(&mut self, key: &str, saw: Vec<String>, as_of_us: u64) {
        self.recent.push(Recent { key: key.to_owned(), saw, as_of_us });
    }

    /// The keys.
    pub fn keys(&self) -> BTreeSet<String> {
        let read = self.looks.iter().flat_map(|look| look.saw.keys());
        self.appends.values().map(|append| &append.key).chain(read).cloned().collect()
    }

    /// Whether everything can have happened as it was told, when this is what the keys hold: tokens and their places. How many calls were checked.
    pub fn check(&self, held: &BTreeMap<String, Vec<(String, String)>>) -> Result<usize, String> {
        let mut place_of: BTreeMap<&str, (&str, usize)> = BTreeMap::new();
        for (key, all) in held {
            for (index, (token, place)) in all.iter().enumerate() {
                let Some(append) = self.appends.get(token) else {
                    return Err(format!("{key} holds {token:?}, which nobody appended"));
                };
                if append.key != *key || append.became == Became::Refused {
                    return Err(format!("{key} holds {token}, which was refused there: {append:?}"));
                }
                if append.place.as_ref().is_some_and(|told| told != place) {
                    return Err(format!("{key} holds {token} at {place}: {append:?}"));
                }
                if place_of.insert(token, (key, index)).is_some() {
                    return Err(format!("{token} is there twice"));
                }
            }
        }
        self.appends_hold(held, &place_of)?;
        self.looks_hold(held, &place_of)?;
        for key in held.keys() {
            self.order_holds(key, &place_of)?;
        }
        self.recent_looks_hold()?;
        let done = self.appends.values().filter(|append| append.became == Became::Done).count();
        Ok(self.looks.len() + self.recent.len() + done)
    }

    fn recent_looks_hold(&self) -> Result<(), String> {
        for Recent { key, saw, as_of_us } in &self.recent {
            let due = self.appends.iter().find(|(token, append)| {
                let done = append.asked.answered_us.is_some_and(|at| at <= *as_of_us);
                done && append.key == *key && !saw.contains(token)
            });
            if let Some((token, append)) = due {
                return Err(format!("a read of {key} was to be as of {as_of_us} us and misses {token}: {append:?}"));
            }
        }
        Ok(())
    }

    fn appends_hold(
        &self,
        held: &BTreeMap<String, Vec<(String, String)>>,
        place_of: &BTreeMap<&str, (&str, usize)>,
    ) -> Result<(), String> {
        for (token, append) in &self.appends {
            let Some((key, index)) = place_of.get(token.as_str()) else {
                if append.became == Became::Done {
                    return Err(format!("{token} was acknowledged and is gone: {append:?}"));
                }
                continue;
            };
            if let Some(with) = &append.with
                && !place_of.contains_key(with.as_str())
            {
                return Err(format!("{token} is there without {with} of the same transaction"));
            }
            if let Some(upon) = &append.upon {
                let before: String = held[*key][..*index].iter().map(|(token, _)| format!("{token}{END}")).collect();
                if before != *upon {
                    return Err(format!(
                        "{token} went on top of {before:?}, and what was watched was {upon:?}: {append:?}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// What was read is how the keys began; of a transaction all or nothing was seen.
    fn looks_hold(
        &self,
        held: &BTreeMap<String, Vec<(String, String)>>,
        place_of: &BTreeMap<&str, (&str, usize)>,
    ) -> Result<(), String> {
        let of_one_transaction: Vec<_> = place_of
            .iter()
            .filter_map(|(token, place)| {
                let with = self.appends[*token].with.as_deref()?;
                Some((token, place, with, place_of.get(with)?))
            })
            .collect();
        for look in &self.looks {
            for (key, saw) in &look.saw {
                let is = held.get(key).map_or(&[][..], Vec::as_slice);
                if saw.len() > is.len() || saw.iter().zip(is).any(|(saw, (is, _))| saw != is) {
                    let last = saw.last();
                    return Err(format!("{key} was read with {} tokens up to {last:?}, and is another now", saw.len()));
                }
            }
            for (token, (key, index), with, (other, other_index)) in &of_one_transaction {
                if let (Some(one), Some(two)) = (look.saw.get(*key), look.saw.get(*other))
                    && (*index < one.len()) != (*other_index < two.len())
                {
                    return Err(format!("{token} and {with} are of one transaction, and one of them was read alone"));
                }
            }
        }
        Ok(())
    }

    /// What was answered before something else was asked comes before it.
    fn order_holds(&self, key: &str, place_of: &BTreeMap<&str, (&str, usize)>) -> Result<(), String> {
        // Of each call: how many tokens there were at the least when it was answered, and at the most when it was asked.
        let mut answered: Vec<(u64, usize, &str)> = Vec::new();
        let mut asked: Vec<(u64, usize, &str)> = Vec::new();
        for (token, append) in self.appends.iter().filter(|(_, append)| append.key == key) {
            let Some((_, index)) = place_of.get(token.as_str()) else { continue };
            asked.push((append.asked.asked_us, *index, token));
            answered.extend(append.asked.answered_us.map(|at| (at, index + 1, token.as_str())));
        }
        for look in self.looks.iter().filter(|look| look.saw.contains_key(key)) {
            let count = look.saw[key].len();
            asked.push((look.asked.asked_us, count, "a read"));
            answered.extend(look.asked.answered_us.map(|at| (at, count, "a read")));
        }
        asked.sort_unstable();
        answered.sort_unstable();
        let (mut answers, mut most) = (answered.into_iter().peekable(), (0, 0, ""));
        for (at, limit, what) in asked {
            while let Some(answer) = answers.next_if(|(answered, ..)| *answered < at) {
                if answer.1 > most.1 {
                    most = answer;
                }
            }
            if most.1 > limit {
                let (when, count, who) = most;
                return Err(format!(
                    "{key}: at {when} us {who} had found or made {count} tokens, and {what}, asked for at {at} us, is at {limit}"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(tokens: &[&str]) -> BTreeMap<String, Vec<(String, String)>> {
        let pairs = tokens.iter().enumerate().map(|(at, token)| ((*token).to_owned(), (at + 1).to_string()));
        BTreeMap::from([("k".to_owned(), pairs.collect())])
    }

    fn appended(tokens: &[(&str, u64, u64)]) -> Growing {
        let mut growing = Growing::default();
        for (token, asked, answered) in tokens {
            growing.ask("k", token, *asked, None, None);
            growing.answer(token, Became::Done, None, *answered);
        }
        growing
    }

    fn saw(tokens: &[&str]) -> BTreeMap<String, Vec<String>> {
        BTreeMap::from([("k".to_owned(), tokens.iter().map(|token| (*token).to_owned()).collect())])
    }

    #[test]
    fn appends_in_order_of_their_calls_hold() {
        let mut growing = appended(&[("a", 1, 5), ("b", 3, 6), ("c", 8, 9)]);
        growing.look(saw(&["b"]), 4, 7);
        growing.look(saw(&["b", "a", "c"]), 10, 11);
        growing.check(&held(&["b", "a", "c"])).expect("a and b overlap");
        assert!(growing.check(&held(&["c", "a", "b"])).is_err(), "c was asked for when a was done");
        assert!(growing.check(&held(&["a", "b"])).is_err(), "c is gone");
        assert!(growing.check(&held(&["a", "b", "c", "x"])).is_err(), "x is nobody's");
    }

    #[test]
    fn read_that_misses_what_was_done_is_found() {
        let mut growing = appended(&[("a", 1, 5)]);
        growing.look(saw(&[]), 6, 7);
        assert!(growing.check(&held(&["a"])).is_err());
        let mut growing = appended(&[("a", 1, 5)]);
        growing.look(saw(&["a"]), 2, 3);
        growing.look(saw(&[]), 4, 6);
        assert!(growing.check(&held(&["a"])).is_err(), "a read went back");
    }

    #[test]
    fn watched_value_that_was_replaced_is_found() {
        let mut growing = appended(&[("a", 1, 2)]);
        growing.ask("k", "b", 4, None, Some("a;"));
        growing.answer("b", Became::Done, None, 5);
        growing.check(&held(&["a", "b"])).expect("as it was watched");
        let mut growing = appended(&[("a", 1, 2)]);
        growing.ask("k", "b", 4, None, Some(""));
        assert!(growing.check(&held(&["a", "b"])).is_err());
    }

    #[test]
    fn read_older_than_it_may_be_is_found() {
        let mut growing = appended(&[("a", 1, 5), ("b", 6, 9)]);
        growing.look_back("k", vec!["a".to_owned(), "lost".to_owned()], 8);
        growing.check(&held(&["a", "b"])).expect("b was not done then");
        growing.look_back("k", vec!["a".to_owned()], 9);
        assert!(growing.check(&held(&["a", "b"])).is_err());
    }

    #[test]
    fn half_a_transaction_is_found() {
        let mut growing = Growing::default();
        growing.ask("k", "a", 1, Some("b"), None);
        growing.ask("l", "b", 1, Some("a"), None);
        let mut both = held(&["a"]);
        both.insert("l".to_owned(), vec![("b".to_owned(), "1".to_owned())]);
        growing.check(&both).expect("all of it");
        assert!(growing.check(&held(&["a"])).is_err(), "the other is missing");
        let half = BTreeMap::from([("k".to_owned(), vec!["a".to_owned()]), ("l".to_owned(), Vec::new())]);
        growing.look(half, 2, 3);
        assert!(growing.check(&both).is_err(), "read alone");
    }
}
