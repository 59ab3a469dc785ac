//! Lines that a guest logs.

use instar_guest_protocol::LogMessage;

/// Lines that are kept of one guest.
const MOST: usize = 100;

/// The first lines of a guest, for `-v`: as it wrote them, not safe for a terminal.
#[derive(Clone, Debug, Default)]
pub struct GuestLog {
    lines: Vec<String>,
}

impl GuestLog {
    /// Take a line, unless there are too many already.
    pub fn take(&mut self, line: LogMessage) {
        if self.lines.len() < MOST {
            self.lines.push(line.text);
        }
    }

    /// The lines.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_lines_is_not_kept() {
        let mut log = GuestLog::default();
        (0..10 * MOST).for_each(|_| log.take(LogMessage { text: "again".into() }));
        assert_eq!(log.lines().len(), MOST);
    }
}
