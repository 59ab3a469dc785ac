//! The order of every operation.

use super::attach::{attach, Attached, DevicePaths};
use super::failure::GuestFailure;
use super::handler::{Events, Handler};
use super::images::{Grants, ImageSet, Named, Opener};
use super::session::Session;
use super::timing::Timing;
use crate::confine::{Confinement, Needs, Reach, Work};
use crate::devices::Devices;
use crate::error::Error;
use crate::image::{
    allow_many_open_files, prepare_to_lock, use_undo_directory, Access, Gate, NamedFile, Roots, UndoDirectory,
};
use crate::lookup::Directory;
use crate::plugins::{Registry, SearchPath};
use crate::sandbox::{workers, ModuleSpec, Program, Report, Sandbox, SandboxChoice};
use instar_guest_abi::ErrorCode;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// The settings of every operation.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The search path for plugins.
    pub search: SearchPath,
    /// Directories that recorded names may lead into, in addition to those of the files that the operator names.
    pub allowed_directories: Vec<PathBuf>,
    /// Total seconds to wait for images in use.
    pub wait: u64,
    /// The sandbox of the guest.
    pub sandbox: SandboxChoice,
    /// The directory of the undo logs of block devices.
    pub undo_directory: Option<PathBuf>,
}

impl Settings {
    /// The same, with another directory of the undo logs of block devices, if one is given.
    #[must_use]
    pub fn with_undo_directory(self, directory: Option<&Path>) -> Self {
        let undo_directory = directory.map(Path::to_owned).or(self.undo_directory);
        Self { undo_directory, ..self }
    }
}

/// The steps that differ between operations. [`run`] has the steps that all of them share, and calls these methods in this
/// order, once each.
///
/// # Example
///
/// Can every table of a chain be walked, and how many layers has it? The guest of `map` walks them; this operation ignores the
/// places that it reports, and is done when the guest has succeeded.
///
/// ```
/// use instar::devices::Devices;
/// use instar::error::Error;
/// use instar::image::Access;
/// use instar::operation::{
///     DevicePaths, Ended, Events, Grants, ImageSet, Named, Opener, Operation, Session, Settings,
/// };
/// use instar::sandbox::{BadRequest, ModuleSpec};
/// use std::path::PathBuf;
///
/// struct Depth {
///     image: PathBuf,
///     settings: Settings,
///     layers: usize,
/// }
///
/// struct Ignored;
///
/// impl Events for Ignored {
///     fn event(&mut self, _: &mut Devices, _: &[u8]) -> Result<(), BadRequest> {
///         Ok(())
///     }
///
///     fn succeeded(&mut self, _: &mut Devices, _: &[u8]) -> Result<(), BadRequest> {
///         Ok(())
///     }
/// }
///
/// impl Operation for Depth {
///     type Events = Ignored;
///     type Outcome = usize;
///
///     fn module(&self) -> ModuleSpec<'static> {
///         instar::map::MODULE
///     }
///
///     fn settings(&self) -> &Settings {
///         &self.settings
///     }
///
///     fn named(&self) -> Named {
///         Named::image(&self.image)
///     }
///
///     fn access(&self) -> Access {
///         Access::to_read(false)
///     }
///
///     fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
///         Ok(ImageSet::read(opener.open_chain(None)?))
///     }
///
///     fn admit(&mut self, images: &mut ImageSet<'_>, _: &Session) -> Result<Grants, Error> {
///         self.layers = images.chain().len();
///         Ok(Grants::default())
///     }
///
///     fn serve(&mut self, _: &mut Devices, _: &DevicePaths, _: &Session) -> Result<Ignored, Error> {
///         Ok(Ignored)
///     }
///
///     fn finish(self, ended: Ended<Ignored>) -> Result<usize, Error> {
///         // The guest's failure becomes one line that names the file.
///         ended.end.map_err(|failure| failure.error(&ended.paths, None))?;
///         Ok(self.layers)
///     }
/// }
/// ```
pub trait Operation {
    /// What serves the guest.
    type Events: Events;
    /// What comes of it.
    type Outcome;

    /// The guest's half.
    fn module(&self) -> ModuleSpec<'static>;

    /// What the process does until all images are open, and what it does from then on. Reading, if nothing else is said.
    fn work(&self) -> (Work, Work) {
        (Work::OpenToRead, Work::Read)
    }

    /// What the operator has settled.
    fn settings(&self) -> &Settings;

    /// The files that the operator names. Nothing of them has been read.
    fn named(&self) -> Named;

    /// How the images that are to be changed are opened.
    fn access(&self) -> Access;

