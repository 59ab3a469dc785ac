//! An open image: its header and its table, which is small enough to be held.

use crate::header::{Header, CLUSTER, HEADER_BYTES};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, ImageInfo};
use instar_guest_sdk::{checked_end, BlockIo, DriverError, DriverResult, OrderedWriter};

/// What an entry of the table says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    Absent,
    Zero,
    Full(u8),
    At(u64),
}

pub struct Image {
    pub device: u32,
    pub header: Header,
    pub file_length: u64,
    pub table: Vec<u64>,
    pub writer: OrderedWriter,
    corrupt: ErrorCode,
}

impl Image {
    pub fn open(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Self> {
        let mut bytes = [0; 64];
        io.read(device.device, 0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(|text| DriverError::new(corrupt, text).at(device.device, 0))?;
        if (header.virtual_size, CLUSTER) != (device.virtual_size, device.cluster_size) {
            let text = "the header is not the one that the host has seen";
            return Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(device.device, 0));
        }
        let mut bytes = vec![0; header.clusters() as usize * 8];
        io.read(device.device, HEADER_BYTES, &mut bytes)?;
        let table = bytes.chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap_or_default()));
        Ok(Self {
            device: device.device,
            header,
            file_length: device.file_length,
            table: table.collect(),
            writer: OrderedWriter::new(device.device),
            corrupt,
        })
    }

    pub fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.header.virtual_size, cluster_size: CLUSTER }
    }

    pub fn entry(&self, index: usize) -> Entry {
        match self.table.get(index).copied().unwrap_or(0) {
            0 => Entry::Absent,
            1 => Entry::Zero,
            entry if entry & 0xff == 2 => Entry::Full((entry >> 8) as u8),
            entry => Entry::At(entry),
        }
    }

    /// Clusters that the image holds.
    pub fn held(&self) -> u64 {
        self.table.iter().filter(|&&entry| entry != 0).count() as u64
    }

    /// What is wrong with the table: the entry, and one clause.
    pub fn faults(&self) -> Vec<(usize, String)> {
        let mut faults = Vec::new();
        let mut found = Vec::new();
        for index in 0..self.table.len() {
            let Entry::At(offset) = self.entry(index) else { continue };
            let inside = checked_end(offset, CLUSTER, self.file_length).is_some();
            if offset % CLUSTER != 0 || offset < self.header.data_start() || !inside {
                faults.push((index, format!("the entry of cluster {index} leads nowhere")));
            }
            found.push((offset, index));
        }
        found.sort_unstable();
        for pair in found.windows(2) {
            if pair[0].0 == pair[1].0 {
                faults.push((pair[1].1, format!("cluster {} is where another one is", pair[1].1)));
            }
        }
        faults
    }

    /// Verify the table; returns how many clusters the image holds.
    pub fn verify(&self) -> DriverResult<u64> {
        match self.faults().into_iter().next() {
            Some((index, text)) => {
                Err(DriverError::new(self.corrupt, text).at(self.device, HEADER_BYTES + index as u64 * 8))
            }
            None => Ok(self.held()),
        }
    }

    /// Write the header's numbers, durably.
    pub fn write_header(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.writer.write(io, 0, &self.header.bytes())?;
        self.writer.barrier(io)
    }

    /// Write the table, durably, when everything that was written before is.
    pub fn write_table(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.writer.barrier(io)?;
        let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.writer.write(io, HEADER_BYTES, &bytes)?;
        self.writer.barrier(io)
    }
}
