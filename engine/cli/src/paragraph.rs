//! Sentences for people, broken between words where a terminal is narrower than they are.

use super::output::print;
use super::terminal::width;
use instar::error::Error;
use std::io::Write;
use textwrap::core::Word;
use textwrap::{Options, WordSeparator, WordSplitter};

/// Where the lines of a sentence begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Indent {
    /// Before the first line.
    pub first: &'static str,
    /// Before all others.
    pub rest: &'static str,
}

/// A sentence in lines of at most `width` columns; one line if that is `None`. Quoted names and commands stay whole, so that they
/// can be copied, even if they are longer.
pub fn filled(sentence: &str, indent: Indent, width: Option<usize>) -> String {
    let Some(width) = width else { return format!("{}{sentence}", indent.first) };
    let options = Options::new(width)
        .initial_indent(indent.first)
        .subsequent_indent(indent.rest)
        .word_separator(WordSeparator::Custom(words))
        .word_splitter(WordSplitter::NoHyphenation)
        .break_words(false);
    textwrap::fill(sentence, options)
}

/// Print sentences on `out`, each of which has lines of its own, in those of the terminal.
///
/// # Errors
/// [`ErrorCode::OutputFailed`](instar_guest_abi::ErrorCode::OutputFailed).
pub fn print_sentences(out: &mut dyn Write, text: &str) -> Result<(), Error> {
    let width = width();
    let lines: String = text.lines().map(|line| filled(line, Indent::default(), width) + "\n").collect();
    print(out, &lines)
}

/// What a line may be broken between: words, and what stands in quotes.
fn words(line: &str) -> Box<dyn Iterator<Item = Word<'_>> + '_> {
    let mut from = 0;
    let mut quote = None;
    let mut ends = Vec::new();
    let mut before = ' ';
    for (at, character) in line.char_indices() {
        let next = line[at..].chars().nth(1).unwrap_or(' ');
        match quote {
            Some(open) if character == open && !next.is_alphanumeric() => quote = None,
            None if matches!(character, '\'' | '`') && matches!(before, ' ' | '(') => quote = Some(character),
            None if character == ' ' && next != ' ' => ends.push(at + 1),
            _ => {}
        }
        before = character;
    }
    // A quote that nothing ends is an apostrophe.
    if quote.is_some() {
        return WordSeparator::AsciiSpace.find_words(line);
    }
    ends.push(line.len());
    Box::new(ends.into_iter().map(move |end| Word::from(&line[std::mem::replace(&mut from, end)..end])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_commands_stay_whole() {
        let indent = Indent { first: "- ", rest: "  " };
        for (sentence, lines) in [
            ("one two three", "- one two\n  three"),
            ("in 'a b c d e f', and on", "- in\n  'a b c d e f',\n  and on"),
            ("run (`instar doctor`) now", "- run\n  (`instar doctor`)\n  now"),
            ("the image's own name", "- the\n  image's\n  own name"),
            ("an 'open end of it", "- an 'open\n  end of it"),
            ("ein Gerät für dich", "- ein Gerät\n  für dich"),
        ] {
            assert_eq!(filled(sentence, indent, Some(12)), lines, "{sentence}");
            assert_eq!(filled(sentence, indent, None), format!("- {sentence}"));
        }
    }
}
