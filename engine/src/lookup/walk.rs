//! Walking a name as the kernel does (path_resolution(7)): link by link, with `..` as the real parent.

use super::{Directory, Identity};
use rustix::fs::{fstatfs, readlinkat, FileType, Stat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Links that are followed at most: as many as the kernel follows (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;
/// Steps that are made at most. A path has no more than 2,048 components, and few are behind links; somebody's deep
/// directories must not keep the program busy.
const MAX_STEPS: usize = 1 << 13;
/// `f_type` of procfs (statfs(2)). What its links say is not where they lead.
const PROC: u64 = 0x9fa0;

/// A directory, and the names by which a walk reached it.
#[derive(Clone, Debug)]
pub struct Place {
    directory: Directory,
    /// The directories that were entered from one another, the lowest last: which each was entered from, and its name there.
    trail: Vec<(Identity, OsString)>,
}

/// The relation of a place to the directory above it, when a walk leaves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// By this name it was entered.
    Named(OsString),
    /// The walk did not come from above.
    Unnamed,
    /// There is nothing above it.
    Top,
}

impl Place {
    /// Begin a walk.
    #[must_use]
    pub fn start(directory: Directory) -> Self {
        Self { directory, trail: Vec::new() }
    }

    /// Return the directory.
    #[must_use]
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    fn enter(&mut self, name: &OsStr) -> Result<(), Errno> {
        let next = self.directory.enter(name)?;
        self.trail.push((self.directory.identity(), name.to_owned()));
        self.directory = next;
        Ok(())
    }

    /// Go to its present parent directory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn leave(&mut self) -> Result<Left, Errno> {
        let parent = self.directory.parent()?;
        if parent.identity() == self.directory.identity() {
            return Ok(Left::Top);
        }
        // Somebody may have moved the directory since.
        let left = match self.trail.pop() {
            Some((identity, name)) if identity == parent.identity() => Left::Named(name),
            _ => {
                self.trail.clear();
                Left::Unnamed
            }
        };
        self.directory = match (&left, self.directory.path().parent()) {
            (Left::Named(_), Some(above)) => parent.shown_as(above.to_owned()),
            _ => parent.really(),
        };
        Ok(left)
    }
}

/// The file at the end of a name.
#[derive(Debug)]
pub struct Reached {
    /// The directory of the last component of the name as written. Names that the file records begin there, even if that
    /// component is a link (as in QEMU).
    pub beside: Directory,
    /// The directory that holds the file itself.
    pub holder: Place,
    /// Its name there.
    pub name: OsString,
    /// A descriptor that only names it.
    pub object: OwnedFd,
    /// What it is.
    pub stat: Stat,
    /// Whether every link on the way lies in a directory that only root and the caller can change.
    pub trusted: bool,
}

/// The reason why a walk ends before a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The kernel's answer.
    Errno(Errno),
    /// The name leads to a directory.
    Directory,
    /// A link of procfs: it leads where no text says.
    Magic,
}

impl From<Errno> for Why {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

/// A walk that ended before a file.
#[derive(Debug)]
pub struct Lost {
    /// Where it ended.
    pub at: Place,
    /// The part of the name that was left.
    pub rest: PathBuf,
    /// Why.
    pub why: Why,
}

/// A part of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Component {
    Root,
    Here,
    Above,
    Name(OsString),
}

/// The parts of a name, the last first.
fn components(name: &[u8]) -> Vec<Component> {
    let mut all: Vec<Component> = name
        .split(|&byte| byte == b'/')
        .map(|part| match part {
            // Between two slashes, and behind the last: what is before it has to be a directory.
            b"" | b"." => Component::Here,
            b".." => Component::Above,
            part => Component::Name(OsStr::from_bytes(part).to_owned()),
        })
        .rev()
        .collect();
    if name.first() == Some(&b'/') {
        all.push(Component::Root);
    }
    all
}

/// A walk that is made step by step.
#[derive(Debug)]
pub struct Walk {
    place: Place,
    top: Directory,
    rest: Vec<Component>,
    links: usize,
    steps: usize,
    beside: Option<Directory>,
    trusted: bool,
}

/// The result of a step.
#[derive(Debug)]
pub enum Step {
    /// There is more to walk.
    More,
    /// The file.
    Reached(Box<Reached>),
}

