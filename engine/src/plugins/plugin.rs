//! A loaded plugin, behind safe calls whose answers are checked.

use super::budget::BudgetedReader;
use super::library::{Candidate, LoadedLibrary};
use super::{ImageFiles, ImageRead, PluginFailure};
use instar_guest_abi::{ErrorCode, MAX_FILE_DEVICES, MODULE_ABI_MAJOR, MODULE_ABI_MINOR};
use instar_plugin_api::v1::PluginManifest;
use instar_plugin_api::{
    CommitRole, CreateSpec, CreatedImage, GuestModule, ImageFacts, ImageFile, ImageReader, PluginError, Verdict,
    PROBE_CERTAIN, ROLE_SINK, ROLE_SOURCE,
};
use std::path::{Path, PathBuf};

/// Longest name of a format in bytes: it has to fit into the guest's module table.
const NAME_MAX: usize = 31;
/// Longest description or version in bytes.
const TEXT_MAX: usize = 200;
/// Longest metadata of a new image in bytes, over all regions.
const CREATED_MAX: u64 = 1 << 30;

/// A loaded plugin. It stays loaded for the life of the process.
pub struct Plugin {
    path: PathBuf,
    library: LoadedLibrary,
    manifest: PluginManifest,
    module: GuestModule,
}

impl Plugin {
    /// Load a library that passed the checks of files, and check what it says about itself.
    ///
    /// # Errors
    /// One clause that says why it cannot be used.
    pub(super) fn load(candidate: Candidate) -> Result<Self, String> {
        let path = candidate.path.clone();
        let library = candidate.load()?;
        let manifest = library.interface.manifest().map_err(|error| error.message.into_string())?;
        check_manifest(&manifest)?;
        let module = library.interface.guest_module().map_err(|error| error.message.into_string())?;
        check_module(&module)?;
        Ok(Self { path, library, manifest, module })
    }

    /// Name of the format.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// Other names of the format.
    pub fn aliases(&self) -> impl Iterator<Item = &str> {
        self.manifest.aliases.iter().map(|alias| alias.as_str())
    }

    /// Usual file name extensions, without the dot.
    pub fn extensions(&self) -> impl Iterator<Item = &str> {
        self.manifest.extensions.iter().map(|extension| extension.as_str())
    }

    /// Options of [`create`](Self::create), as name and help.
    pub fn create_options(&self) -> impl Iterator<Item = (&str, &str)> {
        self.manifest.create_options.iter().map(|option| (option.0.as_str(), option.1.as_str()))
    }

    /// Whether it creates images.
    #[must_use]
    pub fn can_create(&self) -> bool {
        self.manifest.can_create
    }

