//! Numbers of bytes, as people read them.

use std::fmt::{Display, Formatter, Result};

/// A number of bytes in a sentence: exactly, and with a unit where that is easier to read, `65536 bytes (64 KiB)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self(bytes) = *self;
        match bytes {
            1 => f.write_str("1 byte"),
            0..1000 => write!(f, "{bytes} bytes"),
            _ => write!(f, "{bytes} bytes ({})", format_size(bytes)),
        }
    }
}

/// A number of bytes for people: three significant digits and a binary unit, `196 KiB`, `1.5 GiB`.
#[must_use]
#[allow(clippy::cast_precision_loss)]
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // From 1000 on the next unit is used.
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    let mut digits = format!("{value:.decimals$}");
    if digits.contains('.') {
        digits = digits.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    format!("{digits} {}B", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_has_both() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (999, "999 bytes"),
            (65536, "65536 bytes (64 KiB)"),
            (3 << 30, "3221225472 bytes (3 GiB)"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn sizes_are_printed_as_qemu_img_prints_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.98 KiB"),
            (1024, "1 KiB"),
            (200_704, "196 KiB"),
            (1 << 30, "1 GiB"),
            (3 << 29, "1.5 GiB"),
            (1_000_000_000, "954 MiB"),
            (i64::MAX as u64, "8 EiB"),
        ] {
            assert_eq!(format_size(bytes), text, "{bytes}");
        }
    }
}
