//! Finding files without trusting their names: directories are held as descriptors, and a name is walked from one of them
//! component by component, as the kernel walks it, so that every decision concerns the file that was actually reached.
//!
//! Nothing here opens a file for reading or writing: a walk only takes descriptors that name a place (`O_PATH`), which
//! neither wakes a device nor blocks on a FIFO. It needs no call that is newer than Linux 2.6.39.

mod directory;
mod removal;
mod walk;

pub use directory::{Directory, Identity};
pub use removal::removal_denied;
pub use walk::{is_trusted, walk, Left, Lost, Place, Reached, Step, Walk, Why};
