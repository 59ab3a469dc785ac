//! `instar plugins`: what is loaded, from where, and why something is not.

use super::output::{print, print_json, OutputFormat};
use clap::Args;
use instar::error::Error;
use instar::escape::{escape_path, printable};
use instar::plugins::{Plugin, Registry, SearchPath};
use instar_plugin_api::{API_VERSION, ROLE_SINK, ROLE_SOURCE};
use serde_json::{json, Value};
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

/// List the format plugins: what is loaded, from where, and why something is not.
#[derive(Args, Debug)]
pub struct PluginsArgs {
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    /// Also load plugins from DIR; may be given several times
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
}

/// Run the command.
///
/// # Errors
/// Only when the result cannot be written: a plugin that cannot be loaded is part of the result.
pub fn run(args: &PluginsArgs, out: &mut dyn Write) -> Result<(), Error> {
    let search = SearchPath::for_process(&args.plugin_dir, &super::configuration(args.output)?.plugin_paths());
    let registry = Registry::load(&search);
    match args.output {
        OutputFormat::Human => print(out, &human(&registry, &search)),
        OutputFormat::Json => print_json(out, &to_json(&registry, &search)),
    }
}

fn roles(plugin: &Plugin) -> Vec<&'static str> {
    let mut names = Vec::new();
    if plugin.roles() & ROLE_SOURCE != 0 {
        names.push("source");
    }
    if plugin.roles() & ROLE_SINK != 0 {
        names.push("sink");
    }
    if plugin.can_create() {
        names.push("create");
    }
    names
}

fn human(registry: &Registry, search: &SearchPath) -> String {
    let mut text = String::new();
    for plugin in registry.plugins() {
        let _ =
            writeln!(text, "{} {}: {}", plugin.name(), printable(plugin.version()), printable(plugin.description()));
        let _ = writeln!(text, "    library: {}", escape_path(plugin.path()));
        let _ = writeln!(text, "    plugin API: {} (this instar: {API_VERSION})", plugin.api_version());
        let aliases: Vec<&str> = plugin.aliases().collect();
        if !aliases.is_empty() {
            let _ = writeln!(text, "    other names: {}", aliases.join(", "));
        }
        let _ = writeln!(text, "    roles: {}", roles(plugin).join(", "));
    }
    if registry.plugins().is_empty() {
        text.push_str("No plugin is loaded. Looked in:\n");
        for directory in search.directories() {
            let _ = writeln!(text, "    {}", escape_path(directory));
        }
    }
    if !registry.skipped().is_empty() {
        text.push_str("Skipped:\n");
    }
    for skipped in registry.skipped() {
        let _ = writeln!(text, "    {}: {}", escape_path(&skipped.path), printable(&skipped.reason));
    }
    text
}

fn to_json(registry: &Registry, search: &SearchPath) -> Value {
    let plugins: Vec<Value> = registry
        .plugins()
        .iter()
        .map(|plugin| {
            let formats: Vec<&str> = std::iter::once(plugin.name()).chain(plugin.aliases()).collect();
            let create: Vec<Value> =
                plugin.create_options().map(|(name, help)| json!({"name": name, "help": help})).collect();
            json!({
                "name": plugin.name(),
                "description": plugin.description(),
                "version": plugin.version(),
                "api-version": plugin.api_version(),
                "path": plugin.path().to_string_lossy(),
                "formats": formats,
                "extensions": plugin.extensions().collect::<Vec<_>>(),
                "roles": roles(plugin),
                "create-options": create,
            })
        })
        .collect();
    let skipped: Vec<Value> = registry
        .skipped()
        .iter()
        .map(|skipped| json!({"path": skipped.path.to_string_lossy(), "reason": skipped.reason}))
        .collect();
    let directories: Vec<_> = search.directories().iter().map(|directory| directory.to_string_lossy()).collect();
    json!({"api-version": API_VERSION, "plugins": plugins, "skipped": skipped, "search-path": directories})
}
