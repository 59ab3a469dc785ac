//! Finding, checking and loading format plugins.

mod reader;

pub use reader::ImageRead;
