//! `-o`: options of a format, as `qemu-img` reads them.

use super::paragraph::{filled, Indent};
use super::terminal::width;
use super::usage::bad_usage;
use instar::error::Error;
use instar::escape::{escape, printable};
use std::fmt::Write as _;

/// Whether the options ask for the list of options.
#[must_use]
pub fn want_help(options: &[(String, String)]) -> bool {
    options.iter().any(|(name, _)| name == "help" || name == "?")
}

/// The options of a format with their help, and `common` ones.
#[must_use]
pub fn help(format: &str, options: &[(String, String)], common: &[(&str, &str)]) -> String {
    let mut text = format!("Options of {format}:\n");
    let width = width();
    // Below the texts, where a terminal has room for that.
    let rest = if width.is_some_and(|width| width < 60) { "      " } else { "                           " };
    let options = options.iter().map(|(name, help)| (name.as_str(), help.as_str()));
    for (name, help) in options.chain(common.iter().copied()) {
        let line = format!("{:<22} - {}", format!("{}=<value>", printable(name)), printable(help));
        let _ = writeln!(text, "{}", filled(&line, Indent { first: "  ", rest }, width));
    }
    text
}

/// `a=b,c=d` with `,,` for a comma within a value, as `qemu-img` reads it.
///
/// # Errors
/// [`ErrorCode::BadUsage`](instar_guest_abi::ErrorCode::BadUsage) for an option without a value.
pub fn split_options(texts: &[String]) -> Result<Vec<(String, String)>, Error> {
    let mut pairs = Vec::new();
    for text in texts {
        let mut items = vec![String::new()];
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            if c == ',' && chars.next_if_eq(&',').is_none() {
                items.push(String::new());
            } else if let Some(item) = items.last_mut() {
                item.push(c);
            }
        }
        for item in items.into_iter().filter(|item| !item.is_empty()) {
            match item.split_once('=') {
                Some((name, value)) => pairs.push((name.to_owned(), value.to_owned())),
                None if item == "help" || item == "?" => pairs.push((item, String::new())),
                None => return Err(bad_usage(format!("option '{}' needs a value: NAME=VALUE", escape(&item)))),
            }
        }
    }
    Ok(pairs)
}