    /// What a virtual machine that runs can do itself instead, as advice where an image is in use: an imperative clause.
    fn inside_a_machine(&self) -> Option<&'static str> {
        None
    }

    /// How many processors the guest may use at most. More than one help where it decodes, encodes or compares.
    fn most_processors(&self) -> usize {
        usize::MAX
    }

    /// Whether it reads what is below the images that the operator names: a large file beside them may be a part of that.
    fn reads_below(&self) -> bool {
        false
    }

    /// Get what the process cannot get any more once it is confined. Nothing was read of an image.
    fn acquire(&mut self, named: &Named, registry: &Registry) {
        let _ = (named, registry);
    }

    /// The directory in which a new image gets its name, if the operation makes one.
    fn names_in(&self) -> Option<&Directory> {
        None
    }

    /// The directory that a name is removed from at the end, if the operation does that.
    fn removes_in(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What has to be reached for the names of new files: while images are opened, in whichever of these `roots`, where
    /// recorded names may lead; afterwards, with no roots, only where it is.
    fn reach_of_names<'n>(&'n self, roots: &'n [Directory], reach: Reach<'n>) -> Reach<'n> {
        let _ = roots;
        self.names_in().into_iter().fold(reach, Reach::add_names)
    }

    /// Open all images, lock them, and find out what they are.
    ///
    /// # Errors
    /// One line that names the file and what to do.
    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error>;

    /// Ask everything that can refuse without a guest: no file can be opened any more.
    ///
    /// # Errors
    /// One line that names the file and what to do.
    fn admit(&mut self, images: &mut ImageSet<'_>, session: &Session) -> Result<Grants, Error> {
        let _ = (images, session);
        Ok(Grants::default())
    }

    /// What the guest is told: an encoded message.
    fn payload(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Bytes of messages that the guest may send.
    fn message_limit(&self) -> u64 {
        16 << 20
    }

    /// Who serves the guest.
    ///
    /// # Errors
    /// One line that names the file and what to do.
    fn serve(&mut self, devices: &mut Devices, paths: &DevicePaths, session: &Session) -> Result<Self::Events, Error>;

    /// The guest has ended.
    ///
    /// # Errors
    /// Why there is no outcome: one line that names the file and what to do.
    fn finish(self, ended: Ended<Self::Events>) -> Result<Self::Outcome, Error>;
}

/// A guest that has ended.
#[derive(Debug)]
pub struct Ended<E> {
    /// The report of the sandbox for a guest that reported success; otherwise the reason why it did not run, why it was
    /// stopped, or the failure that it reported.
    pub end: Result<Report, GuestFailure>,
    /// The operation's own state.
    pub events: E,
    /// The devices in their final state.
    pub devices: Devices,
    /// The file behind each device.
    pub paths: DevicePaths,
    /// The name of the chosen sandbox.
    pub sandbox: &'static str,
    /// The duration of each part.
    pub timing: Timing,
}

