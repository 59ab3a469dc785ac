//! Guests and a host for the tests of the sandboxes.

use instar::sandbox::{self, BadRequest, BufferAccess, Host, ModuleSpec, Program, Report, Sandbox, SandboxError};
use instar_guest_abi::{
    device_flags, request_status, DeviceConfig, Member, MemberRole, Request, RequestOp, DEVICE_OUTPUT,
};
use instar_guest_build::GuestModule;
use instar_guest_protocol::commit::Outcome;
use instar_guest_protocol::{end_message, guest_message, FailureMessage, Message};
use instar_guest_testmod::Scenario;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

fn build(binary: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let module = GuestModule::new("instar-guest-testmod", "../guest/testmod", binary);
    // Every test is a process, and all of them build: cargo waits for itself, but what it has built is copied.
    let own = tempfile::tempdir().unwrap();
    let (elf, _) = module.out_dir(own.path().to_owned()).target_dir(root.join("guest")).try_build().unwrap();
    std::fs::read(elf).unwrap()
}

pub fn operation() -> &'static [u8] {
    static ELF: OnceLock<Vec<u8>> = OnceLock::new();
    ELF.get_or_init(|| build("test-operation"))
}

pub fn format() -> &'static [u8] {
    static ELF: OnceLock<Vec<u8>> = OnceLock::new();
    ELF.get_or_init(|| build("test-format"))
}

/// Serves any request; READ fills with 0x5a.
#[derive(Default)]
pub struct TestHost {
    pub ops: Vec<u32>,
    pub batches: Vec<usize>,
    pub written: Vec<u8>,
    pub copies: Vec<Request>,
    pub outcome: Option<Outcome>,
    pub failure: Option<FailureMessage>,
    pub logs: Vec<String>,
    pub interrupt_after: Option<usize>,
}

impl Host for TestHost {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        self.batches.push(requests.len());
        for request in requests {
            self.ops.push(request.op);
            let op = RequestOp::from_u32(request.op).ok_or_else(|| BadRequest("an unknown operation".to_owned()))?;
            if matches!(op, RequestOp::Read | RequestOp::Write) {
                let slice = memory.heap_slice(request.buffer, request.length);
                let slice = slice.ok_or_else(|| BadRequest("a buffer outside the heap".to_owned()))?;
                let length = usize::try_from(request.length).unwrap();
                if op == RequestOp::Read {
                    slice.copy_from(&vec![0x5a_u8; length]);
                } else {
                    self.written.resize(length, 0);
                    slice.copy_to(&mut self.written[..]);
                }
            }
            if op == RequestOp::Copy {
                self.copies.push(*request);
            }
            request.status = request_status::OK;
        }
        Ok(())
    }

    fn message(&mut self, message: guest_message::Kind) -> Result<(), BadRequest> {
        match message {
            guest_message::Kind::End(end) => match end.outcome.unwrap() {
                end_message::Outcome::Result(result) => self.outcome = Some(Outcome::decode(&result[..]).unwrap()),
                end_message::Outcome::Failure(failure) => self.failure = Some(failure),
            },
            guest_message::Kind::Log(log) => self.logs.push(log.text),
            other => return Err(BadRequest(format!("an unexpected message {other:?}"))),
        }
        Ok(())
    }

    fn interrupted(&self) -> bool {
        self.interrupt_after.is_some_and(|count| self.batches.len() >= count)
    }
}

pub fn members() -> Vec<Member> {
    let device = DeviceConfig {
        flags: device_flags::PRESENT | device_flags::WRITABLE,
        module: sandbox::FIRST_FORMAT,
        file_length: 1 << 20,
        virtual_size: 1 << 20,
        ..DeviceConfig::default()
    };
    let member = |role: MemberRole, device| Member { role: role as u32, device, ..Member::default() };
    vec![member(MemberRole::Empty, device), member(MemberRole::Write, DeviceConfig { device: DEVICE_OUTPUT, ..device })]
}

pub fn spec(on: &dyn Sandbox, scenario: Scenario) -> Program<'static> {
    let modules = vec![module("plain", format())];
    Program::new(instar::commit::MODULE, scenario.payload(on.name() == "process").to_vec(), members(), modules)
        .with_operation(module("test", operation()))
        .with_stall_limit(Duration::from_secs(2))
}

pub fn module(name: &'static str, elf: &'static [u8]) -> ModuleSpec<'static> {
    ModuleSpec { name, version: "0.9.1", elf }
}

pub fn run(on: &dyn Sandbox, scenario: Scenario) -> (TestHost, Result<Report, SandboxError>) {
    let mut host = TestHost::default();
    let result = sandbox::run(on, &spec(on, scenario), &mut host);
    (host, result)
}

/// The same with workers.
pub fn run_with_workers(
    on: &dyn Sandbox,
    workers: usize,
    scenario: Scenario,
) -> (TestHost, Result<Report, SandboxError>) {
    let mut host = TestHost::default();
    let result = on.acquire(workers).and_then(|ready| ready.run(&spec(on, scenario), &mut host));
    (host, result)
}

/// The error's text.
pub fn failure(on: &dyn Sandbox, scenario: Scenario) -> String {
    run(on, scenario).1.unwrap_err().to_string()
}

/// An ELF whose only segment is `code`, mapped read-execute, with its entry at the first byte.
pub fn raw_code(code: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 4096;
    let mut elf = vec![0; HEADERS + code.len()];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[3, 0, 62, 0, 1]); // shared object, x86-64, version
    put(32, &64_u64.to_le_bytes()); // program headers
    put(52, &[64, 0, 56, 0, 1]); // sizes, one program header
    put(64, &[1, 0, 0, 0, 5]); // to load, read and execute
    put(64 + 8, &(HEADERS as u64).to_le_bytes());
    put(64 + 32, &(code.len() as u64).to_le_bytes());
    put(64 + 40, &(code.len() as u64).to_le_bytes());
    put(64 + 48, &4096_u64.to_le_bytes());
    put(HEADERS, code);
    elf
}

/// Run `code` instead of core, with nothing to help it.
pub fn run_raw(on: &dyn Sandbox, code: &[u8]) -> Result<Report, SandboxError> {
    let elf = raw_code(code);
    sandbox::run(on, &spec(on, Scenario::Good).with_core(&elf), &mut TestHost::default())
}

/// `mov edi, ADDRESS` followed by `rest`.
pub fn with_address(address: u64, rest: &[u8]) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend(u32::try_from(address).unwrap().to_le_bytes());
    code.extend(rest);
    code
}

/// A test on every sandbox: one body, a test of each name.
macro_rules! on_both {
    (fn $name:ident($on:ident) $body:block) => {
        mod $name {
            use super::*;

            fn test($on: &dyn instar::sandbox::Sandbox) $body

            #[test]
            fn kvm() {
                test(&instar::sandbox::Kvm);
            }

            #[test]
            fn process() {
                test(&instar::sandbox::Process);
            }
        }
    };
}
pub(crate) use on_both;
