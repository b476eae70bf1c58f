//! What the bodies of several messages have in common: checked reading, names, histories, the head of a handshake.

use walferry_engine::lsn::{Epoch, Lsn};

use super::types::{EPOCH_BYTES, EPOCHS_PER_MESSAGE_MAX, PROTOCOL_VERSION};
use crate::error::MessageError;
use crate::member::{ClusterId, MemberName};
use crate::policy::{POLICY_TEXT_BYTES_MAX, SyncPolicy};

use super::kind::MessageKind;

pub(super) const MAGIC: [u8; 4] = *b"WFPR";
pub(super) const CHUNK_BODY_BYTES: usize = 16;
/// The flag of FetchFrames of a crc that is known.
pub(super) const FLAG_CRC: u8 = 1;

pub(super) fn put_u64s(out: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

pub(super) fn put_handshake(out: &mut Vec<u8>, protocol: u16, name: &MemberName, address: &str, id: Option<ClusterId>) {
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&protocol.to_le_bytes());
    out.extend_from_slice(&[name.as_str().len() as u8, address.len() as u8]);
    out.extend_from_slice(&id.map_or(0, |id| id.0).to_le_bytes());
}

/// The longest beginning of `text` within `bytes_max` that ends with a whole character.
pub(super) fn cut(text: &str, bytes_max: usize) -> &str {
    let longest = text.len().min(bytes_max);
    let end = (0..=longest).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

pub(super) fn put_history(out: &mut Vec<u8>, history: &[(Epoch, Lsn)]) {
    let newest = &history[history.len().saturating_sub(EPOCHS_PER_MESSAGE_MAX)..];
    out.extend_from_slice(&(newest.len() as u32).to_le_bytes());
    newest.iter().for_each(|(epoch, lsn)| put_u64s(out, &[epoch.0, lsn.0]));
}

/// The rest of a body; every take is checked.
pub(super) struct Body<'a> {
    pub(super) kind: MessageKind,
    pub(super) rest: &'a [u8],
}

impl<'a> Body<'a> {
    pub(super) fn take(&mut self, bytes: usize) -> Result<&'a [u8], MessageError> {
        let short = MessageError::Body(self.kind.name());
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(short)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn number<const BYTES: usize>(&mut self) -> Result<[u8; BYTES], MessageError> {
        Ok(self.take(BYTES)?.try_into().expect("as many as asked for"))
    }

    pub(super) fn u16(&mut self) -> Result<u16, MessageError> {
        self.number().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, MessageError> {
        self.number().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, MessageError> {
        self.number().map(u64::from_le_bytes)
    }

    pub(super) fn lsn(&mut self) -> Result<Lsn, MessageError> {
        self.u64().map(Lsn)
    }

    pub(super) fn field(&self, field: &'static str) -> MessageError {
        MessageError::Field { kind: self.kind.name(), field }
    }

    pub(super) fn end(self) -> Result<(), MessageError> {
        if self.rest.is_empty() { Ok(()) } else { Err(MessageError::Body(self.kind.name())) }
    }

    /// Magic, version; true when the rest is of our version.
    pub(super) fn version(&mut self) -> Result<(u16, bool), MessageError> {
        if self.take(MAGIC.len())? != MAGIC {
            return Err(MessageError::Magic);
        }
        let protocol = self.u16()?;
        Ok((protocol, protocol == PROTOCOL_VERSION))
    }

    pub(super) fn history(&mut self) -> Result<Vec<(Epoch, Lsn)>, MessageError> {
        let count = self.u32()? as usize;
        if count > EPOCHS_PER_MESSAGE_MAX {
            return Err(self.field("epoch count"));
        }
        let mut epochs = Body { kind: self.kind, rest: self.take(count * EPOCH_BYTES)? };
        let mut history: Vec<(Epoch, Lsn)> = Vec::with_capacity(count);
        while !epochs.rest.is_empty() {
            let next = (Epoch(epochs.u64()?), epochs.lsn()?);
            if history.last().is_some_and(|last| next.0 <= last.0 || next.1 < last.1) {
                return Err(self.field("epoch history"));
            }
            history.push(next);
        }
        Ok(history)
    }

    pub(super) fn name(&mut self, bytes: u8) -> Result<MemberName, MessageError> {
        let name = self.take(usize::from(bytes))?;
        let text = std::str::from_utf8(name).map_err(|_| self.field("name"))?;
        text.parse().map_err(|_| self.field("name"))
    }

    pub(super) fn address(&mut self, bytes: u8) -> Result<String, MessageError> {
        let address = self.take(usize::from(bytes))?;
        let address = std::str::from_utf8(address).map_err(|_| self.field("client address"))?;
        // It goes into replies and logs, where a control character could forge a line.
        if address.chars().any(char::is_control) {
            return Err(self.field("client address"));
        }
        Ok(address.to_owned())
    }

    /// The rest is a sync policy.
    pub(super) fn policy(&mut self) -> Result<SyncPolicy, MessageError> {
        if self.rest.len() > POLICY_TEXT_BYTES_MAX {
            return Err(self.field("sync policy"));
        }
        let text = std::str::from_utf8(self.take(self.rest.len())?).map_err(|_| self.field("sync policy"))?;
        let policy: Option<SyncPolicy> = text.parse().ok();
        policy.filter(|policy| policy.to_string() == text).ok_or_else(|| self.field("sync policy"))
    }
}
