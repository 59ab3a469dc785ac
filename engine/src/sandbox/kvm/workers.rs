//! The vCPUs besides the main one, each on a thread of its own.
//!
//! The threads are started before the process confines itself, and sleep. A vCPU is made when it is woken for the first time,
//! because that takes longer than a small operation does. It enters core as a worker, and leaves it on one port, to sleep again;
//! whatever else it does ends the guest. While it is in the guest, a timer lets its thread out now and then, as that of the main
//! one, so that a guest that is to be ended is left by all of them.

use super::step::{position, step};
use super::watchdog::Watchdog;
use super::x86::vcpu;
use crate::confine::{paths, Reach, SignalsBlocked};
use crate::sandbox::error::SandboxError;
use crate::sandbox::guest_loop::{Exit, Guest};
use crate::sandbox::messages::panic_of;
use crate::sandbox::placed::place;
use instar_guest_abi::{MAX_WORKERS, PORT_IDLE, PORT_MESSAGE};
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a worker is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Its thread has not given up yet what it does not need.
    #[default]
    Starting,
    /// It sleeps.
    Idle,
    /// It is to go on, and has not begun.
    Woken,
    /// It is in the guest.
    Running,
}

/// A vCPU, and the guest that it runs.
struct Processor {
    vcpu: VcpuFd,
    guest: Arc<Guest>,
}

#[derive(Default)]
struct Worker {
    state: State,
    /// On its way to the thread.
    processor: Option<Processor>,
    /// Whether the thread has got one.
    is_made: bool,
}

#[derive(Default)]
struct Board {
    workers: Vec<Worker>,
    /// Why the guest has to be ended: what the first worker did that did something else than to become idle.
    failure: Option<SandboxError>,
    /// Nobody goes on in the guest.
    stopped: bool,
    /// Where a worker was when it was stopped.
    position: Option<u64>,
    /// The threads are to end.
    over: bool,
}

#[derive(Default)]
struct Shared {
    board: Mutex<Board>,
    /// For each worker: there is something to do.
    news: [Condvar; MAX_WORKERS],
    /// A worker is idle.
    idle: Condvar,
    /// The processor time that each has used in the guest, in nanoseconds.
    used: [AtomicU64; MAX_WORKERS],
}

impl Shared {
    fn board(&self) -> MutexGuard<'_, Board> {
        // Nothing panics with the board in its hands, and each of its states is a valid one.
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread does until the end. Workers count from 0 here, and from 1 in the guest.
    fn work(&self, index: usize) {
        // Best effort, as for the process.
        let _ = paths::restrict(&Reach::default());
        let mut board = self.board();
        board.set(index, State::Idle);
        self.idle.notify_all();
        let mut entered: Option<(Processor, Watchdog)> = None;
        let Some(news) = self.news.get(index) else { return };
        loop {
            if board.over {
                return;
            }
            let Some(worker) = board.workers.get_mut(index) else { return };
            if worker.state != State::Woken {
                board = news.wait(board).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            worker.state = State::Running;
            let new = worker.processor.take();
            drop(board);
            let result = (|| {
                if let Some(processor) = new {
                    let watchdog = Watchdog::new(processor.guest.stall_limit())?;
                    entered = Some((processor, watchdog));
                }
                match &mut entered {
                    Some((processor, watchdog)) => self.enter(index, processor, watchdog),
                    None => Err(SandboxError::unusable("waking a worker", 0)),
                }
            })();
            board = self.board();
            board.set(index, State::Idle);
            if let Err(error) = result {
                board.failure.get_or_insert(error);
            }
            self.idle.notify_all();
        }
    }

    /// Run the guest until this worker is idle.
    fn enter(&self, index: usize, of: &mut Processor, watchdog: &mut Watchdog) -> Result<(), SandboxError> {
        let Processor { vcpu, guest } = of;
        loop {
            if self.board().stopped {
                let position = position(vcpu)?;
                self.board().position.get_or_insert(position);
                return Ok(());
            }
            watchdog.enter();
            let exit = step(vcpu, guest);
            watchdog.leave();
            if let Some(used) = self.used.get(index) {
                used.store(u64::try_from(watchdog.used().as_nanos()).unwrap_or(u64::MAX), Relaxed);
            }
            match exit? {
                Exit::Nothing => {}
                Exit::Out(PORT_IDLE, _) => return Ok(()),
                Exit::Out(port, value) => return Err(forbidden(guest, (port, value), position(vcpu)?)),
                Exit::Ended(error) => return Err(error),
            }
        }
    }
}

/// The error for an `out` that is not a worker's.
fn forbidden(guest: &Guest, (port, value): (u16, u32), position: u64) -> SandboxError {
    // Core lets a worker say why it panics, and that is the end in any case.
    let panic = if port == PORT_MESSAGE { panic_of(&guest.ram, guest.modules(), value) } else { None };
    let place = place(guest.modules(), position);
    panic.unwrap_or_else(|| SandboxError::protocol(format!("`out` of a worker to port {port:#x} (in {place})")))
}

impl Board {
    fn set(&mut self, index: usize, state: State) {
        if let Some(worker) = self.workers.get_mut(index) {
            worker.state = state;
        }
    }