/// Run an operation: load the plugins, confine the process, open the images, ask everything that can refuse, run the guest, and
/// build the outcome. A refusal on the way leaves all files byte-identical.
///
/// # Errors
/// One line that names the file and what to do.
pub fn run<O: Operation>(mut operation: O, session: &Session) -> Result<O::Outcome, Error> {
    let mut timing = Timing::start(session.observer().wants_notes());
    allow_many_open_files();
    // From here on, the directories that names may lead into are descriptors: no path leads to them a second time.
    let named = operation.named();
    let Settings { search, allowed_directories, wait, sandbox, undo_directory } = operation.settings();
    let undo_directory = use_undo_directory(undo_directory.as_deref())?;
    let roots = Roots::of(&named.image, allowed_directories)?;
    // An operator who names a base also allows the files that belong to it, which lie beside it.
    let with_base = named.base.as_ref().map_or_else(|| roots.clone(), |base| roots.and(base));
    let of_second = named.second.as_ref().map(|second| Roots::of(second, allowed_directories)).transpose()?;
    let of_others = named.others.iter().map(|other| Roots::of(other, allowed_directories));
    let of_others = of_others.collect::<Result<Vec<_>, _>>()?;
    let most = operation.most_processors();
    let is_large = || {
        let mut below = of_second.iter().chain(&of_others).chain([&with_base]).filter(|_| operation.reads_below());
        named.is_large() || below.any(|roots| roots.hold_file_of(Named::LARGE))
    };
    let processors = if most > 1 && is_large() { most } else { 1 };
    let workers = workers(processors);
    // A process gets ready while the plugins are loaded. A virtual machine is made afterwards: the kernel has to tell it of
    // everything that changes in the memory of this process.
    let begun = (*sandbox == SandboxChoice::Process).then(|| sandbox.acquire(workers));
    if begun.is_some() {
        timing.mark("process of the sandbox started");
    }
    let registry = Registry::load(search);
    session.note_plugins(&registry);
    Error::if_refused(&registry)?;
    timing.mark("plugins loaded");
    let ready = begun.unwrap_or_else(|| sandbox.acquire_telling(workers, &mut |why| session.note(|| why)));
    let needs = session.needs(ready.as_ref().map(|ready| ready.needs()).unwrap_or_default());
    let sandbox = ready.as_ref().map_or_else(|_| sandbox.name(), |ready| ready.name());
    session.note(|| match &ready {
        Ok(_) => format!("sandbox: {sandbox}"),
        Err(_) => format!("sandbox: {sandbox}, which cannot be used"),
    });
    prepare_to_lock(session.cancel(), *wait, operation.inside_a_machine(), named.files(), allowed_directories);
    operation.acquire(&named, &registry);
    timing.mark("sandbox acquired, threads started");

    // Which of the files in these directories are images, and which are to be written, only the images say.
    let access = operation.access();
    let descriptors: Vec<BorrowedFd<'_>> = named.files().filter_map(NamedFile::descriptor).collect();
    let reach =
        of_second.iter().chain(&of_others).fold(with_base.reach(access), |reach, roots| roots.add_to(reach, access));
    let reach = descriptors.iter().fold(reach, |reach, file| reach.add(file, access == Access::ReadWrite));
    let reach = named.reach_of_children(reach, access);
    // What a device is, the system tells.
    let sys = undo_directory.as_ref().and_then(UndoDirectory::sys);
    let reach = sys.iter().fold(reach, |reach, sys| reach.add(*sys, false));
    let reach = operation.reach_of_names(with_base.directories(), reach);
    let removes = operation.removes_in();
    let reach = removes.iter().fold(reach, Reach::add_removal);
    let needs = removes.iter().fold(needs, Needs::and_removing_in);
    let (opening, running) = operation.work();
    let confinement = session.begin(reach.with_listing(opening.lists_directories()), opening, &needs);
    note_confinement(session, "confinement", confinement.as_ref());
    timing.mark("process confined");

    let beside_others: Vec<Gate> = of_others.into_iter().map(Gate::within).collect();
    let (gate, below, beside_second) = (Gate::within(roots), Gate::within(with_base), of_second.map(Gate::within));
    let opener = Opener {
        registry: &registry,
        session,
        named: &named,
        gate: &gate,
        below: &below,
        beside_second: beside_second.as_ref(),
        beside_others: &beside_others,
        access,
    };
    let mut images = operation.open(&opener)?;
    timing.mark("chain opened, locked and probed");
    let reach = operation.reach_of_names(&[], Reach::default());
    let removes = operation.removes_in();
    let reach = removes.iter().fold(reach, Reach::add_removal);
    let confinement = confinement.map(|confinement| confinement.forbid_opening(reach, running, &needs));
    note_confinement(session, "confinement, now that all images are open", confinement.as_ref());
    timing.mark("process confined further");

    let grants = operation.admit(&mut images, session)?;
    let all = attach(images, grants)?;
    let modules = all.modules();
    let Attached { mut devices, members, files, paths, .. } = all;
    let events = operation.serve(&mut devices, &paths, session)?;
    let program = Program::new(operation.module(), operation.payload(), members, modules);
    let program = Program { files, ..program }.with_message_limit(operation.message_limit());
    let mut handler = Handler::new(devices, events, session.cancel().clone());
    let machine = ready.and_then(|ready| ready.run(&program, &mut handler));
    timing.mark("program in the sandbox");
    handler.log.lines().iter().for_each(|line| session.note(|| format!("guest says: {line}")));
    let Handler { devices, events, end, .. } = handler;
    note_work(session, machine.as_ref().ok(), &devices);
    let silent = || GuestFailure::ended(ErrorCode::GuestProtocol, "the guest ended without a result");
    let end = match (machine, end) {
        (Err(error), _) => Err(GuestFailure::of_machine(&error)),
        (Ok(report), Some(told)) => told.map(|()| report),
        (Ok(_), None) => Err(silent()),
    };
    operation.finish(Ended { end, events, devices, paths, sandbox, timing })
}

/// Say what the guest asked for and what was moved for it: `tests/tools/bench_guard.py` reads these lines.
fn note_work(session: &Session, report: Option<&Report>, devices: &Devices) {
    let Some(report) = report else { return };
    session.note(|| {
        format!(
            "guest: sandbox {}, ring {}, {} exits, {} doorbells, {} requests, {} messages",
            report.sandbox, report.ring, report.exits, report.doorbells, report.requests, report.messages
        )
    });
    session.note(|| {
        let processors = report.workers + 1;
        format!("guest: {processors} processor{}", if processors == 1 { "" } else { "s" })
    });
    session.note(|| format!("moved: {}", devices.stats()));
}

fn note_confinement(session: &Session, when: &str, confinement: Option<&Confinement>) {
    session.note(|| match confinement {
        Some(confinement) => format!("{when}: {confinement}"),
        None => format!("{when}: none, as the caller wants it"),
    });
}
