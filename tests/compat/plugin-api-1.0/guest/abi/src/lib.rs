//! Layouts, addresses, ports and error codes that the instar host and its guest share.
//!
//! Everything in this crate is `repr(C)` plain data: the host writes it into guest memory (or reads it
//! from there) byte for byte. Nothing here has behavior beyond constructors and accessors, and nothing
//! here trusts its content: the reader of a structure checks it. What both halves of a plugin have to
//! compute alike stands here, too: the [UUID that follows](next_uuid) from another one.
//!
//! The guest is identity mapped: a guest virtual address is a guest physical address.
#![no_std]

mod bitmap;
mod call_table;
mod check;
mod config;
mod error;
mod failure;
mod image;
mod layout;
mod list;
mod module;
mod phase;
mod ring;
mod uuid;

pub use bitmap::{BitmapOps, DirtyRange, WireBitmap, BITMAP_NAME_MAX};
pub use call_table::{CallTable, ParallelWork};
pub use check::{CheckSummary, FindingKind, FindingOps, Repair, RepairSummary};
pub use config::device_flags;
pub use config::{
    ChainConfig, DeviceConfig, FileDevice, FileList, Member, MemberRole, ModuleEntry, ModuleTable, OperationConfig,
    CHAIN_CONFIG_MAGIC, DEVICE_OUTPUT, FIRST_FILE_DEVICE, MAX_CHAIN_DEVICES, MAX_FILE_DEVICES, MAX_MEMBERS,
    MAX_MODULES, MODULE_TABLE_MAGIC, OPERATION_CONFIG_MAGIC,
};
pub use error::*;
pub use failure::{Failure, FAILURE_TEXT_MAX};
pub use image::{ExtentKind, ImageId, ImageInfo, ParentStage, PlanSummary, WireExtent, WireParent, IMAGE_ID_MAX};
pub use layout::*;
pub use list::List;
pub use module::{
    FormatOps, ModuleDescriptor, ModuleKind, OperationOps, ReadBelowOps, SinkOps, SourceOps, MODULE_ABI_LEAST_MINOR,
    MODULE_ABI_MAJOR, MODULE_ABI_MINOR, MODULE_MAGIC,
};
pub use phase::{DeviceRole, Phase, Situation, IDENTITY_RANGE, PARENT_ROOM};
pub use ring::{request_flags, request_status, Request, RequestOp, Ring, RING_CAPACITY};
pub use uuid::{derived_uuid, next_uuid, uuid_of_bits};
