//! RESP2 as a simulated client speaks it: commands out, replies in.

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Simple(String),
    Error(String),
    Integer(i64),
    Bulk(String),
    Nil,
    Array(Vec<Value>),
}

impl Value {
    pub fn error(&self) -> Option<&str> {
        if let Value::Error(text) = self { Some(text) } else { None }
    }
}

/// A command of these words.
pub fn command(words: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
    }
    bytes
}

/// One reply at the front of `bytes`, and its length; `None` while it is not whole.
pub fn reply(bytes: &[u8]) -> Option<(Value, usize)> {
    let line_end = bytes.windows(2).position(|pair| pair == b"\r\n")?;
    let line = std::str::from_utf8(&bytes[..line_end]).expect("nodes speak UTF-8 here");
    let (kind, rest) = line.split_at(1);
    let head = line_end + 2;
    let length = || rest.parse::<i64>().expect("a number");
    let value = match kind {
        "+" => Value::Simple(rest.to_owned()),
        "-" => Value::Error(rest.to_owned()),
        ":" => Value::Integer(length()),
        "$" | "*" if length() < 0 => Value::Nil,
        "$" => {
            let end = head + length() as usize;
            let text = String::from_utf8_lossy(bytes.get(head..end)?).into_owned();
            return (bytes.len() >= end + 2).then_some((Value::Bulk(text), end + 2));
        }
        "*" => {
            let (mut values, mut at) = (Vec::new(), head);
            for _ in 0..length() {
                let (value, taken) = reply(&bytes[at..])?;
                values.push(value);
                at += taken;
            }
            return Some((Value::Array(values), at));
        }
        other => panic!("a reply begins with {other:?}"),
    };
    Some((value, head))
}
