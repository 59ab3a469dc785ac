//! Whether an image is what it should be.
//!
//! * [`verify`]: before an overlay is committed: everything that emptying it relies on;
//! * [`report`]: for a person who wants to know, without any change;
//! * [`repair`]: refcounts and flags of an image that was not closed cleanly, before a commit;
//! * [`mend`]: what a report finds, because somebody asked for it;
//! * [`lost`]: what of the disk cannot be read, where that must not be mended.

pub(crate) mod lost;
pub mod mend;
pub mod repair;
pub mod report;
pub mod verify;
