//! The comparison as an [`Operation`].

use super::contents::Contents;
use super::events::CompareEvents;
use super::{CompareOutcome, CompareRequest};
use crate::devices::Devices;
use crate::error::Error;
use crate::image::{Access, ChainImage};
use crate::map::{most_runs, places};
use crate::operation::{DevicePaths, Ended, Grants, ImageSet, Named, Opener, Operation, Session, Settings};
use crate::sandbox::ModuleSpec;

/// Bytes of messages that a pair can take, at most.
const PAIR_BYTES: u64 = 128;

/// A comparison in progress.
pub struct Compare<'q> {
    request: &'q CompareRequest,
    contents: Contents,
    /// Virtual sizes in bytes.
    sizes: [u64; 2],
    message_limit: u64,
}

impl<'q> Compare<'q> {
    /// Prepare a comparison.
    pub fn new(request: &'q CompareRequest) -> Self {
        Self { request, contents: Contents::default(), sizes: [0; 2], message_limit: 0 }
    }
}

impl Operation for Compare<'_> {
    type Events = CompareEvents;
    type Outcome = CompareOutcome;

    fn module(&self) -> ModuleSpec<'static> {
        super::MODULE
    }

    fn reads_below(&self) -> bool {
        true
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        let [first, second] = &self.request.images;
        Named::two(first, second)
    }

    fn access(&self) -> Access {
        Access::to_read(self.request.force_share)
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        let formats = &self.request.formats;
        let views = opener.open_two_chains([formats[0].as_deref(), formats[1].as_deref()])?;
        let size = |layers: &[ChainImage<'_>]| layers.first().map_or(0, |top| top.facts.virtual_size);
        self.sizes = [size(&views[0]), size(&views[1])];
        let all: Vec<_> = views.iter().flatten().collect();
        self.contents = Contents::new(places(&all), &all, [views[0].len(), views[1].len()]);
        // Each view may cut the runs of the other one.
        self.message_limit = most_runs(&all).saturating_mul(PAIR_BYTES).saturating_add(16 << 20);
        Ok(ImageSet::views(views))
    }

    fn message_limit(&self) -> u64 {
        self.message_limit
    }

    fn serve(&mut self, _: &mut Devices, _: &DevicePaths, session: &Session) -> Result<CompareEvents, Error> {
        let contents = std::mem::take(&mut self.contents);
        let events = CompareEvents::new(contents, self.sizes, self.request.strict, session.observer().clone());
        Ok(events)
    }

    fn admit(&mut self, _: &mut ImageSet<'_>, session: &Session) -> Result<Grants, Error> {
        let [first, second] = self.sizes;
        session.note(|| format!("disks of {first} and {second} bytes"));
        Ok(Grants::default())
    }

    fn finish(self, ended: Ended<CompareEvents>) -> Result<CompareOutcome, Error> {
        let CompareEvents { difference, failure, .. } = &ended.events;
        let outcome = |difference| CompareOutcome { virtual_sizes: self.sizes, sandbox: ended.sandbox, difference };
        if let Some(difference) = difference {
            return Ok(outcome(Some(*difference)));
        }
        if let Some(failure) = failure {
            return Err(failure.error(&ended.paths, None));
        }
        ended.end.map_err(|failure| failure.error(&ended.paths, None))?;
        ended.events.end()?;
        Ok(outcome(None))
    }
}
