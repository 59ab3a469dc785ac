//! `instar doctor`: what is printed.

use super::opening::sandbox_parser;
use super::output::{print, print_json, OutputFormat};
use super::{print_error, FAILED};
use clap::Args;
use instar::doctor::{examine, Diagnosis, Health};
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
        Ok(Health::Good | Health::Weak) => 0,
        Ok(Health::Broken) => FAILED,
        Err(error) => print_error(&error, args.output),
    }
}

fn doctor(args: &DoctorArgs, out: &mut dyn Write) -> Result<Health, Error> {
    let all = examine(&args.plugin_dir, args.sandbox);
    match args.output {
        OutputFormat::Human => print(out, &human(&all))?,
        OutputFormat::Json => print_json(out, &to_json(&all))?,
    }
    Ok(worst(&all))
}

fn worst(all: &[Diagnosis]) -> Health {
    all.iter().map(|diagnosis| diagnosis.health).max().unwrap_or(Health::Good)
}

const fn word(health: Health) -> &'static str {
    match health {
        Health::Good => "ok",
        Health::Weak => "weak",
        Health::Broken => "broken",
    }
}

fn human(all: &[Diagnosis]) -> String {
    let mut text = String::new();
    for Diagnosis { part, health, found, remedy } in all {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{:<8}{part}: {found}", word(*health));
        if let Some(remedy) = remedy {
            let _ = writeln!(text, "        → {remedy}");
        }
    }
    text.push_str(match worst(all) {
        Health::Good => "Commits work here.\n",
        Health::Weak => "Commits work here, with the weaknesses above.\n",
        Health::Broken => "Commits do not work here.\n",
    });
    text
}

fn to_json(all: &[Diagnosis]) -> Value {
    let one = |diagnosis: &Diagnosis| {
        json!({
            "part": diagnosis.part,
            "state": word(diagnosis.health),
            "found": diagnosis.found,
            "remedy": diagnosis.remedy,
        })
    };
    json!({"state": word(worst(all)), "parts": all.iter().map(one).collect::<Vec<_>>()})
}
