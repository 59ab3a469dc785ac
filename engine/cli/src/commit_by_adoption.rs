//! `instar commit --by-adoption`: what is printed.

use super::commit_args::CommitArgs;
use super::output::{print_json_indented, unprinted_but, OutputFormat};
use super::paragraph::print_sentences;
use super::signals::cancel_on_signals;
use super::told::Told;
use instar::adopt::{run_adopt, AdoptOutcome, AdoptRequest};
use instar::bytes::Bytes;
use instar::error::Error;
use instar::escape::escape_path;
use std::io::Write;
use std::path::Path;
use std::rc::Rc;

/// Have the overlay take the place of `base`, and print what came of it.
///
/// # Errors
/// One line that names the file and what to do.
pub fn commit(args: &CommitArgs, base: &Path, out: &mut dyn Write) -> Result<(), Error> {
    let warns = !args.quiet && args.output == OutputFormat::Human;
    let told = Rc::new(Told { verbose: args.verbose, warns, ..Told::of("commit", &args.progress, args.quiet)? });
    let result = adopted(args, base, &told);
    told.end(args.dry_run, result.as_ref());
    let outcome = result?;
    let printed = match args.output {
        OutputFormat::Json => print_json_indented(out, &outcome, b"  "),
        OutputFormat::Human if args.quiet && !args.dry_run => Ok(()),
        OutputFormat::Human => print_sentences(out, &text(&outcome)),
    };
    let done = if args.dry_run { "nothing was changed" } else { "the commit is done" };
    printed.map_err(|error| unprinted_but(done, &outcome.overlay_given, &error))
}

fn adopted(args: &CommitArgs, base: &Path, told: &Rc<Told>) -> Result<AdoptOutcome, Error> {
    let config = super::configuration(args.output)?;
    let request = AdoptRequest {
        overlay: args.filename.clone(),
        format: args.format.clone(),
        base: base.to_owned(),
        base_format: args.base_format.clone(),
        resize_backing: args.resize_backing,
        ignore_siblings: args.ignore_siblings,
        dry_run: args.dry_run,
        cache: args.cache.into(),
        settings: args.opening.settings(&config),
    };
    let mut outcome = run_adopt(&request, &told.session(cancel_on_signals()))?;
    outcome.warnings.splice(0..0, config.warnings);
    Ok(outcome)
}

/// What is said to people.
fn text(outcome: &AdoptOutcome) -> String {
    let (overlay, target, bytes) =
        (escape_path(&outcome.overlay_given), escape_path(&outcome.backing), Bytes(outcome.bytes_kept));
    if outcome.dry_run {
        return format!(
            "'{overlay}' would take the place of '{target}', after {bytes} were written into it. Nothing was changed.\n"
        );
    }
    format!("Image committed.\n'{overlay}' has taken the place of '{target}', after {bytes} were written into it.\n")
}
