//! The images as devices of the guest.

use super::error::CommitError;
use super::failure::Names;
use crate::chain::ChainImage;
use crate::devices::{Device, DeviceSet};
use crate::vm::{ModuleSpec, FIRST_FORMAT};
use instar_guest_abi::{
    ChainConfig, DeviceConfig, ErrorCode, CHAIN_CONFIG_MAGIC, DEVICE_OUTPUT, MAX_CHAIN_DEVICES, MAX_MODULES,
};

/// The images as devices, and what the guest is told about them.
#[derive(Debug)]
pub struct Attached<'r> {
    /// The devices.
    pub devices: DeviceSet,
    /// What the guest is told.
    pub chain: ChainConfig,
    /// The guest halves of the formats in play.
    pub modules: Vec<ModuleSpec<'r>>,
    /// The names of the images.
    pub names: Names,
    /// The formats of overlay and backing.
    pub formats: (&'r str, &'r str),
}

/// Attach the images: `layers` are the overlay and the ancestors of the backing, of which those whose slot is in `rw_slots`
/// may be written, and keep their length (up to the end of the last cluster); `output` is the backing, which may become
/// `output_bound` bytes long.
///
/// # Errors
/// When an image changed since it was looked at, or there are too many.
pub fn open_chain_devices_rw<'r>(
    layers: Vec<ChainImage<'r>>,
    output: ChainImage<'r>,
    output_bound: u64,
    rw_slots: &[usize],
) -> Result<Attached<'r>, CommitError> {
    for image in layers.iter().chain([&output]) {
        refuse_changed(image)?;
    }
    let names = Names {
        layers: layers.iter().map(|image| image.path().to_owned()).collect(),
        backing: output.path().to_owned(),
    };
    let overlay_format = layers.first().map_or("", |image| image.plugin.name());
    let formats = (overlay_format, output.plugin.name());
    let mut modules: Vec<ModuleSpec<'r>> = Vec::new();
    let mut chain = ChainConfig { magic: CHAIN_CONFIG_MAGIC, merge_count: 1, ..ChainConfig::default() };
    chain.count = u32::try_from(layers.len()).unwrap_or(u32::MAX);
    if layers.is_empty() || layers.len() > MAX_CHAIN_DEVICES {
        return Err(CommitError::image(&names.backing, ErrorCode::ChainTooDeep, "the chain has too many images"));
    }
    let mut devices = Vec::new();
    for (slot, image) in layers.into_iter().enumerate() {
        let number = u32::try_from(slot).unwrap_or(u32::MAX);
        let module = module_index(&mut modules, &image)?;
        let facts = (image.facts.virtual_size, image.facts.cluster_size);
        let device = if rw_slots.contains(&slot) {
            let bound = image.file.initial_length().checked_next_multiple_of(facts.1.max(1));
            Device::writable(image.file, bound.unwrap_or(0))
        } else {
            Device::read_only(image.file)
        };
        if let Some(config) = chain.devices.get_mut(slot) {
            *config = config_of(&device, number, module, facts);
        }
        devices.push(device);
    }
    let module = module_index(&mut modules, &output)?;
    let facts = (output.facts.virtual_size, output.facts.cluster_size);
    let device = Device::writable(output.file, output_bound);
    chain.output = config_of(&device, DEVICE_OUTPUT, module, facts);
    let devices = DeviceSet::new(devices, Some(device));
    if devices.has_duplicates() {
        // The chain was searched for loops before.
        let clause = "it is part of the chain twice";
        return Err(CommitError::image(&names.backing, ErrorCode::ChainLoop, clause));
    }
    Ok(Attached { devices, chain, modules, names, formats })
}

/// Refuse an image that is not any more what was looked at.
fn refuse_changed(image: &ChainImage<'_>) -> Result<(), CommitError> {
    let same_length = image.file.current_length() == Ok(image.file.initial_length());
    if same_length && image.file.is_still_named() {
        return Ok(());
    }
    let clause = "the file changed while it was looked at: see who else uses it, and run again; nothing was changed";
    Err(CommitError::image(image.path(), ErrorCode::HeaderMismatch, clause))
}

fn config_of(device: &Device, number: u32, module: u32, (virtual_size, cluster_size): (u64, u64)) -> DeviceConfig {
    DeviceConfig {
        flags: device.flags(),
        device: number,
        module,
        reserved: 0,
        file_length: device.length(),
        virtual_size,
        cluster_size,
    }
}

/// Index in the module table of the image's format; each format is loaded once.
fn module_index<'r>(modules: &mut Vec<ModuleSpec<'r>>, image: &ChainImage<'r>) -> Result<u32, CommitError> {
    let name = image.plugin.name();
    let known = modules.iter().position(|module| module.name == name);
    let index = known.unwrap_or(modules.len());
    if known.is_none() {
        modules.push(ModuleSpec { name, elf: image.plugin.guest_module().elf.as_slice() });
    }
    let index = u32::try_from(index).unwrap_or(u32::MAX).saturating_add(FIRST_FORMAT);
    if usize::try_from(index).unwrap_or(usize::MAX) >= MAX_MODULES {
        let clause = "the chain has images of too many formats";
        return Err(CommitError::image(image.path(), ErrorCode::ChainTooDeep, clause));
    }
    Ok(index)
}
