//! Measuring the content of an image as an [`Operation`]: a map whose runs are counted.

use super::units::Units;
use super::{footprint, outcome, MeasureOutcome, MeasureRequest, MODULE};
use crate::create::plugin_of;
use crate::devices::Devices;
use crate::error::Error;
use crate::image::{Access, SnapshotName};
use crate::map::{message_limit, most_runs, places, MapEvents, MapRun, Place, Runs};
use crate::operation::{DevicePaths, Ended, ImageSet, Named, Opener, Operation, Session, Settings};
use crate::sandbox::ModuleSpec;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::Footprint;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

/// A measurement in progress.
pub struct Measure<'q> {
    request: &'q MeasureRequest,
    path: &'q Path,
    format: Option<&'q str>,
    snapshot: Option<&'q SnapshotName>,
    force_share: bool,
    footprint: Option<Footprint>,
    units: Rc<RefCell<Units>>,
    places: BTreeMap<u32, Place>,
    size: u64,
    most_runs: u64,
}

impl<'q> Measure<'q> {
    /// Prepare a measurement of this image, with its format and snapshot, if the operator names them.
    pub fn new(
        request: &'q MeasureRequest,
        path: &'q Path,
        (format, snapshot): (Option<&'q str>, Option<&'q SnapshotName>),
        force_share: bool,
    ) -> Self {
        let (units, places) = (Rc::default(), BTreeMap::new());
        Self { request, path, format, snapshot, force_share, footprint: None, units, places, size: 0, most_runs: 0 }
    }
}

impl Operation for Measure<'_> {
    type Events = MapEvents<'static>;
    type Outcome = MeasureOutcome;

    fn module(&self) -> ModuleSpec<'static> {
        MODULE
    }

    fn most_processors(&self) -> usize {
        1
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        Named::image(self.path)
    }

    fn access(&self) -> Access {
        Access::to_read(self.force_share)
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        let plugin = plugin_of(opener.registry, &self.request.format)?;
        let mut layers = opener.open_chain(self.format)?;
        if let (Some(top), Some(snapshot)) = (layers.first_mut(), self.snapshot) {
            top.select_snapshot(snapshot)?;
        }
        let all: Vec<_> = layers.iter().collect();
        self.size = all.first().map_or(0, |top| top.facts.virtual_size);
        (self.places, self.most_runs) = (places(&all), most_runs(&all));
        let bitmaps = all.first().and_then(|top| top.facts.bitmaps.as_ref().into_option());
        let footprint = footprint(plugin, self.request, self.size, bitmaps.map(|bitmaps| bitmaps.as_slice()))?;
        *self.units.borrow_mut() = Units::of(footprint.unit);
        self.footprint = Some(footprint);
        Ok(ImageSet::read(layers))
    }

    fn message_limit(&self) -> u64 {
        message_limit(self.most_runs)
    }

    fn serve(&mut self, _: &mut Devices, _: &DevicePaths, _: &Session) -> Result<Self::Events, Error> {
        let units = self.units.clone();
        let each = move |run: &MapRun<'_>| {
            units.borrow_mut().take(run);
            Ok(())
        };
        let runs = Runs::new(0..u64::MAX, std::mem::take(&mut self.places), Some(Box::new(each)));
        Ok(MapEvents::new(self.size, self.most_runs, runs))
    }

    fn finish(self, ended: Ended<Self::Events>) -> Result<MeasureOutcome, Error> {
        let sandbox = Some(ended.sandbox);
        MapEvents::conclude(ended)?;
        let units = self.units.borrow().count();
        let measured = self.footprint.map(|footprint| outcome(&footprint, units, sandbox));
        measured.unwrap_or_else(|| Err(Error::new(ErrorCode::GuestProtocol, "the guest ended before it was asked")))
    }
}
