//! Typed properties of an image.

use abi_stable::std_types::{RString, RVec};
use abi_stable::StableAbi;

/// Maximum nesting depth of values: a list of records whose fields are lists of scalars.
pub const VALUE_DEPTH: usize = 4;

/// Maximum size in bytes of the values of all features of an image together: texts, names, and [`VALUE_BYTES`] for each value.
pub const VALUES_MAX: u64 = 8 << 20;

/// Size in bytes that each value counts in addition to its text and the names of its fields.
pub const VALUE_BYTES: u64 = 16;

/// The value of a [`Feature`].
#[repr(C, u8)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub enum FactValue {
    /// On or off.
    Flag(bool),
    /// A number. Sizes are in bytes.
    Number(u64),
    /// An unescaped text. Text from an image may hold control characters: the engine escapes it for people and for JSON, but a
    /// plugin that quotes it in a reason or a note has to escape it itself.
    Text(RString),
    /// Values in a significant order.
    List(RVec<FactValue>),
    /// Values by unique names, in display order.
    Record(RVec<Field>),
}

/// A part of a [`FactValue::Record`].
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: RString,
    /// Its value.
    pub value: FactValue,
}

impl FactValue {
    /// Make a list.
    pub fn list(values: impl IntoIterator<Item = impl Into<FactValue>>) -> Self {
        Self::List(values.into_iter().map(Into::into).collect())
    }

    /// Make a record from fields with these names.
    pub fn record<'n>(fields: impl IntoIterator<Item = (&'n str, FactValue)>) -> Self {
        Self::Record(fields.into_iter().map(|(name, value)| Field { name: name.into(), value }).collect())
    }

    /// Compute the size in bytes as [`VALUES_MAX`] counts it; `None` if the value is nested deeper than [`VALUE_DEPTH`] or
    /// larger than `most` bytes.
    #[must_use]
    pub fn weight(&self, most: u64) -> Option<u64> {
        let (mut total, mut left) = (0u64, vec![(self, 1usize)]);
        while let Some((value, depth)) = left.pop() {
            let text = match value {
                Self::Flag(_) | Self::Number(_) => 0,
                Self::Text(text) => text.len(),
                Self::List(values) => {
                    left.extend(values.iter().map(|value| (value, depth + 1)));
                    0
                }
                Self::Record(fields) => {
                    left.extend(fields.iter().map(|field| (&field.value, depth + 1)));
                    fields.iter().fold(0, |sum: usize, field| sum.saturating_add(field.name.len()))
                }
            };
            total = total.saturating_add(VALUE_BYTES).saturating_add(text as u64);
            if depth > VALUE_DEPTH || total > most {
                return None;
            }
        }
        Some(total)
    }
}

/// Escape the control characters of a text from an image, for a reason or a note.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

impl From<bool> for FactValue {
    fn from(value: bool) -> Self {
        Self::Flag(value)
    }
}

impl From<u64> for FactValue {
    fn from(value: u64) -> Self {
        Self::Number(value)
    }
}

impl From<u32> for FactValue {
    fn from(value: u32) -> Self {
        Self::Number(value.into())
    }
}

impl From<&str> for FactValue {
    fn from(value: &str) -> Self {
        Self::Text(value.into())
    }
}

impl From<String> for FactValue {
    fn from(value: String) -> Self {
        Self::Text(value.into())
    }
}

/// A property of an image that a verdict or a person may care about.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Name in the terms of the format: `compat`, `refcount-bits`, `snapshots`, `encryption`, …
    pub name: RString,
    /// Its value.
    pub value: FactValue,
    /// Whether `instar info` shows it in the `format-specific` section, under the same name.
    pub in_info: bool,
}

impl Feature {
    /// Make a feature with this value.
    pub fn new(name: &str, value: impl Into<FactValue>, in_info: bool) -> Self {
        Self { name: name.into(), value: value.into(), in_info }
    }

    /// Make a feature whose value is an unescaped text.
    #[must_use]
    pub fn text(name: &str, value: &str, in_info: bool) -> Self {
        Self::new(name, value, in_info)
    }

    /// Make a feature whose value is a number.
    #[must_use]
    pub fn number(name: &str, value: u64, in_info: bool) -> Self {
        Self::new(name, value, in_info)
    }

    /// Make a feature that is on or off.
    #[must_use]
    pub fn flag(name: &str, value: bool, in_info: bool) -> Self {
        Self::new(name, value, in_info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_know_how_large_they_are() {
        assert_eq!(FactValue::from(true).weight(16), Some(16));
        assert_eq!(FactValue::from("abc").weight(19), Some(19));
        assert_eq!(FactValue::from("abc").weight(18), None);
        let record = FactValue::record([("a", 1u64.into()), ("bc", FactValue::list(["x", "yz"]))]);
        // Five values, three letters of names, three of texts.
        assert_eq!(record.weight(u64::MAX), Some(5 * 16 + 6));
        let list = FactValue::list([record]);
        assert!(list.weight(u64::MAX).is_some());
        assert_eq!(FactValue::list([list]).weight(u64::MAX), None);
    }
}
