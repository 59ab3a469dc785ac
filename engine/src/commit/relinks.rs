//! The children of the overlay, which a commit relinks to the target.
//!
//! After a commit the target holds what a child reads through the overlay, whether the overlay was emptied or keeps its
//! content, and however many layers were merged. So a child reads the same through either, and does not need the
//! overlay any more. A child for which this would be untrue is refused here, before anything changes.

use super::as_text::{bytes_as_text, path_as_text};
use super::verdict::Parts;
use crate::error::{Error, Role};
use crate::escape::{escape_bytes, escape_path};
use crate::image::{file_name, parent_mismatch, ChainImage, ChildSearch, NamedFile};
use crate::lookup::Identity;
use crate::operation::{Named, NamedDirectory, Opener};
use instar_guest_abi::{ErrorCode, ERROR_OK, MAX_CHAIN_DEVICES};
use instar_guest_protocol::commit::Relinked as Wanted;
use instar_plugin_api::{Context, ImageFacts, Role as PluginRole, ROLE_SOURCE};
use serde::Serialize;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// A child of the overlay, and the name of the target that it records afterwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Relinked {
    /// Absolute path of the child.
    #[serde(serialize_with = "path_as_text")]
    pub image: PathBuf,
    /// The target's name, as the child records it.
    #[serde(serialize_with = "bytes_as_text")]
    pub backing: Vec<u8>,
    /// Whether it named the target before, because an interrupted run had relinked it.
    pub already: bool,
}

/// The children, open.
#[derive(Debug, Default)]
pub struct Relinks<'r> {
    /// The children to change.
    pub images: Vec<ChainImage<'r>>,
    /// These and the children that name the target already, in the order in which they were named and found.
    pub all: Vec<Relinked>,
    /// Lines about files that could not be looked at.
    pub warnings: Vec<String>,
}

/// The means to examine a child.
struct Family<'f, 'r> {
    search: ChildSearch<'f>,
    overlay: &'f ChainImage<'r>,
    target: &'f ChainImage<'r>,
    /// Absolute paths of the target.
    paths: Vec<PathBuf>,
}

