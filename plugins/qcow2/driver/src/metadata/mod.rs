//! The metadata of an image, as it is read: tables, their entries, and all structures of the file.
//!
//! * [`table_reader`], [`slice_cache`]: tables from front to back, and slices of tables that are changed;
//! * [`entries`], [`l2_entry`]: entries of tables, decoded and held against the bounds of the file;
//! * [`snapshot_table`], [`bitmap_directory`]: what else has tables;
//! * [`l2_slices`], [`mapped_clusters`]: what one L1 table maps, in the order of the guest; [`mapping`]: the same to be
//!   changed;
//! * [`structures`], [`reference`], [`cluster_run`]: all structures of the file, each with what refers to it;
//! * [`l2_tables`]: all L2 tables, each once, however many entries refer to it, and what their entries refer to;
//! * [`map`]: which clusters are metadata.

pub mod bitmap_directory;
pub mod cluster_run;
pub mod entries;
pub mod l2_entry;
pub mod l2_slices;
pub mod l2_tables;
pub mod map;
pub mod mapped_clusters;
pub mod mapping;
pub mod reference;
pub mod slice_cache;
pub mod snapshot_table;
pub mod structures;
pub mod table_reader;
