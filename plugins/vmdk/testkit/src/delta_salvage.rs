//! Reads damaged delta disks as far as that is possible, straight from VMware's document and from what QEMU reads. It shares no
//! code with the driver.

use crate::packed::EXTENT;
use instar_testkit::{little, part, Disk, LONGEST};

/// The extent of an image whose descriptor has one extent of this type with a disk of `sectors` sectors.
fn extent<'a>(image: &'a [u8], kind: &str, sectors: u64) -> Option<&'a [u8]> {
    let text = String::from_utf8_lossy(image.get(..EXTENT)?).into_owned();
    let line = format!("RW {sectors} {kind} \"");
    text.lines().any(|found| found.starts_with(&line)).then(|| &image[EXTENT..])
}

/// What an extent of ESX holds; `None` if its header makes no sense, or the disk is too long to be compared.
pub fn cowd(image: &[u8]) -> Option<Disk> {
    let sectors = little(image, EXTENT as u64 + 12, 4)?;
    let file = extent(image, "VMFSSPARSE", sectors).filter(|file| file.starts_with(b"COWD"))?;
    let grain = little(file, 16, 4)? as usize * 512;
    let directory = little(file, 20, 4)? * 512;
    let mut disk = Disk::new(sectors * 512).filter(|_| grain > 0 && grain as u64 <= LONGEST)?;
    for number in 0..disk.length.div_ceil(grain) {
        let at = number * grain;
        let entry = match little(file, directory + number as u64 / 4096 * 4, 4) {
            Some(0) => Some(0),
            Some(table) => little(file, table * 512 + number as u64 % 4096 * 4, 4),
            None => None,
        };
        match entry {
            Some(0) => {}
            Some(sector) => disk.hold(at, grain, part(file, sector * 512, grain)),
            None => disk.unreadable(at, grain),
        }
    }
    Some(disk)
}

/// What a seSparse extent holds; `None` as for [`cowd`].
pub fn sesparse(image: &[u8]) -> Option<Disk> {
    let sectors = little(image, EXTENT as u64 + 16, 8)?;
    let file = extent(image, "SESPARSE", sectors).filter(|file| little(file, 0, 8) == Some(0xcafe_babe))?;
    let place = |field: u64| little(file, field * 8, 8)?.checked_mul(512);
    let (directory, tables, grains) = (place(16)?, place(18)?, place(24)?);
    let mut disk = Disk::new(sectors.checked_mul(512)?)?;
    for number in 0..disk.length.div_ceil(4096) as u64 {
        let at = number as usize * 4096;
        let table = directory.checked_add(number / 4096 * 8).and_then(|at| little(file, at, 8));
        let entry = match table {
            Some(0) => Some(0),
            Some(table) if table >> 32 == 0x1000_0000 => tables
                .checked_add((table & 0xffff_ffff) * 32768)
                .and_then(|table| little(file, table + number % 4096 * 8, 8)),
            _ => None,
        };
        match entry.map(|entry| (entry >> 60, entry)) {
            Some((0, 0)) => {}
            Some((1 | 2, _)) => disk.hold(at, 4096, &[]),
            Some((3, entry)) => {
                let grain = (entry & 0xffff_ffff_ffff) << 12 | entry >> 48 & 0xfff;
                let data = grain.checked_mul(4096).and_then(|grain| grains.checked_add(grain));
                match data.filter(|data| data + 4096 <= file.len() as u64) {
                    Some(data) => disk.hold(at, 4096, part(file, data, 4096)),
                    None => disk.unreadable(at, 4096),
                }
            }
            _ => disk.unreadable(at, 4096),
        }
    }
    Some(disk)
}
