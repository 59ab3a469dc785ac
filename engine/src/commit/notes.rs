//! What `-v` says of a commit: which plugins were loaded, which images were found, how the process is confined.

use crate::escape::{escape_path, printable};
use crate::image::ChainImage;
use crate::plugins::{ImageFiles, Registry};

/// Done between the plan and the first change.
pub type Announcement = Box<dyn FnOnce()>;

/// Lines for `-v`. Where nobody wants them, none is made: plugins read the images once more for theirs.
#[derive(Debug, Default)]
pub struct Notes {
    lines: Option<Vec<String>>,
    warned: Option<fn(&str)>,
}

impl Notes {
    /// Notes that are kept if they are `wanted`.
    #[must_use]
    pub fn new(wanted: bool) -> Self {
        Self { lines: wanted.then(Vec::new), warned: None }
    }

    /// The same, with somebody who is told each warning before anything is changed.
    #[must_use]
    pub fn warning(self, warned: fn(&str)) -> Self {
        Self { warned: Some(warned), ..self }
    }

    /// What is to be done once nothing can refuse the commit any more: tell the warnings.
    pub(super) fn announcement(&self, warnings: &[String]) -> Announcement {
        let (warned, warnings) = (self.warned, warnings.to_vec());
        Box::new(move || warned.iter().for_each(|warned| warnings.iter().for_each(|warning| warned(warning))))
    }

    /// The text for the terminal, a line each.
    #[must_use]
    pub fn render(&self) -> String {
        let lines = self.lines.iter().flatten();
        lines.fold(String::new(), |text, line| text + "instar: " + &printable(line) + "\n")
    }

    pub(super) fn push(&mut self, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            lines.push(line());
        }
    }

    /// The plugins, and what was passed over.
    pub(super) fn plugins(&mut self, registry: &Registry) {
        for plugin in registry.plugins() {
            self.push(|| format!("plugin {} {} from {}", plugin.name(), plugin.version(), escape_path(plugin.path())));
        }
        for skipped in registry.skipped() {
            self.push(|| format!("plugin skipped: {}: {}", escape_path(&skipped.path), skipped.reason));
        }
    }

    /// An image, and what its plugin says of it.
    pub(super) fn image(&mut self, role: &str, image: &ChainImage<'_>) {
        let Some(lines) = &mut self.lines else { return };
        let (path, format, size) =
            (escape_path(&image.opened.path), image.facts.format.as_str(), image.facts.virtual_size);
        lines.push(format!("{role} {path} ({format}, {size} bytes)"));
        let said = image.plugin.notes(ImageFiles::one(&image.opened.file), &image.facts);
        lines.extend(said.iter().map(|note| format!("{role} {path}: {note}")));
    }
}
