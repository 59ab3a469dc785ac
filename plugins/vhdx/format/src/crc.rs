//! CRC-32C, the checksum of headers, region tables and log entries (2.2.2, 2.2.3.1, 2.3.1.1; RFC 3720, appendix B.4).

/// The Castagnoli polynomial, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// What four more bytes make of a checksum: `TABLES[n]` is for the byte that `n` others follow.
const TABLES: [[u32; 256]; 4] = tables();

const fn tables() -> [[u32; 256]; 4] {
    let mut tables = [[0u32; 256]; 4];
    let mut index = 0;
    while index < 256 {
        #[allow(clippy::cast_possible_truncation, reason = "less than 256")]
        let mut sum = index as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 { (sum >> 1) ^ POLYNOMIAL } else { sum >> 1 };
            bit += 1;
        }
        tables[0][index] = sum;
        index += 1;
    }
    let mut table = 1;
    while table < 4 {
        let mut index = 0;
        while index < 256 {
            let before = tables[table - 1][index];
            tables[table][index] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            index += 1;
        }
        table += 1;
    }
    tables
}

fn update(mut sum: u32, bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        let [a, b, c, d] = (sum ^ u32::from_le_bytes(*word)).to_le_bytes().map(usize::from);
        sum = TABLES[3][a] ^ TABLES[2][b] ^ TABLES[1][c] ^ TABLES[0][d];
    }
    for &byte in rest {
        sum = (sum >> 8) ^ TABLES[0][usize::from(sum.to_le_bytes()[0] ^ byte)];
    }
    sum
}

/// The place of the checksum in every structure that has one.
pub const FIELD: usize = 4;

/// The checksum of a structure, whose own field counts as zero.
pub fn checksum(bytes: &[u8]) -> u32 {
    let (front, rest) = bytes.split_at(bytes.len().min(FIELD));
    let sum = update(update(!0, front), &[0; 4][..rest.len().min(4)]);
    !update(sum, rest.get(4..).unwrap_or_default())
}

/// Whether the checksum of a structure is right.
pub fn is_right(bytes: &[u8]) -> bool {
    crate::u32_at(bytes, FIELD) == checksum(bytes)
}

/// Put the right checksum into a structure.
pub fn seal(bytes: &mut [u8]) {
    let sum = checksum(bytes);
    crate::put(bytes, FIELD, &sum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_sums_come_out() {
        // RFC 3720, B.4, and the usual check value.
        assert_eq!(!update(!0, b"123456789"), 0xe306_9283);
        assert_eq!(!update(!0, &[0; 32]), 0x8a91_36aa);
        assert_eq!(!update(!0, &[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn the_field_itself_counts_as_zero() {
        let mut bytes = [7; 4096];
        seal(&mut bytes);
        assert!(is_right(&bytes));
        let sum = checksum(&bytes);
        bytes[4..8].fill(0);
        assert_eq!((sum, is_right(&bytes)), (checksum(&bytes), false));
        assert_eq!(sum, !update(!0, &bytes));
    }
}
