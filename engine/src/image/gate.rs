//! The gate that decides which files an image may make this program open.
//!
//! A recorded name is [walked](crate::lookup) as the kernel walks it, from the directory of the image. The walk may pass
//! anywhere, but the gate opens only a file whose own directory is a [root](Roots) or lies below one; it compares directories
//! by identity and not by text. A file that `-b` names is compared in the same way, and passes wherever it lies. For any other
//! file, the answer does not reveal whether it exists.

use super::access::Access;
use super::advice::{RecordedRole, Recorder};
use super::names::file_name;
use super::roots::Roots;
use crate::error::Error;
use crate::escape::escape_bytes;
use crate::lookup::{walk, Directory, Identity, Left, Lost, Place, Reached, Step, Walk, Why};
use instar_guest_abi::ErrorCode;
use rustix::fs::FileType;
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The file at the end of a recorded name, if it may be opened.
#[derive(Debug)]
pub struct Located {
    pub(super) reached: Reached,
    /// The absolute path by which the name reads, for people.
    pub(super) path: PathBuf,
    /// The operator named it, too.
    pub(super) by_operator: bool,
    /// The format, if the name says that, too.
    pub(super) format: Option<String>,
    /// The name that led to it, as it is recorded.
    pub(super) name: Vec<u8>,
}

impl Located {
    /// Return its identity.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity::of(&self.reached.stat)
    }

    /// Whether the operator named it as well.
    #[must_use]
    pub fn is_named_by_operator(&self) -> bool {
        self.by_operator
    }

    /// The name that led to it, as it is recorded.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// Its format, if the name says that, too.
    #[must_use]
    pub fn format(&self) -> Option<&str> {
        self.format.as_deref()
    }

    /// Return the directory at which names that it records begin.
    #[must_use]
    pub fn beside(&self) -> &Directory {
        &self.reached.beside
    }
}

/// Where names may lead.
#[derive(Clone, Debug)]
pub struct Gate {
    roots: Roots,
    /// Names may lead anywhere: to look at files as any other program does, and not to change them.
    everywhere: bool,
}

/// Where a file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lies {
    Within,
    /// Below a root, behind or as a component that begins with a dot.
    Hidden,
    Outside,
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_bytes().first() == Some(&b'.')
}

impl Gate {
    /// Make a gate that admits files in these directories.
    #[must_use]
    pub fn within(roots: Roots) -> Self {
        Self { roots, everywhere: false }
    }

    /// Make a gate that admits files in the directory of an image.
    ///
    /// # Errors
    /// [`ErrorCode::OpenFailed`] without a root directory.
    pub fn beside(directory: &Directory) -> Result<Self, Error> {
        Ok(Self::within(Roots::at(directory)?))
    }

    /// Make a gate that admits every file, for a command that only shows facts about images.
    ///
    /// # Errors
    /// [`ErrorCode::OpenFailed`] without a root directory.
    pub fn everywhere() -> Result<Self, Error> {
        Ok(Self { roots: Roots::none()?, everywhere: true })
    }

