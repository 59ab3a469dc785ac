//! The notes about plugins and images that `-v` shows.

use super::session::Session;
use crate::escape::escape_path;
use crate::image::ChainImage;
use crate::plugins::{ImageFiles, Registry};

impl Session {
    /// The plugins, and what was passed over.
    pub(crate) fn note_plugins(&self, registry: &Registry) {
        for plugin in registry.plugins() {
            self.note(|| format!("plugin {} {} from {}", plugin.name(), plugin.version(), escape_path(plugin.path())));
        }
        for skipped in registry.skipped() {
            self.note(|| format!("plugin skipped: {}: {}", escape_path(&skipped.path), skipped.reason));
        }
    }

    /// An image, and what its plugin says of it. The plugin reads the image once more for that.
    pub(crate) fn note_image(&self, role: &str, image: &ChainImage<'_>) {
        if !self.observer().wants_notes() {
            return;
        }
        let (path, format, size) =
            (escape_path(&image.opened.path), image.facts.format.as_str(), image.facts.virtual_size);
        self.note(|| format!("{role} {path} ({format}, {size} bytes)"));
        let said = image.plugin.notes(ImageFiles::one(&image.opened.file), &image.facts);
        said.iter().for_each(|note| self.note(|| format!("{role} {path}: {note}")));
    }
}
