//! What a check makes of what its guest says: the findings, the end.

use crate::devices::Devices;
use crate::operation::{unexpected, Events, Flow, GuestFailure};
use crate::sandbox::BadRequest;
use instar_guest_abi::{Examination, FindingKind};
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::CheckResultMessage;

/// Findings that are kept.
const MAX_FINDINGS: usize = 200;

/// What the guest of a check said.
#[derive(Debug, Default)]
pub struct CheckEvents {
    /// How the check ended, once the guest said so.
    pub result: Option<Result<Examination, GuestFailure>>,
    /// The first findings.
    pub findings: Vec<(FindingKind, String)>,
}

/// The outcome that a message tells.
fn outcome(message: &CheckResultMessage) -> Result<Examination, GuestFailure> {
    let place = (message.error_device, message.error_offset);
    if message.error != 0 {
        return Err(GuestFailure::reported(message.error, place, message.error_errno, &message.error_text));
    }
    Ok(Examination {
        image_end_offset: message.image_end_offset,
        total_clusters: message.total_clusters,
        allocated_clusters: message.allocated_clusters,
        fragmented_clusters: message.fragmented_clusters,
        compressed_clusters: message.compressed_clusters,
        corruptions: message.corruptions,
        leaks: message.leaks,
        unused_tail: message.unused_tail,
    })
}

impl Events for CheckEvents {
    fn message(&mut self, _: &mut Devices, message: Kind) -> Result<Flow, BadRequest> {
        match message {
            Kind::CheckResult(result) => {
                self.result = Some(outcome(&result));
                return Ok(Flow::Over);
            }
            Kind::Finding(finding) => match FindingKind::from_u32(finding.kind) {
                Some(kind) if self.findings.len() < MAX_FINDINGS => self.findings.push((kind, finding.text)),
                Some(_) => {}
                None => return Err(BadRequest(format!("a finding of the unknown kind {}", finding.kind))),
            },
            _ => return Err(unexpected("check")),
        }
        Ok(Flow::GoesOn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::{Cancel, Handler};
    use crate::sandbox::Host;
    use instar_guest_abi::ErrorCode;
    use instar_guest_protocol::{FindingMessage, PlanMessage};

    fn finding(kind: u32) -> Kind {
        Kind::Finding(FindingMessage { kind, text: "cluster 7".into() })
    }

    #[test]
    fn findings_are_kept_up_to_a_bound() {
        let mut handler = Handler::new(Devices::new(), CheckEvents::default(), Cancel::new());
        for _ in 0..10 * MAX_FINDINGS {
            assert_eq!(handler.message(finding(2)), Ok(()));
        }
        assert_eq!(handler.events.findings.len(), MAX_FINDINGS);
        assert!(handler.message(finding(3)).is_err());
    }

    #[test]
    fn one_result_and_nothing_after_it() {
        let mut handler = Handler::new(Devices::new(), CheckEvents::default(), Cancel::new());
        assert!(handler.message(Kind::Plan(PlanMessage::default())).is_err());
        let result = CheckResultMessage { leaks: 3, ..CheckResultMessage::default() };
        assert_eq!(handler.message(Kind::CheckResult(result.clone())), Ok(()));
        assert_eq!(handler.events.result, Some(Ok(Examination { leaks: 3, ..Examination::default() })));
        assert!(handler.message(Kind::CheckResult(result)).is_err() && handler.message(finding(1)).is_err());
    }

    #[test]
    fn a_failure_that_only_the_host_can_see_is_nonsense() {
        let told = |error: ErrorCode| CheckResultMessage { error: error.number(), ..CheckResultMessage::default() };
        let code = |error| outcome(&told(error)).map_err(|failure| failure.code);
        assert_eq!(code(ErrorCode::OverlayIo), Err(ErrorCode::OverlayIo));
        assert_eq!(code(ErrorCode::ImageInUse), Err(ErrorCode::GuestProtocol));
    }
}
