//! The children of an image: other images whose recorded backing it is.
//!
//! No image records its children, so the search covers the places where they usually lie: directories that the operator names
//! or uses, which may hold files of anybody. It opens only regular files, for reading, and skips and counts each file that
//! cannot be opened, read or understood. The cost of a file is bounded by the read budget of plugins and by the number of steps
//! of a walk.
//!
//! A name is walked as the kernel walks it, as everywhere, and the file at its end is compared by identity, without being
//! opened.

use super::access::Access;
use super::chain_image::ChainImage;
use super::names::file_name;
use super::open::{Looked, OpenedFile};
use super::roots::Roots;
use super::scan::{Scan, ScannedImage, Unseen};
use crate::cancel::Cancel;
use crate::error::Error;
use crate::lookup::{Directory, Identity, Step, Walk, Why};
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::ImageFacts;
use rustix::fs::Stat;
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::OsString;
use std::path::PathBuf;

/// Steps that the names of a file are walked, together. Honest names have a few components, and few links on the way.
const MOST_STEPS: usize = 512;

/// An image whose backing is one of the images whose children were looked for.
#[derive(Debug)]
pub struct Child {
    /// Its path, for people.
    pub path: PathBuf,
    /// What it is.
    pub identity: Identity,
    /// The identity of its backing.
    pub parent: Identity,
    /// The facts from its header.
    pub facts: ImageFacts,
    directory: Directory,
    name: OsString,
    stat: Stat,
}

impl Child {
    /// What its file was found to be.
    #[must_use]
    pub fn stat(&self) -> &Stat {
        &self.stat
    }

    /// Open it, if it still is the same file. Does not lock it.
    ///
    /// # Errors
    /// [`ErrorCode::ImageNotFound`] if it is gone; [`ErrorCode::PermissionDenied`], [`ErrorCode::ReadOnly`],
    /// [`ErrorCode::OpenFailed`].
    pub fn open(&self, access: Access) -> Result<OpenedFile, Error> {
        let Self { directory, name, stat, .. } = self;
        let looked = Looked { holder: directory, name, stat, follow: false, exclusive: None };
        looked.open(&self.path, directory, access, ErrorCode::ImageNotFound)
    }
}

/// The result of a search.
#[derive(Debug, Default)]
pub struct Children {
    /// The children, by their paths.
    pub children: Vec<Child>,
    /// Number of files that could not be examined, because they cannot be opened or read, or are not sound images.
    pub passed_over: usize,
    /// The directories that could not be listed.
    pub unlisted: Vec<PathBuf>,
}

/// A search for the children of images.
#[derive(Clone, Copy, Debug)]
pub struct ChildSearch<'s> {
    /// The plugins.
    pub registry: &'s Registry,
    /// The beginnings of names that do not begin at the image which records them.
    pub roots: &'s Roots,
    /// The images whose children are looked for.
    pub parents: &'s [&'s ChainImage<'s>],
    /// Known images. None of their files is a child.
    pub known: &'s [&'s ChainImage<'s>],
    /// The handle that ends the search.
    pub cancel: &'s Cancel,
}

