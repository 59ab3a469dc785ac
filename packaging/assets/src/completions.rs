//! Completions for shells: what `clap` generates from the options, and functions of ours for what only this machine knows, which
//! formats are installed and which options they have, which files are images, and which images are below another.

use clap::builder::{PossibleValuesParser, Resettable};
use clap::{Command, ValueHint};
use clap_complete::{generate, Shell};
use instar_guest_abi::ErrorCode;
use std::path::PathBuf;

/// The formats whose plugins come with the program.
const FORMATS: [&str; 8] = ["parallels", "qcow", "qcow2", "raw", "vdi", "vhdx", "vmdk", "vpc"];
/// How the names of images end.
const SUFFIXES: [&str; 14] =
    ["avhd", "avhdx", "hdd", "hds", "img", "iso", "qcow", "qcow2", "qed", "raw", "vdi", "vhd", "vhdx", "vmdk"];

/// What a shell has to find out when it completes a word: the text that stands for it in a generated script.
#[derive(Clone, Copy)]
enum Asked {
    Formats,
    Images,
    Members,
    Options,
    Codes,
}

impl Asked {
    const ALL: [Self; 5] = [Self::Formats, Self::Images, Self::Members, Self::Options, Self::Codes];

    /// The end of the names of our functions.
    fn function(self) -> &'static str {
        match self {
            Self::Formats => "formats",
            Self::Images => "images",
            Self::Members => "members",
            Self::Options => "options",
            Self::Codes => "codes",
        }
    }

    /// A word that no option has as its value.
    fn mark(self) -> &'static str {
        match self {
            Self::Formats => "@formats@",
            Self::Images => "@images@",
            Self::Members => "@members@",
            Self::Options => "@options@",
            Self::Codes => "@codes@",
        }
    }

    /// What a value of a command's option or argument is, by the name that the help has for it.
    fn of(command: &str, value: &str) -> Option<Self> {
        match (value, command) {
            ("FMT", _) => Some(Self::Formats),
            ("BASE", "commit" | "measure") => Some(Self::Members),
            ("OPTIONS", _) => Some(Self::Options),
            ("CODE", "explain") => Some(Self::Codes),
            ("FILENAME" | "FILENAME1" | "FILENAME2" | "BASE" | "BACKING" | "CHILD", _) => Some(Self::Images),
            _ => None,
        }
    }
}

/// The file of each shell, under the name that the shell looks for, and its content.
pub fn all(command: Command) -> Vec<(PathBuf, Vec<u8>)> {
    let mut command = hinted(shown(&command));
    [(Shell::Bash, "bash/instar"), (Shell::Zsh, "zsh/_instar"), (Shell::Fish, "fish/instar.fish")]
        .map(|(shell, name)| {
            let mut content = Vec::new();
            generate(shell, &mut command, "instar", &mut content);
            let script = String::from_utf8_lossy(&content);
            let script = match shell {
                Shell::Bash => bash(&script, &command),
                Shell::Zsh => zsh(&script),
                _ => fish(&script, &command),
            };
            (PathBuf::from("completions").join(name), script.into_bytes())
        })
        .into()
}

/// The commands that `--help` lists: shells are offered the hidden ones, too, otherwise.
fn shown(command: &Command) -> Command {
    let shown = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    Command::new("instar")
        .version(env!("CARGO_PKG_VERSION"))
        .args(command.get_arguments())
        .disable_help_subcommand(true)
        .disable_help_flag(true)
        .disable_version_flag(true)
        .subcommands(shown)
}

/// What shells are to offer as values: directories for what is called `DIR`, what they have to ask for, and nothing where only
/// the user knows the word.
fn hinted(command: Command) -> Command {
    command.mut_subcommands(|subcommand| {
        let name = subcommand.get_name().to_owned();
        subcommand.mut_args(|argument| {
            if !argument.get_action().takes_values() {
                return argument;
            }
            let value = argument.get_value_names().and_then(|names| names.first()).map(ToString::to_string);
            match value.as_deref() {
                Some("DIR") => argument.value_hint(ValueHint::DirPath),
                Some(value) => match Asked::of(&name, value) {
                    // A default is checked against the values.
                    Some(asked) => argument
                        .default_value(Resettable::Reset)
                        .value_parser(PossibleValuesParser::new([asked.mark()])),
                    None => argument.value_hint(ValueHint::Other),
                },
                None => argument.value_hint(ValueHint::Other),
            }
        })
    })
}

