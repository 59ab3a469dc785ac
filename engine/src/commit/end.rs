//! The end of a commit: report its result, or the reason why it was refused or failed.

use super::atomic::{Atomic, AtomicWay};
use super::changed::Changed;
use super::digest::Digests;
use super::events::CommitEvents;
use super::operation::Commit;
use super::outcome::{CommitOutcome, GuestRun, Preview};
use super::refusals::{is_sibling, nothing_to_commit};
use super::repeated::Repeated;
use super::undo_room::log_room;
use super::verify::Verification;
use crate::error::Error;
use crate::operation::{Ended, GuestFailure, Meter};
use crate::others::Siblings;
use instar_guest_abi::{ErrorCode, DEVICE_OUTPUT};

impl Commit<'_> {
    /// Report the result, and remove the overlay if the operator asked for that.
    ///
    /// # Errors
    /// The refusal or failure, and the state in which it left the images.
    pub(super) fn end(self, mut ended: Ended<CommitEvents>) -> Result<CommitOutcome, Error> {
        let (mut atomic, only_plans) = (ended.events.atomic.take(), self.request.only_plans());
        let events = &ended.events;
        if events.damages_siblings {
            return Err(match (&self.siblings, self.settled()) {
                (None, Some(sibling)) => is_sibling(sibling, &self.paths.1),
                (siblings, _) => siblings.as_ref().map_or_else(nothing_to_commit, Siblings::refusal),
            });
        }
        let found = |kept: Option<&str>| {
            let verified = events.verification.as_ref().and_then(|found| found.error(&ended.paths, kept));
            verified.or_else(|| events.digests.as_ref()?.error(&ended.paths, kept))
        };
        if let Some(error) = found(None) {
            return Err(match atomic.take() {
                // The target was restored.
                Some(atomic) => {
                    let usual = |state: &str| found(Some(state)).unwrap_or_else(nothing_to_commit);
                    atomic.error(Changed::of(&ended.devices), usual)
                }
                None => error,
            });
        }
        let admitted = self.admitted.ok_or_else(nothing_to_commit)?;
        let end = if events.repeated.as_ref().is_some_and(Repeated::is_refused) {
            let clause = admitted.doubt.as_ref().map(|doubt| doubt.clause.clone()).unwrap_or_default();
            let refused = GuestFailure::ended(ErrorCode::FormatMismatch, clause);
            Err(GuestFailure { device: Some(DEVICE_OUTPUT), ..refused })
        } else {
            ended.end
        };
        let end = events.room.judge("the commit", end);
        let report = end.map_err(|failure| {
            let changed = Changed::of(&ended.devices);
            let usual = |state: &str| failure.error(&ended.paths, Some(state));
            match atomic.take() {
                Some(atomic) => atomic.error(changed, usual),
                None => usual(changed.clause()),
            }
        })?;
        // Whatever happens now, the overlay no longer matches the old target's mark, or keeps its content.
        atomic.iter().filter(|_| !only_plans).for_each(Atomic::finished);
        let overlay = ended.devices.device(ended.paths.own()).filter(|_| !self.request.only_plans());
        let deletion = self.deletion.and_then(Result::ok);
        if let (Some(deletion), Some(overlay)) = (&deletion, overlay) {
            deletion.remove(overlay.file())?;
        }
        events.meter.iter().for_each(Meter::done);
        let preview = events.plan.as_ref().filter(|_| self.request.only_plans()).map(|plan| {
            let log = (self.way == Some(AtomicWay::UndoLog)).then(|| log_room(plan, &admitted));
            Preview {
                free_bytes: admitted.free,
                undo_log_bytes: log,
                undo_free_bytes: log.and(self.undo_free),
                ..Preview::of(plan, admitted.length, admitted.taken, &admitted.units())
            }
            .with_lack()
        });
        Ok(CommitOutcome {
            overlay: self.paths.0,
            overlay_given: self.request.overlay.clone(),
            overlay_format: admitted.formats.0,
            backing: self.paths.1,
            backing_format: admitted.formats.1,
            clusters_committed: events.outcome.clusters_committed,
            bytes_committed: events.outcome.bytes_committed,
            overlay_clusters_cleared: events.outcome.overlay_clusters_cleared,
            overlay_bytes_wiped: (self.request.wipe && !self.request.only_plans())
                .then_some(ended.devices.stats().overwritten),
            verified_bytes: self.request.verify.then(|| events.verification.as_ref().map_or(0, Verification::bytes)),
            digest: events.digests.as_ref().and_then(Digests::found),
            overlay_deleted: deletion.map(|_| overlay.is_some()),
            atomic: self.way,
            backup: self.backup.filter(|_| !only_plans),
            stale: admitted.stale,
            relinked: self.request.relinks().then_some(self.relinked),
            bitmaps: events.bitmaps.clone(),
            warnings: events.warnings.clone(),
            preview,
            backing_grows_to: admitted.backing_grows_to,
            sandbox: ended.sandbox,
            run: GuestRun { report, statistics: ended.devices.stats().clone() },
            timing: ended.timing,
        })
    }
}