impl ChildSearch<'_> {
    /// Look for children in these directories, but not in their subdirectories. A file with several names is found once. Links
    /// are not followed: their targets are found in their own directories.
    ///
    /// # Errors
    /// [`ErrorCode::Interrupted`].
    pub fn find<'d>(&self, directories: impl IntoIterator<Item = &'d Directory>) -> Result<Children, Error> {
        let mut found = Children::default();
        // Children with several names are found once, and the images that are known not at all: a loop device and the file
        // below it are one.
        let known = self.known.iter().flat_map(|image| image.all_files());
        let mut seen: HashSet<Identity> =
            known.flat_map(|file| std::iter::once(file.identity).chain(file.below)).collect();
        let mut listed: HashSet<Identity> = HashSet::new();
        let scan = Scan { registry: self.registry, cancel: self.cancel, only: None };
        for directory in directories {
            if !listed.insert(directory.identity()) {
                continue;
            }
            let mut children = Vec::new();
            let passed = scan.images_in(directory, &mut seen, |image| {
                let parent = self.parent(directory, &image.facts)?;
                if let Some(parent) = parent {
                    let ScannedImage { name, stat, identity, facts, .. } = image;
                    let (path, directory) = (directory.path().join(&name), directory.clone());
                    children.push(Child { path, identity, parent, facts, directory, name, stat });
                }
                Ok(parent.is_some())
            })?;
            found.children.append(&mut children);
            found.passed_over += passed.files;
            if !passed.listed {
                found.unlisted.push(directory.path().to_owned());
            }
        }
        found.children.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// Which of the parents an image in this directory has: by a name that it records, or because it could have no other.
    ///
    /// # Errors
    /// `Unseen` if a name that may lead to one of them cannot be followed.
    pub fn parent(&self, directory: &Directory, facts: &ImageFacts) -> Result<Option<Identity>, Unseen> {
        let Some(pointer) = facts.backing.as_ref().into_option() else { return Ok(None) };
        let (mut steps, mut followed) = (MOST_STEPS, Ok(()));
        // The first name that leads to a file is the one; an identity counts for images whose names lead nowhere.
        let reached = pointer.names().find_map(|name| match self.walk(directory, name, &mut steps) {
            Ok(reached) => reached,
            Err(unseen) => {
                followed = Err(unseen);
                None
            }
        });
        let parent = match reached {
            // A raw file that an image keeps its data in is read with it.
            Some(reached) => self.parents.iter().find(|parent| {
                parent.all_files().any(|opened| opened.identity == reached || opened.below == Some(reached))
            }),
            None => {
                let proves =
                    |parent: &&&ChainImage<'_>| facts.is_proven_child_of(&parent.facts, &parent.next_identity(facts));
                self.parents.iter().find(proves)
            }
        };
        match parent {
            Some(parent) => Ok(Some(parent.opened.identity)),
            // A name before the one that was followed may lead to one of them.
            None => followed.map(|()| None),
        }
    }

    /// The file that a name leads to which an image in this directory records.
    #[must_use]
    pub fn leads_to(&self, directory: &Directory, name: &[u8]) -> Option<Identity> {
        self.walk(directory, name, &mut { MOST_STEPS }).ok().flatten()
    }

    /// The file that a name leads to, if it takes no more than `steps` to get there. What is not there, or is no file, leads
    /// nowhere; of a name that may not be followed, or cannot be read on the disk, nobody knows where it leads.
    fn walk(&self, directory: &Directory, name: &[u8], steps: &mut usize) -> Result<Option<Identity>, Unseen> {
        let Ok(file) = file_name(name) else { return Ok(None) };
        let from = if file.from_working_directory { self.roots.working_directory() } else { Some(directory) };
        let Some(start) = from else { return Ok(None) };
        let mut walk = Walk::new(start, self.roots.top(), &file.path);
        while *steps > 0 {
            *steps -= 1;
            match walk.step() {
                Ok(Step::More) => {}
                Ok(Step::Reached(reached)) => return Ok(Some(Identity::of(&reached.stat))),
                Err(Why::Directory | Why::Magic) => return Ok(None),
                Err(Why::Errno(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG)) => return Ok(None),
                Err(Why::Errno(_)) => return Err(Unseen),
            }
        }
        Ok(None)
    }
}

/// Most names in a message.
const SHOWN: usize = 5;

/// For a message: how many other images these names are of, and the first of them.
#[must_use]
pub fn counted(names: &[String]) -> (String, String) {
    let count = match names.len() {
        1 => "1 other image".to_owned(),
        many => format!("{many} other images"),
    };
    let mut shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if let Some(more) = names.len().checked_sub(SHOWN).filter(|&more| more > 0) {
        shown += &format!(" and {more} more");
    }
    (count, shown)
}
