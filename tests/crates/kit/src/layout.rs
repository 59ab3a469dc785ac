//! What an image is made of, for those who change one field of it.

/// A number in a file.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Byte offset.
    pub at: usize,
    /// Bytes: 1, 2, 4 or 8.
    pub width: usize,
}

/// Which byte of a number comes first in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ByteOrder {
    /// The highest.
    Big,
    /// The lowest.
    #[default]
    Little,
}

impl ByteOrder {
    /// The number in a field; bytes past the end of the file are missing from it.
    #[must_use]
    pub fn get(self, bytes: &[u8], field: Field) -> u64 {
        let end = field.at.saturating_add(field.width);
        let raw = bytes.get(field.at..end).unwrap_or_default();
        let fold = |number, byte: &u8| number << 8 | u64::from(*byte);
        match self {
            Self::Big => raw.iter().fold(0, fold),
            Self::Little => raw.iter().rev().fold(0, fold),
        }
    }

    /// Put the low bytes of a number into a field. Nothing happens if that is not within the file.
    pub fn put(self, bytes: &mut [u8], field: Field, value: u64) {
        let end = field.at.saturating_add(field.width);
        let Some(target) = bytes.get_mut(field.at..end) else { return };
        match self {
            Self::Big => target.iter_mut().rev().zip(value.to_le_bytes()).for_each(|(place, byte)| *place = byte),
            Self::Little => target.iter_mut().zip(value.to_le_bytes()).for_each(|(place, byte)| *place = byte),
        }
    }
}

/// What an image is made of: kinds of fields, and the offsets of its structures.
#[derive(Clone, Debug)]
pub struct Layout {
    /// How numbers stand in the file.
    pub order: ByteOrder,
    /// The fields of the header, of the L1 table, of one kind of table each. None is empty.
    pub kinds: Vec<Vec<Field>>,
    /// Where structures begin, in units.
    pub places: Vec<u64>,
    /// The byte of the file from which places are counted.
    pub origin: u64,
    /// Bytes of a unit, in which entries of tables name places.
    pub unit: u64,
    /// Bits that entries may have besides.
    pub flags: &'static [u64],
}

impl Layout {
    /// A layout without any fields.
    #[must_use]
    pub fn new(order: ByteOrder, unit: u64, flags: &'static [u64]) -> Self {
        Self { order, kinds: Vec::new(), places: Vec::new(), origin: 0, unit, flags }
    }

    /// Add a kind: fields of this width one after the other, from byte `start` to `end`.
    pub fn fields(&mut self, start: usize, end: usize, width: usize) {
        self.kind((start..end).step_by(width).filter(|at| at + width <= end).map(|at| Field { at, width }));
    }

    /// Add a kind, unless there is no field of it.
    pub fn kind(&mut self, fields: impl IntoIterator<Item = Field>) {
        let fields: Vec<Field> = fields.into_iter().collect();
        if !fields.is_empty() {
            self.kinds.push(fields);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_in_their_order() {
        let mut bytes = [0; 8];
        let field = Field { at: 2, width: 4 };
        for (order, raw) in [(ByteOrder::Big, [1, 2, 3, 4]), (ByteOrder::Little, [4, 3, 2, 1])] {
            order.put(&mut bytes, field, 0xffff_0000_0102_0304);
            assert_eq!(bytes[1..7], [&[0][..], &raw, &[0]].concat());
            assert_eq!(order.get(&bytes, field), 0x0102_0304);
        }
        ByteOrder::Big.put(&mut bytes, Field { at: 6, width: 4 }, 9);
        assert_eq!(bytes[6..], [0, 0]);
    }
}
