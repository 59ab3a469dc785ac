//! The host's answers to the guest of a commit: it checks the plan, the phases, and the end.

use super::atomic::Atomic;
use super::bitmaps::MergedBitmap;
use super::digest::Digests;
use super::plan::PlanBounds;
use super::repeated::Repeated;
use super::snapshot::Snapshot;
use super::verify::Verification;
use crate::bytes::Bytes;
use crate::devices::Devices;
use crate::escape::escape_path;
use crate::operation::{decode, Events, Meter, Observer, PlanNeeds, Room};
use crate::sandbox::{BadRequest, BufferAccess};
use instar_guest_abi::{request_status, Phase, Request, RequestOp, MAX_CHAIN_DEVICES};
use instar_guest_protocol::commit::event::Kind as Told;
use instar_guest_protocol::commit::{Bitmap, Event, Ignored, Outcome, Plan, Undecoded, Verify};
use std::path::PathBuf;
use std::rc::Rc;

/// Parts that do not decode of which a guest tells one by one, at most. Besides, it tells of the others of each disk.
const MOST_UNDECODED: usize = 64;

/// The reports of a commit's guest, and its permissions.
pub struct CommitEvents {
    /// The result of the commit, once the guest has reported it.
    pub outcome: Outcome,
    /// The guest's plan, once it has reported it.
    pub plan: Option<Plan>,
    /// The progress, if an observer asks for it.
    pub meter: Option<Meter>,
    /// The bitmaps of the committed layers, as the guest reports them, if the commit merges bitmaps.
    pub bitmaps: Option<Vec<MergedBitmap>>,
    /// Names of the overlay and the target, for lines about bitmaps.
    pub names: (PathBuf, PathBuf),
    /// Warnings to print once nothing can refuse the commit any more.
    pub warnings: Vec<String>,
    /// The observer that prints them.
    pub observer: Option<Rc<dyn Observer>>,
    /// The room in the file system of the target.
    pub room: Room,
    /// The check for a backing that looks like an image of another format: only a repeated commit may go on.
    pub repeated: Option<Repeated>,
    /// How far the guest may go: [`Phase::Inspect`] in a dry run, [`Phase::Target`] where the overlay is kept,
    /// [`Phase::Children`] where children of the overlay are to name the target.
    pub last_phase: Phase,
    /// Whether the overlay keeps its content.
    pub keep_overlay: bool,
    /// Whether other images are on the target, or on a layer between.
    pub has_siblings: bool,
    /// Whether the plan would change what they read, for which the host ended the guest.
    pub damages_siblings: bool,
    /// The bounds of its plan.
    pub bounds: PlanBounds,
    /// The progress of reading back, with `--verify`.
    pub verification: Option<Verification>,
    /// The digests of the disk, with `--digest`.
    pub digests: Option<Digests>,
    /// Names of the disks that are converted one behind the other, for lines about parts of them that do not decode.
    pub disks: Vec<PathBuf>,
    /// How many parts of the disk were told that do not decode, where zeroes may stand for them.
    pub undecoded: Option<usize>,
    /// Damage of metadata that the guest passed over, because the operator salvages what can be read.
    pub ignored: Vec<Ignored>,
    /// The state of `--atomic`, with which the target changes completely or not at all.
    pub atomic: Option<Atomic>,
}

impl Default for CommitEvents {
    /// Start with a guest that may only read.
    fn default() -> Self {
        Self {
            outcome: Outcome::default(),
            plan: None,
            meter: None,
            bitmaps: None,
            names: Default::default(),
            disks: Vec::new(),
            warnings: Vec::new(),
            observer: None,
            room: Room::default(),
            repeated: None,
            last_phase: Phase::Inspect,
            keep_overlay: false,
            has_siblings: false,
            damages_siblings: false,
            bounds: PlanBounds::default(),
            verification: None,
            digests: None,
            undecoded: None,
            ignored: Vec::new(),
            atomic: None,
        }
    }
}

/// The step in which the overlay is emptied, as the guest names it.
const EMPTYING: &str = "empty";
/// The step in which the target is written.
const WRITING: &str = "write";

impl CommitEvents {
    /// Take the report of a bitmap's fate. It comes before the plan, so that the observer learns of it before the first
    /// change.
    fn bitmap(&mut self, told: Bitmap) -> Result<(), BadRequest> {
        let bitmap = MergedBitmap::of(told).filter(|_| self.plan.is_none());
        let (Some(bitmap), Some(bitmaps)) = (bitmap, &mut self.bitmaps) else {
            return Err(BadRequest("a word about a bitmap that nobody asked for, or after the plan".to_owned()));
        };
        self.warnings.extend(bitmap.warning(&self.names.0, &self.names.1));
        bitmaps.push(bitmap);
        Ok(())
    }

