//! `instar config`: what is in force, and where each value comes from.

use super::opening::sandbox_parser;
use super::output::{print, print_json, OutputFormat};
use clap::Args;
use instar::config::{Config, Configured};
use instar::error::Error;
use instar::escape::escape_path;
use instar::plugins::{SearchPath, PATH_VARIABLE};
use instar::sandbox::{Sandbox, SandboxChoice};
use serde_json::{json, Value};
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Show what is in force, and where each value comes from.
#[derive(Args, Debug)]
pub struct ConfigArgs {
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    /// Also allow backings in DIR, not only beside the overlay; may be given several times
    #[arg(long, value_name = "DIR")]
    pub allow_backing_dir: Vec<PathBuf>,
    /// Also load plugins from DIR; may be given several times
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
    /// Use this sandbox
    #[arg(long, value_name = "SANDBOX", value_parser = sandbox_parser())]
    pub sandbox: Option<SandboxChoice>,
}

/// Where a value comes from that nobody has set.
const BUILT_IN: &str = "built in";

/// A value, and where it comes from.
struct Directory {
    directory: PathBuf,
    from: String,
}

/// Run the command.
///
/// # Errors
/// A configuration file that is refused; when the result cannot be written.
pub fn run(args: &ConfigArgs, out: &mut dyn Write) -> Result<(), Error> {
    let config = super::configuration(args.output)?;
    let backing = backing_directories(args, &config);
    let plugins = plugin_directories(args, &config);
    let sandbox = sandbox(args, &config);
    match args.output {
        OutputFormat::Human => print(out, &human(&backing, &plugins, &sandbox, &config)),
        OutputFormat::Json => print_json(out, &to_json(&backing, &plugins, &sandbox, &config)),
    }
}

/// The sandbox's name, and where it comes from.
fn sandbox(args: &ConfigArgs, config: &Config) -> (&'static str, String) {
    let given = args.sandbox.map(|sandbox| (sandbox.name(), "--sandbox".to_owned()));
    let configured =
        || config.sandbox.as_ref().map(|(sandbox, file)| (sandbox.name(), file.to_string_lossy().into_owned()));
    given.or_else(configured).unwrap_or((SandboxChoice::default().name(), BUILT_IN.to_owned()))
}

fn of_file(configured: &Configured) -> Directory {
    let from = configured.file.to_string_lossy().into_owned();
    Directory { directory: configured.directory.clone(), from }
}

fn backing_directories(args: &ConfigArgs, config: &Config) -> Vec<Directory> {
    let given = args.allow_backing_dir.iter();
    let given = given.map(|directory| Directory { directory: directory.clone(), from: "--allow-backing-dir".into() });
    given.chain(config.backing_directories.iter().map(of_file)).collect()
}

/// As [`SearchPath`] has them.
fn plugin_directories(args: &ConfigArgs, config: &Config) -> Vec<Directory> {
    let search = SearchPath::for_process(&args.plugin_dir, &config.plugin_paths());
    let origin = |directory: &Path| {
        if args.plugin_dir.iter().any(|given| given == directory) {
            return "--plugin-dir".to_owned();
        }
        if search.is_from_environment(directory) {
            return PATH_VARIABLE.to_owned();
        }
        let configured = config.plugin_directories.iter().find(|configured| configured.directory == directory);
        configured.map_or_else(|| BUILT_IN.to_owned(), |configured| configured.file.to_string_lossy().into_owned())
    };
    let value = |directory: &PathBuf| Directory { directory: directory.clone(), from: origin(directory) };
    search.directories().iter().map(value).collect()
}

fn human(backing: &[Directory], plugins: &[Directory], sandbox: &(&str, String), config: &Config) -> String {
    let (name, from) = sandbox;
    let mut text = format!("sandbox:\n    {name} ({})\n", origin(from));
    for (title, values) in [("allow-backing-dirs", backing), ("plugin-dirs", plugins)] {
        let _ = writeln!(text, "{title}:");
        for value in values {
            let _ = writeln!(text, "    {} ({})", escape_path(&value.directory), origin(&value.from));
        }
        if values.is_empty() {
            text.push_str("    none\n");
        }
    }
    if let Some(undo) = config.undo_directory.as_ref().map(of_file) {
        let _ = writeln!(text, "undo-dir:\n    {} ({})", escape_path(&undo.directory), origin(&undo.from));
    }
    text.push_str("files:\n");
    for (file, present) in &config.files {
        let _ = writeln!(text, "    {} ({})", escape_path(file), if *present { "read" } else { "not there" });
    }
    if config.files.is_empty() {
        text.push_str("    none\n");
    }
    text
}

fn origin(from: &str) -> String {
    if from == BUILT_IN {
        BUILT_IN.to_owned()
    } else {
        format!("from {}", escape_path(Path::new(from)))
    }
}

fn to_json(backing: &[Directory], plugins: &[Directory], sandbox: &(&str, String), config: &Config) -> Value {
    let values = |values: &[Directory]| -> Vec<Value> {
        values.iter().map(|value| json!({"path": value.directory.to_string_lossy(), "from": value.from})).collect()
    };
    let files: Vec<Value> =
        config.files.iter().map(|(file, present)| json!({"path": file.to_string_lossy(), "read": present})).collect();
    let mut object = json!({
        "sandbox": {"name": sandbox.0, "from": sandbox.1},
        "allow-backing-dirs": values(backing),
        "plugin-dirs": values(plugins),
        "undo-dir": config.undo_directory.as_ref().map(|undo| {
            let Directory { directory, from } = of_file(undo);
            json!({"path": directory.to_string_lossy(), "from": from})
        }),
        "files": files,
    });
    // Only there if there is something to say.
    if !config.warnings.is_empty() {
        object["warnings"] = json!(config.warnings);
    }
    object
}
