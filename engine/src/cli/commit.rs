//! `instar commit`.

use super::args::CommitArgs;
use super::output::print;
use super::CliError;
use crate::commit::{
    catch_signals, render_commit_error, render_commit_success, run_commit, CommitError, CommitOptions, Trace,
};
use crate::devices::CacheMode;
use crate::plugins::{Registry, SearchPath};
use instar_guest_abi::ErrorCode;
use std::io::Write;
use std::time::Instant;

/// Run the command. `started` is when the process began.
///
/// # Errors
/// Why nothing was committed; see [`report`] for how it is shown.
pub fn run(args: &CommitArgs, started: Instant, out: &mut dyn Write) -> Result<(), CommitError> {
    let mut trace = Trace::new(args.verbose, started);
    trace.lap("arguments");
    refuse_missing(args)?;
    catch_signals();
    let registry = Registry::load(&SearchPath::for_process(&args.plugin_dir));
    for plugin in registry.plugins() {
        trace.line(format_args!("plugin: {} {} from '{}'", plugin.name(), plugin.version(), plugin.path().display()));
    }
    for skipped in registry.skipped() {
        trace.line(format_args!("plugin skipped: '{}': {}", skipped.path.display(), skipped.reason));
    }
    trace.lap("load plugins");
    let options = CommitOptions {
        overlay: args.filename.clone(),
        format: args.format.clone(),
        base: args.base.clone(),
        allowed_directories: args.allow_backing_dir.clone(),
        cache: args.cache,
    };
    let result = run_commit(&options, &registry, &mut trace);
    trace.total();
    let result = result?;
    if !args.quiet {
        let text = render_commit_success(&result, args.output);
        print(out, &text).map_err(|CliError { code, message }| CommitError::new(code, message))?;
    }
    Ok(())
}

/// Show an error on `err`.
pub fn report(error: &CommitError, args: &CommitArgs, err: &mut dyn Write) {
    // Nobody to tell if stderr is gone.
    let _ = err.write_all(render_commit_error(error, args.output).as_bytes());
}

/// Options that are not there yet are refused, not ignored.
fn refuse_missing(args: &CommitArgs) -> Result<(), CommitError> {
    let missing = [
        (args.keep_overlay, "-d"),
        (args.progress, "-p"),
        (args.rate_limit.is_some_and(|rate| rate != 0), "-r"),
        (args.cache != CacheMode::Writeback, "-t with another mode than writeback"),
        (args.resize_backing, "--resize-backing"),
        (args.dry_run, "--dry-run"),
    ];
    match missing.iter().find(|(given, _)| *given) {
        None => Ok(()),
        Some((_, option)) => {
            let clause = format!("{option} is not there yet: run the commit without it; nothing was changed");
            Err(CommitError::image(&args.filename, ErrorCode::NotImplemented, clause))
        }
    }
}
