//! Core at its place in the guest: fixed addresses, the one heap, the way to the host. Only ever run in the guest.
//!
//! How the host is called is the one thing that differs between sandboxes: an [`Exit`]. Each sandbox has a program of its own
//! that is this module with its exit: `core-module` for a virtual machine, `process-module` for a process.

use crate::{
    check_configuration, check_descriptor, encode_panic, module_name, submit, Doorbell, Heap, Job, StartError,
};
use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::marker::PhantomData;
use core::ops::Range;
use core::ptr::null;
use core::slice;
use core::sync::atomic::{AtomicUsize, Ordering};
use instar_guest_abi::{
    CallTable, ChainConfig, FormatOps, ModuleDescriptor, ModuleEntry, ModuleKind, ModuleTable, OperationConfig,
    OperationOps, ParallelWork, Request, RequestOp, Ring, CHAIN_CONFIG_ADDR, MAX_MODULES, MAX_WORKERS, MESSAGE_ADDR,
    MESSAGE_SIZE, MODULE_ABI_MAJOR, MODULE_ABI_MINOR, MODULE_TABLE_ADDR, OPERATION_CONFIG_ADDR, PORT_DOORBELL,
    PORT_EXIT, PORT_IDLE, PORT_JOIN, PORT_MESSAGE, PORT_WAKE, RING_ADDR, WORKER_STACKS_ADDR,
};

/// The way out of the sandbox.
pub trait Exit: 'static {
    /// Tell the host this value on this port, and wait until the host has done what that asks for.
    ///
    /// # Safety
    /// Called in the guest. The host may read and write the ring, the message and the buffers that the ring names: memory
    /// counts as changed.
    unsafe fn out(port: u16, value: u32);
}

/// State of the main processor, which has no interrupts. Workers do not touch it.
struct Global<T>(UnsafeCell<T>);

// SAFETY: one processor uses it: a worker that comes here is [stopped](refuse_worker).
unsafe impl<T> Sync for Global<T> {}

/// What the workers do.
static JOB: Job = Job::new();
/// How many there are.
static WORKERS: AtomicUsize = AtomicUsize::new(0);

/// Whether a worker is asking: stacks say who.
fn is_worker() -> bool {
    let stack: u64;
    // SAFETY: reads one register.
    unsafe { asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags)) };
    stack > WORKER_STACKS_ADDR
}

/// End the guest if a worker wants what is the main processor's: that would be a race.
fn refuse_worker(what: &'static str) {
    if is_worker() {
        panic_with(format_args!("a worker {what}"));
    }
}

/// The work that was begun last.
#[derive(Clone, Copy)]
struct SharedWork {
    /// Counts what was begun.
    number: u64,
    /// It has not ended.
    is_begun: bool,
    /// Workers were woken for it.
    has_workers: bool,
}

static SHARED_WORK: Global<SharedWork> =
    Global(UnsafeCell::new(SharedWork { number: 0, is_begun: false, has_workers: false }));

/// What is known of the work that was begun last, for the time of one access.
fn with_shared<T>(body: impl FnOnce(&mut SharedWork) -> T) -> T {
    // SAFETY: one processor, and no body reaches this again.
    body(unsafe { &mut *SHARED_WORK.0.get() })
}

static HEAP: Global<Heap> = Global(UnsafeCell::new(Heap::new()));
static HEAP_RANGE: Global<Range<u64>> = Global(UnsafeCell::new(0..0));

/// The heap, for the time of one call.
fn with_heap<T>(body: impl FnOnce(&mut Heap) -> T) -> T {
    // SAFETY: one thread, and no body below reaches the heap again.
    body(unsafe { &mut *HEAP.0.get() })
}

/// What every module is given.
struct Table<E>(PhantomData<E>);

impl<E: Exit> Table<E> {
    const TABLE: &'static CallTable = &CallTable {
        #[allow(clippy::cast_possible_truncation, reason = "some dozens of bytes")]
        size: size_of::<CallTable>() as u32,
        abi_major: MODULE_ABI_MAJOR,
        abi_minor: MODULE_ABI_MINOR,
        reserved: 0,
        alloc,
        dealloc,
        submit: submit_all::<E>,
        message: message::<E>,
        heap_free,
        panic: panic::<E>,
        processors,
        parallel_begin: parallel_begin::<E>,
        parallel_end: parallel_end::<E>,
    };
}

/// An address of the guest, which is of 64 bits.
#[allow(clippy::cast_possible_truncation, reason = "built for 64 bits only")]
const fn address(value: u64) -> usize {
    value as usize
}

fn out<E: Exit>(port: u16, value: u32) {
    // SAFETY: in the guest; no reference to what the host may change is used across the call.
    unsafe { E::out(port, value) };
}

extern "C" fn alloc(size: usize, align: usize) -> *mut u8 {
    refuse_worker("allocates memory");
    with_heap(|heap| heap.alloc(size, align))
}