    /// Take the guest's plan: every check that can refuse has passed, and the first change comes next.
    fn planned(&mut self, plan: Plan) -> Result<(), BadRequest> {
        if self.plan.is_some() {
            return Err(BadRequest("a second plan".to_owned()));
        }
        self.bounds.check(&plan).map_err(BadRequest)?;
        if self.digests.is_none() {
            self.meter.iter().for_each(|meter| meter.planned(plan.bytes));
        }
        self.plan = Some(plan);
        // An overlay that holds nothing changes nothing for them. Such an overlay is left, for example, by an
        // interrupted run that has already relinked some of them to the target.
        self.damages_siblings = self.has_siblings && plan.bytes > 0;
        if self.damages_siblings {
            return Err(BadRequest("a commit that damages other images on the target".to_owned()));
        }
        self.atomic.as_mut().map_or(Ok(()), |atomic| atomic.admit(plan.bytes))?;
        let needs = PlanNeeds {
            data_clusters: plan.new_data_clusters,
            metadata_clusters: plan.new_metadata_clusters,
            encoded_bytes: plan.encoded_bytes,
            final_length: plan.backing_final_length,
        };
        self.room.admit(&needs)?;
        for warning in &self.warnings {
            self.observer.iter().for_each(|observer| observer.warning(warning));
        }
        Ok(())
    }
}

impl CommitEvents {
    /// Read back and compare the places that the guest names.
    fn read_back(&mut self, devices: &mut Devices, found: &Verify) -> Result<(), BadRequest> {
        let (Some(verification), Some(plan)) = (&mut self.verification, &self.plan) else {
            return Err(BadRequest("a target was read back that nobody asked for".to_owned()));
        };
        if verification.take(devices, found, plan.bytes)? {
            self.meter.iter().for_each(|meter| meter.reading_back(plan.bytes));
        }
        Ok(())
    }

    /// Take a part of the disk that does not decode.
    fn undecoded(&mut self, part: Undecoded) -> Result<(), BadRequest> {
        let most = MOST_UNDECODED.saturating_add(self.disks.len());
        let Some(told) = self.undecoded.as_mut().filter(|told| **told < most) else {
            return Err(BadRequest("zeroes stand for data, which nobody asked for, or in too many places".to_owned()));
        };
        *told += 1;
        let Undecoded { guest_offset, length, several, disk } = part;
        let path = usize::try_from(disk).ok().and_then(|disk| self.disks.get(disk));
        let path = path.ok_or_else(|| BadRequest("a part of a disk that is not read".to_owned()))?;
        let (path, length) = (escape_path(path), Bytes(length));
        let line = match several {
            false => format!(
                "'{path}': {length} from byte {guest_offset} of the disk on are compressed and do not decode, and are zero in the copy"
            ),
            true => format!(
                "'{path}': {length} more, from byte {guest_offset} of the disk on, do not decode either, and are zero in the copy"
            ),
        };
        self.observer.iter().for_each(|observer| observer.warning(&line));
        self.warnings.push(line);
        Ok(())
    }

    /// Take damage that did not keep an image from being read.
    fn ignored(&mut self, damage: Ignored) -> Result<(), BadRequest> {
        if self.undecoded.is_none() || self.ignored.len() >= MAX_CHAIN_DEVICES {
            return Err(BadRequest("damage was passed over that nobody allowed, or too often".to_owned()));
        }
        self.ignored.push(damage);
        Ok(())
    }

    /// Take the beginning of a disk to hash.
    fn hash(&mut self, devices: &Devices, after: bool) -> Result<(), BadRequest> {
        let (Some(digests), Some(_)) = (&mut self.digests, &self.plan) else {
            return Err(BadRequest("a disk was hashed that nobody asked for".to_owned()));
        };
        self.meter.iter().for_each(|meter| meter.hashing(digests.length()));
        digests.begin(devices, after)
    }

    /// Whether everything that has to be read back was.
    fn check_read_back(&self) -> Result<(), BadRequest> {
        let planned = self.plan.as_ref().map_or(0, |plan| plan.bytes);
        self.verification.as_ref().map_or(Ok(()), |verification| verification.check_complete(planned))?;
        match (&self.digests, self.last_phase) {
            (None, _) => Ok(()),
            (Some(digests), Phase::Inspect) => digests.check_before(),
            (Some(digests), _) => digests.check_after(),
        }
    }
}

