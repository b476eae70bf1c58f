//! What a command that writes works with: a view, and the record that it fills with effects.

use walferry_applier::record::Effect;

use crate::session::command::view::{Overlay, View};

/// What a writing command works with.
pub struct Writer<'a> {
    base: View<'a>,
    record: &'a mut Vec<u8>,
    /// In a transaction: what its earlier commands changed.
    overlay: Option<&'a mut Overlay>,
    now_ms: u64,
    /// Bytes of values that its appends go on from: each node writes them anew with its next checkpoint, however short the record is.
    appended_to: usize,
}

impl<'a> Writer<'a> {
    /// A command on its own: emits into `record`, which is empty.
    pub fn new(base: View<'a>, record: &'a mut Vec<u8>, now_ms: u64) -> Writer<'a> {
        Writer { base, record, overlay: None, now_ms, appended_to: 0 }
    }

    /// A command of a transaction.
    pub fn in_transaction(
        base: View<'a>,
        record: &'a mut Vec<u8>,
        overlay: &'a mut Overlay,
        now_ms: u64,
    ) -> Writer<'a> {
        Writer { base, record, overlay: Some(overlay), now_ms, appended_to: 0 }
    }

    /// The newest state, this transaction's own changes included.
    pub fn view(&self) -> View<'_> {
        match &self.overlay {
            Some(overlay) => self.base.with(overlay),
            None => self.base,
        }
    }

    /// The wall clock, milliseconds since the Unix epoch.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// As `emit`, for bytes behind a value of this length.
    pub fn append(&mut self, key: &[u8], bytes: &[u8], length: usize) {
        if !self.overlay.as_ref().is_some_and(|overlay| overlay.has(key)) {
            self.appended_to += length;
        }
        self.emit(Effect::Append { key, bytes });
    }

    /// How long the values are together that its appends went on from.
    pub fn appended_to(&self) -> usize {
        self.appended_to
    }

    /// Adds a change to the record. Only once the command can no longer fail.
    pub fn emit(&mut self, effect: Effect<'_>) {
        effect.encode_into(self.record);
        if let Some(overlay) = &mut self.overlay {
            overlay.apply(&effect);
        }
    }
}
