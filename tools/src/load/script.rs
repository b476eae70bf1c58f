//! Load scripts: pgbench's `\set`, `\sleep`, `\startpipeline` and `\endpipeline`, and Redis commands with `:variables`.
//! Also the built-in scripts. Called at the start of a run; knows no connection.

use std::fmt;
use std::time::Duration;

use rand::RngExt;

use super::expr::{self, Expr, Random};

/// Rows per unit of scale, as in pgbench.
pub const ACCOUNTS_PER_SCALE: i64 = 100_000;
/// Tellers per unit of scale, as in pgbench.
pub const TELLERS_PER_SCALE: i64 = 10;
/// A script with more lines is refused.
const LINES_MAX: usize = 10_000;
/// Payloads start anywhere in the first so many bytes of the pool.
const PAYLOAD_OFFSETS: usize = 4096;
/// The largest value that a node takes, so the largest payload worth sending.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;

/// pgbench's `tpcb-like`: the same delta on an account, a teller and a branch, and a line of history.
const TPCB_LIKE: &str = r"
\set aid random(1, :naccounts)
\set tid random(1, :ntellers)
\set bid random(1, :nbranches)
\set delta random(-5000, 5000)
\startpipeline
MULTI
INCRBY account::aid :delta
INCRBY teller::tid :delta
INCRBY branch::bid :delta
XADD history * tid :tid bid :bid aid :aid delta :delta
EXEC
\endpipeline
";

/// pgbench's `simple-update`: account and history only.
const SIMPLE_UPDATE: &str = r"
\set aid random(1, :naccounts)
\set delta random(-5000, 5000)
\startpipeline
MULTI
INCRBY account::aid :delta
XADD history * aid :aid delta :delta
EXEC
\endpipeline
";

const SELECT_ONLY: &str = r"
\set aid random(1, :naccounts)
GET account::aid
";

/// One entry of `-d` bytes on this client's own stream.
const APPEND: &str = "XADD append::client_id * data :payload\n";

/// The built-in scripts: name, pgbench's name for it, text, whether it needs the tables of `load -i`.
pub const BUILTINS: [(&str, &str, &str, bool); 4] = [
    ("tpcb-like", "<builtin: TPC-B (sort of)>", TPCB_LIKE, true),
    ("simple-update", "<builtin: simple update>", SIMPLE_UPDATE, true),
    ("append", "<builtin: append>", APPEND, false),
    ("select-only", "<builtin: select only>", SELECT_ONLY, true),
];

/// The variables of a run: one slot for each name, the same in all scripts.
#[derive(Clone, Debug, Default)]
pub struct Variables {
    names: Vec<String>,
    /// The values that every client starts with.
    pub values: Vec<i64>,
}

impl Variables {
    /// What every script may use, for tables of this scale.
    pub fn predefined(scale: i64, seed: u64) -> Variables {
        let mut variables = Variables::default();
        variables.set("client_id", 0);
        variables.set("scale", scale);
        variables.set("naccounts", scale * ACCOUNTS_PER_SCALE);
        variables.set("ntellers", scale * TELLERS_PER_SCALE);
        variables.set("nbranches", scale);
        variables.set("random_seed", seed as i64);
        variables
    }

    /// The slot of a name.
    pub fn slot(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|known| known == name)
    }

    /// Gives a name a value, and a slot if it has none.
    pub fn set(&mut self, name: &str, value: i64) -> usize {
        let slot = self.slot(name).unwrap_or_else(|| {
            self.names.push(name.to_owned());
            self.values.push(0);
            self.names.len() - 1
        });
        self.values[slot] = value;
        slot
    }
}

/// One line of a script.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// `\set name expression`
    Set(usize, Expr),
    /// `\sleep expression unit`
    Sleep(Expr, Duration),
    /// A command of the node.
    Command(Template),
    /// From here on answers are not waited for.
    StartPipeline,
    /// Waits for all answers of the pipeline.
    EndPipeline,
}

/// What a command does to the connection's MULTI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// Nothing.
    None,
    /// MULTI.
    Begin,
    /// EXEC: its nil answer means that a watched key changed.
    Exec,
    /// DISCARD.
    Discard,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(Vec<u8>),
    Variable(usize),
    Payload,
}

/// A command with places for variables.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    /// The line as it was written, for reports.
    pub text: String,
    /// What it does to MULTI.
    pub boundary: Boundary,
    arguments: Vec<Vec<Part>>,
}

/// Random bytes of which each payload is a stretch.
#[derive(Clone, Debug)]
pub struct Payload {
    pool: Vec<u8>,
    bytes: usize,
}

impl Payload {
    /// A pool for payloads of this size.
    pub fn new(bytes: usize, random: &mut Random) -> Payload {
        let pool = (0..bytes + PAYLOAD_OFFSETS).map(|_| random.random_range(b' '..=b'~')).collect();
        Payload { pool, bytes }
    }

