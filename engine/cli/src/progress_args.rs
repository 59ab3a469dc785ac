//! `-p` and `--progress=HOW`: who is told how far a command is, and in which form.

use super::progress::Shown;
use super::progress_lines::Lines;
use super::usage::bad_usage;
use clap::Args;
use instar::error::Error;
use std::os::fd::RawFd;
use std::str::FromStr;

/// Where progress goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// For people, on standard error.
    Text,
    /// Lines of JSON on this descriptor.
    Json(RawFd),
}

impl FromStr for How {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let descriptor = || text.strip_prefix("fd:")?.parse().ok().filter(|&number: &RawFd| number > 0);
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json(libc::STDERR_FILENO)),
            _ => descriptor().map(Self::Json).ok_or_else(|| {
                "it is `text`, `json`, or `fd:N` with the number of a descriptor that is open for writing".to_owned()
            }),
        }
    }
}

/// The option that all commands have which take long.
#[derive(Args, Debug)]
pub struct ProgressArgs {
    /// Show progress on stderr: a bar for people, or, with `--progress=json`, lines of JSON; `--progress=fd:N` writes those to
    /// descriptor N. SIGUSR1 asks for one line at any time
    #[arg(short, long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub progress: Option<How>,
}

impl ProgressArgs {
    /// Who shows people how far the command is, if that is wanted. A `quiet` command shows nothing.
    #[must_use]
    pub fn shown(&self, quiet: bool) -> Option<Shown> {
        (self.progress == Some(How::Text) && !quiet).then(Shown::new)
    }

    /// Who tells programs, if that is wanted. `job`: what the command is called.
    ///
    /// # Errors
    /// A descriptor that nothing can be written to.
    pub fn lines(&self, job: &'static str) -> Result<Option<Lines>, Error> {
        let Some(How::Json(descriptor)) = self.progress else { return Ok(None) };
        let lines = Lines::begin(job, descriptor).ok_or_else(|| {
            bad_usage(format!(
                "--progress=fd:{descriptor}: the caller has to leave descriptor {descriptor} open for writing"
            ))
        })?;
        Ok(Some(lines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        progress: ProgressArgs,
        #[arg(short)]
        quiet: bool,
        image: Option<String>,
    }

    fn parsed(line: &str) -> Option<(Option<How>, bool, Option<String>)> {
        let line = Line::try_parse_from(line.split(' ')).ok()?;
        Some((line.progress.progress, line.quiet, line.image))
    }

    #[test]
    fn an_image_is_no_value_of_the_option() {
        let image = || Some("x".to_owned());
        assert_eq!(parsed("instar x"), Some((None, false, image())));
        assert_eq!(parsed("instar -p x"), Some((Some(How::Text), false, image())));
        assert_eq!(parsed("instar -pq x"), Some((Some(How::Text), true, image())));
        assert_eq!(parsed("instar --progress x"), Some((Some(How::Text), false, image())));
        assert_eq!(parsed("instar --progress=text"), Some((Some(How::Text), false, None)));
        assert_eq!(parsed("instar --progress=json x"), Some((Some(How::Json(2)), false, image())));
        assert_eq!(parsed("instar --progress=fd:7 x"), Some((Some(How::Json(7)), false, image())));
        for wrong in ["xml", "fd:", "fd:x", "fd:-1", "fd:0", "fd:99999999999", ""] {
            assert_eq!(parsed(&format!("instar --progress={wrong} x")), None, "{wrong}");
        }
    }
}
