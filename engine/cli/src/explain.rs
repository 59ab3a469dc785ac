//! `instar explain`: what an error code means, and what to do about it.

use super::explain_text::remedy;
use super::output::{print, print_json, OutputFormat};
use super::paragraph::{filled, Indent};
use super::terminal::width;
use super::usage::bad_usage;
use clap::Args;
use instar::error::Error;
use instar::nearest::nearest;
use instar_guest_abi::ErrorCode;
use serde_json::{json, Value};
use std::io::Write;

/// Say what an error code means, and what to do about it
#[derive(Args, Debug)]
pub struct ExplainArgs {
    /// Number or name of the code, as an error line or its JSON has it. Default: all codes
    #[arg(value_name = "CODE")]
    pub code: Option<String>,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// Run the command.
///
/// # Errors
/// [`ErrorCode::BadUsage`] for a code that does not exist, and when the result cannot be written.
pub fn run(args: &ExplainArgs, out: &mut dyn Write) -> Result<(), Error> {
    let codes = match &args.code {
        Some(word) => vec![code(word)?],
        None => ErrorCode::ALL.to_vec(),
    };
    match args.output {
        OutputFormat::Human => print(out, &codes.iter().map(|code| human(*code)).collect::<Vec<_>>().join("\n")),
        OutputFormat::Json => {
            print_json(out, &json!({"codes": codes.iter().map(|code| to_json(*code)).collect::<Vec<_>>()}))
        }
    }
}

/// The code that a word means: its number, or its name in any case, `ERROR_` or not.
fn code(word: &str) -> Result<ErrorCode, Error> {
    let name = word.trim_matches(['(', ')']).to_uppercase().replace('-', "_");
    let short = |code: &ErrorCode| code.name().trim_start_matches("ERROR_");
    let found = match name.parse() {
        Ok(number) => ErrorCode::from_u32(number),
        Err(_) => ErrorCode::ALL.iter().find(|code| short(code) == name.trim_start_matches("ERROR_")).copied(),
    };
    found.ok_or_else(|| {
        let names = ErrorCode::ALL.iter().map(short);
        let near = nearest(name.trim_start_matches("ERROR_"), names);
        let near = near.map(|near| format!("; the nearest one is ERROR_{near}")).unwrap_or_default();
        bad_usage(format!("'{word}' is no error code{near}: `instar explain` lists them all"))
    })
}

fn human(code: ErrorCode) -> String {
    let lines = |first, sentence| filled(sentence, Indent { first, rest: "      " }, width());
    let (meaning, remedy) = (lines("    ", code.meaning().trim()), lines("    → ", remedy(code)));
    format!("{} ({})\n{meaning}\n{remedy}\n", code.name(), code.number())
}

fn to_json(code: ErrorCode) -> Value {
    json!({"code": code.number(), "name": code.name(), "meaning": code.meaning().trim(), "remedy": remedy(code)})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_found_by_number_and_name() {
        for word in ["16", "ERROR_NO_SPACE", "error_no_space", "no-space", "(ERROR_NO_SPACE)"] {
            assert_eq!(code(word).ok(), Some(ErrorCode::NoSpace), "{word}");
        }
        for word in ["0", "4600", "-1", "", "nothing of the kind"] {
            assert_eq!(code(word).err().map(|error| error.code), Some(ErrorCode::BadUsage), "{word}");
        }
        let message = code("NO_SPCAE").err().map(|error| error.message).unwrap_or_default();
        assert!(message.contains("the nearest one is ERROR_NO_SPACE"), "{message}");
    }

    #[test]
    fn each_code_has_one_line_of_advice() {
        for &code in ErrorCode::ALL {
            let text = remedy(code);
            assert!(text.ends_with(['.', ')']) && !text.contains('\n') && text.len() < 450, "{}: {text}", code.name());
        }
    }
}