impl<'r> Relinks<'r> {
    /// Open the children that the operator names, and those that are found in the directories that he names. `chain` is the
    /// overlay and everything below it, of which the image with the index `target` is committed into.
    ///
    /// # Errors
    /// Errors of opening, locking and probing; [`ErrorCode::NotInChain`] for an image that is no child of the overlay,
    /// [`ErrorCode::ChainLoop`] for one that is in the chain or is named twice, [`ErrorCode::ParentMismatch`].
    pub fn open(opener: &Opener<'r, '_>, chain: &[&ChainImage<'r>], target: usize) -> Result<Self, Error> {
        let mut relinks = Self::default();
        let Named { children, child_directories, base, .. } = opener.named;
        let (Some(&overlay), Some(&target)) = (chain.first(), chain.get(target)) else { return Ok(relinks) };
        if children.is_empty() && child_directories.is_empty() {
            return Ok(relinks);
        }
        let search = ChildSearch {
            registry: opener.registry,
            roots: opener.gate.roots(),
            parents: chain,
            known: chain,
            cancel: opener.session.cancel(),
        };
        // Where -b names the target by another name than the chain does, only one of the two paths may lead to it.
        let given = base.as_ref().and_then(|base| Some(base.directory()?.clone().really().path().join(base.name())));
        let paths = std::iter::once(target.opened.settled_path()).chain(given).collect();
        let family = Family { search, overlay, target, paths };
        let mut seen: Vec<Identity> = Vec::new();
        for file in children {
            let opened = file.open(opener.access, ErrorCode::ImageNotFound)?;
            let own = chain.iter().find(|image| image.all_files().any(|own| own.identity == opened.identity));
            if let Some(own) = own {
                let which = if std::ptr::eq(*own, overlay) { "the overlay itself" } else { "below the overlay" };
                let clause = format!("is {which}, and no child of it: leave it out of --relink");
                return Err(Error::image(file.path(), ErrorCode::ChainLoop, clause));
            }
            if seen.contains(&opened.identity) {
                let clause = "is named twice with --relink: name each image once";
                return Err(Error::image(file.path(), ErrorCode::ChainLoop, clause));
            }
            seen.push(opened.identity);
            let image = opened.lock(opener.access)?.identify_overlay(opener.registry, None)?;
            relinks.take(&family, image, is_link(file))?;
        }
        for directory in child_directories {
            relinks.search(opener, &family, directory, &mut seen)?;
        }
        let most = MAX_CHAIN_DEVICES.saturating_sub(chain.len());
        if relinks.images.len() > most {
            let clause = format!(
                "has {} children that are to be relinked, and no more than {most} can be at a time: name some of them with \
                 --relink, and the others in a second run",
                relinks.images.len()
            );
            return Err(Error::image(&overlay.opened.path, ErrorCode::ChainTooDeep, clause));
        }
        Ok(relinks)
    }

    /// Take the children in a directory, except for those that were `seen`.
    fn search(
        &mut self,
        opener: &Opener<'r, '_>,
        family: &Family<'_, 'r>,
        directory: &NamedDirectory,
        seen: &mut Vec<Identity>,
    ) -> Result<(), Error> {
        let NamedDirectory { path, found } = directory;
        let directory = found.as_ref().map_err(|errno| {
            let clause = format!("cannot be searched for children: {}", std::io::Error::from(*errno));
            Error::image(path, ErrorCode::OpenFailed, clause)
        })?;
        // Only the overlay's own: what names an image below it is none.
        let overlay = [family.overlay];
        let found = ChildSearch { parents: &overlay, ..family.search }.find([directory])?;
        if !found.unlisted.is_empty() {
            let clause = "cannot be searched for children: you may not list it";
            return Err(Error::image(path, ErrorCode::PermissionDenied, clause));
        }
        if found.passed_over > 0 {
            self.warnings.push(format!(
                "'{}': {} of its files could not be looked at, and may be further children of '{}'",
                escape_path(path),
                found.passed_over,
                escape_path(&family.overlay.opened.path)
            ));
        }
        for child in found.children {
            if seen.contains(&child.identity) {
                continue;
            }
            seen.push(child.identity);
            let opened = child.open(opener.access)?.lock(opener.access)?;
            self.take(family, opened.identify_overlay(opener.registry, None)?, false)?;
        }
        Ok(())
    }

    /// Take an image that is a child of the overlay, or names the target already. `is_link`: the operator named it by a link.
    fn take(&mut self, family: &Family<'_, 'r>, image: ChainImage<'r>, is_link: bool) -> Result<(), Error> {
        let parent = family.search.parent(&image.opened.directory, &image.facts);
        let (parent, already) = match parent {
            Ok(Some(parent)) if parent == family.overlay.opened.identity => (family.overlay, false),
            Ok(Some(parent)) if parent == family.target.opened.identity => (family.target, true),
            _ => return Err(family.stranger(&image)),
        };
        if let Some(clause) = parent_mismatch(&image.facts, &parent.opened.path, parent.plugin, &parent.facts) {
            return Err(Error::image(&image.opened.path, ErrorCode::ParentMismatch, clause));
        }
        let path = image.opened.settled_path();
        if already {
            self.all.push(Relinked { image: path, backing: recorded(&image.facts).to_vec(), already });
            return Ok(());
        }
        let backing = family.name_for(&image, is_link)?;
        self.all.push(Relinked { image: path, backing, already });
        self.images.push(image);
        Ok(())
    }

    /// The children as the guest gets them.
    #[must_use]
    pub fn wanted(all: &[Relinked], target: &ChainImage<'_>) -> Option<Wanted> {
        let mut wanted = Wanted {
            format: target.facts.format.to_string(),
            identity: target.facts.identity.to_vec(),
            ..Wanted::default()
        };
        for child in all.iter().filter(|child| !child.already) {
            let known = wanted.names.iter().position(|name| *name == child.backing);
            let index = known.unwrap_or_else(|| {
                wanted.names.push(child.backing.clone());
                wanted.names.len() - 1
            });
            wanted.chosen.push(u32::try_from(index).unwrap_or(u32::MAX));
        }
        (!wanted.chosen.is_empty()).then_some(wanted)
    }
}

impl<'r> Family<'_, 'r> {
    /// Compute the target's name for a child: relative to the child's directory if its old name is, else absolute. The
    /// name is walked as every program will walk it, and has to lead to the target.
    fn name_for(&self, child: &ChainImage<'r>, is_link: bool) -> Result<Vec<u8>, Error> {
        let old = file_name(recorded(&child.facts));
        // A relative name would begin beside the link for one program, and beside the file for another.
        let was_relative = old.is_ok_and(|old| !old.from_working_directory && !old.path.starts_with(b"/"));
        // A path of another machine leads nowhere here, and the image was found beside this one.
        let leads_nowhere = self.search.leads_to(&child.opened.directory, recorded(&child.facts)).is_none();
        let relative = !is_link && (was_relative || leads_nowhere);
        let from = child.opened.directory.clone().really();
        let names = self.paths.iter().filter(|_| relative).map(|path| relative_name(from.path(), path));
        let absolute = self.paths.iter().map(|path| path.as_os_str().as_bytes().to_vec());
        let target = Some(self.target.opened.identity);
        let leads = |name: &Vec<u8>| self.search.leads_to(&child.opened.directory, name) == target;
        names.chain(absolute).find(leads).ok_or_else(|| {
            let clause = format!(
                "cannot name '{}': no path that was tried leads there from its directory",
                escape_path(&self.target.opened.path)
            );
            Error::image(&child.opened.path, ErrorCode::BackingNotFound, clause)
        })
    }

    /// The error for an image that is no child of the overlay.
    fn stranger(&self, image: &ChainImage<'_>) -> Error {
        let overlay = escape_path(&self.overlay.opened.path);
        let clause = match recorded(&image.facts) {
            [] => format!("records no backing file, and is no child of '{overlay}': leave it out of --relink"),
            name => format!(
                "is backed by '{}', and not by '{overlay}' itself: leave it out of --relink",
                escape_bytes(name)
            ),
        };
        Error::image(&image.opened.path, ErrorCode::NotInChain, clause)
    }
}

