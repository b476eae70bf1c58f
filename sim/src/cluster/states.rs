//! What holds of a node's log and store at every moment: the store is of the node's own log, a replica applies nothing that no leader
//! had on its disk, and what is cut off is kept.

use walferry_engine::EpochHistory;
use walferry_engine::log::LOG_DIR;
use walferry_engine::lsn::Lsn;

use super::{Broken, Checked, Cluster};
use crate::control::name_of;
use crate::lost::lost_frames;
use crate::world::NodeNo;

impl Cluster {
    /// After each turn of a node, and after its start.
    pub(super) fn node_is_sound(&mut self, node: NodeNo) -> Checked {
        self.note_led(node);
        self.what_is_cut_is_kept(node)?;
        let Some(process) = &self.nodes[node].process else { return Ok(()) };
        let member = &process.member;
        let stored = member.store().durable_position();
        let fits = stored.applied <= member.sealed() && member.history().epoch_of_end(stored.applied) == stored.epoch;
        if !fits {
            return Err(Broken(format!(
                "{}: the store's file holds {} of epoch {}, the log ends at {} and has epochs {:?}",
                name_of(node),
                stored.applied,
                stored.epoch,
                member.sealed(),
                member.history().entries()
            )));
        }
        let applied = member.applied();
        let epoch = member.history().epoch_of_end(applied);
        let led = self.led.get(&epoch).copied().unwrap_or_default();
        if applied > led {
            return Err(Broken(format!(
                "{} has applied up to {applied} of epoch {epoch}, of which its leader had only {led} on its disk ({})",
                name_of(node),
                member.describe()
            )));
        }
        Ok(())
    }

    /// Up to where leaders have their log on their disk.
    fn note_led(&mut self, node: NodeNo) {
        let Some(process) = self.nodes[node].process.as_ref().filter(|process| process.member.is_leader()) else {
            return;
        };
        let (history, durable) = (process.member.history(), process.member.flushed());
        let mut note = |epoch, end: Lsn| {
            let known = self.led.entry(epoch).or_default();
            *known = (*known).max(end);
        };
        if !self.led_in.contains(&history.last_epoch()) {
            self.led_in.insert(history.last_epoch());
            for (epoch, _) in history.entries() {
                note(*epoch, history.end_of(*epoch).unwrap_or(durable).min(durable));
            }
        }
        note(history.epoch_of_end(durable), durable);
    }

    /// The log of a node may lose what was durable only when a leader has something else in its place, and then `lost/` has it.
    fn what_is_cut_is_kept(&mut self, node: NodeNo) -> Checked {
        let known = &mut self.nodes[node];
        let Some(process) = &known.process else { return Ok(()) };
        let member = &process.member;
        let (durable, start) = (member.flushed(), member.log_start());
        let (before, began) = (known.seen_durable, known.log_start);
        let is_new = std::mem::replace(&mut known.seen_incarnation, known.incarnation) != known.incarnation;
        if is_new {
            known.lost_seen = 0;
        }
        (known.seen_durable, known.log_start) = (durable, start);
        if durable >= before && *member.history() == known.history {
            return Ok(());
        }
        let history: EpochHistory = std::mem::replace(&mut known.history, member.history().clone());
        let fork = member.history().fork_with(&history, before).max(began);
        if fork >= before || known.was_damaged {
            return Ok(());
        }
        let kept = lost_frames(&known.dir).map_err(Broken)?;
        // Frames that were cut off before, in the same place, do not answer for these.
        let covering = kept.iter().filter(|(_, file)| file.from <= fork && file.to >= before);
        let newest = covering.min_by_key(|(name, file)| (known.lost_files.contains(*name), file.commits));
        let Some((_, file)) = newest else {
            return Err(Broken(format!(
                "{} had its log durable up to {before}, it was cut off at {fork}, and lost/ has only {:?}",
                name_of(node),
                kept.keys().collect::<Vec<_>>()
            )));
        };
        // A process that died between has counted it, and its number is gone with it.
        let counted = member.lost_commits() - known.lost_seen;
        if counted < file.commits && !is_new {
            return Err(Broken(format!(
                "{} lost {} commits between {} and {}, and counted {counted}",
                name_of(node),
                file.commits,
                file.from,
                file.to
            )));
        }
        known.lost_seen += file.commits.min(counted);
        known.lost_files.extend(kept.into_keys());
        Ok(())
    }

    /// Lets the model read on, from the log of this node or of another one that has it all; where it was recycled before the model
    /// had read it, nothing is known any more.
    pub(super) fn read_on(&mut self, node: NodeNo, end: Lsn) -> Checked {
        self.forget_healed();
        let at = self.model.at();
        let position = (self.member(node).history().epoch_of_end(end), end);
        let readable = |other: &NodeNo| {
            let well = !self.world.is_misreading(*other) && self.nodes[*other].rotten.is_none();
            let begins = self.nodes[*other].process.as_ref().map(|process| process.member.log_start());
            well && begins.is_some_and(|begins| begins <= at) && self.holds(*other, position)
        };
        let source = [node].into_iter().chain(0..self.nodes.len()).find(readable);
        let Some(source) = source else {
            if self.member(node).log_start() > at {
                self.model.lose();
            }
            return Ok(());
        };
        self.world.be(source);
        self.model.read(&self.nodes[source].dir.join(LOG_DIR), end).map_err(Broken)
    }

    /// At the end: every store holds what the whole log says, and nothing else.
    pub(super) fn states_are_the_model(&mut self, leader: NodeNo, end: Lsn) -> Checked {
        self.read_on(leader, end)?;
        if self.model.is_lost() {
            return Ok(());
        }
        for node in self.data_members() {
            self.world.be(node);
            let same = self.model.compare(self.member(node).store());
            same.map_err(|text| Broken(format!("{}: {text}", name_of(node))))?;
        }
        Ok(())
    }
}
