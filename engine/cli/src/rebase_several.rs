//! `instar rebase` of several images in one call. A process confines itself to the images of one rebase, so each gets a process of
//! its own. They plan one after the other, and keep their locks; once all of them can begin, they are let go, one after the other.

use super::output::{absolute, error_value, print_json, unprinted_but, OutputFormat};
use super::paragraph::print_sentences;
use super::print_error;
use super::rebase::{rebase_one, refuse_unsupported, request, text, told, RebaseArgs};
use super::rebase_member::{run as run_member, same_file, Said, TICK};
use super::said::say_error;
use super::signals::{asked, cancel_on_signals};
use super::told::Told;
use super::usage::bad_usage;
use instar::error::{Error, Role};
use instar::escape::escape_path;
use instar::operation::{Cancel, Observer, Progress, Stage};
use instar::rebase::RebaseRequest;
use instar::worker::decode_error;
use instar_guest_abi::ErrorCode;
use serde::Serialize;
use serde_json::Value;
use std::io::{PipeReader, PipeWriter};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Images in one call: each of them holds a sandbox until the last one is planned.
const MOST: usize = 64;
/// The clause about a process whose words cannot be read.
const NONSENSE: &str = "its process said what makes no sense";

/// Run the command; the exit status.
pub fn run(args: &RebaseArgs, out: &mut dyn Write) -> u8 {
    let done = refuse_unsupported(args).and_then(|()| match args.filenames.as_slice() {
        [image] => rebase_one(args, image, out),
        images => rebase_several(args, images, out),
    });
    match done {
        Ok(()) => 0,
        Err(error) => print_error(&error, args.output),
    }
}

/// What became of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Status {
    /// It has the new backing file.
    Rebased,
    /// It could get it; nothing was changed.
    Possible,
    /// It was refused, or its rebase failed: the error says what is true of it.
    Failed,
    /// It was not touched, because another one failed.
    Untouched,
}

/// One image of the result.
#[derive(Debug, Serialize)]
struct Entry {
    image: String,
    status: Status,
    /// What a rebase of this image alone prints.
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Value>,
}

