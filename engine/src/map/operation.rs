//! The map as an [`Operation`].

use super::events::MapEvents;
use super::places::{message_limit, most_runs, places, Place};
use super::runs::{Each, Runs};
use super::MapRequest;
use crate::devices::Devices;
use crate::error::Error;
use crate::image::Access;
use crate::operation::{DevicePaths, Ended, Grants, ImageSet, Named, Opener, Operation, Session, Settings};
use crate::sandbox::ModuleSpec;
use std::collections::BTreeMap;

/// A map in progress.
pub struct Map<'q, 'e> {
    request: &'q MapRequest,
    each: Option<Box<Each<'e>>>,
    places: BTreeMap<u32, Place>,
    /// Virtual size of the top-most layer in bytes.
    size: u64,
    /// How many runs there can be.
    most_runs: u64,
}

impl<'q, 'e> Map<'q, 'e> {
    /// Prepare a map.
    pub fn new(request: &'q MapRequest, each: Box<Each<'e>>) -> Self {
        Self { request, each: Some(each), places: BTreeMap::new(), size: 0, most_runs: 0 }
    }
}

impl<'e> Operation for Map<'_, 'e> {
    type Events = MapEvents<'e>;
    type Outcome = ();

    fn module(&self) -> ModuleSpec<'static> {
        super::MODULE
    }

    fn most_processors(&self) -> usize {
        1
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        Named::image(&self.request.image)
    }

    fn access(&self) -> Access {
        Access::to_read(self.request.force_share)
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        Ok(ImageSet::read(opener.open_chain(self.request.format.as_deref())?))
    }

    fn admit(&mut self, images: &mut ImageSet<'_>, _: &Session) -> Result<Grants, Error> {
        let layers = images.chain();
        self.size = layers.first().map_or(0, |top| top.facts.virtual_size);
        self.places = places(&layers);
        self.most_runs = most_runs(&layers);
        Ok(Grants::default())
    }

    fn message_limit(&self) -> u64 {
        message_limit(self.most_runs)
    }

    fn serve(&mut self, _: &mut Devices, _: &DevicePaths, _: &Session) -> Result<MapEvents<'e>, Error> {
        let runs = Runs::new(self.request.range.clone(), std::mem::take(&mut self.places), self.each.take());
        Ok(MapEvents::new(self.size, self.most_runs, runs))
    }

    fn finish(self, ended: Ended<MapEvents<'e>>) -> Result<(), Error> {
        MapEvents::conclude(ended)
    }
}