    /// One payload.
    pub fn draw(&self, random: &mut Random) -> &[u8] {
        let from = random.random_range(0..PAYLOAD_OFFSETS);
        &self.pool[from..from + self.bytes]
    }
}

impl Template {
    /// Appends the command in RESP.
    pub fn encode(&self, out: &mut Vec<u8>, variables: &[i64], payload: &Payload, random: &mut Random) {
        write_header(out, b'*', self.arguments.len());
        for argument in &self.arguments {
            match argument.as_slice() {
                [Part::Literal(bytes)] => write_bulk(out, bytes),
                [Part::Payload] => write_bulk(out, payload.draw(random)),
                parts => {
                    // The length stands in front: write the value, then turn what was written around.
                    let from = out.len();
                    for part in parts {
                        match part {
                            Part::Literal(bytes) => out.extend_from_slice(bytes),
                            Part::Variable(slot) => write_number(out, variables[*slot]),
                            Part::Payload => out.extend_from_slice(payload.draw(random)),
                        }
                    }
                    let value_bytes = out.len() - from;
                    write_header(out, b'$', value_bytes);
                    out[from..].rotate_left(value_bytes);
                    out.extend_from_slice(b"\r\n");
                }
            }
        }
    }
}

fn write_bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    write_header(out, b'$', bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

fn write_header(out: &mut Vec<u8>, kind: u8, number: usize) {
    out.push(kind);
    write_number(out, number as i64);
    out.extend_from_slice(b"\r\n");
}

fn write_number(out: &mut Vec<u8>, number: i64) {
    const DIGITS_MAX: usize = 20;
    let mut digits = [0; DIGITS_MAX];
    let mut at = DIGITS_MAX;
    let mut rest = number.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if number < 0 {
        out.push(b'-');
    }
    out.extend_from_slice(&digits[at..]);
}

/// A script, ready to run.
#[derive(Clone, Debug)]
pub struct Script {
    /// The file's name, or pgbench's name of the built-in.
    pub name: String,
    /// How often it is chosen, relative to the others.
    pub weight: u64,
    /// Its lines.
    pub steps: Vec<Step>,
    /// True if it works on the tables of `load -i`.
    pub needs_tables: bool,
}

/// What is wrong with a script, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScriptError {
    name: String,
    line: usize,
    text: String,
}

impl std::error::Error for ScriptError {}

impl fmt::Display for ScriptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.name, self.text),
            line => write!(f, "{}, line {line}: {}", self.name, self.text),
        }
    }
}

impl Script {
    /// The built-in script of this name.
    pub fn builtin(name: &str, weight: u64, variables: &mut Variables) -> Result<Script, String> {
        let names = || BUILTINS.map(|(name, ..)| name).join(", ");
        let found = BUILTINS.iter().find(|(known, ..)| *known == name);
        let (_, title, text, needs_tables) =
            found.ok_or_else(|| format!("no built-in script {name:?}; there are {}", names()))?;
        let script = Script::parse(title, weight, text, variables).map_err(|error| error.to_string())?;
        Ok(Script { needs_tables: *needs_tables, ..script })
    }

    /// A script from its text.
    pub fn parse(name: &str, weight: u64, text: &str, variables: &mut Variables) -> Result<Script, ScriptError> {
        let wrong = |line, text: String| ScriptError { name: name.to_owned(), line, text };
        let (mut steps, mut pipelining) = (Vec::new(), false);
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            if number > LINES_MAX {
                return Err(wrong(number, format!("more than {LINES_MAX} lines")));
            }
            let line = line.trim();
            if line.is_empty() || line.starts_with("--") || line.starts_with('#') {
                continue;
            }
            let step = match line.strip_prefix('\\') {
                Some(meta) => parse_meta(meta, variables),
                None => parse_command(line, variables).map(Step::Command),
            };
            let step = step.map_err(|text| wrong(number, text))?;
            match (&step, pipelining) {
                (Step::StartPipeline, true) => {
                    return Err(wrong(number, "a pipeline is already open".to_owned()));
                }
                (Step::EndPipeline, false) => {
                    return Err(wrong(number, "no pipeline is open".to_owned()));
                }
                (Step::StartPipeline, _) => pipelining = true,
                (Step::EndPipeline, _) => pipelining = false,
                _ => {}
            }
            steps.push(step);
        }
        if pipelining {
            return Err(wrong(0, "\\startpipeline has no \\endpipeline".to_owned()));
        }
        if !steps.iter().any(|step| matches!(step, Step::Command(_))) {
            return Err(wrong(0, "the script has no command".to_owned()));
        }
        Ok(Script { name: name.to_owned(), weight, steps, needs_tables: false })
    }
}

