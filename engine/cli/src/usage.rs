//! Reading the command line, and what is said of one that cannot be understood.

use super::output::{note_directory, render_error, unprinted, OutputFormat};
use super::said::{broken, say_error};
use super::{run, Cli, FAILED};
use crate::terminal::{note_width, say};
use clap::error::ErrorKind;
use clap::Parser;
use instar::error::Error;
use instar::escape::printable;
use instar_guest_abi::ErrorCode;
use std::ffi::OsString;
use std::io::Write;

/// Exit status for bad usage.
pub(super) const USAGE: u8 = 2;
/// That of `instar check`, where 2 says that an image is corrupt: `EX_USAGE` of `sysexits.h`.
pub(super) const CHECK_USAGE: u8 = 64;

/// Run the program with these arguments, the first of which is its name; the exit status. Results go to `out`.
pub fn main(arguments: &[OsString], out: &mut dyn Write) -> u8 {
    note_directory();
    note_width();
    say_panics();
    match Cli::try_parse_from(arguments) {
        Ok(cli) => run(&cli, out),
        Err(error) => explain(&error, arguments),
    }
}

/// Have panics said in one line. There are no backtraces: they would open files, which a confined process cannot.
pub fn say_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string();
        say(&format!("instar: internal error: {}\n", printable(&text)));
    }));
}

/// The arguments can be read, and make no sense.
pub(super) fn bad_usage(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::BadUsage, message)
}

/// Print help, the version, or why the arguments make no sense; the exit status.
fn explain(error: &clap::Error, arguments: &[OsString]) -> u8 {
    let output = if wants_json(arguments) { OutputFormat::Json } else { OutputFormat::Human };
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match error.print() {
            Ok(()) => 0,
            Err(failed) => {
                say_error(&unprinted(&failed), output);
                FAILED
            }
        };
    }
    match output {
        OutputFormat::Human => say(&for_people(error)),
        OutputFormat::Json => say_error(&bad_usage(clause(error)), output),
    }
    if arguments.get(1).is_some_and(|command| command == "check") {
        CHECK_USAGE
    } else {
        USAGE
    }
}

/// Whether the arguments, although they make no sense as a whole, ask for JSON.
fn wants_json(arguments: &[OsString]) -> bool {
    let mut options = arguments.iter().take_while(|argument| *argument != "--").peekable();
    let mut last = false;
    while let Some(argument) = options.next() {
        match argument.to_str() {
            Some("--output") => last = options.peek().is_some_and(|value| *value == "json"),
            Some(word) if word.starts_with("--output=") => last = word == "--output=json",
            _ => {}
        }
    }
    last
}

/// What is wrong, as the line of any other error, and below it what clap advises: the names that were probably meant, and the
/// synopsis. Where even the command is missing, the help is the advice, and the line ends it.
fn for_people(error: &clap::Error) -> String {
    let line = broken(&render_error(&bad_usage(clause(error)), OutputFormat::Human));
    let text = error.render().to_string();
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return format!("{text}\n{line}");
    }
    match text.split_once("\n\n") {
        Some((_, advice)) => format!("{line}\n{advice}"),
        None => line,
    }
}

/// What is wrong, as one line: the first paragraph of what clap says.
fn clause(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "a command is missing: see `instar --help`".to_owned();
    }
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = first.split_whitespace().collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn json_is_wanted_where_the_last_word_says_so() {
        for (line, json) in [
            ("instar commit --output json --nonesuch", true),
            ("instar commit --output=json --nonesuch", true),
            ("instar commit --output json --output human", false),
            ("instar commit -- --output json", false),
            ("instar commit --output", false),
            ("instar", false),
        ] {
            assert_eq!(wants_json(&arguments(line)), json, "{line}");
        }
    }

    #[test]
    fn people_get_the_line_of_any_error_and_then_advice() {
        let said =
            |line| Cli::try_parse_from(arguments(line)).map_err(|error| for_people(&error)).err().unwrap_or_default();
        let text = said("instar commit --ouptut json x");
        assert!(text.starts_with("instar: unexpected argument '--ouptut' found (ERROR_BAD_USAGE)\n\n"), "{text}");
        assert!(text.contains("'--output'") && text.contains("Usage: instar commit"), "{text}");
        let text = said("instar check");
        assert!(text.starts_with("instar: ") && text.contains("<FILENAME> (ERROR_BAD_USAGE)\n\nUsage: "), "{text}");
        let text = said("instar");
        assert!(text.contains("\nCommands:\n") && text.ends_with("`instar --help` (ERROR_BAD_USAGE)\n"), "{text}");
    }

    #[test]
    fn what_is_wrong_is_one_line() {
        for (line, words) in [
            ("instar commit --nonesuch x", "--nonesuch"),
            ("instar commit", "<FILENAME>"),
            ("instar commit --output xml x", "xml"),
            ("instar nonesuch", "nonesuch"),
            ("instar", "a command is missing"),
        ] {
            let said = Cli::try_parse_from(arguments(line)).map_err(|error| clause(&error)).err().unwrap_or_default();
            assert!(said.contains(words) && !said.contains('\n') && !said.starts_with("error"), "{line}: {said}");
        }
    }
}
