//! Completions for shells.

use clap::{Command, ValueHint};
use clap_complete::{generate, Shell};
use std::path::PathBuf;

/// The file of each shell, under the name that the shell looks for, and its content.
pub fn all(command: Command) -> Vec<(PathBuf, Vec<u8>)> {
    let mut command = hinted(command);
    [(Shell::Bash, "bash/instar"), (Shell::Zsh, "zsh/_instar"), (Shell::Fish, "fish/instar.fish")]
        .map(|(shell, name)| {
            let mut content = Vec::new();
            generate(shell, &mut command, "instar", &mut content);
            (PathBuf::from("completions").join(name), content)
        })
        .into()
}

/// What shells are to offer as values: directories for what is called `DIR`, no files where a word is wanted.
fn hinted(command: Command) -> Command {
    command.mut_subcommands(|subcommand| {
        subcommand.mut_args(|argument| {
            let hint = match argument.get_value_names().and_then(|names| names.first()).map(clap::builder::Str::as_str)
            {
                Some("DIR") => ValueHint::DirPath,
                Some("FILENAME" | "BASE") => ValueHint::FilePath,
                _ => return argument,
            };
            argument.value_hint(hint)
        })
    })
}