/// Whether the operator's name of a file is a link.
fn is_link(file: &NamedFile) -> bool {
    let entry = file.directory().and_then(|directory| directory.look(file.name()).ok());
    entry.is_some_and(|(_, stat)| Some(Identity::of(&stat)) != file.identity())
}

/// The name that an image records of its backing; empty if it records none.
fn recorded(facts: &ImageFacts) -> &[u8] {
    facts.backing.as_ref().into_option().map_or(&[], |pointer| pointer.name.as_slice())
}

/// Compute the relative path from a directory to a file; both are absolute, and have no links in their directories. It
/// has no colon before its first slash, where QEMU would read a protocol.
fn relative_name(from: &Path, to: &Path) -> Vec<u8> {
    let mut from: Vec<Component<'_>> = from.components().collect();
    let mut to: Vec<Component<'_>> = to.components().collect();
    let shared = from.iter().zip(&to).take_while(|(one, other)| one == other).count();
    let (up, down) = (from.split_off(shared).len(), to.split_off(shared));
    let parts = std::iter::repeat_n(OsStr::new(".."), up).chain(down.iter().map(|part| part.as_os_str()));
    let parts: Vec<&[u8]> = parts.map(OsStr::as_bytes).collect();
    let here: &[u8] = if parts.first().is_some_and(|first| first.contains(&b':')) { b"./" } else { b"" };
    [here, &parts.join(&b'/')].concat()
}

/// Refuse children without asking a guest. The backing grows to `grows_to` bytes, if at all.
///
/// # Errors
/// [`ErrorCode::UnsupportedFormat`] for a child that would read other data above the target, or would not match it
/// after a second run; the plugins' refusals.
pub fn admit<'s, 'r: 's>(
    children: impl Iterator<Item = &'s ChainImage<'r>>,
    parts: &Parts<'_, '_>,
    grows_to: Option<u64>,
    warnings: &mut Vec<String>,
) -> Result<(), Error> {
    let Parts { overlay, backing, .. } = parts;
    let virtual_size = grows_to.unwrap_or(backing.facts.virtual_size);
    let below = ImageFacts { virtual_size, ..backing.facts.clone() };
    for child in children {
        let path = &child.opened.path;
        let refused = |code, clause: &str| Err(Error::image(path, code, clause).in_role(Role::Child));
        if child.plugin.roles() & ROLE_SOURCE == 0 {
            let clause = format!("an image cannot be relinked with this version of the {} plugin", child.plugin.name());
            return refused(ErrorCode::UnsupportedFormat, &clause);
        }
        let verdict = child.plugin.verdict(PluginRole::Read, &child.facts, &Context::reading(Some(&below), false));
        if verdict.code != ERROR_OK {
            let code = ErrorCode::from_u32(verdict.code).unwrap_or(ErrorCode::PluginRefused);
            return refused(code, &verdict.reason);
        }
        if !verdict.reason.is_empty() {
            warnings.push(format!("'{}': {}", escape_path(path), verdict.reason));
        }
        // Past the overlay's end, a child (or a snapshot in it) reads zeroes; above the target, it would read the
        // target's data.
        let shorter = overlay.facts.virtual_size;
        let snapshots = child.facts.snapshots.iter().map(|snapshot| snapshot.virtual_size);
        let longest = snapshots.fold(child.facts.virtual_size, u64::max);
        if longest > shorter && virtual_size > shorter {
            let clause = format!(
                "reads zeroes past the {shorter} bytes of the overlay, where '{}' has data: leave it out of --relink, and rebase \
                 it afterwards in the way that copies what differs",
                escape_path(&backing.opened.path)
            );
            return refused(ErrorCode::UnsupportedFormat, &clause);
        }
        if !parts.empties && child.facts.follows(&backing.next_identity(&child.facts)) {
            let clause = format!(
                "records the identity of its parent, and that of '{}' changes each time that this commit is run, because the \
                 overlay keeps its content: relink without -d and -b, one layer after the other",
                escape_path(&backing.opened.path)
            );
            return refused(ErrorCode::UnsupportedFormat, &clause);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_from_a_directory_to_a_file() {
        let way =
            |from: &str, to: &str| String::from_utf8(relative_name(Path::new(from), Path::new(to))).unwrap_or_default();
        assert_eq!(way("/a/b", "/a/b/base"), "base");
        assert_eq!(way("/a/b", "/a/base"), "../base");
        assert_eq!(way("/a/b", "/c/d/base"), "../../c/d/base");
        assert_eq!(way("/", "/base"), "base");
        assert_eq!(way("/a", "/a/b:c"), "./b:c");
        assert_eq!(way("/a", "/a/b/c:d"), "b/c:d");
        assert_eq!(way("/a", "/a/b:c/d"), "./b:c/d");
    }
}
