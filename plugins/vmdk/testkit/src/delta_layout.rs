//! What packed delta disks are made of, and which of them can be compared.

use crate::delta::{cowd_content, cowd_entries, cowd_is_tidy, sesparse_content, SE_GRAIN};
use crate::packed::{is_plain, EXTENT};
use crate::{le32, le64};
use instar_testkit::{ByteOrder, Layout};

const SECTOR: usize = 512;
/// Bytes of the longest disk whose content is compared.
const LONGEST: u64 = 4 << 20;

/// The text of the descriptor; places are counted from where the extent begins.
fn descriptor() -> Layout {
    let mut layout = Layout::new(ByteOrder::Little, SECTOR as u64, &[1 << 31, 1, 1 << 28, 1 << 29, 1 << 60, 1 << 61]);
    layout.origin = EXTENT as u64;
    layout.fields(0, 320, 1);
    layout
}

/// The fields of a valid extent of ESX.
pub fn cowd(image: &[u8]) -> Layout {
    let (mut layout, file) = (descriptor(), &image[EXTENT..]);
    let (directory, entries) = (le32(file, 20) * SECTOR, le32(file, 24));
    layout.fields(EXTENT, EXTENT + 32, 4);
    layout.fields(EXTENT + directory, EXTENT + directory + entries.min(64) * 4, 4);
    for table in (0..entries.min(64)).map(|entry| le32(file, directory + entry * 4)).filter(|table| *table != 0) {
        layout.fields(EXTENT + table * SECTOR, EXTENT + table * SECTOR + 512, 4);
        layout.places.push(table as u64);
    }
    layout.places.extend(cowd_entries(file).into_iter().take(16).map(|(_, sector)| sector as u64));
    let end = (file.len() / SECTOR) as u64;
    layout.places.extend([0, 4, le32(file, 28) as u64, end, end - 1, end + 2]);
    layout
}

/// Whether the reader understands an extent of ESX, and finds it consistent.
pub fn cowd_is_sound(image: &[u8]) -> bool {
    let Some(file) = image.get(EXTENT..).filter(|file| file.len() >= 2048) else { return false };
    let size = le32(file, 12) as u64 * 512;
    let known = file.starts_with(b"COWD") && le32(file, 4) == 1 && le32(file, 8) == 3;
    let grain = le32(file, 16);
    known
        && size <= LONGEST
        && grain.is_power_of_two()
        && grain <= 128
        && is_plain(image, ("vmfsSparse", "VMFSSPARSE"), size as usize)
        && le32(file, 24) < 1 << 16
        && cowd_is_tidy(file)
        && !cowd_content(file, &[]).is_empty()
}

/// The fields of a valid seSparse extent.
pub fn sesparse(image: &[u8]) -> Layout {
    let (mut layout, file) = (descriptor(), &image[EXTENT..]);
    let [directory, tables, grains] = [16, 18, 24].map(|field| le64(file, field * 8) as usize * SECTOR);
    layout.fields(EXTENT, EXTENT + 26 * 8, 8);
    layout.fields(EXTENT + SECTOR, EXTENT + SECTOR + 64, 8);
    layout.fields(EXTENT + directory, EXTENT + directory + 64, 8);
    for number in (0..8).map(|entry| le64(file, directory + entry * 8)).filter(|entry| *entry != 0) {
        let at = tables + (number & 0xffff_ffff) as usize * 64 * SECTOR;
        layout.fields(EXTENT + at, EXTENT + at + 512, 8);
        layout.places.push((at / SECTOR) as u64);
    }
    let end = (file.len() / SECTOR) as u64;
    layout.places.extend([0, 1, (directory / SECTOR) as u64, (tables / SECTOR) as u64, (grains / SECTOR) as u64, end]);
    layout
}

/// Whether the reader understands a seSparse extent, and finds it consistent: no two entries name the same.
pub fn sesparse_is_sound(image: &[u8]) -> bool {
    let Some(file) = image.get(EXTENT..).filter(|file| file.len() >= 1024) else { return false };
    let size = le64(file, 16) * 512;
    if size > LONGEST || !is_plain(image, ("seSparse", "SESPARSE"), size as usize) {
        return false;
    }
    let pristine = crate::delta::sesparse(size as usize, &[]);
    if file[..2 * SECTOR] != pristine[..2 * SECTOR] {
        return false;
    }
    let [directory, tables, grains] = [16, 18, 24].map(|field| le64(file, field * 8) as usize * SECTOR);
    let entry = le64(file, directory);
    let mut used: Vec<u64> = Vec::new();
    if entry != 0 {
        let (kind, number) = (entry >> 60, (entry & 0xffff_ffff) as usize);
        if kind != 1 || entry >> 32 & 0x0fff_ffff != 0 || number >= (grains - tables) / (64 * SECTOR) {
            return false;
        }
        for grain in 0..4096 {
            let entry = le64(file, tables + number * 64 * SECTOR + grain * 8);
            match entry >> 60 {
                3 => used.push((entry & 0xffff_ffff_ffff) << 12 | entry >> 48 & 0xfff),
                0..=2 if entry & !(0xf << 60) == 0 => {}
                _ => return false,
            }
        }
    }
    used.sort_unstable();
    used.windows(2).all(|pair| pair[0] != pair[1])
        && used.last().is_none_or(|last| grains as u64 + (last + 1) * SE_GRAIN as u64 <= file.len() as u64)
        && !sesparse_content(file, &[]).is_empty()
}
