//! The values that writers send: each names itself, and its padding can be told from any other's. Core.

use crate::promise::SLOTS;

/// Most values fit a frame beside others; some fill one of their own.
const SMALL_BYTES_MAX: u64 = 600;
const LARGE_BYTES_MAX: u64 = 40_000;
const LARGE_ONE_IN: u64 = 8;

/// Where value `number` of a writer goes.
pub fn key(writer: usize, slot: u64) -> String {
    format!("w{writer}:{slot}")
}

/// Value `number` of a writer.
pub fn value(writer: usize, number: u64) -> String {
    let mixed = mix(number ^ (writer as u64) << 40);
    let length = match mixed % LARGE_ONE_IN {
        0 => mixed / LARGE_ONE_IN % LARGE_BYTES_MAX,
        _ => mixed / LARGE_ONE_IN % SMALL_BYTES_MAX,
    };
    let mut text = format!("{number}:");
    let letter = |at: u64| char::from(b'a' + (mixed.rotate_left((at % 64) as u32) % 26) as u8);
    text.extend((0..length).map(letter));
    text
}

/// The number of a value that was read from `slot`; an error when it is not what was sent.
pub fn number(writer: usize, slot: u64, text: &str) -> Result<u64, String> {
    let number = text.split(':').next().and_then(|number| number.parse().ok());
    match number {
        Some(number) if number % SLOTS == slot && value(writer, number) == text => Ok(number),
        _ => Err(format!("{} holds what nobody sent: {:.40}... ({} bytes)", key(writer, slot), text, text.len())),
    }
}

/// SplitMix64's finish.
fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_name_themselves_and_every_change_is_seen() {
        for value_number in 1..200 {
            let slot = value_number % SLOTS;
            let text = value(3, value_number);
            assert_eq!(number(3, slot, &text), Ok(value_number));
            assert!(number(3, slot + 1, &text).is_err() && number(3, slot, &format!("{text}a")).is_err());
            assert!(text.len() < 100 || number(2, slot, &text).is_err());
        }
        assert!((1..100).any(|number| value(0, number).len() > 5_000));
    }
}
