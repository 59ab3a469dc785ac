//! Changes to valid images, as an input describes them: which field, and what to put there.

use super::{Files, Fixture};
use instar_testkit::{Field, Layout};

/// Bytes of an input for each change.
pub const CHANGE: usize = 16;
/// From this value of byte 6 of a change on, the image's checksums are made right again.
const SEALED: u8 = 0x80;
/// Changes that one input can make.
const MAX_CHANGES: usize = 6;

/// Apply the changes of an input. Byte by byte: 0 is not looked at (in the first change it chooses the images); 1 says which
/// file; 2 the kind of field, or any place of the file; 3 to 5 which one; 6 what the value is made of, and whether checksums are
/// made right again; 7 how long the file is afterwards, mostly as long as it was; 8 to 15 a number.
pub fn apply(fixture: &Fixture, input: &[u8]) -> Files {
    let mut files = fixture.files.clone();
    let devices: Vec<u32> = fixture.files.keys().copied().collect();
    for change in input.chunks_exact(CHANGE).take(MAX_CHANGES) {
        let device = devices[usize::from(change[1]) % devices.len()];
        let layout = &fixture.layouts[&device];
        if let Some(bytes) = files.get_mut(&device) {
            one(bytes, layout, change);
            if change[6] >= SEALED {
                fixture.formats[&device].kit.seal(bytes);
            }
        }
    }
    files
}

/// Apply one change to the bytes of an image.
pub(super) fn one(bytes: &mut Vec<u8>, layout: &Layout, change: &[u8]) {
    let index = usize::from(change[3]) << 16 | usize::from(change[4]) << 8 | usize::from(change[5]);
    let number = change[8..].iter().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
    let field = match layout.kinds.get(usize::from(change[2]) % (layout.kinds.len() + 1)) {
        Some(kind) => kind[index % kind.len()],
        None => {
            let width = [1, 2, 4, 8][index % 4];
            Field { at: (index / 4) % bytes.len().max(1) / width * width, width }
        }
    };
    if field.at + field.width <= bytes.len() {
        let old = layout.order.get(bytes, field);
        let low = usize::try_from(number % (1 << 32)).unwrap();
        let place = layout.places.get(low % layout.places.len().max(1)).copied().unwrap_or(0);
        let flag = |n: u64| layout.flags.get(usize::try_from(n % 16).unwrap()).copied().unwrap_or(0);
        let value = match change[6] % 12 {
            0 => number,
            1 => number >> (number % 64),
            2 => old ^ 1 << (number % 64),
            3 => old.wrapping_add(number % 16),
            4 => old.wrapping_sub(number % 16),
            // A structure, a flag or two beside it; or something close to one.
            5 | 6 => place | flag(number >> 32) | flag(number >> 40),
            7 => place.wrapping_add(1 << ((number >> 32) % 24)),
            8 => layout.order.get(bytes, Field { at: low % (bytes.len() / 8).max(1) * 8, width: 8 }),
            9 => old ^ flag(number) ^ flag(number >> 8),
            10 => u64::MAX >> (number % 64),
            _ => 0,
        };
        layout.order.put(bytes, field, value);
    }
    match change[7] {
        0xf0..=0xf7 => bytes.truncate(bytes.len().saturating_sub(low_part(number, 4096))),
        0xf8..=0xfb => bytes.truncate(low_part(number, bytes.len().max(1))),
        0xfc..=0xff => bytes.resize(bytes.len() + low_part(number, 4096), 0xa5),
        _ => {}
    }
}

fn low_part(number: u64, below: usize) -> usize {
    usize::try_from(number % below as u64).unwrap_or(0)
}
