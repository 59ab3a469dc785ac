//! Sizes as `qemu-img` reads them.

/// Parse a number of bytes: digits, for a suffix also with a decimal fraction, and a suffix `b`, `k`, `M`, `G`, `T`, `P`
/// or `E` in either case, all powers of 1024. `None` for anything else, and beyond 2^63 - 1.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let last = text.chars().last()?;
    let shift = match last.to_ascii_lowercase() {
        'b' => Some(0),
        'k' => Some(10),
        'm' => Some(20),
        'g' => Some(30),
        't' => Some(40),
        'p' => Some(50),
        'e' => Some(60),
        _ => None,
    };
    let digits = if shift.is_some() { text.strip_suffix(last)? } else { text };
    let scale = 1u128 << shift.unwrap_or(0);
    let (whole, fraction) = match digits.split_once('.') {
        None => (digits, ""),
        // Half a byte is nothing.
        Some((whole, fraction)) if scale > 1 && !fraction.is_empty() => (whole, fraction),
        Some(_) => return None,
    };
    let all_digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) || fraction.len() > 18 {
        return None;
    }
    let mut bytes = whole.parse::<u128>().ok()?.checked_mul(scale)?;
    if !fraction.is_empty() {
        let ten = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        bytes = bytes.checked_add(fraction.parse::<u128>().ok()?.checked_mul(scale)?.checked_add(ten / 2)? / ten)?;
    }
    u64::try_from(bytes).ok().filter(|&bytes| i64::try_from(bytes).is_ok())
}

/// [`parse_size`] for an option.
///
/// # Errors
/// What is wrong, in one clause.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let too_large = text.len() - number.len() <= 1 && !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    parse_size(text).ok_or_else(|| match text.bytes().last().map(|last| last.to_ascii_lowercase()) {
        Some(b'0'..=b'9' | b'b' | b'k' | b'm' | b'g' | b't' | b'p' | b'e') if too_large => {
            "more than 2^63 - 1 bytes".to_owned()
        }
        _ => "not a number of bytes, with or without a suffix k, M, G, T, P or E".to_owned(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            ("512b", 512),
            ("1k", 1024),
            ("1K", 1024),
            ("1.5G", 3 << 29),
            ("0.5M", 1 << 19),
            ("7E", 7 << 60),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "k", "-1", "+1", "1.5", "1.k", ".5k", "1kb", "8E", "1x", "0x10", "1e3", "99999999999999999999"]
        {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_said() {
        for text in ["8E", "99999999999999999999", "16384P"] {
            assert_eq!(parse_bytes(text).unwrap_err(), "more than 2^63 - 1 bytes", "{text}");
        }
        for text in ["", "1kb", "x", "-1", "1.5"] {
            assert!(parse_bytes(text).unwrap_err().starts_with("not a number of bytes"), "{text}");
        }
    }
}
