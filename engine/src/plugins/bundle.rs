//! The layers of a Parallels disk, as `DiskDescriptor.xml` in its folder describes them: enough of it to say which files a person
//! should name. No file is opened because of what stands there.
//!
//! `StorageData` has an `Image` for each layer, with its GUID and its file; `Snapshots` has a `Shot` for each, with the GUID of
//! the one below, and `TopGUID`, or else the GUID of the newest layer is a fixed one. A disk that is split has a `Storage` for
//! each part. (So does dissect.hypervisor's `disk/hdd.py` read it; Parallels publishes no description.)

use super::ImageRead;
use crate::escape::shell_word;
use std::fmt;

/// Bytes of a description that are looked at, at most. Those of a disk with a hundred snapshots have 40 KiB.
const MOST: usize = 1 << 18;
/// Layers that are followed, at most.
const MOST_LAYERS: usize = 512;
/// The newest layer, where the description names none.
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
/// What the lowest layer has instead of a parent.
const NONE: &str = "{00000000-0000-0000-0000-000000000000}";

/// The layers of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bundle {
    /// The files of its layers, without their directories, the newest first: one at least.
    Layers(Vec<String>),
    /// Each layer consists of several images.
    Split,
    /// The description is not understood.
    Unknown,
}

impl Bundle {
    /// Read the description.
    #[must_use]
    pub fn read(description: &dyn ImageRead) -> Self {
        let mut bytes = vec![0; MOST];
        let length = description.read_at(0, &mut bytes).unwrap_or(0);
        bytes.truncate(length);
        std::str::from_utf8(&bytes).map_or(Self::Unknown, Self::parse)
    }

    fn parse(text: &str) -> Self {
        let Some(storages) = content(text, "StorageData") else { return Self::Unknown };
        if elements(storages, "Storage").count() > 1 {
            return Self::Split;
        }
        let images: Vec<(&str, &str)> = elements(storages, "Image")
            .filter_map(|image| Some((content(image, "GUID")?, content(image, "File")?)))
            .collect();
        let shots = content(text, "Snapshots").unwrap_or_default();
        let mut layer = content(shots, "TopGUID").unwrap_or(TOP);
        let mut files = Vec::new();
        while layer != NONE && files.len() < MOST_LAYERS {
            // A name with an entity, or one that names nothing, is left to the reader.
            let file = images.iter().find(|(guid, _)| *guid == layer).map(|(_, file)| *file);
            let name =
                file.and_then(|file| file.rsplit('/').next()).filter(|name| !name.is_empty() && !name.contains('&'));
            let Some(name) = name else { return Self::Unknown };
            files.push(name.to_owned());
            let shot = elements(shots, "Shot").find(|shot| content(shot, "GUID") == Some(layer));
            layer = shot.and_then(|shot| content(shot, "ParentGUID")).unwrap_or(NONE);
        }
        if files.is_empty() {
            Self::Unknown
        } else {
            Self::Layers(files)
        }
    }
}

/// The contents of the elements with this name. No element contains another one of its own name, and none has attributes.
fn elements<'t>(text: &'t str, name: &str) -> impl Iterator<Item = &'t str> {
    let (begin, end) = (format!("<{name}>"), format!("</{name}>"));
    let mut rest = text;
    std::iter::from_fn(move || {
        let (_, after) = rest.split_once(&begin)?;
        let (content, after) = after.split_once(&end)?;
        rest = after;
        Some(content.trim())
    })
}

/// The content of the first of them.
fn content<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    elements(text, name).next()
}

/// What to name instead of the folder or its description, as the end of a sentence.
impl fmt::Display for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |name: &String| shell_word(name.as_bytes());
        match self {
            Self::Layers(files) => match files.as_slice() {
                [top, parent, ..] => write!(
                    f,
                    "name the newest of its {} layers, {}, and commit that with -b {}, the layer below it",
                    files.len(),
                    named(top),
                    named(parent)
                ),
                [only] => write!(f, "name its image, {}", named(only)),
                [] => Ok(()),
            },
            Self::Split => f.write_str("it is split into several images, which only Parallels' own tools join"),
            Self::Unknown => f.write_str(
                "name the .hds file with the newest changes, and commit that with -b and the .hds file that is its parent",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "{11111111-0000-0000-0000-000000000000}";
    const B: &str = "{22222222-0000-0000-0000-000000000000}";

    fn image(guid: &str, file: &str) -> String {
        format!("<Image>\n<GUID>{guid}</GUID>\n<Type>Compressed</Type>\n<File>{file}</File>\n</Image>")
    }

    fn shot(guid: &str, parent: &str) -> String {
        format!("<Shot> <GUID>{guid}</GUID> <ParentGUID>{parent}</ParentGUID> </Shot>")
    }

    fn parse(images: &[String], snapshots: &str) -> Bundle {
        let images = images.concat();
        Bundle::parse(&format!(
            "<?xml version='1.0'?>\n<Parallels_disk_image Version=\"1.0\">\n<StorageData>\n<Storage>\n<Start>0</Start>{images}\
             </Storage>\n</StorageData>\n<Snapshots>{snapshots}</Snapshots>\n</Parallels_disk_image>\n"
        ))
    }

    #[test]
    fn layers_are_told_from_the_newest_down() {
        let layers = |names: &[&str]| Bundle::Layers(names.iter().map(|name| (*name).to_owned()).collect());
        let images = [image(A, "base.hds"), image(TOP, "/Users/x/d.hdd/top.hds"), image(B, "middle.hds")];
        let shots = [shot(A, NONE), shot(B, A), shot(TOP, B)].concat();
        assert_eq!(parse(&images, &shots), layers(&["top.hds", "middle.hds", "base.hds"]));
        let named = format!("<TopGUID>{B}</TopGUID>{shots}");
        assert_eq!(parse(&images, &named), layers(&["middle.hds", "base.hds"]));
        assert_eq!(parse(&images[1..2], ""), layers(&["top.hds"]));
    }

    #[test]
    fn a_description_that_leads_nowhere_is_not_understood() {
        let images = [image(TOP, "top.hds"), image(A, "a&amp;b.hds")];
        assert_eq!(parse(&images, &shot(TOP, B)), Bundle::Unknown, "a layer without an image");
        assert_eq!(parse(&images, &shot(TOP, A)), Bundle::Unknown, "an entity in a name");
        assert_eq!(parse(&[], ""), Bundle::Unknown);
        assert_eq!(Bundle::parse("<StorageData><Storage>"), Bundle::Unknown);
        let circle = parse(&images[..1], &shot(TOP, TOP));
        assert!(matches!(&circle, Bundle::Layers(files) if files.len() == MOST_LAYERS), "{circle}");
        let split = Bundle::parse("<StorageData><Storage>a</Storage>\n<Storage>b</Storage></StorageData>");
        assert_eq!(split, Bundle::Split);
    }

    #[test]
    fn what_to_name_is_told() {
        let told = |names: &[&str]| Bundle::Layers(names.iter().map(|name| (*name).to_owned()).collect()).to_string();
        assert_eq!(told(&["a.hds"]), "name its image, 'a.hds'");
        let chain = told(&["it's.hds", "b.hds", "c.hds"]);
        assert!(chain.contains(r"its 3 layers, 'it'\''s.hds'") && chain.contains("-b 'b.hds'"), "{chain}");
    }
}
