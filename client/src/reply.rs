//! What a node answers, apart from how it is written. Made by `tcp` or by a pool of another kind.

use redis_protocol::resp2::types::OwnedFrame;

/// What a node answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The key or element does not exist.
    Nil,
    /// A number.
    Int(i64),
    /// A status or a value.
    Text(Vec<u8>),
    /// An error, its code first.
    Error(String),
    /// Several answers.
    Array(Vec<Reply>),
}

impl Reply {
    /// The text of a status, a value or a number.
    pub fn text(&self) -> Option<String> {
        match self {
            Reply::Text(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            Reply::Int(number) => Some(number.to_string()),
            _ => None,
        }
    }

    /// The number of a number, or of a value that is one.
    pub fn int(&self) -> Option<i64> {
        match self {
            Reply::Int(number) => Some(*number),
            Reply::Text(bytes) => std::str::from_utf8(bytes).ok()?.parse().ok(),
            _ => None,
        }
    }

    /// The elements of an array; of anything else none.
    pub fn items(&self) -> &[Reply] {
        match self {
            Reply::Array(items) => items,
            _ => &[],
        }
    }

    /// The value that stands after `key` in a flat list of keys and values.
    pub fn field(&self, key: &str) -> Option<&Reply> {
        self.items().chunks_exact(2).find(|pair| pair[0].text().as_deref() == Some(key)).map(|pair| &pair[1])
    }
}

impl From<OwnedFrame> for Reply {
    fn from(frame: OwnedFrame) -> Reply {
        match frame {
            OwnedFrame::SimpleString(bytes) | OwnedFrame::BulkString(bytes) => Reply::Text(bytes),
            OwnedFrame::Error(text) => Reply::Error(text),
            OwnedFrame::Integer(number) => Reply::Int(number),
            OwnedFrame::Array(items) => Reply::Array(items.into_iter().map(Reply::from).collect()),
            OwnedFrame::Null => Reply::Nil,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_in_flat_lists() {
        let text = |t: &'static str| Reply::Text(t.into());
        let row = Reply::Array(vec![text("name"), text("b"), text("lag_bytes"), Reply::Int(7)]);
        assert_eq!(row.field("lag_bytes").and_then(Reply::int), Some(7));
        assert_eq!(row.field("b"), None, "a value is not a key");
    }
}