/// Our functions for a shell.
fn helpers(text: &str) -> String {
    let each = |before: &str, between: &str| SUFFIXES.map(|suffix| format!("{before}{suffix}")).join(between);
    let codes: Vec<&str> = ErrorCode::ALL.iter().map(|code| code.name()).collect();
    text.replace("@BUNDLED@", &FORMATS.join(" "))
        .replace("@CODES@", &codes.join(" "))
        .replace("@PATTERNS@", &each("*.", " | "))
        .replace("@GLOB@", &format!("*.({})", SUFFIXES.join("|")))
        .replace("@SUFFIXES@", &each(".", " "))
}

/// The script for bash, in which a word that begins no option is the name of an image, or a code, wherever a command takes one. As
/// it is generated, the first word after a command, and all others, are completed to options.
fn bash(script: &str, command: &Command) -> String {
    const BEGIN: &str = "    opts=\"\"\n";
    const OPTIONS: &str =
        "            COMPREPLY=( $(compgen -W \"${opts}\" -- \"${cur}\") )\n            return 0\n            ;;\n";
    let mut script = script.replace(" || ${COMP_CWORD} -eq 2 ]]", " ]]");
    for asked in Asked::ALL {
        let generated = format!("COMPREPLY=($(compgen -W \"{}\" -- \"${{cur}}\"))", asked.mark());
        script = script.replace(&generated, &format!("_instar_{}", asked.function()));
        // Images are listed among the options, too.
        script = script.replace(&format!(" {}\"", asked.mark()), "\"").replace(&format!(" {}", asked.mark()), "");
    }
    for (subcommand, asked) in command.get_subcommands().filter_map(positional) {
        let case = format!("        instar__subcmd__{subcommand})\n");
        let Some(from) = script.find(&case) else { continue };
        if let Some(at) = script[from..].find(OPTIONS) {
            let asks = format!("            _instar_{}\n            return 0\n            ;;\n", asked.function());
            script.replace_range(from + at..from + at + OPTIONS.len(), &asks);
        }
    }
    let script = script.replacen(BEGIN, &format!("{BEGIN}    _instar_within_options && return 0\n"), 1);
    helpers(include_str!("../completions/helpers.bash")) + &script
}

/// The script for zsh. The line `#compdef` has to stay the first.
fn zsh(script: &str) -> String {
    let mut script = script.to_owned();
    for asked in Asked::ALL {
        script = script.replace(&format!("({})", asked.mark()), &format!("_instar_{}", asked.function()));
    }
    let (first, rest) = script.split_once('\n').unwrap_or((&script, ""));
    format!("{first}\n\n{}{rest}", helpers(include_str!("../completions/helpers.zsh")))
}

/// The script for fish. As it is generated, arguments that are no values of options are completed to any files.
fn fish(script: &str, command: &Command) -> String {
    let mut script = script.to_owned();
    for asked in Asked::ALL {
        let generated = format!("\"{}\\t''\"", asked.mark());
        script = script.replace(&generated, &format!("\"(__fish_instar_{})\"", asked.function()));
    }
    for (name, asked) in command.get_subcommands().filter_map(positional) {
        let function = asked.function();
        script += &format!(
            "complete -c instar -n \"__fish_instar_using_subcommand {name}\" -k -f -a \"(__fish_instar_{function})\"\n"
        );
    }
    helpers(include_str!("../completions/helpers.fish")) + &script
}

/// The name of a command whose arguments are images or codes, and which of the two.
fn positional(command: &Command) -> Option<(&str, Asked)> {
    let asked = |argument: &clap::Arg| Asked::of(command.get_name(), argument.get_value_names()?.first()?);
    Some((command.get_name(), command.get_positionals().find_map(asked)?))
}
