//! A loaded plugin, behind safe calls whose answers are checked.

use super::budget::BudgetedReader;
use super::library::{Candidate, LoadedLibrary};
use super::trust::Distrust;
use super::{answers, ImageFiles, ImageRead, PluginFailure};
use crate::confine::trap::Calling;
use crate::nearest::nearest;
use instar_guest_abi::{ErrorCode, ERROR_OK};
use instar_plugin_api::v1::PluginManifest;
use instar_plugin_api::{
    BitmapFacts, Context, CreateSpec, CreatedImage, Footprint, GuestModule, ImageFacts, ImageFile, ImageReader,
    PluginError, Role, Verdict, IDENTITY_MAX, PROBE_CERTAIN,
};
use std::path::{Path, PathBuf};

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
    /// Why it cannot be used.
    pub(super) fn load(candidate: Candidate) -> Result<Self, Distrust> {
        let path = candidate.path.clone();
        let library = candidate.load()?;
        let manifest = library.interface.manifest().map_err(|error| answers::cut(error.message.into_string()))?;
        answers::check_manifest(&manifest)?;
        let module = library.interface.guest_module().map_err(|error| answers::cut(error.message.into_string()))?;
        answers::check_module(&module)?;
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

    /// What its guest half can do: [`ROLE_SOURCE`](instar_plugin_api::ROLE_SOURCE) and [`ROLE_SINK`](instar_plugin_api::ROLE_SINK).
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
        let files = self.with_reader(ImageFiles::one(image), |reader| self.library.interface.files(reader))?;
        answers::check_files(&files).map_err(|message| self.faulty(message))?;
        Ok(files)
    }

    /// What the header of an image says.
    ///
    /// # Errors
    /// When the image cannot be read or makes no sense, or the plugin is faulty.
    pub fn facts(&self, image: ImageFiles<'_>) -> Result<ImageFacts, PluginFailure> {
        let facts = self.with_reader(image, |reader| self.library.interface.facts(reader))?;
        let lengths = std::iter::once(&image.first).chain(image.others).map(|file| file.length());
        let length = lengths.fold(0, u64::saturating_add);
        answers::check_facts(&facts, self.name(), length).map_err(|message| self.faulty(message))?;
        Ok(facts)
    }

    /// What a person should know of an image whose facts these are, one line each. What kept the plugin from saying so is
    /// a line, too.
    #[must_use]
    pub fn notes(&self, image: ImageFiles<'_>, facts: &ImageFacts) -> Vec<String> {
        let notes = match self.with_reader(image, |reader| self.library.interface.notes(reader, facts)) {
            Ok(notes) => notes,
            Err(failure) => return vec![format!("no notes: {failure}")],
        };
        match answers::check_notes(&notes) {
            Ok(()) => notes,
            Err(message) => vec![format!("no notes: {}", self.faulty(message))],
        }
    }

    /// Whether the image with the facts `own` may take its part in an operation; a refusal is an answer, not an error. See
    /// [`FormatPlugin::verdict`](instar_plugin_api::FormatPlugin::verdict).
    #[must_use]
    pub fn verdict(&self, role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
        let _calling = Calling::plugin(self.name());
        let mut verdict = self.library.interface.verdict(role, own, context);
        if verdict.code != ERROR_OK && ErrorCode::from_u32(verdict.code).is_none() {
            verdict.code = ErrorCode::PluginRefused.number();
        }
        verdict.reason = answers::cut(verdict.reason.into_string()).into();
        verdict
    }

    /// The identity that the image with the facts `own` gets when something is written into it from an image with the facts
    /// `child`, or from those above that one; empty if it keeps its own. What a faulty plugin says counts as that: then the
    /// guest half, which comes to another answer, must not change what the child records.
    #[must_use]
    pub fn next_identity(&self, own: &ImageFacts, child: &ImageFacts) -> Vec<u8> {
        let _calling = Calling::plugin(self.name());
        let identity = self.library.interface.next_identity(own, child).unwrap_or_default();
        if identity.len() > IDENTITY_MAX {
            return Vec::new();
        }
        identity
    }

    /// A new, empty image.
    ///
    /// # Errors
    /// When the plugin cannot create what is asked for, or is faulty.
    pub fn create(&self, spec: &CreateSpec) -> Result<CreatedImage, PluginFailure> {
        let _calling = Calling::plugin(self.name());
        let image = self.library.interface.create(spec).map_err(|error| self.refused_spec(error, spec))?;
        answers::check_created(&image).map_err(|message| self.faulty(message))?;
        Ok(image)
    }

    /// How much room an image would take that [`create`](Self::create) makes for the same `spec`, with these bitmaps.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn measure(&self, spec: &CreateSpec, bitmaps: &[BitmapFacts]) -> Result<Footprint, PluginFailure> {
        let _calling = Calling::plugin(self.name());
        let footprint =
            self.library.interface.measure(spec, bitmaps).map_err(|error| self.refused_spec(error, spec))?;
        answers::check_footprint(&footprint, spec.virtual_size).map_err(|message| self.faulty(message))?;
        Ok(footprint)
    }

    fn with_reader<T>(
        &self,
        image: ImageFiles<'_>,
        call: impl FnOnce(&ImageReader<'_>) -> Result<T, PluginError>,
    ) -> Result<T, PluginFailure> {
        let source = BudgetedReader::new(image);
        let others: Vec<u64> = image.others.iter().map(|file| file.length()).collect();
        let _calling = Calling::plugin(self.name());
        let result = call(&ImageReader::with_files(image.first.length(), &others, &source));
        match (result, source.into_failure()) {
            // A plugin that goes on after a failed read has not seen the image: its answer does not count.
            (_, Some((offset, source))) => Err(PluginFailure::Io { offset, source }),
            (Ok(value), None) => Ok(value),
            (Err(error), None) => Err(self.refused(error)),
        }
    }

    fn refused(&self, error: PluginError) -> PluginFailure {
        let message = answers::cut(error.message.into_string());
        match ErrorCode::from_u32(error.code) {
            Some(ErrorCode::PluginUnavailable) => self.faulty(message),
            None => self.faulty(format!("it failed with the unknown code {}", error.code)),
            Some(code) => PluginFailure::Refused { code, message },
        }
    }

    /// The same for a new image: name the option, or the value of one, that was probably meant.
    fn refused_spec(&self, error: PluginError, spec: &CreateSpec) -> PluginFailure {
        match self.refused(error) {
            PluginFailure::Refused { code, message } => {
                let wanted = spec.options.iter().map(|option| (option.0.as_str(), option.1.as_str()));
                let message = match self.meant(wanted, &message) {
                    Some(near) => format!("{message}; the nearest one is {near}"),
                    None => message,
                };
                PluginFailure::Refused { code, message }
            }
            failure => failure,
        }
    }

    /// The name or value that is nearest to the one that a refusal complains about. Values are words that both the help of
    /// their option and the refusal list.
    fn meant<'a>(&'a self, wanted: impl Iterator<Item = (&'a str, &'a str)>, refusal: &str) -> Option<&'a str> {
        let words = |text: &'a str| text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| word.len() > 1);
        for (name, value) in wanted.filter(|(name, _)| refusal.contains(*name)) {
            let Some((_, help)) = self.create_options().find(|(known, _)| *known == name) else {
                return nearest(name, self.create_options().map(|(known, _)| known));
            };
            if !refusal.contains(value) || words(help).any(|word| word == value) {
                continue;
            }
            let listed = words(help).filter(|word| refusal.contains(*word));
            if let Some(near) = nearest(value, listed) {
                return Some(near);
            }
        }
        None
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
