//! Which files a commit touches: the names that images record, and the gate that every such name passes.
//!
//! An image names the image below it, and may be hostile: [`decide`] says whether its name may be followed at all, before
//! the file system is touched; [`open_beneath`] follows it so that no link and no race leads elsewhere;
//! [`discover_backing_chain`] goes down the chain.

mod directory;
mod image;
mod walk;
mod write_target;

pub use directory::ImageDirectory;
pub use image::{admit, ChainImage, Recorded};
pub(crate) use walk::refuse_loop;
pub use walk::{chain_contains, discover_backing_chain, next_in_chain, Gate};
pub use write_target::{decide, open_beneath, protocol_of, NameRefusal, Target, TargetError};
