//! Manual pages of the commands: options from `clap`, and for each command the sections that options do not tell.

use crate::pages::tidy;
use crate::Result;
use clap::builder::StyledStr;
use clap::Command;
use clap_mangen::Man;
use instar_guest_abi::ErrorCode;
use std::fmt::Write as _;
use std::path::PathBuf;

/// What each page has after its options: the same for all commands that read images or load plugins.
const COMMON: &str = include_str!("../sections/common.roff");
/// The pages, by command, and their own sections. A command that is not here is an error.
const SECTIONS: &[(&str, &str)] = &[
    ("instar", include_str!("../sections/instar.roff")),
    ("instar-check", include_str!("../sections/check.roff")),
    ("instar-commit", include_str!("../sections/commit.roff")),
    ("instar-config", include_str!("../sections/config.roff")),
    ("instar-create", include_str!("../sections/create.roff")),
    ("instar-doctor", include_str!("../sections/doctor.roff")),
    ("instar-info", include_str!("../sections/info.roff")),
    ("instar-map", include_str!("../sections/map.roff")),
    ("instar-plugins", include_str!("../sections/plugins.roff")),
];

/// `instar.1`, and a page for each command that is not hidden.
///
/// # Errors
/// A command without sections of its own.
pub fn pages(command: &Command, day: &str) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let shown = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    let all = std::iter::once(("instar".to_owned(), command))
        .chain(shown.map(|subcommand| (format!("instar-{}", subcommand.get_name()), subcommand)));
    all.map(|(name, command)| {
        let page = page(&name, command, day)?;
        Ok((PathBuf::from(format!("man/{name}.1")), page))
    })
    .collect()
}

fn page(name: &str, command: &Command, day: &str) -> Result<Vec<u8>> {
    let (_, own) = SECTIONS.iter().find(|(page, _)| *page == name).ok_or_else(|| {
        format!("{name} has no sections for its manual page: add a file to packaging/assets/sections and to man.rs")
    })?;
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
        .and_then(|()| man.render_synopsis_section(&mut page))
        .and_then(|()| man.render_description_section(&mut page))
        .and_then(|()| man.render_options_section(&mut page))
        .and_then(|()| if command.has_subcommands() { man.render_subcommands_section(&mut page) } else { Ok(()) });
    rendered.map_err(|error| format!("{name}: {error}"))?;
    let page = String::from_utf8(page).map_err(|error| format!("{name}: {error}"))?;
    // What comes before SEE ALSO, which is the last section of each file.
    let (own, see_also) = own.split_once(".SH SEE ALSO\n").ok_or_else(|| format!("{name}: no SEE ALSO"))?;
    let codes = if name == "instar-commit" { error_codes() } else { String::new() };
    let own = own.replace(".\\\" ERROR CODES\n", &codes);
    Ok(tidy(&format!("{page}{own}{COMMON}.SH SEE ALSO\n{see_also}")).into_bytes())
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

fn error_codes() -> String {
    let mut text = String::new();
    for code in ErrorCode::ALL {
        let meaning = code.meaning().replace('`', "\"").replace('-', "\\-");
        // Writing into a string cannot fail.
        let _ = writeln!(text, ".TP\n.B {} {}\n{}", code.number(), code.name(), meaning.trim());
    }
    text
}
