//! Color in texts for people: where a terminal shows it, unless the environment or `--color` says otherwise.

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use anstyle_query::clicolor_force;
use clap::{Args, ValueEnum};
use std::io::{stderr, stdout};

/// When a text has colors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// On a terminal, unless NO_COLOR is set or TERM is dumb
    #[default]
    Auto,
    /// Always, for a pager
    Always,
    /// Never
    Never,
}

/// The option of the commands whose text has colors.
#[derive(Args, Debug, Default)]
pub struct ColorArgs {
    /// Color what is printed for people. JSON never has any
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub color: When,
}

impl ColorArgs {
    /// How text on standard output is painted. To be asked for before the process is confined.
    #[must_use]
    pub fn stdout(&self) -> Paint {
        self.on(AutoStream::choice(&stdout()), dumb())
    }

    /// How text on standard error is painted. To be asked for before the process is confined.
    #[must_use]
    pub fn stderr(&self) -> Paint {
        self.on(AutoStream::choice(&stderr()), dumb())
    }

    fn on(&self, stream: ColorChoice, dumb: bool) -> Paint {
        Paint(match self.color {
            When::Auto => stream != ColorChoice::Never && !dumb,
            When::Always => true,
            When::Never => false,
        })
    }
}

/// Whether the terminal says that it shows no colors, and nobody forces them. `anstream` colors such a terminal where the variable CI is set.
fn dumb() -> bool {
    !clicolor_force() && std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}

/// Paints words, or leaves them plain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paint(bool);

impl Paint {
    /// Without color.
    pub const PLAIN: Self = Self(false);

    /// A heading, or the name of an image.
    #[must_use]
    pub fn heading(self, text: &str) -> String {
        self.styled(Style::new().bold(), text)
    }

    /// The name of a value.
    #[must_use]
    pub fn label(self, text: &str) -> String {
        self.styled(AnsiColor::Cyan.on_default(), text)
    }

    /// What is as it should be.
    #[must_use]
    pub fn good(self, text: &str) -> String {
        self.styled(AnsiColor::Green.on_default(), text)
    }

    /// What to look at, without harm to data.
    #[must_use]
    pub fn warning(self, text: &str) -> String {
        self.styled(AnsiColor::Yellow.on_default(), text)
    }

    /// What is damaged.
    #[must_use]
    pub fn bad(self, text: &str) -> String {
        self.styled(AnsiColor::Red.on_default().bold(), text)
    }

    /// Data in a picture.
    #[must_use]
    pub fn data(self, text: &str) -> String {
        self.styled(AnsiColor::Blue.on_default().bold(), text)
    }

    /// What is less important.
    #[must_use]
    pub fn faint(self, text: &str) -> String {
        self.styled(Style::new().dimmed(), text)
    }

    fn styled(self, style: Style, text: &str) -> String {
        if self.0 && !text.is_empty() {
            format!("{style}{text}{style:#}")
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_goes_before_the_terminal() {
        let painted = |color, stream, dumb| ColorArgs { color }.on(stream, dumb).bad("x");
        for (color, stream, dumb, text) in [
            (When::Auto, ColorChoice::Never, false, "x"),
            (When::Auto, ColorChoice::Always, false, "\x1b[1m\x1b[31mx\x1b[0m"),
            (When::Auto, ColorChoice::Always, true, "x"),
            (When::Never, ColorChoice::Always, false, "x"),
            (When::Always, ColorChoice::Never, true, "\x1b[1m\x1b[31mx\x1b[0m"),
        ] {
            assert_eq!(painted(color, stream, dumb), text, "{color:?} {stream:?} {dumb}");
        }
        assert_eq!(ColorArgs { color: When::Always }.on(ColorChoice::Never, false).good(""), "");
    }
}