    /// One line for people.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.manifest.description
    }

    /// Version of the plugin itself.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.manifest.version
    }

    /// Version of the plugin API that it was built with.
    #[must_use]
    pub fn api_version(&self) -> &str {
        &self.library.api_version
    }

    /// Where the library is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its guest half can do: [`ROLE_SOURCE`] and [`ROLE_SINK`].
    #[must_use]
    pub fn roles(&self) -> u32 {
        self.module.roles
    }

    /// The guest half.
    #[must_use]
    pub fn guest_module(&self) -> GuestModule {
        self.module
    }

    /// How sure the plugin is that an image is of its format, 0 to 100.
    ///
    /// # Errors
    /// When the image cannot be read, or the plugin is faulty.
    pub fn probe(&self, image: &dyn ImageRead) -> Result<u32, PluginFailure> {
        let score = self.with_reader(ImageFiles::one(image), |reader| self.library.interface.probe(reader))?;
        if score > PROBE_CERTAIN {
            return Err(self.faulty(format!("its probe scored {score} of {PROBE_CERTAIN}")));
        }
        Ok(score)
    }

    /// The files that an image has besides the one that it is named by.
    ///
    /// # Errors
    /// As [`facts`](Self::facts).
    pub fn files(&self, image: &dyn ImageRead) -> Result<Vec<ImageFile>, PluginFailure> {
        self.with_reader(ImageFiles::one(image), |reader| self.library.interface.files(reader))
    }

    /// What the header of an image says.
    ///
    /// # Errors
    /// When the image cannot be read or makes no sense, or the plugin is faulty.
    pub fn facts(&self, image: ImageFiles<'_>) -> Result<ImageFacts, PluginFailure> {
        let facts = self.with_reader(image, |reader| self.library.interface.facts(reader))?;
        if facts.format.as_str() != self.name() {
            return Err(self.faulty(format!("it reports the format {:?}", facts.format.as_str())));
        }
        let lengths = std::iter::once(&image.first).chain(image.others).map(|file| file.length());
        if facts.file_length != lengths.fold(0, u64::saturating_add) {
            return Err(self.faulty("it reports another file length than the file has".to_owned()));
        }
        if facts.virtual_size > i64::MAX as u64 {
            return Err(self.faulty("it reports a virtual size beyond 2^63 bytes".to_owned()));
        }
        for feature in &facts.features {
            if serde_json::from_str::<serde_json::Value>(&feature.json).is_err() {
                return Err(self.faulty(format!("the value of its feature {:?} is not JSON", feature.name.as_str())));
            }
        }
        Ok(facts)
    }

    /// Whether the image with the facts `own` may take its part in a commit with `other`; a refusal is an answer, not an
    /// error. What `other` is: see [`FormatPlugin::verdict`](instar_plugin_api::FormatPlugin::verdict).
    #[must_use]
    pub fn verdict(&self, role: CommitRole, own: &ImageFacts, other: &ImageFacts) -> Verdict {
        let mut verdict = self.library.interface.verdict(role, own, other);
        if ErrorCode::from_u32(verdict.code).is_none() {
            verdict.code = ErrorCode::PluginRefused.number();
        }
        verdict
    }

    /// A new, empty image.
    ///
    /// # Errors
    /// When the plugin cannot create what is asked for, or is faulty.
    pub fn create(&self, spec: &CreateSpec) -> Result<CreatedImage, PluginFailure> {
        let image = self.library.interface.create(spec).map_err(|error| self.refused(error))?;
        let mut total = 0u64;
        let others = image.files.iter().map(|file| (file.length, &file.regions));
        for (file_length, regions) in std::iter::once((image.length, &image.regions)).chain(others) {
            for region in regions {
                let length = region.bytes.len() as u64;
                total = total.saturating_add(length);
                if region.offset.checked_add(length).is_none_or(|end| end > file_length) {
                    return Err(self.faulty("it puts metadata of a new image past the end of the file".to_owned()));
                }
            }
            if total > CREATED_MAX || file_length > i64::MAX as u64 {
                return Err(self.faulty("it makes a new image too large to be written".to_owned()));
            }
        }
        if image.files.len() > MAX_FILE_DEVICES {
            return Err(self.faulty(format!("it makes a new image of more than {MAX_FILE_DEVICES} files")));
        }
        // Beside the image, and nowhere else.
        let plain = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && !name.iter().any(|&b| b == b'/' || b == 0);
        if !image.files.iter().all(|file| plain(&file.name)) {
            return Err(self.faulty("it names a file of a new image by what is no plain file name".to_owned()));
        }
        Ok(image)
    }

    fn with_reader<T>(
        &self,
        image: ImageFiles<'_>,
        call: impl FnOnce(&ImageReader<'_>) -> Result<T, PluginError>,
    ) -> Result<T, PluginFailure> {
        let source = BudgetedReader::new(image);
        let others: Vec<u64> = image.others.iter().map(|file| file.length()).collect();
        let result = call(&ImageReader::with_files(image.first.length(), &others, &source));
        match (result, source.into_failure()) {
            // A plugin that goes on after a failed read has not seen the image: its answer does not count.
            (_, Some((offset, source))) => Err(PluginFailure::Io { offset, source }),
            (Ok(value), None) => Ok(value),
            (Err(error), None) => Err(self.refused(error)),
        }
    }

    fn refused(&self, error: PluginError) -> PluginFailure {
        let message = error.message.into_string();
        match ErrorCode::from_u32(error.code) {
            Some(ErrorCode::PluginUnavailable) => self.faulty(message),
            None | Some(ErrorCode::Ok) => self.faulty(format!("it failed with the unknown code {}", error.code)),
            Some(code) => PluginFailure::Refused { code, message },
        }
    }

    fn faulty(&self, message: String) -> PluginFailure {
        PluginFailure::Faulty { plugin: self.name().to_owned(), message }
    }
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin").field("name", &self.name()).field("path", &self.path).finish_non_exhaustive()
    }
}

/// Whether `name` may be the name of a format.
pub(super) fn is_format_name(name: &str) -> bool {
    name.len() <= NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
}

fn check_manifest(manifest: &PluginManifest) -> Result<(), String> {
    // `core` and `commit` are modules of the guest itself.
    for name in std::iter::once(&manifest.name).chain(&manifest.aliases) {
        if !is_format_name(name) || name == "core" || name == "commit" {
            return Err(format!("{:?} cannot be the name of a format", name.as_str()));
        }
    }
    let texts = [("description", &manifest.description), ("version", &manifest.version)];
    for (what, text) in texts {
        if text.len() > TEXT_MAX || text.chars().any(char::is_control) {
            return Err(format!("its {what} is not one short line"));
        }
    }
    Ok(())
}

fn check_module(module: &GuestModule) -> Result<(), String> {
    if !module.elf.starts_with(b"\x7fELF") {
        return Err("its guest module is not an ELF file".to_owned());
    }
    if module.roles == 0 || module.roles & !(ROLE_SOURCE | ROLE_SINK) != 0 {
        return Err(format!("its guest module has the unknown roles {:#x}", module.roles));
    }
    if module.abi_major != MODULE_ABI_MAJOR || module.abi_minor > MODULE_ABI_MINOR {
        return Err(format!(
            "its guest module was built for module interface {}.{}, this instar has {MODULE_ABI_MAJOR}.{MODULE_ABI_MINOR}",
            module.abi_major, module.abi_minor
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::is_format_name;

    #[test]
    fn names_of_formats() {
        for good in ["qcow2", "raw", "my-format_2"] {
            assert!(is_format_name(good), "{good}");
        }
        for bad in ["", "2x", "Qcow2", "a b", "a\n", "é", "a/b", &"a".repeat(32)] {
            assert!(!is_format_name(bad), "{bad}");
        }
    }
}