impl Events for CommitEvents {
    fn requests(
        &mut self,
        devices: &mut Devices,
        memory: &dyn BufferAccess,
        requests: &mut [Request],
    ) -> Result<(), BadRequest> {
        if let Some(digests) = self.digests.as_mut().filter(|_| requests.iter().any(Digests::concerns)) {
            return digests.take(devices, memory, requests);
        }
        match &mut self.repeated {
            None => devices.execute(memory, requests)?,
            // One after the other, and out of the guest's reach: the compared bytes have to be the written bytes.
            Some(repeated) => {
                for request in requests.iter_mut() {
                    let writes = request.op == RequestOp::Write as u32;
                    let copy = if writes { Snapshot::of(memory, request)? } else { None };
                    let memory = copy.as_ref().map_or(memory, |copy| copy);
                    if !repeated.allows(devices, memory, request) {
                        return Err(BadRequest("a change of the header of another format".to_owned()));
                    }
                    devices.execute(memory, std::slice::from_mut(request))?;
                    if request.status != request_status::OK {
                        break;
                    }
                }
            }
        }
        self.meter.iter().for_each(|meter| meter.settle(devices));
        Ok(())
    }

    fn event(&mut self, devices: &mut Devices, event: &[u8]) -> Result<(), BadRequest> {
        match decode::<Event>(event)?.kind {
            Some(Told::Plan(plan)) => self.planned(plan),
            Some(Told::Bitmap(bitmap)) => self.bitmap(bitmap),
            Some(Told::Complete(_)) => match &mut self.atomic {
                Some(_) => {
                    self.check_read_back()?;
                    self.atomic.as_mut().map_or(Ok(()), |atomic| atomic.complete(devices))
                }
                None => Err(BadRequest("a complete target was announced that nobody asked for".to_owned())),
            },
            Some(Told::Verify(found)) => self.read_back(devices, &found),
            Some(Told::Digest(begun)) => self.hash(devices, begun.after),
            Some(Told::Undecoded(part)) => self.undecoded(part),
            Some(Told::Ignored(damage)) => self.ignored(damage),
            None => Err(BadRequest("an event that says nothing".to_owned())),
        }
    }

    fn enter(&mut self, devices: &mut Devices, phase: Phase) -> Result<(), BadRequest> {
        if self.plan.is_none() {
            return Err(BadRequest("a change was announced before a plan".to_owned()));
        }
        let why = match (phase, self.last_phase) {
            (Phase::Target | Phase::Overlay | Phase::Children, Phase::Inspect) => "a change was announced in a dry run",
            (Phase::Overlay, _) if self.keep_overlay || self.last_phase < phase => {
                "a change of an overlay that is to keep its content was announced"
            }
            (Phase::Children, Phase::Target | Phase::Overlay) => "a change of children was announced that are to stay",
            (Phase::Children, _) if !self.keep_overlay && devices.phase() != Phase::Overlay => {
                "a change of children was announced before the overlay was emptied"
            }
            (Phase::Overlay | Phase::Children, _) => {
                self.check_read_back()?;
                return devices.enter(phase).map_err(BadRequest);
            }
            (Phase::Target, _) => {
                if let (Some(digests), Some(plan)) = (&self.digests, &self.plan) {
                    digests.check_before()?;
                    self.meter.iter().for_each(|meter| meter.planned(plan.bytes));
                }
                return devices.enter(phase).map_err(BadRequest);
            }
            _ => return devices.enter(phase).map_err(BadRequest),
        };
        Err(BadRequest(why.to_owned()))
    }

    fn step(&mut self, step: &str, done: u64) {
        match step {
            EMPTYING => self.meter.iter().for_each(Meter::emptying),
            WRITING => self.meter.iter().for_each(|meter| meter.written(done)),
            _ => {}
        }
    }

    /// Accept a success only if the devices confirm it.
    fn succeeded(&mut self, devices: &mut Devices, result: &[u8]) -> Result<(), BadRequest> {
        self.outcome = decode(result)?;
        self.check_read_back()?;
        let whole = self.last_phase == Phase::Inspect || self.atomic.as_ref().is_none_or(Atomic::is_complete);
        if !whole {
            return Err(BadRequest("it reported success and never said that the target is complete".to_owned()));
        }
        devices.finished(self.plan.is_some().then_some(self.last_phase)).map_err(BadRequest)
    }
}

#[cfg(test)]
#[path = "events_tests.rs"]
mod tests;
