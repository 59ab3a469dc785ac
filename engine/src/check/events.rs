//! What a check makes of what its guest says: the findings, the numbers.

use crate::devices::Devices;
use crate::operation::{decode, Events};
use crate::sandbox::BadRequest;
use instar_guest_abi::{CheckSummary, FindingKind};
use instar_guest_protocol::check::{Finding, Outcome};

/// Findings that are kept.
const MAX_FINDINGS: usize = 200;

/// What the guest of a check said.
#[derive(Debug, Default)]
pub struct CheckEvents {
    /// The findings in numbers, once the guest said so.
    pub found: CheckSummary,
    /// The first findings.
    pub findings: Vec<(FindingKind, String)>,
}

impl Events for CheckEvents {
    fn event(&mut self, _: &mut Devices, event: &[u8]) -> Result<(), BadRequest> {
        let finding: Finding = decode(event)?;
        match FindingKind::from_u32(finding.kind) {
            Some(kind) if self.findings.len() < MAX_FINDINGS => self.findings.push((kind, finding.text)),
            Some(_) => {}
            None => return Err(BadRequest(format!("a finding of the unknown kind {}", finding.kind))),
        }
        Ok(())
    }

    fn succeeded(&mut self, _: &mut Devices, result: &[u8]) -> Result<(), BadRequest> {
        let found: Outcome = decode(result)?;
        self.found = CheckSummary {
            image_end_offset: found.image_end_offset,
            total_clusters: found.total_clusters,
            allocated_clusters: found.allocated_clusters,
            fragmented_clusters: found.fragmented_clusters,
            compressed_clusters: found.compressed_clusters,
            corruptions: found.corruptions,
            leaks: found.leaks,
            unused_tail: found.unused_tail,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::{Cancel, Handler};
    use crate::sandbox::Host;
    use instar_guest_abi::Phase;
    use instar_guest_protocol::end_message::Outcome as End;
    use instar_guest_protocol::guest_message::Kind;
    use instar_guest_protocol::{EndMessage, Message, PhaseMessage};

    fn finding(kind: u32) -> Kind {
        Kind::Event(Finding { kind, text: "cluster 7".into() }.encode_to_vec())
    }

    fn handler() -> Handler<CheckEvents> {
        Handler::new(Devices::new(), CheckEvents::default(), Cancel::new())
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
        assert!(handler.message(Kind::Phase(PhaseMessage { phase: Phase::Target as u32 })).is_err(), "it only reads");
        let result = Outcome { leaks: 3, ..Outcome::default() }.encode_to_vec();
        let end = Kind::End(EndMessage { outcome: Some(End::Result(result)) });
        assert_eq!((handler.message(end.clone()), handler.end.clone()), (Ok(()), Some(Ok(()))));
        assert_eq!(handler.events.found, CheckSummary { leaks: 3, ..CheckSummary::default() });
        assert!(handler.message(end).is_err() && handler.message(finding(1)).is_err());
    }

    #[test]
    fn an_end_says_how_it_was() {
        assert!(handler().message(Kind::End(EndMessage::default())).is_err());
        let nonsense = EndMessage { outcome: Some(End::Result(vec![0xff])) };
        assert!(handler().message(Kind::End(nonsense)).is_err());
    }
}
