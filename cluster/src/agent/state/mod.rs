//! What the duties of an agent keep, a file for each.

pub(super) mod commands;
pub(super) mod contacts;
pub(super) mod leading;
pub(super) mod members;
pub(super) mod voters;
