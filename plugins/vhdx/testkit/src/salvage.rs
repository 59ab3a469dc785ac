//! Reads damaged images as far as that is possible, straight from the specification. It shares no code with the driver.

use crate::view::View;
use instar_testkit::{little, part, Disk};

/// What an image holds; `None` if its headers or metadata make no sense, or the disk is too long to be compared.
pub fn salvage(bytes: &[u8]) -> Option<Disk> {
    let view = View::read(bytes).ok()?;
    let mut disk = Disk::new(view.size as u64)?;
    for (block, state, at) in view.blocks() {
        let start = block * view.block;
        let length = (disk.length.saturating_sub(start)).min(view.block);
        match state {
            1..=3 => disk.hold(start, length, &vec![0; length]),
            6 if at.saturating_add(length) <= view.bytes.len() => {
                disk.hold(start, length, part(&view.bytes, at as u64, length))
            }
            7 if view.kind == crate::Kind::Differencing => {
                let per_block = view.block / view.sector;
                let slot = block / view.ratio() * (view.ratio() + 1) + view.ratio();
                let bitmap = view.table.1.get(slot).map_or(0, |entry| entry >> 20 << 20);
                let bits = bitmap.saturating_add((block % view.ratio() * per_block / 8) as u64);
                for within in 0..length / view.sector {
                    let place = start + within * view.sector;
                    match little(&view.bytes, bits.saturating_add(within as u64 / 8), 1) {
                        Some(byte) if byte >> (within % 8) & 1 == 0 => {}
                        Some(_) => {
                            let data = part(&view.bytes, at.saturating_add(within * view.sector) as u64, view.sector);
                            disk.hold(place, view.sector, data);
                        }
                        None => disk.unreadable(place, view.sector),
                    }
                }
            }
            _ => disk.unreadable(start, length),
        }
    }
    Some(disk)
}
