//! Bytes that end before what is read of them does: zeroes follow, as behind the end of a parent or of a file.

/// The first `length` of these bytes, with as many zeroes behind them as are missing.
#[must_use]
pub fn padded(bytes: &[u8], length: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(length);
    all.extend_from_slice(&bytes[..length.min(bytes.len())]);
    all.resize(length, 0);
    all
}

/// Fill `place` with the first of these bytes, and what is left of it with zeroes.
pub fn copy_padded(place: &mut [u8], bytes: &[u8]) {
    let (copied, missing) = place.split_at_mut(place.len().min(bytes.len()));
    copied.copy_from_slice(&bytes[..copied.len()]);
    missing.fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_zero() {
        assert_eq!(padded(&[1, 2, 3], 2), [1, 2]);
        assert_eq!(padded(&[1, 2], 4), [1, 2, 0, 0]);
        for (bytes, expected) in [(&[1, 2, 3, 4][..], [1, 2, 3]), (&[1], [1, 0, 0]), (&[], [0; 3])] {
            let mut place = [9; 3];
            copy_padded(&mut place, bytes);
            assert_eq!(place, expected);
        }
    }
}