    /// Whether nobody is at work, or is to be.
    fn is_idle(&self) -> bool {
        self.workers.iter().all(|worker| worker.state == State::Idle)
    }
}

/// The workers of a machine. Their threads end with it.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Start the threads for so many, as far as the system lets them be started.
    pub fn start(count: usize) -> Self {
        let count = count.min(MAX_WORKERS);
        let mut workers = Self { shared: Arc::default(), threads: Vec::new() };
        if count == 0 {
            return workers;
        }
        workers.shared.board().workers.resize_with(count, Worker::default);
        let _signals = SignalsBlocked::new();
        for index in 0..count {
            let shared = Arc::clone(&workers.shared);
            let builder = std::thread::Builder::new().name("worker".into()).stack_size(128 << 10);
            match builder.spawn(move || shared.work(index)) {
                Ok(thread) => workers.threads.push(thread),
                Err(_) => break,
            }
        }
        let started = workers.threads.len();
        workers.shared.board().workers.truncate(started);
        workers
    }

    /// Wait until each thread has given up the rights that it does not need.
    pub fn expect(&self) {
        let starting = |board: &mut Board| board.workers.iter().any(|worker| worker.state == State::Starting);
        drop(self.shared.idle.wait_while(self.shared.board(), starting).unwrap_or_else(PoisonError::into_inner));
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// The processor time that they have used in the guest.
    pub fn used(&self) -> Duration {
        Duration::from_nanos(self.shared.used.iter().map(|used| used.load(Relaxed)).sum())
    }

    /// Why the guest has to be ended, if one of them did what it must not.
    pub fn failure(&self) -> Option<SandboxError> {
        self.shared.board().failure.clone()
    }

    /// Let the first `count` of them go on in this guest, and make their vCPUs if need be.
    ///
    /// # Errors
    /// [`SandboxError::GuestProtocol`] if there are not so many, or one is at work; [`SandboxError::KvmUnusable`].
    pub fn wake(&mut self, count: u32, vm: &VmFd, guest: &Arc<Guest>) -> Result<(), SandboxError> {
        let there = self.count();
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count == 0 || count > there {
            let text = format!("waking {count} workers, and there are {there}");
            return Err(SandboxError::protocol(text));
        }
        let mut board = self.shared.board();
        if !board.is_idle() {
            return Err(SandboxError::protocol("waking workers while they are at work"));
        }
        for (index, (worker, news)) in board.workers.iter_mut().zip(&self.shared.news).take(count).enumerate() {
            if !worker.is_made {
                worker.processor = Some(Processor::new(vm, guest, index as u64 + 1)?);
                worker.is_made = true;
            }
            worker.state = State::Woken;
            news.notify_one();
        }
        Ok(())
    }

    /// Let nobody begin who has not begun.
    pub fn call_off(&self) {
        for worker in &mut self.shared.board().workers {
            if worker.state == State::Woken {
                worker.state = State::Idle;
            }
        }
    }

    /// Wait until all are idle, for this long at most. `false` if they are not, or one of them failed.
    pub fn wait(&self, most: Duration) -> bool {
        let busy = |board: &mut Board| !board.is_idle() && board.failure.is_none();
        let waited = self.shared.idle.wait_timeout_while(self.shared.board(), most, busy);
        let (board, _) = waited.unwrap_or_else(PoisonError::into_inner);
        board.is_idle() && board.failure.is_none()
    }

    /// Let all leave the guest for good, and say where one of them was.
    pub fn stop(&self) -> Option<u64> {
        let mut board = self.shared.board();
        board.stopped = true;
        let busy = |board: &mut Board| !board.is_idle();
        self.shared.idle.wait_while(board, busy).unwrap_or_else(PoisonError::into_inner).position
    }
}

impl Processor {
    /// The vCPU of a worker, which counts from 1.
    fn new(vm: &VmFd, guest: &Arc<Guest>, number: u64) -> Result<Self, SandboxError> {
        let failed = |e: kvm_ioctls::Error| SandboxError::unusable("KVM_CREATE_VCPU", e.errno());
        let vcpu = vm.create_vcpu(number).map_err(failed)?;
        vcpu::set_up(&vcpu, number)?;
        vcpu::start_at(&vcpu, guest.layout.entry, number)?;
        Ok(Self { vcpu, guest: Arc::clone(guest) })
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        {
            let mut board = self.shared.board();
            (board.over, board.stopped) = (true, true);
        }
        self.shared.news.iter().for_each(Condvar::notify_all);
        for thread in self.threads.drain(..) {
            // One that panicked is over, too.
            let _ = thread.join();
        }
    }
}
