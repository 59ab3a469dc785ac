//! VMware's delta disks, made and read from their bytes: sparse extents of ESX (COWD) and seSparse ones, without the code that
//! is tested.

use crate::{le32, le64, put32};
use instar_testkit::{copy_padded, padded};

const SECTOR: usize = 512;
/// Bytes of the header of an extent of ESX; its directory follows.
const COWD_HEADER: usize = 2048;
/// Entries of a grain table, of either kind.
const ENTRIES: usize = 4096;
/// Bytes of a seSparse grain.
pub const SE_GRAIN: usize = 4096;
/// Where a seSparse extent of these tests has its directory, its tables and its grains, in sectors.
const SE_PLACES: [usize; 3] = [8, 16, 16 + 64 * 4];

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// A file of ESX is a multiple of 4 KiB, and longer than what is in use.
fn pad(file: &mut Vec<u8>) {
    file.resize((file.len() + 1).next_multiple_of(4096), 0);
}

/// An extent of ESX with a disk of `size` bytes, grains of `grain` bytes and these in it, in this order.
pub fn cowd(size: usize, grain: usize, grains: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let tables = size.div_ceil(grain * ENTRIES);
    let mut file = vec![0; (COWD_HEADER + tables * 4).next_multiple_of(SECTOR)];
    for (number, bytes) in grains {
        let entry = COWD_HEADER + number / ENTRIES * 4;
        if le32(&file, entry) == 0 {
            let sector = file.len() / SECTOR;
            put32(&mut file, entry, sector);
            file.resize(file.len() + ENTRIES * 4, 0);
        }
        let (place, sector) = (le32(&file, entry) * SECTOR + number % ENTRIES * 4, file.len() / SECTOR);
        put32(&mut file, place, sector);
        file.extend_from_slice(bytes);
        file.resize(sector * SECTOR + grain, 0);
    }
    let free = file.len() / SECTOR;
    file[..4].copy_from_slice(b"COWD");
    let fields = [1, 3, size / SECTOR, grain / SECTOR, COWD_HEADER / SECTOR, tables, free];
    for (index, value) in fields.into_iter().enumerate() {
        put32(&mut file, 4 + index * 4, value);
    }
    pad(&mut file);
    file
}

/// How many entries of the directory stand for a part of the disk: it may have more.
fn cowd_tables(file: &[u8]) -> usize {
    le32(file, 12).div_ceil(le32(file, 16) * ENTRIES)
}

/// The entries of an extent of ESX that are not 0, by grain.
pub fn cowd_entries(file: &[u8]) -> Vec<(usize, usize)> {
    let directory = le32(file, 20) * SECTOR;
    let table = |index: usize| le32(file, directory + index * 4) * SECTOR;
    let tables = (0..cowd_tables(file)).filter(|&index| table(index) != 0);
    let entries =
        tables.flat_map(|index| (0..ENTRIES).map(move |entry| (index * ENTRIES + entry, table(index) + entry * 4)));
    entries.map(|(grain, at)| (grain, le32(file, at))).filter(|(_, sector)| *sector != 0).collect()
}

/// What a guest reads of an extent of ESX over the bytes that are below.
pub fn cowd_content(file: &[u8], below: &[u8]) -> Vec<u8> {
    let (size, grain) = (le32(file, 12) * SECTOR, le32(file, 16) * SECTOR);
    let mut content = padded(below, size);
    for (number, sector) in cowd_entries(file) {
        let (start, end) = (number * grain, ((number + 1) * grain).min(size));
        copy_padded(&mut content[start..end], &file[sector * SECTOR..]);
    }
    content
}

