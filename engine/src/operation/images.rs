//! Opening the images of an operation, and their parts in it.

use super::session::Session;
use crate::confine::Reach;
use crate::error::Error;
use crate::image::{check_parents, open_extra_files, Access, ChainImage, Descent, FilesOf, Gate, NamedFile};
use crate::lookup::{Directory, Identity};
use crate::plugins::Registry;
use instar_guest_abi::{ErrorCode, MemberRole, MAX_CHAIN_DEVICES};
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// A directory that the operator names, and the result of opening it.
#[derive(Debug)]
pub struct NamedDirectory {
    /// Its path as the operator gave it.
    pub path: PathBuf,
    /// The directory, open, or the kernel's answer.
    pub found: Result<Directory, Errno>,
}

impl NamedDirectory {
    /// Look at the directory that this path names.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), found: Directory::open(path) }
    }
}

/// The files that the operator names.
#[derive(Debug)]
pub struct Named {
    /// The image that the operation works on: recorded names may lead into its directory.
    pub image: NamedFile,
    /// Another image of its chain, into whose directory the names below it may lead as well.
    pub base: Option<NamedFile>,
    /// An image of another chain that is read together with the first. Names that it records may lead into its own directory.
    pub second: Option<NamedFile>,
    /// More images, each with its own chain, that are read together with the first.
    pub others: Vec<NamedFile>,
    /// Images above the first one, which record it as their backing.
    pub children: Vec<NamedFile>,
    /// Directories that are searched for such images.
    pub child_directories: Vec<NamedDirectory>,
}

impl Named {
    /// Name only the image that the operation works on.
    #[must_use]
    pub fn image(path: &Path) -> Self {
        let image = NamedFile::new(path);
        let (others, children, child_directories) = (Vec::new(), Vec::new(), Vec::new());
        Self { image, base: None, second: None, others, children, child_directories }
    }

    /// Name two images, each of which is read with the layers below it.
    #[must_use]
    pub fn two(first: &Path, second: &Path) -> Self {
        Self { second: Some(NamedFile::new(second)), ..Self::image(first) }
    }

    /// All files.
    pub fn files(&self) -> impl Iterator<Item = &NamedFile> {
        std::iter::once(&self.image).chain(&self.base).chain(&self.second).chain(&self.others).chain(&self.children)
    }

    /// The size in bytes from which on more processors help by more than it takes to start them.
    pub(super) const LARGE: u64 = 32 << 20;

    /// Whether one of these files takes that much space. Of an image in several files, the one that is named may say nothing of it.
    pub(super) fn is_large(&self) -> bool {
        self.files().any(|file| file.is_block_device() || file.allocated().is_some_and(|bytes| bytes >= Self::LARGE))
    }

    /// What can be opened of the children and in the directories in which they are looked for: their other files lie beside
    /// them.
    pub(super) fn reach_of_children<'n>(&'n self, reach: Reach<'n>, access: Access) -> Reach<'n> {
        let beside = self.children.iter().filter_map(NamedFile::directory);
        let reach = beside.fold(reach, |reach, directory| reach.add(directory, false));
        let child_directories = self.child_directories.iter().filter_map(|directory| directory.found.as_ref().ok());
        child_directories.fold(reach, |reach, directory| reach.add(directory, access == Access::ReadWrite))
    }
}

/// The context in which the images of an operation are opened.
#[derive(Debug)]
pub struct Opener<'r, 'o> {
    /// The plugins.
    pub registry: &'r Registry,
    /// Who is told what was found.
    pub session: &'o Session,
    /// The files that the operator names.
    pub named: &'o Named,
    /// The gate for names that the first image records.
    pub gate: &'o Gate,
    /// The gate for names that the images below it record.
    pub below: &'o Gate,
    /// The gate for names that the [second](Named::second) image and those below it record.
    pub beside_second: Option<&'o Gate>,
    /// The gates for names that each of the [other](Named::others) images and those below it record.
    pub beside_others: &'o [Gate],
    /// The way to open the images that will change.
    pub access: Access,
}

