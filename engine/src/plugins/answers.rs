//! Checks of a plugin's answers. A plugin is trusted as code but may still be wrong. Its answers end up in commands, on
//! terminals and as bounds, so invalid ones are refused here, by name, and never passed on.

use instar_guest_abi::{MAX_FILE_DEVICES, MODULE_ABI_MAJOR, MODULE_ABI_MINOR};
use instar_plugin_api::v1::PluginManifest;
use instar_plugin_api::{
    CreatedImage, Footprint, GuestModule, ImageFacts, ImageFile, ReservedRange, IDENTITY_MAX, ROLE_SINK, ROLE_SOURCE,
    VALUES_MAX, VALUE_BYTES,
};

/// Longest name of a format in bytes: it has to fit into the guest's module table.
const NAME_MAX: usize = 31;
/// Longest description or version, longest name of a feature, option or extension, in bytes.
const TEXT_MAX: usize = 200;
/// Longest message or reason that is shown, in bytes.
const MESSAGE_MAX: usize = 2000;
/// Most aliases, extensions and options.
const LIST_MAX: usize = 64;
/// Most features of an image.
const FEATURES_MAX: usize = 1000;
/// Longest recorded name or format of a backing, in bytes: no path is longer.
const RECORDED_MAX: usize = 4095;
/// Most other names of a backing or file.
const NAMES_MAX: usize = 16;
/// Most notes on an image, and the longest of them in bytes.
const NOTES_MAX: (usize, usize) = (16, 300);
/// Longest metadata of a new image in bytes, over all regions.
const CREATED_MAX: u64 = 1 << 30;
/// Ranges of a new image that are reserved, at most.
const RESERVED_MAX: usize = 1024;

