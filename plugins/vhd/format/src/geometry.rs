//! Cylinders, heads and sectors ("Appendix: CHS Calculation"), which old creators measure a disk by.

/// Sectors of the largest disk that a geometry can describe: 65535 × 16 × 255.
const MOST: u64 = 65535 * 16 * 255;

/// The geometry of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads, 16 at most in what this library makes.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors: u8,
}

impl Geometry {
    /// The geometry of a disk of `total` sectors, as the appendix computes it. Its product may be less than `total`.
    #[must_use]
    pub fn of(total: u64) -> Self {
        let total = total.min(MOST);
        let (heads, sectors) = if total >= 65535 * 16 * 63 {
            (16, 255)
        } else {
            let tracks = total / 17;
            let heads = tracks.div_ceil(1024).max(4);
            if tracks < heads * 1024 && heads <= 16 {
                (heads, 17)
            } else if total / 31 < 16 * 1024 {
                (16, 31)
            } else {
                (16, 63)
            }
        };
        // At most 65535 cylinders, 16 heads and 255 sectors: every number fits.
        Self {
            cylinders: u16::try_from(total / sectors / heads).unwrap_or(u16::MAX),
            heads: u8::try_from(heads).unwrap_or(u8::MAX),
            sectors: u8::try_from(sectors).unwrap_or(u8::MAX),
        }
    }

    /// Sectors that the geometry describes.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.cylinders as u64 * self.heads as u64 * self.sectors as u64
    }

    /// Whether no larger disk can be described: then the geometry says nothing about the size.
    #[must_use]
    pub const fn is_largest(self) -> bool {
        self.total() == MOST
    }

    /// The field of the footer.
    #[must_use]
    pub const fn encode(self) -> [u8; 4] {
        let [high, low] = self.cylinders.to_be_bytes();
        [high, low, self.heads, self.sectors]
    }

    /// What the field of the footer says.
    #[must_use]
    pub const fn decode(field: [u8; 4]) -> Self {
        Self { cylinders: u16::from_be_bytes([field[0], field[1]]), heads: field[2], sectors: field[3] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Measured: what QEMU 10.0 writes for sizes that are the product of a geometry.
    #[test]
    fn the_numbers_of_the_appendix() {
        for (total, wanted) in [
            (2108, (31, 4, 17)),
            (102_408, (1004, 6, 17)),
            (1_049_328, (1041, 16, 63)),
            (2_097_648, (2081, 16, 63)),
            (83_888_880, (20561, 16, 255)),
            (u64::MAX, (65535, 16, 255)),
        ] {
            let found = Geometry::of(total);
            assert_eq!((found.cylinders, found.heads, found.sectors), wanted, "{total} sectors");
            assert_eq!(Geometry::decode(found.encode()), found);
        }
        // The second step, which few sizes stop at.
        assert_eq!(Geometry::of(400_000).sectors, 31);
        assert!(Geometry::of(u64::MAX).is_largest() && !Geometry::of(1 << 21).is_largest());
        assert!((1..5000).all(|total| Geometry::of(total * 977).total() <= total * 977));
        assert_eq!(Geometry::of(0).total(), 0);
    }
}
