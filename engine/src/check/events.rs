//! The messages of a check's guest: findings, counts, the plan of a repair, and phases.

use crate::devices::Devices;
use crate::operation::{decode, enter_planned, Events, Meter};
use crate::sandbox::BadRequest;
use instar_guest_abi::{CheckSummary, FindingKind, Phase};
use instar_guest_protocol::check::{event, Event, Finding, Outcome, Plan};

/// Findings that are kept, of each kind.
const MAX_FINDINGS: usize = 200;

/// Findings, one line each as the guest wrote it.
pub type Findings = Vec<(FindingKind, String)>;

/// The messages that a check's guest has sent, and its permissions.
#[derive(Default)]
pub struct CheckEvents {
    /// Says how far it is, if anybody wants to know.
    pub(super) meter: Option<Meter>,
    /// The findings in numbers, once the guest said so.
    pub found: CheckSummary,
    /// The first findings of the last check.
    pub findings: Findings,
    /// The plan of a repair, once the guest said so.
    pub plan: Option<Plan>,
    /// Reasons why the plan leaves faults unrepaired.
    pub kept: Findings,
    /// The first findings of the check before the repair.
    pub before: Findings,
    /// The permission to repair; `None` if nothing may be repaired.
    pub grant: Option<Grant>,
}

/// The permission of a repair's guest.
#[derive(Clone, Copy, Debug)]
pub struct Grant {
    /// [`Phase::Inspect`] in a dry run, [`Phase::Target`] otherwise.
    pub last_phase: Phase,
    /// Maximum combined length of the image's files in bytes.
    pub longest: u64,
}

impl CheckEvents {
    /// Expect the messages of a guest that may repair the image.
    #[must_use]
    pub fn repairing(grant: Grant) -> Self {
        Self { grant: Some(grant), ..Self::default() }
    }

    fn finding(&mut self, finding: Finding) -> Result<(), BadRequest> {
        let Some(kind) = FindingKind::from_u32(finding.kind) else {
            return Err(BadRequest(format!("a finding of the unknown kind {}", finding.kind)));
        };
        let findings = if finding.kept { &mut self.kept } else { &mut self.findings };
        if findings.len() < MAX_FINDINGS {
            findings.push((kind, finding.text));
        }
        Ok(())
    }

    /// The guest knows what it would repair: the first change comes next.
    fn planned(&mut self, plan: Plan) -> Result<(), BadRequest> {
        let Some(grant) = self.grant else {
            return Err(BadRequest("a plan to repair an image that is only checked".to_owned()));
        };
        if self.plan.is_some() {
            return Err(BadRequest("a second plan".to_owned()));
        }
        if plan.final_length > grant.longest {
            return Err(BadRequest(format!(
                "a repair that makes the image {} bytes long, where {} are allowed",
                plan.final_length, grant.longest
            )));
        }
        self.plan = Some(plan);
        Ok(())
    }

    /// The phase in which the guest has to end.
    fn last_phase(&self) -> Phase {
        match (self.grant, &self.plan) {
            (Some(grant), Some(plan)) if mends(plan) => grant.last_phase,
            _ => Phase::Inspect,
        }
    }
}

/// Whether there is anything to repair.
fn mends(plan: &Plan) -> bool {
    (plan.corruptions, plan.leaks) != (0, 0)
}

/// The numbers of a check.
pub(super) fn summary(found: &Outcome) -> CheckSummary {
    CheckSummary {
        image_end_offset: found.image_end_offset,
        total_clusters: found.total_clusters,
        allocated_clusters: found.allocated_clusters,
        fragmented_clusters: found.fragmented_clusters,
        compressed_clusters: found.compressed_clusters,
        corruptions: found.corruptions,
        leaks: found.leaks,
        unused_tail: found.unused_tail,
    }
}

impl Events for CheckEvents {
    fn meter(&self) -> Option<&Meter> {
        self.meter.as_ref()
    }

    fn event(&mut self, _: &mut Devices, event: &[u8]) -> Result<(), BadRequest> {
        let event: Event = decode(event)?;
        match event.kind {
            Some(event::Kind::Finding(finding)) => self.finding(finding),
            Some(event::Kind::Plan(plan)) => self.planned(plan),
            None => Err(BadRequest("an event that says nothing".to_owned())),
        }
    }

    fn enter(&mut self, devices: &mut Devices, phase: Phase) -> Result<(), BadRequest> {
        if self.grant.is_none() {
            return Err(BadRequest("a change was announced in an operation that only reads".to_owned()));
        }
        enter_planned(devices, phase, self.plan.as_ref(), self.last_phase())?;
        self.before = std::mem::take(&mut self.findings);
        // What it takes is not known beforehand.
        self.meter.iter().for_each(|meter| meter.planned(0));
        Ok(())
    }

