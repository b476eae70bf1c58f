//! A record: effects that are read are written as they were.

use walferry_applier::record::{Effect, Fields, effects};

/// Any bytes.
pub fn run(data: &[u8]) {
    let mut again = Vec::new();
    let mut failed = false;
    for effect in effects(data) {
        assert!(!failed, "nothing follows an error");
        match effect {
            Ok(effect) => {
                assert!(effect.key().len() <= data.len());
                if let Effect::StreamAdd { fields, .. } = effect {
                    let taken: usize = Fields::new(fields).map(<[u8]>::len).sum();
                    assert!(taken <= fields.len());
                }
                effect.encode_into(&mut again);
            }
            Err(error) => {
                assert!(error.at < data.len());
                failed = true;
            }
        }
    }
    // Read twice instead of kept: a record of many small effects is larger read than written, and that would be our memory.
    assert!(effects(&again).all(|effect| effect.is_ok()), "what was written is read");
    assert!(effects(&again).flatten().eq(effects(data).flatten()), "and says the same");
    assert!(again.len() <= data.len(), "no length is written longer than it has to be");
}