impl Walk {
    /// Prepare a walk from `start`; names and links that begin with a slash begin at `top`, the root directory.
    #[must_use]
    pub fn new(start: &Directory, top: &Directory, name: &[u8]) -> Self {
        Self {
            place: Place::start(start.clone()),
            top: top.clone(),
            rest: components(name),
            links: 0,
            steps: 0,
            beside: None,
            trusted: true,
        }
    }

    /// Return the place that it has reached.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Return the name that the next step enters, unless it only goes up or begins again at the top.
    #[must_use]
    pub fn enters(&self) -> Option<&OsStr> {
        match self.rest.last() {
            Some(Component::Name(name)) => Some(name),
            _ => None,
        }
    }

    /// Whether the next step goes up.
    #[must_use]
    pub fn climbs(&self) -> bool {
        self.rest.last() == Some(&Component::Above)
    }

    /// Return the part of the name that is left.
    #[must_use]
    pub fn rest(&self) -> PathBuf {
        let text = |component: &Component| match component {
            Component::Root => OsStr::new("/").to_owned(),
            Component::Here => OsString::new(),
            Component::Above => OsStr::new("..").to_owned(),
            Component::Name(name) => name.clone(),
        };
        // An empty part would be a slash at the end.
        self.rest.iter().rev().map(text).filter(|part| !part.is_empty()).collect()
    }

    /// Make a step.
    ///
    /// # Errors
    /// Why there is none. The walk is where it was, and what it could not enter is still to be walked.
    pub fn step(&mut self) -> Result<Step, Why> {
        self.steps += 1;
        if self.steps > MAX_STEPS {
            return Err(Errno::NAMETOOLONG.into());
        }
        let last = self.rest.len() == 1;
        match self.rest.last() {
            None => return Err(Why::Directory),
            Some(Component::Here) => {}
            Some(Component::Root) => self.place = Place::start(self.top.clone()),
            Some(Component::Above) => {
                self.place.leave()?;
            }
            Some(Component::Name(name)) => {
                let name = name.clone();
                if last && self.beside.is_none() {
                    self.beside = Some(self.place.directory.clone());
                }
                return self.name(&name, last);
            }
        }
        self.rest.pop();
        Ok(Step::More)
    }

    fn name(&mut self, name: &OsStr, last: bool) -> Result<Step, Why> {
        if !last {
            match self.place.enter(name) {
                Ok(()) => {
                    self.rest.pop();
                    return Ok(Step::More);
                }
                Err(Errno::NOTDIR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let (object, stat) = self.place.directory.look(name)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => self.follow(&object)?,
            _ if !last => return Err(Errno::NOTDIR.into()),
            FileType::Directory => return Err(Why::Directory),
            _ => {
                let beside = self.beside.clone().unwrap_or_else(|| self.place.directory.clone());
                let (holder, name, trusted) = (self.place.clone(), name.to_owned(), self.trusted);
                return Ok(Step::Reached(Box::new(Reached { beside, holder, name, object, stat, trusted })));
            }
        }
        Ok(Step::More)
    }

    /// Go on with what a link says.
    fn follow(&mut self, link: &OwnedFd) -> Result<(), Why> {
        if fstatfs(&self.place.directory).is_ok_and(|system| system.f_type.cast_unsigned() == PROC) {
            return Err(Why::Magic);
        }
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        let text = readlinkat(link, "", Vec::new())?.into_bytes();
        if text.is_empty() {
            return Err(Errno::NOENT.into());
        }
        self.trusted &= is_trusted(&self.place.directory);
        self.rest.pop();
        let text = OsString::from_vec(text);
        self.rest.extend(components(text.as_bytes()));
        Ok(())
    }
}

/// Whether only root and the caller can change the entries of a directory.
#[must_use]
pub fn is_trusted(directory: &Directory) -> bool {
    let caller = rustix::process::geteuid().as_raw();
    directory.stat().is_ok_and(|stat| (stat.st_uid == 0 || stat.st_uid == caller) && stat.st_mode & 0o022 == 0)
}

/// Walk a name to its end. See [`Walk`].
///
/// # Errors
/// Where and why it ended before a file.
pub fn walk(start: &Directory, top: &Directory, name: &[u8]) -> Result<Reached, Lost> {
    let mut walk = Walk::new(start, top, name);
    loop {
        match walk.step() {
            Ok(Step::More) => {}
            Ok(Step::Reached(reached)) => return Ok(*reached),
            Err(why) => return Err(Lost { rest: walk.rest(), at: walk.place, why }),
        }
    }
}
