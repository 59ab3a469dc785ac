//! The checksum of footer and dynamic header ("Hard Disk Footer Format", field Checksum).

/// One's complement of the sum of all bytes, the four of the checksum at byte `field` taken as zero.
pub fn checksum(bytes: &[u8], field: usize) -> u32 {
    let own = field..field.saturating_add(4);
    let counted = bytes.iter().enumerate().filter(|(at, _)| !own.contains(at));
    !counted.fold(0u32, |sum, (_, &byte)| sum.wrapping_add(u32::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_itself_does_not_count() {
        assert_eq!(checksum(&[1, 2, 0xff, 0xff, 0xff, 0xff, 3], 2), !6);
        assert_eq!(checksum(&[0; 512], 64), u32::MAX);
    }
}
