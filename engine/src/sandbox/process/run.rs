//! Fills the guest's memory, lets the starter jump into it, and turns what it rings for into exits.

use super::child::{Child, Guests, TICK};
use super::memory_files::seal;
use super::turns::Turns;
use super::workers::{Wants, Workers};
use super::{layout, unusable, CORE, NAME};
use crate::confine::call_name;
use crate::sandbox::error::SandboxError;
use crate::sandbox::guest_loop::{Exit, Guest, Processor};
use crate::sandbox::host::Host;
use crate::sandbox::layout::{Layout, Place};
use crate::sandbox::messages::panic_of;
use crate::sandbox::placed::place;
use crate::sandbox::plain::{bytes, bytes_mut};
use crate::sandbox::program::{Program, Report};
use crate::sandbox::rights::Rights;
use crate::sandbox::x86::fault::Fault;
use instar_guest_abi::{MESSAGE_ADDR, PORT_FAULT, PORT_MESSAGE};
use instar_guest_starter::{
    FaultRecord, MappedRange, Plan, Ring, Step, CODE, DATA, MAX_RANGES, PLAN_MAGIC, READ, SENT,
};
use rustix::io::Errno;
use std::cell::Cell;
use std::fs::File;
use std::time::{Duration, Instant};

/// How long a guest that is asked where it is may take to answer.
const POSITION_MAX: Duration = Duration::from_secs(1);

/// Run a program in this process.
///
/// # Errors
/// Why it was ended, or never started.
pub fn run(guests: Guests, program: &Program<'_>, host: &mut dyn Host) -> Result<Report, SandboxError> {
    let started = Instant::now();
    let Guests { mut child, mut workers, memory, text, ram, time_create } = guests;
    let files = Files { memory: &memory, text: &text, failed: Cell::new(None) };
    let layout = layout::fill(&files, CORE, workers.len(), program).map_err(|error| files.reason(error))?;
    seal(files.text)?;
    let plan = plan(&layout).ok_or(SandboxError::Layout("there are too many ranges"))?;
    if !files.place(0, bytes(&[plan]), Rights::READ) {
        return Err(files.reason(SandboxError::Layout("the plan does not fit")));
    }
    let guest = Guest::new(ram, layout, program);
    let report = Report { sandbox: NAME, time_create, time_load: started.elapsed(), ..Report::default() };
    let mut running = Running {
        turns: Turns::begin(child.process),
        child: &mut child,
        workers: Workers::new(&mut workers),
        guest: &guest,
        has_begun: false,
        owes: false,
        joins: false,
        used: Duration::ZERO,
        asleep: Duration::ZERO,
    };
    running.expect_starter(host)?;
    guest.run(&mut running, report, host)
}

/// The files that are the guest's memory and its text. A `write` to a file in memory costs less than the first touch of its
/// pages.
struct Files<'a> {
    memory: &'a File,
    text: &'a File,
    /// Why the kernel did not take what was written.
    failed: Cell<Option<Errno>>,
}

impl Files<'_> {
    /// The reason for an error: the kernel's, where it had one.
    fn reason(&self, error: SandboxError) -> SandboxError {
        match self.failed.get() {
            Some(errno) => unusable("writing the guest into a file in memory", errno.raw_os_error()),
            None => error,
        }
    }
}

impl Place for Files<'_> {
    fn place(&self, address: u64, bytes: &[u8], rights: Rights) -> bool {
        let file = if rights.execute { self.text } else { self.memory };
        let written = rustix::io::pwrite(file, bytes, address);
        let all = written == Ok(bytes.len());
        if !all {
            // Where memory ends in the middle, it took a part.
            self.failed.set(Some(written.err().unwrap_or(Errno::NOSPC)));
        }
        all
    }
}

fn plan(layout: &Layout) -> Option<Plan> {
    let mut ranges = [MappedRange::default(); MAX_RANGES];
    for (index, (range, rights)) in layout.mappings.iter().enumerate() {
        let rights = match rights {
            Rights { execute: true, .. } => CODE,
            Rights { write: true, .. } => DATA,
            Rights { .. } => READ,
        };
        *ranges.get_mut(index)? = MappedRange { start: range.start, end: range.end, rights };
    }
    Some(Plan { magic: PLAN_MAGIC, entry: layout.entry, count: layout.mappings.len() as u64, ranges })
}

