//! One record as a line of text: the changes in it, as close to the commands that made them as can be told.
//! Called by `log dump --records`; any bytes print without harm.

use walferry_applier::record::{Effect, Fields, effects};

/// Shown of a key or a value; what is longer ends with its length.
const SHOWN_BYTES_MAX: usize = 64;

/// The effects of a record, separated by semicolons; `(nothing)` for a record without any.
pub fn describe(record: &[u8]) -> String {
    let texts: Vec<String> = effects(record)
        .map(|effect| match effect {
            Ok(effect) => describe_effect(&effect),
            Err(error) => format!("DAMAGED: {error}"),
        })
        .collect();
    if texts.is_empty() { "(nothing)".to_owned() } else { texts.join("; ") }
}

fn describe_effect(effect: &Effect<'_>) -> String {
    match effect {
        Effect::Put { key, value } => format!("put {} {}", quoted(key), quoted(value)),
        Effect::Delete { key } => format!("delete {}", quoted(key)),
        Effect::Append { key, bytes } => format!("append {} {}", quoted(key), quoted(bytes)),
        Effect::StreamAdd { key, id, fields } => {
            let fields: Vec<String> = Fields::new(fields).map(quoted).collect();
            format!("add {} {}-{} {}", quoted(key), id.0, id.1, fields.join(" "))
        }
    }
}

/// Printable text as it is in quotes, other bytes escaped as redis-cli does, long values cut.
fn quoted(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(SHOWN_BYTES_MAX)];
    let cut = if bytes.len() > shown.len() { format!("...({} bytes)", bytes.len()) } else { String::new() };
    format!("\"{}\"{cut}", shown.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_effect_reads_like_its_command() {
        let mut fields = Vec::new();
        for part in [&b"delta"[..], b"-5"] {
            Fields::push(&mut fields, part);
        }
        let mut record = Vec::new();
        let long = [b'x'; 100];
        for effect in [
            Effect::Put { key: b"account:1", value: b"a\x00\n" },
            Effect::Delete { key: b"gone" },
            Effect::Append { key: b"k", bytes: &long },
            Effect::StreamAdd { key: b"history", id: (17, 2), fields: &fields },
        ] {
            effect.encode_into(&mut record);
        }
        let cut = format!("\"{}\"...(100 bytes)", "x".repeat(SHOWN_BYTES_MAX));
        let expected = format!(
            "put \"account:1\" \"a\\x00\\n\"; delete \"gone\"; append \"k\" {cut}; add \"history\" 17-2 \"delta\" \"-5\""
        );
        assert_eq!(describe(&record), expected);
        assert_eq!(describe(b""), "(nothing)");
        assert!(describe(&[99, 1, 2]).contains("DAMAGED"));
    }
}
