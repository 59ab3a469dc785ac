//! Whole operations over images in memory: valid images of many kinds, with a few fields changed, then what the product does:
//! the plugins' host halves look at them and give their verdicts, and the guest's code commits, checks, maps, resizes, rebases, converts or
//! repairs.
//!
//! What is asked: nothing panics or takes memory without bound, and no request breaks a rule of the host. A commit that is
//! refused before its first change has changed nothing. Of images that made sense, whatever happens: the overlay reads what it
//! read; after a success the backing reads that, too, snapshots read what they read, and both are consistent.

mod bounded_devices;
mod chains;
mod change;
mod commit;
mod crashes;
mod damage;
mod fixtures;
mod jobs;
mod look;
mod sandboxed;
mod verdict;

pub use chains::{drawn_chain, DrawnChain};
pub use change::CHANGE;
pub use commit::run_changed;
pub use crashes::{interrupted_commits, Complaint, PowerLosses};
pub use damage::{damaged_job, damaged_pair};
pub use fixtures::Pairs;
pub use jobs::{interrupted_job, run_job, Job};
pub use look::look;
pub use verdict::{Ending, Verdict};

use crate::formats::Format;
use instar_guest_abi::{device_flags, DeviceConfig, DEVICE_OUTPUT};
use instar_guest_sdk::{BlockIo, DriverResult, Sink, Source};
use instar_plugin_api::ImageFacts;
use instar_testkit::Layout;
pub use instar_testkit::{ANCESTOR, MIDDLE, OVERLAY};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{catch_unwind, set_hook, take_hook, AssertUnwindSafe};
use std::sync::Once;
use std::thread::Result as Caught;

/// Content by device.
pub type Files = BTreeMap<u32, Vec<u8>>;

/// Images that make sense.
pub struct Fixture {
    /// Formats by device.
    pub formats: BTreeMap<u32, &'static Format>,
    /// Content by device.
    pub files: Files,
    /// What each is made of.
    pub layouts: BTreeMap<u32, Layout>,
    /// The backing may grow.
    pub resize: bool,
    /// The devices from the overlay down to the lowest ancestor.
    chain: Vec<u32>,
}

impl Fixture {
    /// Images of these formats, the overlay first. Of several that are merged, the lowest is [`MIDDLE`]; of several below the
    /// output device, the highest is [`ANCESTOR`].
    fn new(images: impl IntoIterator<Item = (u32, &'static Format, Vec<u8>)>) -> Self {
        let (formats, layouts) = (BTreeMap::new(), BTreeMap::new());
        let mut fixture = Self { formats, files: Files::new(), layouts, resize: false, chain: Vec::new() };
        for (device, format, bytes) in images {
            fixture.chain.push(device);
            fixture.formats.insert(device, format);
            fixture.layouts.insert(device, format.kit.layout(&bytes));
            fixture.files.insert(device, bytes);
        }
        fixture.resize = fixture.formats.get(&DEVICE_OUTPUT).is_some_and(|format| format.kit.can_grow());
        fixture
    }

    /// The devices from the overlay down to the lowest ancestor.
    fn chain(&self) -> &[u32] {
        &self.chain
    }

    /// Whether the commit leaves the overlay as it is: several layers are merged, or its format cannot be emptied.
    fn keeps_overlay(&self) -> bool {
        self.files.contains_key(&MIDDLE) || !self.formats[&OVERLAY].kit.can_empty()
    }
}

/// What the host tells the guest of an image.
fn config(device: u32, facts: &ImageFacts, writable: bool, max_length: u64) -> DeviceConfig {
    DeviceConfig {
        flags: device_flags::PRESENT | if writable { device_flags::WRITABLE } else { 0 },
        device,
        module: 2,
        file_length: facts.file_length,
        max_length,
        virtual_size: facts.virtual_size,
        cluster_size: facts.cluster_size,
        ..DeviceConfig::default()
    }
}

fn open_source(format: &Format, io: &mut dyn BlockIo, config: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
    format.kit.open_source(io, config)
}

fn open_sink(format: &Format, io: &mut dyn BlockIo, config: &DeviceConfig, below: bool) -> DriverResult<Box<dyn Sink>> {
    format.kit.open_sink(io, config, below)
}

/// Whether an image makes sense to the testkit's own checker, which is not made for large ones.
fn sound(format: &Format, bytes: &[u8]) -> bool {
    quietly(|| format.kit.is_sound(bytes)).unwrap_or(false)
}

/// What each image of the chain reads as, by device.
fn views(fixture: &Fixture, files: &Files) -> Files {
    let mut below: Option<Vec<u8>> = None;
    let mut views = Files::new();
    for device in fixture.chain().iter().rev() {
        let view = fixture.formats[device].kit.content(&files[device], below.as_deref());
        views.insert(*device, view.clone());
        below = Some(view);
    }
    views
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Call something that may panic, and say nothing of that.
pub fn quietly<T>(call: impl FnOnce() -> T) -> Caught<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    QUIET.set(false);
    result
}