/// A guest that runs in its process.
struct Running<'a> {
    turns: Turns,
    child: &'a mut Child,
    workers: Workers<'a>,
    guest: &'a Guest,
    /// The starter has said its last word: what rings is the guest.
    has_begun: bool,
    /// It has rung, and waits.
    owes: bool,
    /// It gets its answer when all workers are idle.
    joins: bool,
    /// Its processor time, when that was last known.
    used: Duration,
    /// How long it has used none since it last rang, and the host was waiting for it.
    asleep: Duration,
}

impl Running<'_> {
    /// The starter has done what it could without the guest, and waits.
    fn expect_starter(&mut self, host: &dyn Host) -> Result<(), SandboxError> {
        let begin = Instant::now();
        loop {
            match self.child.wait()? {
                Some(ring) if ring.port == Step::Done as u32 => {
                    self.owes = true;
                    return Ok(());
                }
                Some(ring) => return Err(starter_failed(ring)),
                None if host.interrupted() => return Err(SandboxError::Interrupted),
                None if self.child.is_stopped() => return Err(stopped()),
                None if begin.elapsed() > Duration::from_secs(30) => {
                    return Err(unusable("starting a process", libc::ETIMEDOUT));
                }
                None => {}
            }
        }
    }

    /// It did not ring, though the host has waited for this long. A guest can sleep without end, in a `read` of an answer that
    /// nobody owes it, and uses no processor time then. One that is ready to run gets some of it in every tick.
    fn note_silence(&mut self, waited: Duration, used: Duration) -> Result<Exit, SandboxError> {
        if self.child.is_stopped() {
            return Err(stopped());
        }
        if used == self.used {
            // No more than a tick, in case the host itself stood still.
            self.asleep += waited.min(TICK);
        }
        if self.asleep <= self.guest.stall_limit() {
            return Ok(Exit::Nothing);
        }
        let time = u64::try_from(self.asleep.as_millis()).unwrap_or(u64::MAX);
        Err(SandboxError::GuestAsleep { time, place: place(self.guest.modules(), self.position()?) })
    }

    /// What the guest's process left before it rang for a fault: zeroes if that cannot be read.
    fn record(&self) -> FaultRecord {
        let mut record = [FaultRecord::default()];
        let known = self.guest.ram.read(MESSAGE_ADDR, bytes_mut(&mut record));
        let [record] = record;
        if known {
            record
        } else {
            FaultRecord::default()
        }
    }

    /// What the guest's process said of its own end.
    fn fault(&self) -> SandboxError {
        let FaultRecord { signal, vector, error_code, address, rip } = self.record();
        let modules = self.guest.modules();
        let (sent, signal) = (signal & SENT != 0, signal & !SENT);
        if sent && (FAULTS.contains(&signal) || signal == SIGSYS) {
            return SandboxError::ProcessLost(format!("was ended from outside (signal {signal})"));
        }
        if signal == SIGSYS {
            const X86_64: u64 = 0xc000_003e;
            let (number, architecture) = (address & 0xffff_ffff, address >> 32);
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let x86_64 = architecture == X86_64;
            let name = call_name(number.into()).filter(|_| x86_64).unwrap_or("without a name");
            return SandboxError::SystemCall { number, name, x86_64, rip, place: place(modules, rip) };
        }
        if signal == SIGXCPU {
            // The host did not ask: it would not come here then.
            let text = "was ended by SIGXCPU, from another program or by a limit of processor time (see `ulimit -t`)";
            return SandboxError::ProcessLost(text.to_owned());
        }
        if !FAULTS.contains(&signal) {
            return SandboxError::protocol("a false report of a fault");
        }
        // The kernel raises it itself, too, for a call that is no instruction's fault (`uretprobe`, which no filter sees).
        let vector = if signal == SIGILL { INVALID_OPCODE } else { vector };
        match u8::try_from(vector) {
            Ok(vector) if vector < 32 => Fault { vector, error_code, rip, address }.error(modules),
            _ => SandboxError::protocol("a false report of a fault"),
        }
    }
}

const SIGSYS: u64 = number(libc::SIGSYS);
const SIGXCPU: u64 = number(libc::SIGXCPU);
const SIGILL: u64 = number(libc::SIGILL);
/// What an instruction can raise.
const FAULTS: [u64; 5] =
    [SIGILL, number(libc::SIGTRAP), number(libc::SIGBUS), number(libc::SIGFPE), number(libc::SIGSEGV)];
const INVALID_OPCODE: u64 = 6;

#[allow(clippy::cast_sign_loss, reason = "a small number")]
const fn number(signal: libc::c_int) -> u64 {
    signal as u64
}