/// The result: an entry for each image, in the order of the command line.
#[derive(Debug, Serialize)]
struct Entries {
    images: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// How a process ended.
#[derive(Debug)]
enum End {
    Done { result: Value, text: String },
    Failed(Error),
}

/// A process that rebases one image.
#[derive(Debug)]
struct Link {
    image: PathBuf,
    process: libc::pid_t,
    says: PipeReader,
    /// Closed to hold it back.
    go: Option<PipeWriter>,
    /// What it has said of a line that is not whole yet.
    rest: Vec<u8>,
    planned: Option<u64>,
    end: Option<End>,
}

/// Who is told, and who may end it.
struct Caller {
    told: Rc<Told>,
    cancel: Cancel,
}

impl Caller {
    fn writing(&self, done: u64, total: u64) {
        self.told.progress(Progress { stage: Stage::Writing, done, total });
    }
}

fn rebase_several(args: &RebaseArgs, images: &[PathBuf], out: &mut dyn Write) -> Result<(), Error> {
    refuse_repeated(images, &args.backing)?;
    let config = super::configuration(args.output)?;
    let requests = images.iter().map(|image| request(args, image, &config)).collect::<Result<Vec<_>, _>>()?;
    let caller = Caller { told: Rc::new(told(args)?), cancel: cancel_on_signals() };
    let mut links = Vec::new();
    let ran = plan(&caller, &requests, images, &mut links).and_then(|()| write(&caller, args.dry_run, &mut links));
    // Those that still wait are held back.
    links.iter_mut().for_each(Link::finish);
    let failed = first_error(&links).or(ran.err());
    let entries = Entries { images: entries(args.dry_run, images, &links), warnings: config.warnings };
    caller.told.end(args.dry_run, failed.as_ref().map_or(Ok(&entries), Err));
    report(args, &entries, &links, failed, out)
}

/// A file that is named twice, or that the others get below them, would be in use by its own rebase.
fn refuse_repeated(images: &[PathBuf], backing: &str) -> Result<(), Error> {
    if images.len() > MOST {
        let many = images.len();
        return Err(bad_usage(format!(
            "{many} images are more than the {MOST} of one call: name fewer, in several calls"
        )));
    }
    let repeated = images.iter().enumerate().find_map(|(number, image)| {
        let before = images.get(..number)?.iter().find(|before| same_file(before, image))?;
        Some((before, image))
    });
    if let Some((before, image)) = repeated {
        let (before, image) = (escape_path(before), escape_path(image));
        return Err(bad_usage(format!("'{before}' and '{image}' are the same file: name it once")));
    }
    let beside = |image: &Path| image.parent().unwrap_or(Path::new("")).join(backing);
    let itself = images.iter().find(|image| images.iter().any(|other| same_file(&beside(other), image)));
    itself.map_or(Ok(()), |image| {
        let clause = "is the new backing file and one of the images, and cannot be backed by itself: name others";
        Err(Error::image(image, ErrorCode::ChainLoop, clause))
    })
}

/// Have all of them plan: what refuses one of them refuses all, and all of the refusals are found.
fn plan(caller: &Caller, requests: &[RebaseRequest], images: &[PathBuf], links: &mut Vec<Link>) -> Result<(), Error> {
    for request in requests {
        if caller.cancel.is_cancelled() {
            return Err(interrupted());
        }
        let mut link = start(caller, request, images, links)?;
        link.listen(caller, &mut |_| {}, |link| link.planned.is_some())?;
        link.blame_none_of(links);
        links.push(link);
    }
    Ok(())
}

/// Let them go, unless one was refused. The first that fails ends it: what it ran into is likely to be in the way of the next.
fn write(caller: &Caller, dry_run: bool, links: &mut [Link]) -> Result<(), Error> {
    if dry_run || first_error(links).is_some() {
        return Ok(());
    }
    let total = links.iter().filter_map(|link| link.planned).fold(0, u64::saturating_add);
    let mut before = 0;
    caller.writing(0, total);
    for link in links {
        if caller.cancel.is_cancelled() {
            return Err(interrupted());
        }
        let agreed = link.go.as_mut().map_or(Ok(()), |go| go.write_all(b"g"));
        if agreed.is_err() {
            // Only a process that is gone cannot be told to begin.
            return Err(link.lost());
        }
        let mut so_far = |done| caller.writing(u64::min(total, before + done), total);
        link.listen(caller, &mut so_far, |_| false)?;
        if matches!(link.end, Some(End::Failed(_))) {
            return Ok(());
        }
        before = before.saturating_add(link.planned.unwrap_or(0)).min(total);
        caller.writing(before, total);
    }
    Ok(())
}

/// Start the process for one image.
fn start(caller: &Caller, request: &RebaseRequest, images: &[PathBuf], links: &mut Vec<Link>) -> Result<Link, Error> {
    let image = &request.image;
    let failed = |what: &str, error: &std::io::Error| Error::io(image, ErrorCode::OpenFailed, what, error);
    let pipes = std::io::pipe().and_then(|events| Ok((events, std::io::pipe()?)));
    let ((says, member_says), (member_go, go)) =
        pipes.map_err(|error| failed("the process for it gets no pipe", &error))?;
    // SAFETY: the call takes numbers.
    let parent = unsafe { libc::getpid() };
    // SAFETY: this process has one thread, so that the new one, in which that thread goes on, finds no lock that another held.
    match unsafe { libc::fork() } {
        -1 => Err(failed("cannot get a process of its own", &std::io::Error::last_os_error())),
        0 => {
            // SAFETY: the calls take numbers. The process that waits for this one may be gone already.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM, 0, 0, 0);
                if libc::getppid() != parent {
                    libc::_exit(1);
                }
            }
            // The pipes of the others are theirs.
            drop((std::mem::take(links), says, go));
            let (told, cancel) = (caller.told.clone(), caller.cancel.clone());
            run_member(request, images, told, cancel, (member_says, member_go), text)
        }
        process => {
            let (image, rest) = (image.clone(), Vec::new());
            Ok(Link { image, process, says, go: Some(go), rest, planned: None, end: None })
        }
    }
}

impl Link {
    fn failed(&self, clause: &str) -> Error {
        Error::image(&self.image, ErrorCode::InternalOverflow, clause)
    }

    /// An image that the process of another one of this call holds is no stranger's: that other image is on it, or below it.
    fn blame_none_of(&mut self, others: &[Self]) {
        let Some(End::Failed(error)) = &self.end else { return };
        let holds = |other: &&Self| u32::try_from(other.process).ok() == error.holder();
        if let Some(other) = others.iter().find(holds) {
            let clause = format!(
                "shares an image with '{}', another image of this call, which would change it: rebase the lower one in a call \
                 of its own first",
                escape_path(&other.image)
            );
            self.end = Some(End::Failed(Error::image(&self.image, ErrorCode::ImageInUse, clause).in_role(Role::Image)));
        }
    }

    /// Another program, or the kernel for lack of memory, ended its process.
    fn lost(&self) -> Error {
        let clause = "its process was ended from outside: run the same command again, which finishes the rebase";
        Error::image(&self.image, ErrorCode::SandboxLost, clause)
    }