/// Every table and grain has a place of its own, in front of the first free sector, and that is in the file: then ESX, which
/// puts the next one there, writes over nothing.
pub fn cowd_is_tidy(file: &[u8]) -> bool {
    let (grain, free) = (le32(file, 16), le32(file, 28));
    let directory = le32(file, 20);
    let end = directory + (le32(file, 24) * 4).div_ceil(SECTOR);
    let tables =
        (0..cowd_tables(file)).map(|index| le32(file, directory * SECTOR + index * 4)).filter(|&table| table != 0);
    let mut places: Vec<(usize, usize)> = tables.map(|table| (table, ENTRIES * 4 / SECTOR)).collect();
    places.extend(cowd_entries(file).into_iter().map(|(_, sector)| (sector, grain)));
    places.push((0, end));
    places.sort_unstable();
    let last = places.last().map_or(0, |(start, length)| start + length);
    places.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0) && last <= free && free * SECTOR < file.len()
}

/// What a seSparse extent holds of a grain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SeHeld {
    /// These bytes.
    Data(Vec<u8>),
    /// Zeroes that the guest has written.
    Zero,
    /// Zeroes, because the guest has given the space back.
    Unmapped,
}

/// A seSparse extent with a disk of `size` bytes, four tables at most, and these grains in this order.
pub fn sesparse(size: usize, grains: &[(usize, SeHeld)]) -> Vec<u8> {
    let [directory, tables, data] = SE_PLACES;
    let mut file = vec![0; data * SECTOR];
    let fields: [u64; 26] = [
        0xcafe_babe,
        0x2_0000_0001,
        (size / SECTOR) as u64,
        8,
        64,
        0,
        0,
        0,
        0,
        0,
        1,
        1,
        2,
        1,
        3,
        4,
        directory as u64,
        8,
        tables as u64,
        (data - tables) as u64,
        7,
        1,
        7,
        1,
        data as u64,
        1 << 20,
    ];
    for (index, field) in fields.into_iter().enumerate() {
        put64(&mut file, index * 8, field);
    }
    put64(&mut file, SECTOR, 0xcafe_cafe);
    // Tables are numbered in the order in which they are needed, and not from 0 on, as nobody says that they have to be.
    let (mut table_count, mut grain_count) = (1, 0x1000_u64 - 3);
    for (number, held) in grains {
        let entry = directory * SECTOR + number / ENTRIES * 8;
        if le64(&file, entry) == 0 {
            put64(&mut file, entry, 0x1000_0000_0000_0000 | table_count);
            table_count += 1;
        }
        let table = (le64(&file, entry) & 0xffff_ffff) as usize;
        let place = (tables + table * 64) * SECTOR + number % ENTRIES * 8;
        let value = match held {
            SeHeld::Zero => 0x2000_0000_0000_0000,
            SeHeld::Unmapped => 0x1000_0000_0000_0000,
            SeHeld::Data(bytes) => {
                // Numbers on both sides of the border between the two parts of an entry.
                let at = data * SECTOR + grain_count as usize * SE_GRAIN;
                file.resize(at, 0);
                file.extend_from_slice(bytes);
                file.resize(at + SE_GRAIN, 0);
                grain_count += 1;
                0x3000_0000_0000_0000 | ((grain_count - 1) & 0xfff) << 48 | (grain_count - 1) >> 12
            }
        };
        put64(&mut file, place, value);
    }
    file
}

/// What a guest reads of a seSparse extent over the bytes that are below.
pub fn sesparse_content(file: &[u8], below: &[u8]) -> Vec<u8> {
    let size = le64(file, 16) as usize * SECTOR;
    let [directory, tables, data] = [16, 18, 24].map(|field| le64(file, field * 8) as usize * SECTOR);
    let mut content = padded(below, size);
    for number in 0..size.div_ceil(SE_GRAIN) {
        let table = le64(file, directory + number / ENTRIES * 8);
        if table == 0 {
            continue;
        }
        let entry = le64(file, tables + (table & 0xffff_ffff) as usize * 64 * SECTOR + number % ENTRIES * 8);
        let place = &mut content[number * SE_GRAIN..((number + 1) * SE_GRAIN).min(size)];
        match entry >> 60 {
            0 => {}
            3 => {
                let grain = (entry & 0xffff_ffff_ffff) << 12 | entry >> 48 & 0xfff;
                let at = data + grain as usize * SE_GRAIN;
                place.copy_from_slice(&file[at..at + place.len()]);
            }
            _ => place.fill(0),
        }
    }
    content
}