extern "C" fn dealloc(pointer: *mut u8, size: usize, align: usize) {
    refuse_worker("gives memory back");
    // SAFETY: the interface promises what `alloc` returned for this size and alignment.
    with_heap(|heap| unsafe { heap.dealloc(pointer, size, align) });
}

extern "C" fn heap_free() -> usize {
    with_heap(|heap| heap.free())
}

struct Bell<E> {
    /// The code that submitted the requests.
    caller: u64,
    exit: PhantomData<E>,
}

impl<E: Exit> Doorbell for Bell<E> {
    fn ring(&mut self, requests: &mut [Request]) {
        // SAFETY: the ring is mapped there, and no other reference to it exists.
        let entries = unsafe { &mut (*(RING_ADDR as *mut Ring)).entries };
        for (entry, request) in entries.iter_mut().zip(&*requests) {
            *entry = Request { caller: self.caller, ..*request };
        }
        out::<E>(PORT_DOORBELL, u32::try_from(requests.len()).unwrap_or(0));
        for (request, entry) in requests.iter_mut().zip(&*entries) {
            request.status = entry.status;
            if request.op == RequestOp::NextData as u32 || request.op == RequestOp::Length as u32 {
                (request.offset, request.length) = (entry.offset, entry.length);
            }
        }
    }

    fn heap(&self) -> Range<u64> {
        // SAFETY: written once, before any module runs.
        unsafe { (*HEAP_RANGE.0.get()).clone() }
    }

    fn with_bounce(&mut self, length: usize, body: &mut dyn FnMut(&mut Self, u64)) -> bool {
        let buffer = alloc(length, 16);
        if buffer.is_null() {
            return false;
        }
        body(self, buffer as u64);
        dealloc(buffer, length, 16);
        true
    }

    unsafe fn copy(&mut self, from: u64, to: u64, length: usize) {
        // SAFETY: the caller promises that both are accessible and apart.
        unsafe { core::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, length) };
    }
}

/// Execute requests for the module that calls: its return address is noted in each.
#[unsafe(naked)]
extern "C" fn submit_all<E: Exit>(requests: *mut Request, count: usize) -> usize {
    naked_asm!("mov rdx, [rsp]", "jmp {submit_for}", submit_for = sym submit_for::<E>)
}

extern "C" fn submit_for<E: Exit>(requests: *mut Request, count: usize, caller: u64) -> usize {
    refuse_worker("asks for a device");
    if requests.is_null() || count == 0 {
        return 0;
    }
    // SAFETY: the interface promises `count` requests whose buffers are accessible to the guest.
    unsafe { submit(&mut Bell::<E> { caller, exit: PhantomData }, slice::from_raw_parts_mut(requests, count)) }
}

/// The message buffer.
fn buffer() -> &'static mut [u8] {
    // SAFETY: the buffer is mapped there; each of the two users is done with it when the host has read it.
    unsafe { slice::from_raw_parts_mut(MESSAGE_ADDR as *mut u8, address(MESSAGE_SIZE)) }
}

extern "C" fn message<E: Exit>(bytes: *const u8, length: usize) {
    refuse_worker("sends a message");
    if bytes.is_null() {
        return;
    }
    // SAFETY: the interface promises `length` readable bytes.
    let bytes = unsafe { slice::from_raw_parts(bytes, length) };
    match buffer().get_mut(..length) {
        Some(buffer) => {
            buffer.copy_from_slice(bytes);
            out::<E>(PORT_MESSAGE, u32::try_from(length).unwrap_or(0));
        }
        None => report::<E>("a module sent a message that is too long", 0),
    }
}

/// Report a panic of the module that calls.
#[unsafe(naked)]
extern "C" fn panic<E: Exit>(text: *const u8, length: usize) -> ! {
    naked_asm!("mov rdx, [rsp]", "jmp {panic_of}", panic_of = sym panic_of::<E>)
}

extern "C" fn panic_of<E: Exit>(text: *const u8, length: usize, caller: u64) -> ! {
    let text = if text.is_null() {
        &[]
    } else {
        // SAFETY: the interface promises `length` readable bytes.
        unsafe { slice::from_raw_parts(text, length) }
    };
    report::<E>(core::str::from_utf8(text).unwrap_or("a panic whose message is not text"), caller)
}

/// Report a panic of the code at an address, 0 if it is not known, and end the guest.
fn report<E: Exit>(text: &str, address: u64) -> ! {
    let length = encode_panic(if text.is_empty() { "without a message" } else { text }, address, buffer());
    out::<E>(PORT_MESSAGE, u32::try_from(length).unwrap_or(0));
    exit::<E>()
}

extern "C" fn processors() -> usize {
    WORKERS.load(Ordering::Relaxed) + 1
}

