//! Which sync policy a leader begins with, and whether it can confirm what its sessions begin with.

use walferry_cluster::handover::Handover;
use walferry_cluster::level::CommitLevel;
use walferry_cluster::policy::SyncPolicy;

use crate::config::{ConfigError, NodeConfig, OnSyncLoss};
use crate::error::DaemonError;
use crate::role;

/// The sync policy of a node that is to lead: what its options name, else, where it was promoted, that of its leader.
pub(super) fn own_policy(config: &NodeConfig) -> Result<SyncPolicy, DaemonError> {
    if let Some(policy) = &config.sync {
        return Ok(policy.clone());
    }
    if config.members.is_some() {
        return Ok(SyncPolicy::None);
    }
    let promoted = matches!(role::Role::load(&config.data), Ok(Some(role::Role::Leader { promoted_from: Some(_) })));
    let handover = match Handover::load(&config.data) {
        // Of a leader whose replica this was until it was made a leader of its own, by a start and not by a promotion.
        Ok(Some(kept)) if !promoted => {
            tracing::warn!(
                "no --sync is given, and this node leads without a sync policy: it was not promoted, so that of {}, which it \
                 followed, {:?}, does not hold here. Name one with --sync",
                kept.leader,
                kept.policy.to_string()
            );
            None
        }
        Err(_) if !promoted => None,
        kept => kept?,
    };
    let Some(handover) = handover else { return Ok(SyncPolicy::None) };
    let policy = handover.policy_of(&config.name.parse()?);
    if policy.waits() {
        tracing::info!(leader = %handover.leader, %policy, "no --sync is given: the sync policy of the leader before holds");
    }
    Ok(policy)
}

pub(super) fn no_policy(level: CommitLevel) -> String {
    format!(
        "no replica confirms commits at {level}: this leader has no sync policy. Start it with --sync 'ANY 1 (*)' or another policy"
    )
}

/// Refuses the start of a leader whose sessions would begin at a remote level that nobody confirms. Changes nothing.
pub(super) fn check_level(config: &NodeConfig) -> Result<(), DaemonError> {
    let leads = config.members.is_none() && config.follow.is_none();
    let degrades = matches!(config.on_sync_loss, OnSyncLoss::Degrade(_));
    let level = config.commit_level;
    if !leads || !level.is_remote() || degrades || own_policy(config)?.waits() {
        return Ok(());
    }
    let reason = format!("{}, or with commit_level = local", no_policy(level));
    Err(ConfigError::Value { key: "commit_level", value: level.to_string(), reason }.into())
}
