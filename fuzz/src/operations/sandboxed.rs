//! The guest of a commit in a sandbox, over the same devices in memory: `make damage SANDBOX=process`, and the other campaigns.
//!
//! Called as a function, a driver is fast and its code is covered. In a sandbox it is the module that is shipped, with the heap,
//! the ring and the messages that it has there, and the findings are the same: devices in memory judge every request.

use super::bounded_devices::BoundedDevices;
use super::Fixture;
use instar::sandbox::{
    self, BadRequest, BufferAccess, Host, ModuleSpec, Program, Sandbox, SandboxChoice, FIRST_FORMAT,
};
use instar_guest_abi::{DeviceConfig, ErrorCode, Member, MemberRole, Phase, Request, RequestOp, DEVICE_OUTPUT};
use instar_guest_commit::{CommitFailure, Outcome, Step};
use instar_guest_protocol::commit;
use instar_guest_protocol::end_message::Outcome as End;
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{FailureMessage, Message};
use instar_guest_sdk::{BlockIo, DriverError};
use instar_plugin_api::GuestModule;
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// The sandbox in which guests run, if `INSTAR_TEST_SANDBOX` names one; else they are called as functions.
pub fn chosen() -> Option<SandboxChoice> {
    static CHOSEN: OnceLock<Option<SandboxChoice>> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let name = std::env::var("INSTAR_TEST_SANDBOX").unwrap_or_default();
        let choice = SandboxChoice::from_name(&name);
        assert!(choice.is_some() || name.is_empty(), "INSTAR_TEST_SANDBOX is no sandbox: {name:?}");
        choice
    })
}

/// Commit a fixture's images, as [`guest`](super::commit::guest) does. Panics if the guest does what would end it.
pub fn run(
    choice: SandboxChoice,
    fixture: &Fixture,
    io: &mut BoundedDevices,
    configs: &BTreeMap<u32, DeviceConfig>,
) -> Result<Outcome, CommitFailure> {
    let mut names: Vec<&str> = Vec::new();
    let mut modules: Vec<GuestModule> = Vec::new();
    let mut module = |device: u32| {
        let format = fixture.formats[&device];
        let index = names.iter().position(|name| *name == format.name).unwrap_or_else(|| {
            names.push(format.name);
            modules.push((format.guest_module)());
            names.len() - 1
        });
        FIRST_FORMAT + index as u32
    };
    let chain = fixture.chain();
    let output = chain.iter().position(|&device| device == DEVICE_OUTPUT).unwrap_or(0);
    let members = chain.iter().enumerate().map(|(place, &device)| {
        let role = match place {
            _ if place > output => MemberRole::Below,
            _ if place == output => MemberRole::Write,
            _ if fixture.keeps_overlay() => MemberRole::Read,
            _ => MemberRole::Empty,
        };
        let device = DeviceConfig { module: module(device), ..configs[&device] };
        Member { role: role as u32, depth: place as u32, device, ..Member::default() }
    });
    let members: Vec<Member> = members.collect();
    let modules = names.iter().zip(&modules);
    let modules = modules.map(|(&name, module)| ModuleSpec { name, version: "fuzz", elf: module.elf.as_slice() });
    let payload = commit::Config {
        dry_run: false,
        resize_backing: fixture.resize,
        relinked: None,
        bitmaps: false,
        digest: false,
        detect_zeroes: false,
        announce_complete: false,
        verify: false,
    }
    .encode_to_vec();
    let program = Program::new(instar::commit::MODULE, payload, members, modules.collect());
    let mut devices = InMemory { io, end: None };
    match sandbox::run(&choice, &program, &mut devices) {
        Ok(_) => devices.end.expect("a guest that exits has said how it ended"),
        Err(error) => panic!("the {} sandbox ended the guest: {error}", choice.name()),
    }
}

/// Serves a guest from devices in memory.
struct InMemory<'a> {
    io: &'a mut BoundedDevices,
    end: Option<Result<Outcome, CommitFailure>>,
}

impl Host for InMemory<'_> {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        let buffers: Vec<u64> = requests.iter().map(|request| request.buffer).collect();
        for request in requests.iter_mut() {
            if matches!(RequestOp::from_u32(request.op), Some(RequestOp::Read | RequestOp::Write)) {
                let slice = memory.heap_slice(request.buffer, request.length);
                // The guest waits for the answer, and nothing else refers to its memory meanwhile.
                request.buffer = slice.expect("a buffer lies in the heap").ptr_guard_mut().as_ptr() as u64;
            }
        }
        // The status of each request says what became of it.
        let _ = self.io.submit(requests);
        requests.iter_mut().zip(buffers).for_each(|(request, buffer)| request.buffer = buffer);
        Ok(())
    }

    fn message(&mut self, message: Kind) -> Result<(), BadRequest> {
        assert!(self.end.is_none(), "a message after the end: {message:?}");
        match message {
            Kind::Phase(message) => self.io.enter(Phase::from_u32(message.phase).expect("a phase")),
            Kind::End(message) => {
                self.end = Some(match message.outcome.expect("an end has an outcome") {
                    End::Result(bytes) => Ok(outcome(&bytes)),
                    End::Failure(failure) => Err(self::failure(failure)),
                });
            }
            Kind::Event(event) => drop(commit::Event::decode(event.as_slice()).expect("an event")),
            Kind::Progress(_) | Kind::Log(_) => {}
            Kind::Panic(panic) => panic!("a panic that the sandbox did not take: {}", panic.text),
        }
        Ok(())
    }
}

fn outcome(bytes: &[u8]) -> Outcome {
    let commit::Outcome { clusters_committed, bytes_committed, overlay_clusters_cleared } =
        commit::Outcome::decode(bytes).expect("a result");
    Outcome { clusters_committed, bytes_committed, overlay_clusters_cleared }
}

fn failure(failure: FailureMessage) -> CommitFailure {
    let steps = [Step::Check, Step::Plan, Step::Write, Step::Verify, Step::Empty];
    let step = steps.into_iter().find(|step| step.name() == failure.step).expect("a step of a commit");
    let code = ErrorCode::from_u32(failure.error).expect("a code");
    let device = (failure.device != u32::MAX).then_some(failure.device);
    let offset = (failure.offset != u64::MAX).then_some(failure.offset);
    CommitFailure { step, error: DriverError { code, device, offset, errno: failure.errno, text: failure.text } }
}
