//! Selecting the disk of an image that an operation reads: its own, or that of an internal snapshot.

use super::chain_image::ChainImage;
use crate::error::Error;
use crate::escape::{escape, escape_bytes};
use crate::nearest::nearest;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::SnapshotFacts;
use std::convert::Infallible;
use std::str::FromStr;

/// Most names of snapshots in a message.
const SHOWN: usize = 8;

/// The operator's name for an internal snapshot: as for `-l` of `qemu-img`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotName {
    /// The identifier of one, or else a name.
    IdOrName(String),
    /// Identifier and name, of which each that is given has to match.
    Exactly {
        /// `snapshot.id=`
        id: Option<String>,
        /// `snapshot.name=`
        name: Option<String>,
    },
}

impl FromStr for SnapshotName {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let (mut id, mut name) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("snapshot.id", value)) => id = Some(value.to_owned()),
                Some(("snapshot.name", value)) => name = Some(value.to_owned()),
                _ => return Ok(Self::IdOrName(text.to_owned())),
            }
        }
        Ok(Self::Exactly { id, name })
    }
}

impl SnapshotName {
    /// The place of the snapshot that is meant: the first that fits, as QEMU takes it.
    fn find(&self, all: &[SnapshotFacts]) -> Option<usize> {
        let is = |bytes: &[u8], wanted: &str| bytes == wanted.as_bytes();
        match self {
            Self::IdOrName(text) => {
                let by_id = all.iter().position(|snapshot| is(&snapshot.id, text));
                by_id.or_else(|| all.iter().position(|snapshot| is(&snapshot.name, text)))
            }
            Self::Exactly { id, name } => all.iter().position(|snapshot| {
                id.as_ref().is_none_or(|id| is(&snapshot.id, id))
                    && name.as_ref().is_none_or(|name| is(&snapshot.name, name))
            }),
        }
    }

    /// The name of a snapshot that is nearest to the one that was given.
    fn near<'a>(&self, all: &'a [SnapshotFacts]) -> Option<&'a str> {
        let (Self::IdOrName(wanted) | Self::Exactly { name: Some(wanted), .. }) = self else { return None };
        nearest(wanted, all.iter().filter_map(|snapshot| std::str::from_utf8(&snapshot.name).ok()))
    }
}

impl ChainImage<'_> {
    /// Read the disk of this snapshot, which may have another size, instead of the image's own.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if there is no such snapshot.
    pub fn select_snapshot(&mut self, name: &SnapshotName) -> Result<(), Error> {
        let all = &self.facts.snapshots;
        let found = name.find(all).and_then(|place| all.get(place).zip(u32::try_from(place + 1).ok()));
        let Some((snapshot, number)) = found else {
            let names: Vec<String> =
                all.iter().take(SHOWN).map(|snapshot| format!("'{}'", escape_bytes(&snapshot.name))).collect();
            let others = if all.len() > SHOWN { ", …" } else { "" };
            let clause = if names.is_empty() {
                "it has no internal snapshots: leave out -l".to_owned()
            } else {
                let near =
                    name.near(all).map(|near| format!("; the nearest one is {}", escape(near))).unwrap_or_default();
                format!("it has no such internal snapshot; it has {}{others}{near}", names.join(", "))
            };
            return Err(Error::image(&self.opened.path, ErrorCode::UnsupportedFormat, clause));
        };
        self.facts.virtual_size = snapshot.virtual_size;
        self.snapshot = number;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_goes_before_a_name() {
        let all = [("1", "2"), ("2", "one"), ("3", "a=b,c")]
            .map(|(id, name)| SnapshotFacts::new(id.as_bytes(), name.as_bytes(), 0));
        for (text, place) in [
            ("1", Some(0)),
            ("2", Some(1)),
            ("one", Some(1)),
            ("a=b,c", Some(2)),
            ("", None),
            ("4", None),
            ("snapshot.id=2", Some(1)),
            ("snapshot.name=2", Some(0)),
            ("snapshot.id=1,snapshot.name=2", Some(0)),
            ("snapshot.id=1,snapshot.name=one", None),
            ("snapshot.id=", None),
        ] {
            let Ok(name) = text.parse::<SnapshotName>();
            assert_eq!(name.find(&all), place, "{text}");
        }
    }
}