fn stopped() -> SandboxError {
    SandboxError::ProcessLost("was stopped from outside, and does not go on".to_owned())
}

/// The error for a ring that is not a worker's.
fn forbidden(ring: Ring) -> SandboxError {
    SandboxError::protocol(format!("`out` of a worker to port {:#x}", ring.port))
}

fn starter_failed(ring: Ring) -> SandboxError {
    let what = Step::from_u32(ring.port).map_or("starting the guest", Step::what);
    unusable(what, i32::try_from(ring.value).unwrap_or(0))
}

impl Running<'_> {
    /// The processor time of all, as far as it is known.
    fn processor_time(&self) -> Duration {
        self.child.used().map_or(self.used, |used| used + self.workers.used())
    }

    /// The error for a worker that wants something.
    fn of_worker(&self, wants: Wants) -> Result<SandboxError, SandboxError> {
        let ring = match wants {
            Wants::Start(ring) => return Err(starter_failed(ring)),
            Wants::Ring(ring) => ring,
        };
        let modules = self.guest.modules();
        Ok(match u16::try_from(ring.port) {
            Ok(PORT_FAULT) => self.fault(),
            // Core lets a worker say why it panics, and that is the end in any case.
            Ok(PORT_MESSAGE) => panic_of(&self.guest.ram, modules, ring.value).unwrap_or_else(|| forbidden(ring)),
            _ => forbidden(ring),
        })
    }

    /// What the guest wants.
    fn rung(&mut self, ring: Ring) -> Exit {
        self.owes = true;
        self.asleep = Duration::ZERO;
        self.turns.next();
        match u16::try_from(ring.port) {
            Ok(PORT_FAULT) => Exit::Ended(self.fault()),
            Ok(port) => Exit::Out(port, ring.value),
            Err(_) => Exit::Ended(SandboxError::protocol(format!("`out` to unassigned port {:#x}", ring.port))),
        }
    }
}

impl Processor for Running<'_> {
    fn enter(&mut self) -> Result<Exit, SandboxError> {
        let begin = Instant::now();
        if self.joins && self.workers.are_busy() {
            let wants = self.workers.look(true)?;
            if let Some(wants) = wants {
                return Ok(Exit::Ended(self.of_worker(wants)?));
            }
            let used = self.processor_time();
            let silent =
                if self.workers.are_busy() { self.note_silence(begin.elapsed(), used) } else { Ok(Exit::Nothing) };
            self.used = used;
            return silent;
        }
        self.joins = false;
        if std::mem::take(&mut self.owes) {
            self.child.answer(0)?;
        }
        let rung = self.child.wait();
        let used = self.processor_time();
        let exit = match rung? {
            None => match self.workers.look(false)? {
                Some(wants) => Ok(Exit::Ended(self.of_worker(wants)?)),
                None => self.note_silence(begin.elapsed(), used),
            },
            // A signal that came before the guest is reported in the same way.
            Some(ring) if self.has_begun || ring.port == u32::from(PORT_FAULT) => Ok(self.rung(ring)),
            // The socket keeps the order: nothing of the guest comes before this.
            Some(ring) if ring.port == Step::Done as u32 => {
                self.has_begun = true;
                Ok(Exit::Nothing)
            }
            Some(ring) => Err(starter_failed(ring)),
        };
        self.used = used;
        exit
    }

    fn used(&self) -> Duration {
        self.used
    }

    fn wake(&mut self, workers: u32) -> Result<(), SandboxError> {
        self.workers.wake(workers)
    }

    fn join(&mut self) {
        self.joins = true;
    }

    fn finish(&mut self) -> Result<(), SandboxError> {
        match self.workers.look(false)? {
            Some(wants) => Err(self.of_worker(wants)?),
            None if self.workers.are_busy() => Err(SandboxError::protocol("it ended while its workers were at work")),
            None => Ok(()),
        }
    }

    fn position(&mut self) -> Result<u64, SandboxError> {
        // It may be a worker that the main processor waits for.
        let worker = if self.joins { self.workers.busy() } else { None };
        let child = worker.unwrap_or(&mut *self.child);
        child.ask_for_position();
        let asked = Instant::now();
        while asked.elapsed() < POSITION_MAX {
            if child.wait()?.is_some_and(|ring| ring.port == u32::from(PORT_FAULT)) {
                return Ok(self.record().rip);
            }
        }
        Ok(0)
    }

    fn ring(&self) -> Result<u8, SandboxError> {
        Ok(3)
    }
}