/// Let as many workers as there are slots and items for begin with the items. Slot 0 stays free for this processor.
extern "C" fn parallel_begin<E: Exit>(work: ParallelWork, context: *const c_void, slots: usize, count: usize) -> u64 {
    refuse_worker("shares work");
    end_work::<E>();
    JOB.publish(work, context, slots, count);
    let workers = WORKERS.load(Ordering::Relaxed).min(slots.min(count.saturating_add(1)).saturating_sub(1));
    if workers > 0 {
        out::<E>(PORT_WAKE, u32::try_from(workers).unwrap_or(0));
    }
    with_shared(|shared| {
        *shared = SharedWork { number: shared.number + 1, is_begun: true, has_workers: workers > 0 };
        shared.number
    })
}

extern "C" fn parallel_end<E: Exit>(number: u64) {
    refuse_worker("waits for shared work");
    if with_shared(|shared| shared.number) == number {
        end_work::<E>();
    }
}

/// Do what is left of the work that was begun last, and wait for the workers. A module that waits for it later finds it done.
fn end_work<E: Exit>() {
    let SharedWork { is_begun, has_workers, .. } = with_shared(|shared| *shared);
    if !is_begun {
        return;
    }
    JOB.lead();
    if has_workers {
        // From here on, nobody has anything of this work: its memory may be used for something else.
        out::<E>(PORT_JOIN, 0);
    }
    JOB.see();
    with_shared(|shared| shared.is_begun = false);
}

/// What a worker does: a part of the work of the moment, whenever it is woken.
pub fn help<E: Exit>() -> ! {
    loop {
        JOB.help();
        out::<E>(PORT_IDLE, 0);
    }
}

fn exit<E: Exit>() -> ! {
    loop {
        out::<E>(PORT_EXIT, 0);
    }
}

/// Check, set up the heap, call the modules' entries, run the operation.
///
/// # Safety
/// Called once, by the entry of core, in the guest as the host sets it up.
pub unsafe fn start<E: Exit>() -> ! {
    // SAFETY: the host mapped and wrote the three pages.
    let (config, chain, modules) = unsafe {
        (
            &*(OPERATION_CONFIG_ADDR as *const OperationConfig),
            &*(CHAIN_CONFIG_ADDR as *const ChainConfig),
            &*(MODULE_TABLE_ADDR as *const ModuleTable),
        )
    };
    // SAFETY: a static table; done before anything can allocate or panic.
    unsafe { instar_guest_sdk::runtime::init(Table::<E>::TABLE) };
    let count = check_configuration(config, chain, modules).unwrap_or_else(|error| fail("instar", error));
    WORKERS.store(usize::try_from(config.workers).unwrap_or(0).min(MAX_WORKERS), Ordering::Relaxed);
    // SAFETY: one thread; nothing has used the heap yet, and the host reserved the range for it.
    let claimed = unsafe {
        *HEAP_RANGE.0.get() = config.heap_start..config.heap_end;
        with_heap(|heap| heap.claim(address(config.heap_start), address(config.heap_end)))
    };
    if !claimed {
        fail("instar", StartError::Heap);
    }

    let mut formats = [null::<FormatOps>(); MAX_MODULES];
    for (entry, ops) in modules.entries.iter().zip(&mut formats).take(count).skip(2) {
        *ops = open_module(Table::<E>::TABLE, entry, ModuleKind::Format).ops.cast();
    }
    if let Some(operation) = modules.entries.get(1) {
        let ops = open_module(Table::<E>::TABLE, operation, ModuleKind::Operation).ops.cast::<OperationOps>();
        // SAFETY: the descriptor of an operation points to its table.
        let run = unsafe { (*ops).run };
        run(Table::<E>::TABLE, config, chain, formats.as_ptr(), count);
    }
    // The host lets no guest end while its workers are at work.
    end_work::<E>();
    exit::<E>()
}

fn fail(module: &str, error: StartError) -> ! {
    // Formatted by the panic handler, without the heap.
    panic_with(format_args!("module {module}: {error}"))
}

#[allow(clippy::panic, reason = "the way to report that the guest cannot start")]
fn panic_with(text: core::fmt::Arguments<'_>) -> ! {
    panic!("{text}")
}

/// Call a module's entry and check what it returns.
fn open_module(table: &CallTable, entry: &ModuleEntry, kind: ModuleKind) -> &'static ModuleDescriptor {
    // SAFETY: the host checked that the entry lies in the module's text, and made it of this type by contract.
    let function = unsafe {
        core::mem::transmute::<usize, extern "C" fn(*const CallTable) -> *const ModuleDescriptor>(address(entry.entry))
    };
    // SAFETY: null or a descriptor that lives as long as the guest, by contract.
    let descriptor = unsafe { function(table).as_ref() };
    match (check_descriptor(descriptor, kind), descriptor) {
        (Ok(()), Some(descriptor)) => descriptor,
        (Err(error), _) => fail(module_name(entry), error),
        (Ok(()), None) => fail(module_name(entry), StartError::NoDescriptor),
    }
}