    /// Return its directories.
    #[must_use]
    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    /// Find the file that `recorder` records under the first of `names` that leads to one; `wanted` is a file that the operator
    /// named. Opens nothing.
    ///
    /// # Errors
    /// Those of the first name, with the others that were tried: [`ErrorCode::WriteTargetNotAllowed`] where it may not lead, [`ErrorCode::BackingNotFound`] or
    /// [`ErrorCode::OpenFailed`] where it leads to no file.
    pub fn find<'n>(
        &self,
        recorder: &Recorder<'_>,
        names: impl IntoIterator<Item = &'n [u8]>,
        access: Access,
        wanted: Option<Identity>,
    ) -> Result<Located, Error> {
        self.find_or(recorder, names, access, wanted, || Ok(None))
    }

    /// Do the same, and take what `otherwise` gives if there is no file of any of the names.
    ///
    /// # Errors
    /// As [`Gate::find`], and those of `otherwise`.
    pub fn find_or<'n>(
        &self,
        recorder: &Recorder<'_>,
        names: impl IntoIterator<Item = &'n [u8]>,
        access: Access,
        wanted: Option<Identity>,
        otherwise: impl FnOnce() -> Result<Option<Located>, Error>,
    ) -> Result<Located, Error> {
        let (mut first, mut others, mut absent) = (None, Vec::new(), true);
        for name in names {
            match self.find_one(recorder, name, access, wanted) {
                Ok(located) => return Ok(located),
                Err(error) => {
                    absent &= error.code == ErrorCode::BackingNotFound;
                    match first {
                        None => first = Some(error),
                        Some(_) => others.push(format!("'{}'", escape_bytes(name))),
                    }
                }
            }
        }
        if absent {
            if let Some(located) = otherwise()? {
                return Ok(located);
            }
        }
        let error = first.unwrap_or_else(|| recorder.missing(&PathBuf::new(), !self.everywhere));
        Err(if others.is_empty() { error } else { error.in_state(&format!("tried as well: {}", others.join(", "))) })
    }

    fn find_one(
        &self,
        recorder: &Recorder<'_>,
        name: &[u8],
        access: Access,
        wanted: Option<Identity>,
    ) -> Result<Located, Error> {
        let file = file_name(name).map_err(|why| recorder.no_file(name, &why))?;
        let start = match self.roots.working_directory() {
            Some(directory) if file.from_working_directory => directory,
            None if file.from_working_directory => return Err(recorder.missing(&PathBuf::from("."), !self.everywhere)),
            _ => recorder.directory,
        };
        // Decided by its text, which is public: the answer reveals nothing about its content.
        if file.path.starts_with(b"/proc/") {
            return Err(recorder.through_proc(name));
        }
        let refused = || recorder.outside(name, &self.visible(start, &file.path));
        let reached = match walk(start, self.roots.top(), &file.path) {
            Ok(reached) => reached,
            Err(lost) => return Err(self.lost(recorder, name, lost, refused)),
        };
        let identity = Identity::of(&reached.stat);
        let written = file.path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        let path = reached.beside.path().join(OsStr::from_bytes(written));
        let by_operator = wanted == Some(identity);
        if !by_operator {
            match self.lies(&reached.holder, Some(&reached.name)) {
                Lies::Within => {}
                Lies::Outside if self.roots.has_device(identity) => {}
                Lies::Hidden => return Err(recorder.hidden(name, &path)),
                Lies::Outside => return Err(refused()),
            }
        }
        match FileType::from_raw_mode(reached.stat.st_mode) {
            // A dry run opens the target only to read it, and is to say what the commit itself would say.
            FileType::RegularFile
                if by_operator || (access != Access::ReadWrite && recorder.role != RecordedRole::Target) => {}
            FileType::RegularFile if reached.stat.st_mode & 0o111 != 0 => {
                return Err(recorder.executable(name, &path));
            }
            FileType::RegularFile | FileType::BlockDevice => {}
            _ => return Err(Error::image(&path, ErrorCode::OpenFailed, "is not a regular file or block device")),
        }
        Ok(Located { reached, path, by_operator, format: file.format, name: name.to_owned() })
    }

    fn lost(&self, recorder: &Recorder<'_>, name: &[u8], lost: Lost, outside: impl FnOnce() -> Error) -> Error {
        let path = lost.at.directory().path().join(&lost.rest);
        match self.lies(&lost.at, None) {
            Lies::Outside => return outside(),
            Lies::Hidden => return recorder.hidden(name, &path),
            Lies::Within => {}
        }
        let failed = |clause: &str| Error::image(&path, ErrorCode::OpenFailed, clause);
        match lost.why {
            Why::Errno(Errno::NOENT) => recorder.missing(&path, !self.everywhere),
            Why::Errno(Errno::LOOP) => failed("cannot be followed: there are more than 40 symbolic links on the way"),
            Why::Errno(Errno::ACCESS) => {
                Error::image(&path, ErrorCode::PermissionDenied, "cannot be reached: permission denied")
            }
            Why::Errno(errno) => failed(&format!("cannot be reached: {}", std::io::Error::from(errno))),
            Why::Directory => failed("is a directory, not an image"),
            Why::Magic => recorder.through_proc(name),
        }
    }

    /// Where a file lies whose directory is `holder`, by what the directories above it are.
    fn lies(&self, holder: &Place, name: Option<&OsStr>) -> Lies {
        if self.everywhere {
            return Lies::Within;
        }
        let mut place = holder.clone();
        let mut hidden = name.is_some_and(is_hidden);
        loop {
            if self.roots.contains(place.directory().identity()) {
                return if hidden { Lies::Hidden } else { Lies::Within };
            }
            match place.leave() {
                Ok(Left::Named(name)) => hidden |= is_hidden(&name),
                Ok(Left::Unnamed) => {}
                // Without a way up, nothing shows that it is below a root.
                Ok(Left::Top) | Err(_) => return Lies::Outside,
            }
        }
    }

    /// A path that a name leads to outside of the roots, by nothing but what stands in the roots: it is the same whether there
    /// is such a file or not.
    fn visible(&self, start: &Directory, name: &[u8]) -> PathBuf {
        let mut walk = Walk::new(start, self.roots.top(), name);
        // How far below a root the walk is: what is entered from within lies within.
        let mut depth = self.depth(walk.place());
        loop {
            let seen = walk.place().directory().path().join(walk.rest());
            if depth.is_none() {
                // On the way to a root, there is nothing to tell that the root does not tell.
                let known = |directory: &Directory| self.roots.is_above(directory.identity());
                if !known(walk.place().directory()) {
                    return seen;
                }
                if let Some(name) = walk.enters() {
                    let next = walk.place().directory().enter(name);
                    let known = |next: &Directory| known(next) || self.roots.contains(next.identity());
                    if !next.is_ok_and(|next| known(&next)) {
                        return seen;
                    }
                }
            }
            let (before, entered) = (walk.place().directory().identity(), walk.enters().is_some());
            let climbed = walk.climbs();
            if !matches!(walk.step(), Ok(Step::More)) {
                return seen;
            }
            if walk.place().directory().identity() != before {
                depth = match depth {
                    Some(depth) if entered => Some(depth + 1),
                    Some(depth) if depth > 0 && climbed => Some(depth - 1),
                    _ => self.depth(walk.place()),
                };
            }
        }
    }

    /// How far a directory lies below a root, if it does.
    fn depth(&self, place: &Place) -> Option<usize> {
        let mut place = place.clone();
        for depth in 0.. {
            if self.roots.contains(place.directory().identity()) {
                return Some(depth);
            }
            if matches!(place.leave(), Ok(Left::Top) | Err(_)) {
                return None;
            }
        }
        None
    }
}