/// Cut a text that is too long to be shown.
pub fn cut(mut text: String) -> String {
    if text.len() > MESSAGE_MAX {
        let end = (0..=MESSAGE_MAX).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Whether a text is a line of at most `most` bytes.
fn is_line(text: &str, most: usize) -> bool {
    text.len() <= most && !text.chars().any(char::is_control)
}

/// Whether `name` may be the name of a format.
fn is_format_name(name: &str) -> bool {
    name.len() <= NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
}

/// Check a plugin's description of itself.
pub fn check_manifest(manifest: &PluginManifest) -> Result<(), String> {
    let lists = [manifest.aliases.len(), manifest.extensions.len(), manifest.create_options.len()];
    if lists.iter().any(|&count| count > LIST_MAX) {
        return Err(format!("it has more than {LIST_MAX} aliases, extensions or options"));
    }
    // `core` and `commit` are modules of the guest itself.
    for name in std::iter::once(&manifest.name).chain(&manifest.aliases) {
        if !is_format_name(name) || name == "core" || name == "commit" {
            let shown: String = name.chars().take(NAME_MAX + 1).collect();
            return Err(format!("{shown:?} cannot be the name of a format"));
        }
    }
    let own = [("description", &manifest.description), ("version", &manifest.version)];
    let extensions = manifest.extensions.iter().map(|extension| ("extension", extension));
    let options =
        manifest.create_options.iter().flat_map(|option| [("option", &option.0), ("option's help", &option.1)]);
    for (what, text) in own.into_iter().chain(extensions).chain(options) {
        if !is_line(text, TEXT_MAX) {
            return Err(format!("its {what} is not one short line"));
        }
    }
    Ok(())
}

/// Check the guest half, as far as possible before it is loaded.
pub fn check_module(module: &GuestModule) -> Result<(), String> {
    if !module.elf.starts_with(b"\x7fELF") {
        return Err("its guest module is not an ELF file".to_owned());
    }
    if module.roles == 0 || module.roles & !(ROLE_SOURCE | ROLE_SINK) != 0 {
        return Err(format!("its guest module has the unknown roles {:#x}", module.roles));
    }
    // A later minor version only offers more, which nobody asks for here; what it needs of the guest's core is another number.
    let (major, least) = (module.abi_major, module.least_minor);
    if major != MODULE_ABI_MAJOR || least > MODULE_ABI_MINOR {
        let advice = if major < MODULE_ABI_MAJOR { "rebuild the plugin" } else { "update instar" };
        return Err(format!(
            "its guest module needs module interface {major}.{least}, this instar has \
             {MODULE_ABI_MAJOR}.{MODULE_ABI_MINOR}: {advice}"
        ));
    }
    Ok(())
}

/// Check the facts about an image of `file_length` bytes from the plugin of the format `name`.
pub fn check_facts(facts: &ImageFacts, name: &str, file_length: u64) -> Result<(), String> {
    if facts.format.as_str() != name {
        let shown: String = facts.format.chars().take(NAME_MAX + 1).collect();
        return Err(format!("it reports the format {shown:?}"));
    }
    if facts.file_length != file_length {
        return Err("it reports another file length than the file has".to_owned());
    }
    if facts.virtual_size > i64::MAX as u64 {
        return Err("it reports a virtual size beyond 2^63 bytes".to_owned());
    }
    if facts.cluster_size != 0 && !facts.cluster_size.is_power_of_two() {
        return Err(format!("it reports a cluster size of {} bytes, which is no power of two", facts.cluster_size));
    }
    if facts.cluster_size > i64::MAX as u64 {
        return Err("it reports a cluster size beyond 2^63 bytes".to_owned());
    }
    if let Some(backing) = facts.backing.as_ref().into_option() {
        let format = backing.format.as_ref().into_option().map_or(0, |format| format.len());
        if backing.other_names.len() > NAMES_MAX {
            return Err(format!("it reports more than {NAMES_MAX} other names of a backing"));
        }
        if backing.names().any(|name| name.len() > RECORDED_MAX) || format > RECORDED_MAX {
            return Err(format!("it reports a backing whose name or format is longer than {RECORDED_MAX} bytes"));
        }
    }
    if [&facts.identity, &facts.parent_identity].iter().any(|id| id.len() > IDENTITY_MAX) {
        return Err(format!("it reports an identity of more than {IDENTITY_MAX} bytes"));
    }
    if facts.backing.is_none() && !facts.parent_identity.is_empty() {
        return Err("it reports the identity of a parent, and no parent".to_owned());
    }
    if facts.features.len() > FEATURES_MAX {
        return Err(format!("it reports more than {} features", FEATURES_MAX));
    }
    let mut left = VALUES_MAX;
    let bitmaps = facts.bitmaps.as_ref().map_or(&[][..], |bitmaps| bitmaps.as_slice());
    let snapshots = facts.snapshots.iter().map(|snapshot| snapshot.id.len().saturating_add(snapshot.name.len()));
    let names_of_bitmaps = bitmaps.iter().map(|bitmap| bitmap.name.len());
    for length in snapshots.chain(names_of_bitmaps) {
        let weight = VALUE_BYTES.saturating_add(length as u64);
        left =
            left.checked_sub(weight).ok_or("it reports too many snapshots and bitmaps, or too long names of them")?;
    }
    if facts.snapshots.iter().any(|snapshot| snapshot.virtual_size > i64::MAX as u64) {
        return Err("it reports a snapshot of a disk beyond 2^63 bytes".to_owned());
    }
    if bitmaps.iter().any(|bitmap| !bitmap.granularity.is_power_of_two()) {
        return Err("it reports a bitmap whose granularity is no power of two".to_owned());
    }
    for feature in &facts.features {
        if feature.name.is_empty() || !is_line(&feature.name, TEXT_MAX) {
            return Err("the name of a feature that it reports is not one short line".to_owned());
        }
        match feature.value.weight(left) {
            Some(weight) => left = left.saturating_sub(weight),
            None => {
                let name = feature.name.as_str();
                return Err(format!("the value of its feature {name:?} is too large, or nested too deeply"));
            }
        }
    }
    Ok(())
}

/// Check the list of an image's other files. Their permitted number depends on the rest of the chain.
pub fn check_files(files: &[ImageFile]) -> Result<(), String> {
    if files.iter().any(|file| file.other_names.len() > NAMES_MAX) {
        return Err(format!("it names a file of the image by more than {NAMES_MAX} other names"));
    }
    if files.iter().any(|file| file.names().any(|name| name.len() > RECORDED_MAX)) {
        return Err(format!("it names a file of the image by more than {RECORDED_MAX} bytes"));
    }
    if !files.iter().all(|file| is_format_name(&file.format)) {
        return Err("it says of a file of the image that it is of a format that has no valid name".to_owned());
    }
    Ok(())
}

/// Check the notes on an image.
pub fn check_notes(notes: &[String]) -> Result<(), String> {
    let fit = notes.iter().all(|note| !note.is_empty() && is_line(note, NOTES_MAX.1));
    if fit && notes.len() <= NOTES_MAX.0 {
        Ok(())
    } else {
        Err("its notes are not a few short lines".to_owned())
    }
}

/// Check the layout of a new image.
pub fn check_created(image: &CreatedImage) -> Result<(), String> {
    let mut total = 0u64;
    let others = image.files.iter().map(|file| (file.length, &file.regions));
    for (file_length, regions) in std::iter::once((image.length, &image.regions)).chain(others) {
        for region in regions {
            let length = region.bytes.len() as u64;
            total = total.saturating_add(length);
            if region.offset.checked_add(length).is_none_or(|end| end > file_length) {
                return Err("it puts metadata of a new image past the end of the file".to_owned());
            }
        }
        if total > CREATED_MAX || file_length > i64::MAX as u64 {
            return Err("it makes a new image too large to be written".to_owned());
        }
    }
    let fits = |range: &ReservedRange| range.offset.checked_add(range.length).is_some_and(|end| end <= image.length);
    if image.reserved.len() > RESERVED_MAX || !image.reserved.iter().all(fits) {
        return Err("it reserves space past the end of a new image, or in too many places".to_owned());
    }
    if image.files.len() > MAX_FILE_DEVICES {
        return Err(format!("it makes a new image of more than {MAX_FILE_DEVICES} files"));
    }
    // Beside the image, and nowhere else.
    let plain = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && !name.iter().any(|&b| b == b'/' || b == 0);
    if !image.files.iter().all(|file| plain(&file.name)) {
        return Err("it names a file of a new image by what is no plain file name".to_owned());
    }
    Ok(())
}

/// Check the space of a new image of this virtual size.
pub fn check_footprint(footprint: &Footprint, virtual_size: u64) -> Result<(), String> {
    if footprint.unit == 0 {
        return Err("it measures a new image in units of 0 bytes".to_owned());
    }
    if footprint.virtual_size < virtual_size {
        return Err("it measures a smaller disk than it was asked for".to_owned());
    }
    if footprint.fully_allocated().is_none_or(|length| length > i64::MAX as u64) {
        return Err("it measures a new image beyond 2^63 bytes".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_plugin_api::std_types::ROption;

    #[test]
    fn footprints_have_bounds() {
        let good = Footprint { virtual_size: 1024, unit: 512, overhead: 512, thin: true, bitmaps: ROption::RNone };
        assert_eq!(check_footprint(&good, 1000), Ok(()));
        for (bad, words) in [
            (Footprint { unit: 0, ..good }, "0 bytes"),
            (Footprint { virtual_size: 512, ..good }, "smaller disk"),
            (Footprint { virtual_size: u64::MAX, ..good }, "2^63"),
            (Footprint { unit: u64::MAX, ..good }, "2^63"),
            (Footprint { overhead: u64::MAX, ..good }, "2^63"),
        ] {
            assert!(check_footprint(&bad, 1000).is_err_and(|text| text.contains(words)), "{bad:?}");
        }
    }

    #[test]
    fn names_of_formats() {
        for good in ["qcow2", "raw", "my-format_2"] {
            assert!(is_format_name(good), "{good}");
        }
        for bad in ["", "2x", "Qcow2", "a b", "a\n", "é", "a/b", &"a".repeat(32)] {
            assert!(!is_format_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_message_is_cut_at_a_character() {
        assert_eq!(cut("é".repeat(100)), "é".repeat(100));
        assert_eq!(cut(format!("a{}", "é".repeat(2000))).len(), 1999 + "…".len());
    }
}
