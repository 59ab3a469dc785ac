//! Persistent bitmaps that are handed from image to image: listed, read, merged, and made where they are missing.

pub(crate) mod dirty;
pub(crate) mod list;
pub(crate) mod made;
pub(crate) mod merge;
