//! The KVM runner: one virtual machine, one vCPU at ring 3, the modules of one operation.

mod handler;

pub use handler::{BadRequest, BufferAccess, GuestHandler};
