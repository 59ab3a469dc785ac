//! The corpus of a target: one file of text, so that the repository has one file for each, a change of it can be read, and what was
//! a finding once has a name.
//!
//! A line is an input: its name, a blank, and its bytes in hexadecimal. Inputs without a name are called `-`.

use std::io;
use std::path::{Path, PathBuf};

/// An input.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Input {
    /// What it was a finding of; `None` for one that covers more code.
    pub finding: Option<String>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Names of findings in directories of inputs begin with this.
const FINDING: &str = "finding-";

fn path(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(format!("{target}.txt"))
}

fn parse(line: &str) -> Option<Input> {
    let (name, text) = line.split_once(' ')?;
    let digits = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    let bytes = (0..text.len()).step_by(2).map(digits).collect::<Option<Vec<u8>>>()?;
    Some(Input { finding: (name != "-").then(|| name.to_owned()), bytes })
}

/// The inputs of a target.
///
/// # Errors
/// What reading the file gives; `InvalidData` with the number of a line that is no input.
pub fn load(target: &str) -> io::Result<Vec<Input>> {
    let (path, mut inputs) = (path(target), Vec::new());
    for (number, line) in std::fs::read_to_string(&path)?.lines().enumerate() {
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, format!("{}:{}", path.display(), number + 1));
        inputs.push(parse(line).ok_or_else(wrong)?);
    }
    Ok(inputs)
}

/// Replace the inputs of a target.
///
/// # Errors
/// What writing the file gives.
pub fn store(target: &str, inputs: &[Input]) -> io::Result<()> {
    let mut sorted = inputs.to_vec();
    sorted.sort();
    sorted.dedup();
    let line = |input: &Input| {
        let digits: String = input.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{} {digits}\n", input.finding.as_deref().unwrap_or("-"))
    };
    std::fs::write(path(target), sorted.iter().map(line).collect::<String>())
}

/// Write each input of a target to a file of its own in a directory, as libFuzzer has them.
///
/// # Errors
/// As [`load`]; what writing gives.
pub fn unpack(target: &str, directory: &Path) -> io::Result<()> {
    for (number, input) in load(target)?.iter().enumerate() {
        let name = match &input.finding {
            Some(finding) => format!("{FINDING}{finding}"),
            None => format!("input-{number}"),
        };
        std::fs::write(directory.join(name), &input.bytes)?;
    }
    Ok(())
}

/// Make the files in a directory the inputs of a target. What was a finding once stays.
///
/// # Errors
/// As [`load`] and [`store`].
pub fn pack(target: &str, directory: &Path) -> io::Result<usize> {
    let mut inputs: Vec<Input> = load(target)?.into_iter().filter(|input| input.finding.is_some()).collect();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let finding = entry.file_name().to_str().and_then(|name| name.strip_prefix(FINDING)).map(str::to_owned);
        inputs.push(Input { finding, bytes: std::fs::read(entry.path())? });
    }
    store(target, &inputs)?;
    Ok(inputs.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_inputs() {
        assert_eq!(parse("- 00ff"), Some(Input { finding: None, bytes: vec![0, 255] }));
        assert_eq!(parse("a-name "), Some(Input { finding: Some("a-name".into()), bytes: vec![] }));
        for wrong in ["", "-", "- 0", "- 0g", "- é"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
