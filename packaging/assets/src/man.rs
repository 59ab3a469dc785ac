//! Manual pages of the commands: options from `clap`, and for each command the sections that options do not tell.

use crate::pages::tidy;
use crate::{read, Result};
use clap::builder::StyledStr;
use clap::{Arg, ArgAction, Command};
use clap_mangen::Man;
use instar_guest_abi::ErrorCode;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// `instar.1`, and a page for each command that is not hidden. `sections` is the folder with the sections that each page has
/// of its own, and `common.roff`, which all pages have after those.
///
/// # Errors
/// A command without sections of its own.
pub fn pages(command: &Command, sections: &Path, day: &str) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let shown = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    let all = std::iter::once(("instar".to_owned(), command))
        .chain(shown.map(|subcommand| (format!("instar-{}", subcommand.get_name()), subcommand)));
    all.map(|(name, command)| {
        let page = page(&name, command, sections, day)?;
        Ok((PathBuf::from(format!("man/{name}.1")), page))
    })
    .collect()
}

fn page(name: &str, command: &Command, sections: &Path, day: &str) -> Result<Vec<u8>> {
    let short = name.strip_prefix("instar-").unwrap_or(name);
    let own = read(&sections.join(format!("{short}.roff")))
        .map_err(|error| format!("{name} has no sections for its manual page: {error}"))?;
    let common = read(&sections.join("common.roff"))?;
    let man = Man::new(without_backticks(command))
        .title(name.to_uppercase())
        .section("1")
        .date(day)
        .source(format!("instar {}", env!("CARGO_PKG_VERSION")))
        .manual("User Commands");
    let mut page = Vec::new();
    let rendered = man
        .render_title(&mut page)
        .and_then(|()| man.render_name_section(&mut page))
        .and_then(|()| page.write_all(synopsis(command).as_bytes()))
        .and_then(|()| man.render_description_section(&mut page))
        .and_then(|()| man.render_options_section(&mut page))
        .and_then(|()| if command.has_subcommands() { man.render_subcommands_section(&mut page) } else { Ok(()) });
    rendered.map_err(|error| format!("{name}: {error}"))?;
    let page = String::from_utf8(page).map_err(|error| format!("{name}: {error}"))?;
    // What comes before SEE ALSO, which is the last section of each file.
    let (own, see_also) = own.split_once(".SH SEE ALSO\n").ok_or_else(|| format!("{name}: no SEE ALSO"))?;
    let codes = if name == "instar-commit" { error_codes() } else { String::new() };
    let own = own.replace(".\\\" ERROR CODES\n", &codes);
    Ok(tidy(&format!("{page}{own}{common}.SH SEE ALSO\n{see_also}")).into_bytes())
}

/// Words of code are quoted, for a backtick prints as an opening quote. NAME has one clause.
fn without_backticks(command: &Command) -> Command {
    let plain = |text: &StyledStr| text.to_string().replace('`', "\"");
    let about = command.get_about().map(plain).unwrap_or_default();
    let long = command.get_long_about().map(plain).unwrap_or_else(|| about.clone());
    let clause = about.split_once(". ").map_or(about.as_str(), |(clause, _)| clause).to_owned();
    command.clone().about(clause).long_about(format!("{}.", long.trim_end_matches('.'))).mut_args(|argument| {
        let help = argument.get_help().map(plain);
        argument.help(help.unwrap_or_default())
    })
}

/// How the command is called: one form of each option, with its value. An option that excludes a positional argument is shown as
/// the other choice.
fn synopsis(command: &Command) -> String {
    let mut parts = vec![format!("\\fB{}\\fR", roff(command.get_bin_name().unwrap_or(command.get_name())))];
    let mut instead: Vec<(&str, String)> = Vec::new();
    for option in command.get_opts().chain(command.get_arguments().filter(|argument| is_flag(argument))) {
        if option.is_hide_set() {
            continue;
        }
        let name = option.get_short().map(|short| format!("-{short}"));
        let name = name.or_else(|| option.get_long().map(|long| format!("--{long}"))).unwrap_or_default();
        // A value that may be left out is not the next word.
        let value = match (is_flag(option), option.is_require_equals_set(), option.get_long()) {
            (true, ..) => String::new(),
            (_, true, Some(_)) => format!("[={}]", value(option)),
            _ => format!(" {}", value(option)),
        };
        let called = format!("\\fB{}\\fR{value}", roff(&name));
        let excluded = command.get_arg_conflicts_with(option).into_iter().find(|other| other.is_positional());
        if let Some(positional) = excluded {
            instead.push((positional.get_id().as_str(), called));
            continue;
        }
        let more = if matches!(option.get_action(), ArgAction::Append) { " \\&..." } else { "" };
        parts.push(format!("[{called}]{more}"));
    }
    for argument in command.get_positionals() {
        let others =
            instead.iter().filter(|(id, _)| *id == argument.get_id().as_str()).map(|(_, called)| called.clone());
        let choices: Vec<String> = std::iter::once(value(argument)).chain(others).collect();
        parts.push(match choices.as_slice() {
            [name] if argument.is_required_set() => name.clone(),
            [name] => format!("[{name}]"),
            several => format!("{{{}}}", several.join(" | ")),
        });
    }
    if command.has_subcommands() {
        parts.push("\\fICOMMAND\\fR".to_owned());
    }
    format!(".SH SYNOPSIS\n{}\n", parts.join(" "))
}

/// Whether an argument is an option without a value.
fn is_flag(argument: &Arg) -> bool {
    !argument.is_positional() && !argument.get_action().takes_values()
}

/// The value of an argument: the words that it may be, if they are few, or what it is called.
fn value(argument: &Arg) -> String {
    let words: Vec<String> = argument.get_possible_values().iter().map(|value| roff(value.get_name())).collect();
    if (1..=2).contains(&words.len()) {
        return format!("\\fB{}\\fR", words.join("\\fR|\\fB"));
    }
    let name = argument.get_value_names().and_then(|names| names.first()).map_or("VALUE", |name| name.as_str());
    format!("\\fI{}\\fR", roff(name))
}

/// Hyphens that stay hyphens.
fn roff(text: &str) -> String {
    text.replace('-', "\\-")
}

fn error_codes() -> String {
    let mut text = String::new();
    for code in ErrorCode::ALL {
        let meaning = code.meaning().replace('`', "\"").replace('-', "\\-");
        // Writing into a string cannot fail.
        let _ = writeln!(text, ".TP\n.B {} {}\n{}", code.number(), code.name(), meaning.trim());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_stands_for_an_argument_is_the_other_choice() {
        let size = Arg::new("size").short('s').value_name("SIZE").conflicts_with("file");
        let wait = Arg::new("wait").long("wait").value_name("SECONDS");
        let mut command = Command::new("measure").args([size, wait, Arg::new("file").value_name("FILE")]);
        command.build();
        let text = synopsis(&command);
        assert!(text.contains("[\\fB\\-\\-wait\\fR \\fISECONDS\\fR]"), "{text}");
        assert!(text.ends_with(" {\\fIFILE\\fR | \\fB\\-s\\fR \\fISIZE\\fR}\n"), "{text}");
    }
}
