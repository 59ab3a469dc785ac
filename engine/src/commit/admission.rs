//! The admission of a commit: every check that can refuse it before its guest begins.

use super::admitted::Admitted;
use super::atomic::Atomic;
use super::bitmaps::{allowance, count as bitmaps_of, left_out};
use super::digest;
use super::operation::Commit;
use super::plan::PlanBounds;
use super::refusals::nothing_to_commit;
use super::relinks::{self, Relinks};
use super::request::CommitMode;
use super::verdict::{become_stale, Parts};
use super::verify;
use super::wipe;
use crate::error::Error;
use crate::image::check_parents;
use crate::operation::{block_size, free_space, taken_space, Grants, ImageSet, Operation, Session, Space};
use instar_guest_abi::{ErrorCode, MemberRole, PAYLOAD_SIZE};
use std::path::PathBuf;

impl Commit<'_> {
    /// Ask the plugins, and check everything else that can refuse the commit. Returns how long each file may become.
    ///
    /// # Errors
    /// The first refusal, as one line that names the file and a remedy.
    pub(super) fn ask_all(&mut self, images: &mut ImageSet<'_>, session: &Session) -> Result<Grants, Error> {
        check_parents(&images.chain())?;
        let parts = Parts::of(images).ok_or_else(nothing_to_commit)?;
        parts.refuse_doubt(self.request.only_plans())?;
        // A device of plain bytes is itself the disk: lengthening the one makes the other grow.
        let is_disk = parts.backing.opened.block_device && parts.backing.facts.cluster_size <= 1;
        let may_grow = self.request.resize_backing || (self.request.mode == CommitMode::Measure && is_disk);
        // A plugin's refusal comes first.
        let growth = parts.growth(may_grow);
        let mut grants = parts.verdict(growth.as_ref().ok().copied().flatten(), &mut self.warnings)?;
        let backing_grows_to = growth?;
        if self.request.bitmaps {
            let size = backing_grows_to.unwrap_or(0).max(parts.backing.facts.virtual_size);
            let merged = parts.merged().map(|layer| &layer.facts);
            grants.target = grants.target.saturating_add(allowance(&parts.backing.facts, merged, size));
        } else if self.request.mode != CommitMode::Measure {
            self.warnings.extend(left_out(&parts));
        }
        if !parts.empties && !self.request.relink_in.is_empty() {
            let clause = "keeps its content, so that after an interrupted commit nothing would tell its children from other images \
                          on the target: name them with --relink, and not with --relink-in";
            return Err(Error::image(&parts.overlay.opened.path, ErrorCode::BackingShared, clause));
        }
        if self.request.wipe {
            wipe::admit(self.request, &parts)?;
            self.warnings.extend(wipe::warning(&parts));
        }
        if self.request.verify {
            verify::admit(self.request)?;
            self.message_limit = self.message_limit.saturating_add(verify::message_limit(&parts));
        }
        if self.request.digest {
            digest::admit(self.request, &parts)?;
        }
        if let Some(deletion) = self.deletion.take().transpose()? {
            deletion.admit(self.request, &parts, &mut self.warnings)?;
            self.deletion = Some(Ok(deletion));
        }
        let children = images.of_role(|role| role == MemberRole::Relinked);
        relinks::admit(children, &parts, backing_grows_to, &mut self.warnings)?;
        let wanted = Relinks::wanted(&self.relinked, parts.backing);
        if let Some(siblings) = &self.siblings {
            match (self.request.ignore_siblings, self.request.relinks()) {
                (true, _) => self.warnings.push(siblings.warning(self.request.only_plans())),
                (false, false) => return Err(siblings.refusal()),
                // They may be children that an earlier run has relinked: only the plan says whether they are damaged.
                (false, true) => {}
            }
        }
        grants.beyond_devices = self.request.mode == CommitMode::Measure;
        self.warnings.extend(parts.unsure_mark());
        if let Some(size) = backing_grows_to {
            session.note(|| format!("the backing's virtual size grows to {size} bytes"));
        }
        let stale: Vec<PathBuf> = parts.between.iter().map(|layer| layer.opened.path.clone()).collect();
        self.warnings.extend(become_stale(&stale, self.request.only_plans()));
        let Parts { overlay, backing, .. } = &parts;
        let formats = (overlay.facts.format.to_string(), backing.facts.format.to_string());
        self.admitted = Some(Admitted {
            formats,
            keep_overlay: self.request.keeps_content() || !stale.is_empty(),
            stale,
            backing_grows_to,
            bounds: PlanBounds { longest: grants.target, ..PlanBounds::of(overlay, backing) },
            space: Space::of(backing, &parts.merged().collect::<Vec<_>>()),
            doubt: None,
            wanted,
            overlay_length: overlay.length(),
            virtual_size: overlay.facts.virtual_size,
            bitmaps: parts.merged().chain([*backing]).map(|image| bitmaps_of(&image.facts)).sum(),
            repairs: backing.facts.dirty,
            length: backing.facts.file_length,
            // A clone's changes are not the target's own.
            sources: self.atomic.as_ref().map_or(0, Atomic::sources),
            taken: if self.atomic.as_ref().is_some_and(Atomic::is_clone) { Some(0) } else { taken_space(backing) },
            free: free_space(backing),
            block: block_size(backing),
        });
        if self.payload().len() as u64 > PAYLOAD_SIZE {
            let clause = "has too many children in too many directories to relink at a time: name some of them with --relink, and \
                          the others in a second run";
            return Err(Error::image(&self.paths.0, ErrorCode::ChainTooDeep, clause));
        }
        if let (Some(admitted), Some(backing)) = (&mut self.admitted, &mut images.target) {
            admitted.doubt = backing.doubt.take();
        }
        Ok(grants)
    }
}
