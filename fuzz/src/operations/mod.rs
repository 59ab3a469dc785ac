//! Whole operations over images in memory: valid images of many kinds, with a few fields changed, then what the product does:
//! the plugins' host halves look at them and give their verdicts, and the guest's code commits, checks or maps.
//!
//! What is asked: nothing panics or takes memory without bound, and no request breaks a rule of the host. A commit that is
//! refused before its first change has changed nothing. Of images that made sense, whatever happens: the overlay reads what it
//! read; after a success the backing reads that, too, snapshots read what they read, and both are consistent.

mod beds;
mod change;
mod commit;
mod crashes;
mod damage;
mod look;
mod qcow2;
mod strict;
mod vmdk;

pub use beds::Pairs;
pub use change::{Layout, CHANGE};
pub use commit::{cross_commit, qcow2_commit, vmdk_commit};
pub use crashes::{Complaint, PowerLosses};
pub use damage::{damaged_pair, Ending, Verdict};
pub use look::look;

use crate::host::Format;
use instar_guest_abi::{device_flags, DeviceConfig};
use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver, Sink, Source};
use instar_plugin_api::ImageFacts;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{catch_unwind, set_hook, take_hook, AssertUnwindSafe};
use std::sync::{Once, OnceLock};
use std::thread::Result as Caught;

/// Content by device.
pub type Files = BTreeMap<u32, Vec<u8>>;

/// The overlay.
pub const OVERLAY: u32 = 0;
/// What the backing is backed by.
pub const ANCESTOR: u32 = 1;
/// A layer between overlay and backing, which is committed with the overlay.
pub const MIDDLE: u32 = 2;

/// Images that make sense.
pub struct Bed {
    /// Formats by device.
    pub formats: BTreeMap<u32, Format>,
    /// Content by device.
    pub files: Files,
    /// What each is made of.
    pub layouts: BTreeMap<u32, Layout>,
    /// The backing may grow.
    pub resize: bool,
}

impl Bed {
    /// Images of these formats.
    fn new(images: impl IntoIterator<Item = (u32, Format, Vec<u8>)>) -> Self {
        let mut bed = Self { formats: BTreeMap::new(), files: Files::new(), layouts: BTreeMap::new(), resize: false };
        for (device, format, bytes) in images {
            let layout = match format {
                Format::Qcow2 => qcow2::layout(&bytes),
                Format::Vmdk => vmdk::layout(&bytes),
                Format::Raw => Layout::default(),
            };
            bed.formats.insert(device, format);
            bed.layouts.insert(device, layout);
            bed.files.insert(device, bytes);
        }
        bed
    }

    /// The devices from the overlay down to the lowest ancestor.
    fn chain(&self) -> Vec<u32> {
        let order = [OVERLAY, MIDDLE, instar_guest_abi::DEVICE_OUTPUT, ANCESTOR];
        order.into_iter().filter(|device| self.files.contains_key(device)).collect()
    }
}

/// The bed that an input is about.
fn choose<'a>(beds: &'a OnceLock<Vec<Bed>>, make: fn() -> Vec<Bed>, input: &[u8]) -> Option<&'a Bed> {
    let beds = beds.get_or_init(make);
    beds.get(usize::from(*input.first()?) % beds.len())
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

fn open_source(format: Format, io: &mut dyn BlockIo, config: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
    Ok(match format {
        Format::Qcow2 => Box::new(instar_qcow2_driver::Qcow2::open_source(io, config)?),
        Format::Vmdk => Box::new(instar_vmdk_driver::Vmdk::open_source(io, config)?),
        Format::Raw => Box::new(instar_raw_driver::Raw::open_source(io, config)?),
    })
}

fn open_sink(format: Format, io: &mut dyn BlockIo, config: &DeviceConfig, below: bool) -> DriverResult<Box<dyn Sink>> {
    Ok(match format {
        Format::Qcow2 => Box::new(instar_qcow2_driver::Qcow2::open_sink(io, config, below)?),
        Format::Vmdk => Box::new(instar_vmdk_driver::Vmdk::open_sink(io, config, below)?),
        Format::Raw => Box::new(instar_raw_driver::Raw::open_sink(io, config, below)?),
    })
}

/// Whether an image makes sense to the tests' own checker, which is not made for large ones.
fn sound(format: Format, bytes: &[u8]) -> bool {
    let call = || match format {
        Format::Qcow2 => qcow2::is_sound(bytes),
        Format::Vmdk => vmdk::is_sound(bytes),
        Format::Raw => true,
    };
    quietly(call).unwrap_or(false)
}

/// What an image reads as over what is below it, by the tests' own reader.
fn content(format: Format, bytes: &[u8], below: Option<&[u8]>) -> Vec<u8> {
    match format {
        Format::Qcow2 => qcow2::content(bytes, below),
        Format::Vmdk => vmdk::content(bytes, below.unwrap_or_default()),
        Format::Raw => {
            let mut disk = bytes.to_vec();
            disk.resize(disk.len().next_multiple_of(512), 0);
            disk
        }
    }
}

/// What each image of the chain reads as, by device.
fn views(bed: &Bed, files: &Files) -> Files {
    let mut below: Option<Vec<u8>> = None;
    let mut views = Files::new();
    for device in bed.chain().into_iter().rev() {
        let view = content(bed.formats[&device], &files[&device], below.as_deref());
        views.insert(device, view.clone());
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
