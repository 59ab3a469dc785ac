//! `instar doctor`: what is printed.

use super::opening::sandbox_parser;
use super::output::{print, print_json, OutputFormat};
use super::paragraph::{filled, Indent};
use super::terminal::width;
use super::{print_error, FAILED};
use clap::Args;
use instar::doctor::{examine, Diagnosis, Examination, Health};
use instar::error::Error;
use instar::sandbox::SandboxChoice;
use serde_json::{json, Value};
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

/// Find out whether commits work on this machine, and what to do if they do not
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    /// Also load plugins from DIR; may be given several times
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
    /// The sandbox that is to work; both are tried. Default: as configured, else kvm
    #[arg(long, value_name = "SANDBOX", value_parser = sandbox_parser())]
    pub sandbox: Option<SandboxChoice>,
}

/// Run the command; the exit status: 1 if a commit would not work.
pub fn run(args: &DoctorArgs, out: &mut dyn Write) -> u8 {
    match doctor(args, out) {
        Ok(Health::Good | Health::Unneeded | Health::Weak) => 0,
        Ok(Health::Broken) => FAILED,
        Err(error) => print_error(&error, args.output),
    }
}

fn doctor(args: &DoctorArgs, out: &mut dyn Write) -> Result<Health, Error> {
    let found = examine(&args.plugin_dir, args.sandbox);
    match args.output {
        OutputFormat::Human => print(out, &human(&found))?,
        OutputFormat::Json => print_json(out, &to_json(&found))?,
    }
    Ok(found.health())
}

const fn word(health: Health) -> &'static str {
    match health {
        Health::Good => "ok",
        Health::Unneeded => "unneeded",
        Health::Weak => "weak",
        Health::Broken => "broken",
    }
}

fn human(found: &Examination) -> String {
    const REMEDY: Indent = Indent { first: "         → ", rest: "           " };
    let (mut text, width) = (String::new(), width());
    for Diagnosis { part, health, found, remedy } in &found.parts {
        // Writing into a string cannot fail.
        let line = format!("{:<9}{part}: {found}", word(*health));
        let _ = writeln!(text, "{}", filled(&line, Indent { first: "", rest: "         " }, width));
        if let Some(remedy) = remedy {
            let _ = writeln!(text, "{}", filled(remedy, REMEDY, width));
        }
    }
    let sandbox = found.sandbox.map(|name| format!(", in the sandbox {name}")).unwrap_or_default();
    let end = match (found.health(), found.other) {
        (Health::Good | Health::Unneeded, _) => format!("Commits work here{sandbox}."),
        (Health::Weak, _) => format!("Commits work here{sandbox}, with the weaknesses above."),
        (Health::Broken, Some(other)) => format!(
            "Commits do not work here. The sandbox {other} works: choose it with `--sandbox {other}`, or with \
             sandbox = \"{other}\" in the configuration."
        ),
        (Health::Broken, None) => "Commits do not work here.".to_owned(),
    };
    text + &filled(&end, Indent::default(), width) + "\n"
}

fn to_json(found: &Examination) -> Value {
    let one = |diagnosis: &Diagnosis| {
        json!({
            "part": diagnosis.part,
            "state": word(diagnosis.health),
            "found": diagnosis.found,
            "remedy": diagnosis.remedy,
        })
    };
    let parts: Vec<Value> = found.parts.iter().map(one).collect();
    json!({"state": word(found.health()), "sandbox": found.sandbox, "parts": parts})
}