fn parse_meta(meta: &str, variables: &mut Variables) -> Result<Step, String> {
    let (word, rest) = meta.split_once(char::is_whitespace).unwrap_or((meta, ""));
    let rest = rest.trim();
    match word {
        "set" => {
            let (name, text) = rest.split_once(char::is_whitespace).ok_or("\\set needs a name and an expression")?;
            let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            if !plain || name.bytes().next().is_none_or(|b| b.is_ascii_digit()) {
                return Err(format!("{name:?} is not a variable's name"));
            }
            if name == "payload" {
                return Err("`payload` is the random value of -d bytes; choose another name".to_owned());
            }
            let expr = expr::parse(text, &|name| variables.slot(name))?;
            let slot = variables.slot(name).unwrap_or_else(|| variables.set(name, 0));
            Ok(Step::Set(slot, expr))
        }
        "sleep" => {
            let (text, unit) = match rest.rsplit_once(char::is_whitespace) {
                Some((text, "us")) => (text, Duration::from_micros(1)),
                Some((text, "ms")) => (text, Duration::from_millis(1)),
                Some((text, "s")) => (text, Duration::from_secs(1)),
                _ => (rest, Duration::from_secs(1)),
            };
            Ok(Step::Sleep(expr::parse(text, &|name| variables.slot(name))?, unit))
        }
        "startpipeline" => Ok(Step::StartPipeline),
        "endpipeline" => Ok(Step::EndPipeline),
        _ => Err(format!("no command \\{word}; there are \\set, \\sleep, \\startpipeline, \\endpipeline")),
    }
}

/// A command as `redis-cli` takes it, with `:variables`.
pub fn parse_command(line: &str, variables: &Variables) -> Result<Template, String> {
    let words = split_words(line)?;
    let name = words.first().map(|word| word.to_ascii_uppercase()).unwrap_or_default();
    let boundary = match name.as_slice() {
        b"MULTI" => Boundary::Begin,
        b"EXEC" => Boundary::Exec,
        b"DISCARD" => Boundary::Discard,
        _ => Boundary::None,
    };
    let arguments = words.iter().map(|word| split_parts(word, variables)).collect();
    Ok(Template { text: line.to_owned(), boundary, arguments })
}

/// Splits a line into words as redis-cli does: blanks separate, quotes hold together, `\n \r \t \\ \" \xHH` escape.
fn split_words(line: &str) -> Result<Vec<Vec<u8>>, String> {
    let bytes = line.as_bytes();
    let (mut words, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        if bytes[at].is_ascii_whitespace() {
            at += 1;
            continue;
        }
        let mut word = Vec::new();
        let quote = Some(bytes[at]).filter(|b| matches!(b, b'"' | b'\''));
        at += usize::from(quote.is_some());
        loop {
            match (bytes.get(at).copied(), quote) {
                (None, Some(_)) => return Err("a quote is not closed".to_owned()),
                (None, None) => break,
                (Some(b), None) if b.is_ascii_whitespace() => break,
                (Some(b), Some(quote)) if b == quote => {
                    at += 1;
                    if bytes.get(at).is_some_and(|b| !b.is_ascii_whitespace()) {
                        return Err("after a closing quote a blank must follow".to_owned());
                    }
                    break;
                }
                (Some(b'\\'), Some(b'"')) => {
                    let (escaped, taken) = unescape(&bytes[at + 1..]);
                    word.push(escaped);
                    at += 1 + taken;
                }
                (Some(b), _) => {
                    word.push(b);
                    at += 1;
                }
            }
        }
        words.push(word);
    }
    Ok(words)
}

/// The byte that the characters after a backslash stand for, and how many they are.
fn unescape(rest: &[u8]) -> (u8, usize) {
    match rest {
        [b'n', ..] => (b'\n', 1),
        [b'r', ..] => (b'\r', 1),
        [b't', ..] => (b'\t', 1),
        [b'x', high, low, ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
            let digit = |b: u8| (b as char).to_digit(16).unwrap_or(0) as u8;
            (digit(*high) << 4 | digit(*low), 3)
        }
        [other, ..] => (*other, 1),
        [] => (b'\\', 0),
    }
}

/// Splits a word at its variables. A colon before anything but a known name is itself: keys are full of colons.
fn split_parts(word: &[u8], variables: &Variables) -> Vec<Part> {
    let (mut parts, mut literal, mut at) = (Vec::new(), Vec::new(), 0);
    while at < word.len() {
        let name_end = |from: usize| {
            word[from..]
                .iter()
                .position(|b| !(b.is_ascii_alphanumeric() || *b == b'_'))
                .map_or(word.len(), |n| from + n)
        };
        let name = if word[at] == b':' { &word[at + 1..name_end(at + 1)] } else { &[] };
        let part = match std::str::from_utf8(name) {
            Ok("payload") => Some(Part::Payload),
            Ok(name) => variables.slot(name).map(Part::Variable),
            Err(_) => None,
        };
        match part {
            Some(part) => {
                if !literal.is_empty() {
                    parts.push(Part::Literal(std::mem::take(&mut literal)));
                }
                parts.push(part);
                at += 1 + name.len();
            }
            None => {
                literal.push(word[at]);
                at += 1;
            }
        }
    }
    if !literal.is_empty() || parts.is_empty() {
        parts.push(Part::Literal(literal));
    }
    parts
}

#[cfg(test)]
#[path = "script_tests.rs"]
mod tests;
