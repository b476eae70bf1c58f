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
    let read: Vec<_> = effects(&again).collect();
    assert!(read.iter().all(Result::is_ok), "what was written is read");
    assert!(read.into_iter().flatten().eq(effects(data).flatten()), "and says the same");
    assert!(again.len() <= data.len(), "no length is written longer than it has to be");
}
