//! Completions for shells.

use clap::builder::PossibleValuesParser;
use clap::{Command, ValueHint};
use clap_complete::{generate, Shell};
use std::path::PathBuf;

/// The formats whose plugins come with the program.
const FORMATS: [&str; 8] = ["parallels", "qcow", "qcow2", "raw", "vdi", "vhdx", "vmdk", "vpc"];

/// The file of each shell, under the name that the shell looks for, and its content.
pub fn all(command: Command) -> Vec<(PathBuf, Vec<u8>)> {
    let mut command = hinted(command);
    [(Shell::Bash, "bash/instar"), (Shell::Zsh, "zsh/_instar"), (Shell::Fish, "fish/instar.fish")]
        .map(|(shell, name)| {
            let mut content = Vec::new();
            generate(shell, &mut command, "instar", &mut content);
            if shell == Shell::Bash {
                content = with_files(&String::from_utf8_lossy(&content), &command).into_bytes();
            }
            (PathBuf::from("completions").join(name), content)
        })
        .into()
}

/// What shells are to offer as values: directories for what is called `DIR`, files for an image, formats for `FMT`, and
/// nothing where only the user knows the word.
fn hinted(command: Command) -> Command {
    command.mut_subcommands(|subcommand| {
        subcommand.mut_args(|argument| {
            if !argument.get_action().takes_values() {
                return argument;
            }
            match argument.get_value_names().and_then(|names| names.first()).map(clap::builder::Str::as_str) {
                Some("DIR") => argument.value_hint(ValueHint::DirPath),
                Some("FILENAME" | "BASE") => argument.value_hint(ValueHint::FilePath),
                Some("FMT") => argument.value_parser(PossibleValuesParser::new(FORMATS)),
                _ => argument.value_hint(ValueHint::Other),
            }
        })
    })
}

/// The script for bash, in which a word that begins no option is the name of a file wherever a command takes one. As it is
/// generated, the first word after a command, and all others, are completed to options.
fn with_files(script: &str, command: &Command) -> String {
    const OPTIONS: &str =
        "            COMPREPLY=( $(compgen -W \"${opts}\" -- \"${cur}\") )\n            return 0\n            ;;\n";
    const FILES: &str = "            local IFS=$'\\n'\n            COMPREPLY=( $(compgen -f -- \"${cur}\") )\n            \
                         if [[ \"${BASH_VERSINFO[0]}\" -ge 4 ]]; then\n                compopt -o filenames\n            \
                         fi\n            return 0\n            ;;\n";
    let mut script = script.replace(" || ${COMP_CWORD} -eq 2 ]]", " ]]");
    let takes_file = |subcommand: &&Command| {
        subcommand.get_positionals().any(|argument| argument.get_value_hint() == ValueHint::FilePath)
    };
    for subcommand in command.get_subcommands().filter(takes_file) {
        let case = format!("        instar__subcmd__{})\n", subcommand.get_name());
        let Some(from) = script.find(&case) else { continue };
        if let Some(at) = script[from..].find(OPTIONS) {
            script.replace_range(from + at..from + at + OPTIONS.len(), FILES);
        }
    }
    script
}
