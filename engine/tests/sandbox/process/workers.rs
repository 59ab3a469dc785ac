//! Workers that may execute any code: each is a process like the main one, behind the same walls, with a doorbell of its own.

use super::code::{assemble, call, ring, told, wait, EXIT};
use super::inside::{can_look, children, maps, path, Map};
use crate::support::{raw_code, spec, TestHost};
use instar::sandbox::{BadRequest, BufferAccess, Host, Process, Report, Sandbox, SandboxError};
use instar_guest_abi::{
    request_status, ErrorCode, Request, GUEST_MEMORY_SIZE, PORT_EXIT, PORT_IDLE, PORT_JOIN, PORT_WAKE,
};
use instar_guest_protocol::guest_message;
use instar_guest_testmod::Scenario;
use std::fs::{read_dir, read_link, read_to_string};
use std::time::Instant;

/// How many there are.
const WORKERS: usize = 2;

/// Code of the main processor, followed by that of its workers.
fn both(main: &[u8], worker: &[u8]) -> Vec<u8> {
    let length = u32::try_from(main.len()).unwrap();
    // test edi, edi; jnz WORKER
    [&[0x85, 0xff, 0x0f, 0x85][..], &length.to_le_bytes(), main, worker].concat()
}

/// Ring, and wait for the answer.
fn ask(port: u16, value: u32) -> Vec<u8> {
    [ring(port.into(), value), wait()].concat()
}

/// Wake so many; they and the main processor run what follows.
pub fn waking(workers: usize) -> Vec<u8> {
    both(&ask(PORT_WAKE, u32::try_from(workers).unwrap()), &[])
}

/// Wake all, and wait until all are idle.
fn share() -> Vec<u8> {
    [ask(PORT_WAKE, u32::try_from(WORKERS).unwrap()), ask(PORT_JOIN, 0)].concat()
}

/// Run this code with workers and this host.
fn run_with(code: &[u8], host: &mut dyn Host) -> Result<Report, SandboxError> {
    let elf = raw_code(code);
    Process.acquire(WORKERS).unwrap().run(&spec(&Process, Scenario::Good).with_core(&elf), host)
}

/// What becomes of a guest whose workers run this code.
fn failure(worker: &[u8]) -> SandboxError {
    run_with(&both(&share(), worker), &mut TestHost::default()).unwrap_err()
}

#[test]
fn a_worker_makes_no_other_system_call_either() {
    const X32: u32 = 0x4000_0000;
    // `uretprobe` and `uprobe` raise faults of their own (calls.rs).
    let numbers = (0..600).filter(|number| ![EXIT, 335, 336].contains(number));
    for number in numbers.chain([X32, X32 + 1, X32 + 62, X32 + 521, u32::MAX]) {
        let error = failure(&call(number));
        let SandboxError::SystemCall { number: told, x86_64: true, .. } = error else { panic!("{number}: {error}") };
        assert_eq!(told, number, "{error}");
    }
}

#[test]
fn no_worker_signals_or_traces_another() {
    // kill, tkill, tgkill, rt_sigqueueinfo, ptrace, process_vm_readv, process_vm_writev, pidfd_open, pidfd_send_signal,
    // pidfd_getfd, kcmp, process_madvise: of every process that may be signaled, and of the numbers that follow another.
    for number in [62, 200, 234, 129, 101, 310, 311, 434, 424, 438, 312, 440] {
        for target in [u64::MAX, 0, 1, 2, 1000] {
            let target = [&[0x48, 0xbf], &target.to_le_bytes()[..]].concat();
            let code = [&target[..], assemble!("mov esi, 9", "mov edx, 9"), &call(number)].concat();
            let error = failure(&code);
            assert!(
                matches!(error, SandboxError::SystemCall { number: told, .. } if told == number),
                "{number}: {error}"
            );
        }
    }
}

#[test]
fn the_doorbell_of_a_worker_says_that_it_is_idle_and_nothing_else() {
    let idle = u32::from(PORT_IDLE);
    let ports = (0..24_u32).chain(0x500..0x520).chain([0xffff, idle | 0x1_0000, idle | 0x8000_0000, u32::MAX]);
    // Port 0x512 is that of faults, which the next test forges.
    for port in ports.filter(|port| *port != idle && *port != u32::from(instar_guest_abi::PORT_FAULT)) {
        let error = failure(&ring(port, 0xffff_ffff));
        assert_eq!(error.code(), ErrorCode::GuestProtocol, "{error}");
        assert!(error.to_string().contains(&format!("`out` of a worker to port {port:#x}")), "{error}");
    }
    // Another length, or another descriptor, is no ring.
    for (number, descriptor, length) in [(1_u32, 4_u32, 7_u32), (1, 4, 9), (1, 3, 8), (1, 5, 8), (0, 4, 8), (0, 3, 1)] {
        let mov = |opcode: u8, value: u32| [&[opcode], &value.to_le_bytes()[..]].concat();
        let code = [mov(0xbf, descriptor), mov(0xbe, 0x4_0000), mov(0xba, length), call(number)].concat();
        let error = failure(&code);
        assert!(matches!(error, SandboxError::SystemCall { .. }), "{number} {descriptor} {length}: {error}");
    }
}

