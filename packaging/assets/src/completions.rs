//! Completions for shells: what `clap` generates from the options, and functions of ours for what only this machine knows, which
//! formats are installed, which files are images, and which images are below another.

use clap::builder::{PossibleValuesParser, Resettable};
use clap::{Command, ValueHint};
use clap_complete::{generate, Shell};
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
}

impl Asked {
    const ALL: [Self; 3] = [Self::Formats, Self::Images, Self::Members];

    /// The end of the names of our functions.
    fn function(self) -> &'static str {
        match self {
            Self::Formats => "formats",
            Self::Images => "images",
            Self::Members => "members",
        }
    }

    /// A word that no option has as its value.
    fn mark(self) -> &'static str {
        match self {
            Self::Formats => "@formats@",
            Self::Images => "@images@",
            Self::Members => "@members@",
        }
    }

    /// What a value of a command's option or argument is, by the name that the help has for it.
    fn of(command: &str, value: &str) -> Option<Self> {
        match (value, command) {
            ("FMT", _) => Some(Self::Formats),
            ("BASE", "commit" | "measure") => Some(Self::Members),
            ("FILENAME" | "FILENAME1" | "FILENAME2" | "BASE" | "BACKING" | "CHILD", _) => Some(Self::Images),
            _ => None,
        }
    }
}

/// The file of each shell, under the name that the shell looks for, and its content.
pub fn all(command: Command) -> Vec<(PathBuf, Vec<u8>)> {
    let mut command = hinted(command);
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
    text.replace("@BUNDLED@", &FORMATS.join(" "))
        .replace("@PATTERNS@", &each("*.", " | "))
        .replace("@GLOB@", &format!("*.({})", SUFFIXES.join("|")))
        .replace("@SUFFIXES@", &each(".", " "))
}

/// The script for bash, in which a word that begins no option is the name of an image wherever a command takes one. As it is
/// generated, the first word after a command, and all others, are completed to options.
fn bash(script: &str, command: &Command) -> String {
    const OPTIONS: &str =
        "            COMPREPLY=( $(compgen -W \"${opts}\" -- \"${cur}\") )\n            return 0\n            ;;\n";
    const IMAGES: &str = "            _instar_images\n            return 0\n            ;;\n";
    let mut script = script.replace(" || ${COMP_CWORD} -eq 2 ]]", " ]]");
    for asked in Asked::ALL {
        let generated = format!("COMPREPLY=($(compgen -W \"{}\" -- \"${{cur}}\"))", asked.mark());
        script = script.replace(&generated, &format!("_instar_{}", asked.function()));
        // Images are listed among the options, too.
        script = script.replace(&format!(" {}\"", asked.mark()), "\"").replace(&format!(" {}", asked.mark()), "");
    }
    for subcommand in command.get_subcommands().filter(|subcommand| takes_image(subcommand)) {
        let case = format!("        instar__subcmd__{})\n", subcommand.get_name());
        let Some(from) = script.find(&case) else { continue };
        if let Some(at) = script[from..].find(OPTIONS) {
            script.replace_range(from + at..from + at + OPTIONS.len(), IMAGES);
        }
    }
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
    for subcommand in command.get_subcommands().filter(|subcommand| takes_image(subcommand)) {
        let name = subcommand.get_name();
        script += &format!(
            "complete -c instar -n \"__fish_instar_using_subcommand {name}\" -k -f -a \"(__fish_instar_images)\"\n"
        );
    }
    helpers(include_str!("../completions/helpers.fish")) + &script
}

/// Whether an argument of a command is the name of an image.
fn takes_image(command: &Command) -> bool {
    command.get_positionals().any(|argument| {
        let names = argument.get_value_names().unwrap_or_default();
        names.first().is_some_and(|value| matches!(Asked::of(command.get_name(), value), Some(Asked::Images)))
    })
}
