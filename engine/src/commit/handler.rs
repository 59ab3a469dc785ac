//! Serves the guest of a commit: its block requests, its messages, its end.

use super::interrupt;
use super::notes::Announcement;
use super::progress::Progress;
use super::repeated::Repeated;
use super::space::Space;
use crate::devices::Devices;
use crate::vm::{BadRequest, BufferAccess, Excess, GuestHandler};
use instar_guest_abi::{request_status, Request};
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{CommitResultMessage, PlanMessage};
use std::time::Duration;

/// What the guest of a commit said and did.
pub struct CommitHandler {
    /// The devices of the chain.
    pub devices: Devices,
    /// How the commit ended, once the guest said so.
    pub result: Option<CommitResultMessage>,
    /// What the guest planned, once it said so: from here on it changes files.
    pub plan: Option<PlanMessage>,
    /// Log lines of the guest.
    pub log: Vec<String>,
    /// Who is shown how far it is.
    pub progress: Option<Progress>,
    /// What is to be done once nothing can refuse the commit any more.
    pub announcement: Option<Announcement>,
    /// What is known of the space for the backing.
    pub space: Option<Space>,
    /// The backing looks like an image of another format: only a commit that is repeated may go on.
    pub repeated: Option<Repeated>,
    /// The bytes that the plan needs and that there are, if that is why the guest was ended.
    pub lacking: Option<(u64, u64)>,
}

/// The step in which the overlay is emptied, as the guest names it.
const EMPTYING: &str = "empty";
/// Log lines that are kept.
const MAX_LOG_LINES: usize = 100;

impl CommitHandler {
    /// A handler with these devices.
    #[must_use]
    pub fn new(devices: Devices) -> Self {
        Self {
            devices,
            result: None,
            plan: None,
            log: Vec::new(),
            progress: None,
            space: None,
            repeated: None,
            announcement: None,
            lacking: None,
        }
    }
}

impl GuestHandler for CommitHandler {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        if self.result.is_some() {
            return Err(BadRequest("a request after the result".to_owned()));
        }
        match &mut self.repeated {
            None => self.devices.execute(memory, requests)?,
            // One after the other: what is compared must be what is written.
            Some(repeated) => {
                for request in requests.iter_mut() {
                    if !repeated.allows(&self.devices, memory, request) {
                        return Err(BadRequest("a change of the header of another format".to_owned()));
                    }
                    self.devices.execute(memory, std::slice::from_mut(request))?;
                    if request.status != request_status::OK {
                        break;
                    }
                }
            }
        }
        self.progress.iter().for_each(|progress| progress.settle(&self.devices));
        Ok(())
    }

    fn message(&mut self, message: Kind) -> Result<(), BadRequest> {
        if self.result.is_some() {
            return Err(BadRequest("a message after the result".to_owned()));
        }
        match message {
            Kind::CommitResult(result) => self.result = Some(result),
            Kind::Plan(plan) => {
                self.progress.iter().for_each(|progress| progress.planned(plan.bytes));
                self.plan = Some(plan);
                self.lacking = self.space.and_then(|space| space.lacking(&plan));
                if self.lacking.is_some() {
                    return Err(BadRequest("more space than there is".to_owned()));
                }
                if let Some(announce) = self.announcement.take() {
                    announce();
                }
            }
            Kind::Progress(progress) if progress.step == EMPTYING => {
                self.progress.iter().for_each(Progress::emptying);
            }
            Kind::Log(line) if self.log.len() < MAX_LOG_LINES => self.log.push(line.text),
            Kind::Log(_) | Kind::Progress(_) => {}
            // The runner takes panics itself.
            Kind::Panic(_) => return Err(BadRequest("a panic that is none".to_owned())),
            Kind::Finding(_) | Kind::CheckResult(_) | Kind::Map(_) | Kind::MapResult(_) => {
                return Err(BadRequest("a message that a commit does not send".to_owned()));
            }
        }
        Ok(())
    }

    fn interrupted(&self) -> bool {
        self.result.is_none() && interrupt::received()
    }

    fn excess(&self, used: Duration) -> Option<Excess> {
        self.devices.excess(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_guest_protocol::LogMessage;

    #[test]
    fn a_flood_of_lines_is_not_kept() {
        let mut handler = CommitHandler::new(Devices::new());
        for _ in 0..10 * MAX_LOG_LINES {
            assert_eq!(handler.message(Kind::Log(LogMessage { text: "again".into() })), Ok(()));
        }
        assert_eq!(handler.log.len(), MAX_LOG_LINES);
        assert_eq!(handler.message(Kind::CommitResult(CommitResultMessage::default())), Ok(()));
        assert!(handler.message(Kind::Log(LogMessage::default())).is_err(), "the result is the last word");
    }
}
