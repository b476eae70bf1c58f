//! A sync policy as text: PostgreSQL's grammar of `synchronous_standby_names`, and `ALL`. Read from configuration and commands, written
//! to the register and to people; what a policy means stands in `policy.rs`.
//!
//! ```text
//! policy = ""                                  nobody: remote levels are refused, unless on_sync_loss lets them degrade
//!        | list                                FIRST 1 (list)
//!        | k "(" list ")"                      FIRST k (list)
//!        | "FIRST" k "(" list ")"              the first k of the list that are connected and streaming
//!        | "ANY" k "(" list ")"                any k of the list
//!        | "ALL"                               every member of the in-sync set
//! list   = name { "," name }                   name: a node's name, may be quoted; or "*" for every replica
//! ```

use std::fmt;
use std::str::FromStr;

use super::{NamePattern, POLICY_NAMES_MAX, SyncPolicy};
use crate::member::NameSyntax;

impl fmt::Display for SyncPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, k, names) = match self {
            SyncPolicy::None => return Ok(()),
            SyncPolicy::All => return f.write_str("ALL"),
            SyncPolicy::First { k, names } => ("FIRST", k, names),
            SyncPolicy::Any { k, names } => ("ANY", k, names),
        };
        write!(f, "{word} {k} (")?;
        for (index, name) in names.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { ", " })?;
            write!(f, "{name}")?;
        }
        f.write_str(")")
    }
}

/// What was given is not a sync policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicySyntax {
    /// Neither of the forms.
    #[error("{0:?} is not a sync policy: expected FIRST k (a, b), ANY k (a, b), ALL or nothing")]
    Form(String),
    /// A name that no node can have.
    #[error(transparent)]
    Name(#[from] NameSyntax),
    /// A k that cannot be met.
    #[error("a sync policy cannot ask for {k} of {names} names")]
    Count {
        /// What was asked for.
        k: usize,
        /// Out of how many.
        names: usize,
    },
    /// A name that stands there more than once: it confirms a commit once.
    #[error("{0} stands twice in the list: every replica confirms a commit once")]
    Twice(NamePattern),
}

impl FromStr for SyncPolicy {
    type Err = PolicySyntax;

    fn from_str(text: &str) -> Result<SyncPolicy, PolicySyntax> {
        let form = || PolicySyntax::Form(text.chars().take(200).collect());
        let trimmed = text.trim();
        match trimmed {
            "" => return Ok(SyncPolicy::None),
            all if all.eq_ignore_ascii_case("all") => return Ok(SyncPolicy::All),
            _ => {}
        }
        let Some((head, list)) = trimmed.split_once('(') else {
            return build(false, 1, parse_list(trimmed, form)?);
        };
        let list = list.strip_suffix(')').ok_or_else(form)?;
        let words: Vec<&str> = head.split_whitespace().collect();
        let (any, k) = match words[..] {
            [k] => (false, k),
            [word, k] if word.eq_ignore_ascii_case("first") => (false, k),
            [word, k] if word.eq_ignore_ascii_case("any") => (true, k),
            _ => return Err(form()),
        };
        let digits = k.bytes().all(|byte| byte.is_ascii_digit());
        let k = digits.then(|| k.parse().ok()).flatten().ok_or_else(form)?;
        build(any, k, parse_list(list, form)?)
    }
}

fn parse_list(list: &str, form: impl Fn() -> PolicySyntax) -> Result<Vec<NamePattern>, PolicySyntax> {
    let mut names = Vec::new();
    for word in list.split(',') {
        let word = word.trim();
        let quoted = word.strip_prefix('"').and_then(|word| word.strip_suffix('"'));
        let name = quoted.unwrap_or(word);
        let pattern = match name {
            "" => return Err(form()),
            "*" => NamePattern::Every,
            // As in PostgreSQL, case does not matter unless quoted; nodes' names are lower case.
            _ if quoted.is_none() => NamePattern::Name(name.to_ascii_lowercase().parse()?),
            _ => NamePattern::Name(name.parse()?),
        };
        if names.contains(&pattern) {
            return Err(PolicySyntax::Twice(pattern));
        }
        names.push(pattern);
    }
    Ok(names)
}

fn build(any: bool, k: usize, names: Vec<NamePattern>) -> Result<SyncPolicy, PolicySyntax> {
    let open_ended = names.contains(&NamePattern::Every);
    let count_max = if open_ended { POLICY_NAMES_MAX } else { names.len() };
    if k == 0 || k > count_max || names.len() > POLICY_NAMES_MAX {
        return Err(PolicySyntax::Count { k, names: names.len() });
    }
    Ok(if any { SyncPolicy::Any { k, names } } else { SyncPolicy::First { k, names } })
}
