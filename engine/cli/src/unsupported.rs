//! Options of `qemu-img` that many of its commands have and none of these: each gets a sentence.

use super::usage::bad_usage;
use clap::Args;
use instar::error::Error;

/// Options that are taken for a sentence about them.
#[derive(Args, Debug, Default)]
pub struct UnsupportedArgs {
    /// An option of `qemu-img`, for a sentence about it
    #[arg(long, hide = true, value_name = "OBJDEF")]
    pub object: Vec<String>,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(long, hide = true)]
    pub image_opts: bool,
}

impl UnsupportedArgs {
    /// Refuse those that were given.
    ///
    /// # Errors
    /// [`ErrorCode::BadUsage`](instar_guest_abi::ErrorCode::BadUsage), with what to do instead.
    pub fn refuse(&self) -> Result<(), Error> {
        if !self.object.is_empty() {
            return Err(bad_usage(
                "--object gives keys to QEMU, but instar reads no encrypted images: decrypt the image first",
            ));
        }
        if self.image_opts {
            return Err(bad_usage(
                "--image-opts is not supported: name the image by its file name, and its format with -f",
            ));
        }
        Ok(())
    }
}