    /// What the guest says of a success has to be what the devices saw.
    fn succeeded(&mut self, devices: &mut Devices, result: &[u8]) -> Result<(), BadRequest> {
        let found: Outcome = decode(result)?;
        self.found = summary(&found);
        let knows = self.grant.is_none() || self.plan.is_some();
        devices.finished(knows.then(|| self.last_phase())).map_err(BadRequest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Device;
    use crate::operation::test_buffers::Zeroes;
    use crate::operation::{Cancel, Handler};
    use crate::sandbox::Host;
    use instar_guest_abi::{DeviceRole, Request, DEVICE_OUTPUT};
    use instar_guest_protocol::end_message::Outcome as End;
    use instar_guest_protocol::guest_message::Kind;
    use instar_guest_protocol::{EndMessage, Message, PhaseMessage};

    const LENGTH: u64 = 4096;

    fn event(kind: event::Kind) -> Kind {
        Kind::Event(Event { kind: Some(kind) }.encode_to_vec())
    }

    fn finding(kind: u32) -> Kind {
        event(event::Kind::Finding(Finding { kind, text: "cluster 7".into(), kept: false }))
    }

    fn plan(leaks: u64, final_length: u64) -> Kind {
        event(event::Kind::Plan(Plan { leaks, final_length, ..Plan::default() }))
    }

    fn target() -> Kind {
        Kind::Phase(PhaseMessage { phase: Phase::Target as u32 })
    }

    fn done() -> Kind {
        let result = Outcome { leaks: 3, ..Outcome::default() }.encode_to_vec();
        Kind::End(EndMessage { outcome: Some(End::Result(result)) })
    }

    fn handler() -> Handler<CheckEvents> {
        Handler::new(Devices::new(), CheckEvents::default(), Cancel::new())
    }

    fn repairing(last_phase: Phase) -> Handler<CheckEvents> {
        let mut devices = Devices::new();
        let file = tempfile::tempfile().unwrap_or_else(|error| unreachable!("{error}"));
        let _ = file.set_len(LENGTH);
        let device = Device::new(file, true, LENGTH, 2 * LENGTH, false).with_role(DeviceRole::Target);
        devices.attach(DEVICE_OUTPUT, device);
        let grant = Grant { last_phase, longest: 2 * LENGTH };
        Handler::new(devices, CheckEvents::repairing(grant), Cancel::new())
    }

    impl Handler<CheckEvents> {
        fn tell(&mut self, message: Kind) -> String {
            self.message(message).map_or_else(|bad| bad.0, |()| String::new())
        }

        fn ask(&mut self, request: Request) -> String {
            self.requests(&Zeroes, &mut [request]).map_or_else(|bad| bad.0, |()| String::new())
        }
    }

    fn write() -> Request {
        Request::write(DEVICE_OUTPUT, 0, 0, 512)
    }

    #[test]
    fn findings_are_kept_up_to_a_bound() {
        let mut handler = handler();
        for _ in 0..10 * MAX_FINDINGS {
            assert_eq!(handler.message(finding(2)), Ok(()));
        }
        assert_eq!(handler.events.findings.len(), MAX_FINDINGS);
        assert!(handler.message(finding(3)).is_err());
    }

    #[test]
    fn one_result_and_nothing_after_it() {
        let mut handler = handler();
        assert!(handler.message(Kind::Event(vec![0xff])).is_err(), "no message");
        assert!(handler.tell(target()).contains("only reads"));
        assert!(handler.tell(plan(1, 0)).contains("only checked"));
        assert_eq!((handler.message(done()), handler.end.clone()), (Ok(()), Some(Ok(()))));
        assert_eq!(handler.events.found, CheckSummary { leaks: 3, ..CheckSummary::default() });
        assert!(handler.message(done()).is_err() && handler.message(finding(1)).is_err());
    }

    #[test]
    fn an_end_says_how_it_was() {
        assert!(handler().message(Kind::End(EndMessage::default())).is_err());
        let nonsense = EndMessage { outcome: Some(End::Result(vec![0xff])) };
        assert!(handler().message(Kind::End(nonsense)).is_err());
    }

    #[test]
    fn a_repair_goes_from_its_plan_to_what_is_durable() {
        let mut handler = repairing(Phase::Target);
        assert!(handler.ask(write()).contains("before a plan was accepted"));
        assert!(handler.tell(target()).contains("before a plan"));
        let mut handler = repairing(Phase::Target);
        assert_eq!(handler.tell(finding(2)) + &handler.tell(plan(3, LENGTH + 1)), "");
        assert!(handler.ask(write()).contains("before a plan was accepted"), "announced, not entered");
        let mut handler = repairing(Phase::Target);
        assert_eq!(handler.tell(finding(2)) + &handler.tell(plan(3, 0)) + &handler.tell(target()), "");
        assert_eq!(handler.events.before.len(), 1);
        assert_eq!(handler.ask(write()), "");
        assert!(handler.tell(done()).contains("not flushed"));
        assert_eq!(handler.ask(Request::flush(DEVICE_OUTPUT)) + &handler.tell(finding(1)) + &handler.tell(done()), "");
        assert_eq!(handler.events.findings.len(), 1);
    }

    #[test]
    fn nothing_is_changed_in_a_dry_run_or_where_nothing_is_to_be_mended() {
        for (last_phase, leaks) in [(Phase::Inspect, 3), (Phase::Target, 0)] {
            let mut handler = repairing(last_phase);
            assert_eq!(handler.tell(plan(leaks, 0)), "");
            assert!(handler.tell(target()).contains("nothing may be changed"));
            assert!(handler.ask(write()).contains("before a plan was accepted"));
            assert_eq!(handler.tell(done()), "");
        }
    }

    #[test]
    fn a_plan_keeps_its_bound_and_a_success_is_one() {
        assert!(repairing(Phase::Target).tell(plan(1, 2 * LENGTH + 1)).contains("are allowed"));
        let mut twice = repairing(Phase::Target);
        assert_eq!(twice.tell(plan(1, 2 * LENGTH)), "");
        assert!(twice.tell(plan(1, 0)).contains("second plan"));
        assert!(twice.tell(done()).contains("before its work was done"), "planned, not repaired");
        assert!(repairing(Phase::Target).tell(done()).contains("before its work was done"), "no plan");
        let mut beyond = repairing(Phase::Target);
        assert_eq!(beyond.tell(plan(1, 0)) + &beyond.tell(target()), "");
        assert!(beyond.tell(Kind::Phase(PhaseMessage { phase: Phase::Children as u32 })).contains("may be changed"));
        assert!(!beyond.ask(Request::write(DEVICE_OUTPUT, 2 * LENGTH, 0, 512)).is_empty());
    }
}