impl<'r> Opener<'r, '_> {
    /// Open the image that the operator names, for reading, in the `format` that the operator names or the detected one.
    ///
    /// # Errors
    /// What opening, locking and probing give.
    pub fn open_named(&self, format: Option<&str>) -> Result<ChainImage<'r>, Error> {
        self.open_file(&self.named.image, format, "-f")
    }

    /// `option` is the one with which the operator names the format.
    fn open_file(&self, file: &NamedFile, format: Option<&str>, option: &str) -> Result<ChainImage<'r>, Error> {
        let opened = file.open(self.access, ErrorCode::ImageNotFound)?.lock(self.access)?;
        opened.identify_as(self.registry, format, option)
    }

    /// Open the image that the operator names and everything below it, for reading, top-most first.
    ///
    /// # Errors
    /// What opening, locking and probing give; [`ErrorCode::ParentMismatch`], [`ErrorCode::ChainTooDeep`].
    pub fn open_chain(&self, format: Option<&str>) -> Result<Vec<ChainImage<'r>>, Error> {
        self.open_chain_onto(format, None)
    }

    /// Do the same; the file that the operator names as a backing file has the format `base`, if no image records another one.
    ///
    /// # Errors
    /// As [`Opener::open_chain`].
    pub fn open_chain_onto(&self, format: Option<&str>, base: Option<&str>) -> Result<Vec<ChainImage<'r>>, Error> {
        let believed = self.named.base.as_ref().and_then(NamedFile::identity).zip(base);
        self.chain_of(&self.named.image, self.gate, (format, "-f"), believed, MAX_CHAIN_DEVICES)
    }

    /// Do the same for the images that are read together with the first, whose chain takes `taken` layers of the limit.
    ///
    /// # Errors
    /// As [`Opener::open_chain`].
    pub fn open_others(&self, format: Option<&str>, mut taken: usize) -> Result<Vec<Vec<ChainImage<'r>>>, Error> {
        let each = self.named.others.iter().zip(self.beside_others).map(|(file, gate)| {
            let room = MAX_CHAIN_DEVICES.checked_sub(taken).filter(|room| *room > 0).ok_or_else(|| {
                let clause = format!("is one layer more than the {MAX_CHAIN_DEVICES} that are supported");
                Error::image(file.path(), ErrorCode::ChainTooDeep, clause)
            })?;
            let layers = self.chain_of(file, gate, (format, "-f"), None, room)?;
            taken += layers.len();
            Ok(layers)
        });
        each.collect()
    }

    /// Do the same for both images, which share the limit of layers.
    ///
    /// # Errors
    /// As [`Opener::open_chain`].
    pub fn open_two_chains(&self, formats: [Option<&str>; 2]) -> Result<[Vec<ChainImage<'r>>; 2], Error> {
        let first = self.chain_of(&self.named.image, self.gate, (formats[0], "-f"), None, MAX_CHAIN_DEVICES - 1)?;
        let room = MAX_CHAIN_DEVICES - first.len();
        let second = match (&self.named.second, self.beside_second) {
            (Some(second), Some(gate)) => self.chain_of(second, gate, (formats[1], "-F"), None, room)?,
            _ => Vec::new(),
        };
        Ok([first, second])
    }

    /// `format`: as named with `option`, if it is. `most`: how many layers there may be.
    fn chain_of(
        &self,
        file: &NamedFile,
        gate: &Gate,
        (format, option): (Option<&str>, &str),
        believed: Option<(Identity, &str)>,
        most: usize,
    ) -> Result<Vec<ChainImage<'r>>, Error> {
        let Self { registry, access, .. } = *self;
        let top = self.open_file(file, format, option)?;
        let mut descent = Descent::new(registry, gate, file.path(), most.saturating_sub(1), self.session.cancel())
            .believing(believed);
        let below = descent.open_below(&top, access)?;
        let mut layers: Vec<ChainImage<'r>> = std::iter::once(top).chain(below).collect();
        check_parents(&layers.iter().collect::<Vec<_>>())?;
        let mut files: Vec<FilesOf<'_, '_, '_>> =
            layers.iter_mut().map(|image| FilesOf { image, access, changes: false, gate }).collect();
        open_extra_files(registry, &mut files)?;
        Ok(layers)
    }
}

/// An image that is read, and its part in the operation.
#[derive(Debug)]
pub struct Slot<'r> {
    /// What it is to the operation.
    pub role: MemberRole,
    /// Which view of a disk it belongs to.
    pub group: u32,
    /// The image.
    pub image: ChainImage<'r>,
}

impl<'r> Slot<'r> {
    /// An image of the first view.
    #[must_use]
    pub fn new(role: MemberRole, image: ChainImage<'r>) -> Self {
        Self { role, group: 0, image }
    }
}

/// The images of an operation, open.
#[derive(Debug, Default)]
pub struct ImageSet<'r> {
    /// The images that are read, by group, top-most first. Those with [`MemberRole::Below`] are below the target; those with
    /// [`MemberRole::Relinked`] follow them.
    pub slots: Vec<Slot<'r>>,
    /// The image that is written.
    pub target: Option<ChainImage<'r>>,
    /// Whether the target gets another parent afterwards.
    pub rebases: bool,
    /// Slots that are seen in another group as well, below its own: that group, and the index of the slot.
    pub again: Vec<(u32, usize)>,
}

impl<'r> ImageSet<'r> {
    /// Images that are only read, the top-most first.
    #[must_use]
    pub fn read(images: impl IntoIterator<Item = ChainImage<'r>>) -> Self {
        Self::views([images])
    }

    /// Views of disks that are only read: the images of each, the top-most first.
    #[must_use]
    pub fn views(views: impl IntoIterator<Item = impl IntoIterator<Item = ChainImage<'r>>>) -> Self {
        let slots = (0..).zip(views).flat_map(|(group, images)| {
            images.into_iter().map(move |image| Slot { role: MemberRole::Read, group, image })
        });
        Self { slots: slots.collect(), ..Self::default() }
    }

    /// The images with a role that `wanted` holds of, the top-most first.
    pub fn of_role(&self, wanted: impl Fn(MemberRole) -> bool) -> impl Iterator<Item = &ChainImage<'r>> {
        self.slots.iter().filter(move |slot| wanted(slot.role)).map(|slot| &slot.image)
    }

    /// All images in the order of the chain; not the overlay's children.
    #[must_use]
    pub fn chain(&self) -> Vec<&ChainImage<'r>> {
        let above = self.of_role(|role| !matches!(role, MemberRole::Below | MemberRole::Relinked));
        above.chain(&self.target).chain(self.of_role(|role| role == MemberRole::Below)).collect()
    }
}

/// The limits of growth in bytes, for all files of an image together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// Those of the target.
    pub target: u64,
    /// Those of the image that is emptied, which a repair may have to lengthen first.
    pub emptied: u64,
    /// Whether nothing will be written, so that a target on a block device may plan beyond its end.
    pub beyond_devices: bool,
    /// What arrives in the target is compressed.
    pub compress: bool,
}
