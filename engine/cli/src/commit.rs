//! `instar commit`: the run, and what is printed.

use super::commit_args::{CommitArgs, DetectZeroes};
use super::commit_text::{render_commit_success, render_dry_run, render_verbose};
use super::output::OutputFormat;
use super::print_error;
use super::said::broken;
use super::signals::cancel_on_signals;
use super::terminal::say;
use super::told::Told;
use instar::commit::{run_commit, CommitMode, CommitOutcome, CommitRequest};
use instar::error::Error;
use std::io::Write;
use std::rc::Rc;

/// Run the command; the exit status.
pub fn run(args: &CommitArgs, out: &mut dyn Write) -> u8 {
    match commit(args, out) {
        Ok(()) => 0,
        Err(error) => print_error(&error, args.output),
    }
}

fn commit(args: &CommitArgs, out: &mut dyn Write) -> Result<(), Error> {
    args.unsupported.refuse()?;
    if let (true, Some(base)) = (args.by_adoption, &args.base) {
        return super::commit_by_adoption::commit(args, base, out);
    }
    let warns = !args.quiet && args.output == OutputFormat::Human;
    let told = Told { verbose: args.verbose, warns, ..Told::of("commit", &args.progress, args.quiet)? };
    let told = Rc::new(told);
    let result = committed(args, &told);
    told.end(args.dry_run, result.as_ref());
    let result = result?;
    if args.verbose {
        say(&broken(&render_verbose(&result)));
    }
    if args.dry_run {
        return render_dry_run(&result, args.output, out);
    }
    render_commit_success(&result, args.output, args.quiet, out)
}

fn committed(args: &CommitArgs, told: &Rc<Told>) -> Result<CommitOutcome, Error> {
    let config = super::configuration(args.output)?;
    let request = CommitRequest {
        overlay: args.filename.clone(),
        format: args.format.clone(),
        base: args.base.clone(),
        base_format: args.base_format.clone(),
        keep_overlay: args.keep_overlay,
        wipe: args.wipe,
        verify: args.verify,
        digest: args.digest,
        detect_zeroes: args.detect_zeroes.unwrap_or_default() != DetectZeroes::Off,
        delete_overlay: args.delete_overlay,
        mode: if args.dry_run { CommitMode::DryRun } else { CommitMode::Whole },
        atomic: args.atomic,
        keep_backup: args.keep_backup.clone(),
        resize_backing: args.resize_backing,
        bitmaps: args.bitmaps,
        relink: args.relink.clone(),
        relink_in: args.relink_in.clone(),
        ignore_siblings: args.ignore_siblings,
        rate_limit: args.rate_limit.unwrap_or(0),
        cache: args.cache.into(),
        settings: args.opening.settings(&config).with_undo_directory(args.undo_dir.as_deref()),
    };
    let mut result = run_commit(&request, &told.session(cancel_on_signals()))?;
    result.warnings.splice(0..0, config.warnings);
    Ok(result)
}