#[test]
fn what_a_worker_rings_while_it_is_idle_is_not_taken_for_the_starters_word() {
    // It becomes idle, and rings what the starter says when it is done, which is read when it is woken again.
    let worker = [&ring(PORT_IDLE.into(), 0)[..], &ring(0, 0), &wait(), &ring(PORT_IDLE.into(), 0), &wait()].concat();
    let error = run_with(&both(&[share(), share()].concat(), &worker), &mut TestHost::default()).unwrap_err();
    assert!(error.to_string().contains("`out` of a worker to port 0x0"), "{error}");
}

#[test]
fn a_worker_that_lies_about_being_idle_counts_and_ends_with_the_guest() {
    let worker = [&ring(PORT_IDLE.into(), 0)[..], &[0xeb, 0xfe]].concat();
    let started = Instant::now();
    let error = run_with(&both(&[share(), wait()].concat(), &worker), &mut TestHost::default()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestStalled, "{error}");
    assert!(matches!(error, SandboxError::GuestStalled { .. }), "{error}");
    assert!(started.elapsed().as_secs() < 60);
    assert!(children().is_empty());
    run_with(&both(&[share(), ring(PORT_EXIT.into(), 0)].concat(), &worker), &mut TestHost::default()).unwrap();
    assert!(children().is_empty());
}

#[test]
fn a_worker_that_goes_is_missed() {
    let end = [assemble!("mov edi, 7"), &call(EXIT)[..]].concat();
    let error = failure(&end);
    assert_eq!(error.to_string(), "the guest broke the protocol: its process ended with status 7");
    // Also where nobody waits for it yet.
    let worker = [&ring(PORT_IDLE.into(), 0)[..], &end].concat();
    let error = run_with(&both(&[share(), share()].concat(), &worker), &mut TestHost::default()).unwrap_err();
    assert_eq!(error.to_string(), "the guest broke the protocol: its process ended with status 7");
}

/// Compares the processes of a guest while the guest waits.
#[derive(Default)]
struct Looking {
    doorbells: Vec<String>,
}

impl Host for Looking {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        let children = children();
        assert_eq!(children.len(), 1 + WORKERS);
        let rights = |child: i32| {
            let status = read_to_string(path(child, "status")).unwrap();
            let fields = ["Name:", "Threads:", "Cap", "Groups:", "Sig", "Seccomp", "NoNewPrivs:"];
            let kept = |line: &&str| fields.iter().any(|field| line.starts_with(field));
            let status: Vec<String> = status.lines().filter(kept).map(str::to_owned).collect();
            (status, read_to_string(path(child, "limits")).unwrap())
        };
        for child in &children {
            assert_eq!(rights(*child), rights(children[0]));
        }
        if can_look() {
            // Where the kernel put the starter and the memory for signals differs.
            let mapped = |child: i32| -> (Vec<Map>, Vec<String>) {
                let (guest, own): (Vec<_>, Vec<_>) =
                    maps(child).into_iter().partition(|map| map.range.end <= GUEST_MEMORY_SIZE);
                let mut kinds: Vec<String> = own
                    .iter()
                    .map(|map| format!("{} {} {}", map.rights, map.name, map.range.end - map.range.start))
                    .collect();
                kinds.sort_unstable();
                (guest, kinds)
            };
            for child in children {
                assert_eq!(mapped(child), mapped(super::inside::children()[0]));
                let open: Vec<_> = read_dir(path(child, "fd")).unwrap().map(|entry| entry.unwrap().path()).collect();
                assert_eq!(open, [path(child, "fd/4")]);
                self.doorbells.push(read_link(&open[0]).unwrap().display().to_string());
            }
            self.doorbells.sort_unstable();
            self.doorbells.dedup();
            assert_eq!(self.doorbells.len(), 1 + WORKERS, "each has its own");
            assert!(self.doorbells.iter().all(|bell| bell.starts_with("socket:")), "{:?}", self.doorbells);
        }
        memory.heap_slice(requests[0].buffer, 8).unwrap().copy_from(&[0; 8]);
        requests[0].status = request_status::OK;
        Ok(())
    }

    fn message(&mut self, message: guest_message::Kind) -> Result<(), BadRequest> {
        Err(BadRequest(format!("{message:?}")))
    }
}

#[test]
fn a_worker_has_what_the_main_processor_has_and_a_doorbell_of_its_own() {
    let main = [share(), told(), ring(PORT_EXIT.into(), 0)].concat();
    let worker = [ring(PORT_IDLE.into(), 0), wait()].concat();
    let report = run_with(&both(&main, &worker), &mut Looking::default()).unwrap();
    assert_eq!(report.workers, WORKERS);
}