    /// Listen to it until it ends, or until enough was said.
    fn listen(
        &mut self,
        caller: &Caller,
        written: &mut dyn FnMut(u64),
        enough: impl Fn(&Self) -> bool,
    ) -> Result<(), Error> {
        let mut buffer = [0; 4096];
        while self.end.is_none() && !enough(self) {
            let mut wanted = libc::pollfd { fd: self.says.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: `wanted` is one valid structure.
            let ready = unsafe { libc::poll(&raw mut wanted, 1, TICK) };
            if caller.cancel.is_cancelled() {
                self.signal(libc::SIGTERM);
            } else if asked() {
                self.signal(libc::SIGUSR1);
            }
            if ready <= 0 {
                continue;
            }
            let read = self.says.read(&mut buffer);
            let read = read.map_err(|error| self.failed(&format!("its process cannot be listened to: {error}")))?;
            if read == 0 {
                self.end = Some(End::Failed(self.lost()));
            }
            self.rest.extend_from_slice(buffer.get(..read).unwrap_or_default());
            self.take_lines(written);
        }
        Ok(())
    }

    fn take_lines(&mut self, written: &mut dyn FnMut(u64)) {
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Said::Planned(bytes)) => self.planned = Some(bytes),
                Ok(Said::Written(done)) => written(done),
                Ok(Said::Done(result, text)) => self.end = Some(End::Done { result, text }),
                Ok(Said::Failed(error)) => {
                    let error = decode_error(&error).unwrap_or_else(|| self.failed(NONSENSE));
                    self.end = Some(End::Failed(error));
                }
                Err(_) => self.end = Some(End::Failed(self.failed(NONSENSE))),
            }
        }
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: the call takes numbers; the process was not waited for yet, so that its number is its own.
        unsafe { libc::kill(self.process, signal) };
    }

    /// Hold it back if it waits, and wait for its end.
    fn finish(&mut self) {
        self.go = None;
        let mut status = 0;
        // SAFETY: `status` can be written to.
        while unsafe { libc::waitpid(self.process, &raw mut status, 0) } < 0 {
            if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
                break;
            }
        }
    }
}

fn interrupted() -> Error {
    Error::new(ErrorCode::Interrupted, "the rebase was interrupted before the next image: run the same command again")
}

fn first_error(links: &[Link]) -> Option<Error> {
    links.iter().find_map(|link| match &link.end {
        Some(End::Failed(error)) => Some(error.clone()),
        _ => None,
    })
}

/// What became of each image.
fn entries(dry_run: bool, images: &[PathBuf], links: &[Link]) -> Vec<Entry> {
    let end = |number: usize| links.get(number).and_then(|link| link.end.as_ref());
    let entry = |(number, image): (usize, &PathBuf)| {
        let (status, result, error) = match end(number) {
            Some(End::Done { result, .. }) => {
                (if dry_run { Status::Possible } else { Status::Rebased }, Some(result.clone()), None)
            }
            Some(End::Failed(error)) => {
                let value = error_value(error);
                (Status::Failed, None, Some(value.get("error").cloned().unwrap_or(value)))
            }
            None => (Status::Untouched, None, None),
        };
        Entry { image: absolute(image).to_string_lossy().into_owned(), status, result, error }
    };
    images.iter().enumerate().map(entry).collect()
}

/// Print what became of them.
fn report(
    args: &RebaseArgs,
    entries: &Entries,
    links: &[Link],
    failed: Option<Error>,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let texts = || links.iter().filter_map(|link| Some((&link.image, link.end.as_ref()?)));
    let printed = match args.output {
        OutputFormat::Json => print_json(out, entries),
        OutputFormat::Human if args.quiet && !args.dry_run => Ok(()),
        OutputFormat::Human => {
            let lines = texts().filter_map(|(image, end)| match end {
                End::Done { text, .. } if args.dry_run => Some(text.clone()),
                End::Done { text, .. } => Some(format!("{}: {text}", escape_path(image))),
                End::Failed(_) => None,
            });
            print_sentences(out, &lines.collect::<String>())
        }
    };
    if let Some(error) = failed {
        if args.output == OutputFormat::Human {
            let others = texts().filter_map(|(_, end)| match end {
                End::Failed(other) if *other != error => Some(other),
                _ => None,
            });
            others.for_each(|other| say_error(other, args.output));
        }
        return Err(error.in_state(&state(entries)));
    }
    let done = if args.dry_run { "nothing was changed" } else { "the rebase is done" };
    let first: &Path = args.filenames.first().map_or(Path::new(""), PathBuf::as_path);
    printed.map_err(|error| unprinted_but(done, first, &error))
}

/// What is true of the images of a call that failed.
fn state(entries: &Entries) -> String {
    let of = |status| entries.images.iter().filter(|entry| entry.status == status).count();
    let all = entries.images.len();
    match of(Status::Rebased) {
        0 => format!("none of the {all} images was rebased"),
        done => format!("{done} of the {all} images are rebased, and {} untouched", of(Status::Untouched)),
    }
}
