//! CRC-32C (Castagnoli), the checksum of iSCSI (RFC 3720, B.4), eight bytes at a time.

/// The polynomial, bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// For each of eight positions, the remainder that a byte there leaves.
static TABLES: [[u32; 256]; 8] = tables();

#[allow(clippy::cast_possible_truncation, clippy::indexing_slicing, reason = "indices below 256 and 8, in a constant")]
const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut rest = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            rest = (rest >> 1) ^ (POLYNOMIAL * (rest & 1));
            bit += 1;
        }
        tables[0][byte] = rest;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[table - 1][byte];
            tables[table][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// The checksum of these bytes.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let entry = |table: usize, byte: u32| TABLES[table][(byte & 0xff) as usize];
    let mut crc = u32::MAX;
    let mut words = bytes.chunks_exact(8);
    for word in &mut words {
        let [a, b, c, d, e, f, g, h] = *word else { continue };
        let low = crc ^ u32::from_le_bytes([a, b, c, d]);
        let high = u32::from_le_bytes([e, f, g, h]);
        crc = (0..4).fold(0, |crc, place: u32| {
            let shift = 8 * place;
            let (near, far) = (7 - place as usize, 3 - place as usize);
            crc ^ entry(near, low >> shift) ^ entry(far, high >> shift)
        });
    }
    for &byte in words.remainder() {
        crc = (crc >> 8) ^ entry(0, crc ^ u32::from(byte));
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_rfc_3720() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
    }
}
