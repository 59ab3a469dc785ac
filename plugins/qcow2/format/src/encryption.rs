//! Encrypted images, which nothing here can read: both halves say the same of them.

use alloc::format;
use alloc::string::String;

/// The name of a `crypt_method` (section "Header").
#[must_use]
pub const fn encryption_method(crypt_method: u32) -> &'static str {
    match crypt_method {
        1 => "aes",
        2 => "luks",
        _ => "unknown",
    }
}

/// Say why an image with this method of encryption is refused, and what to do.
#[must_use]
pub fn encryption_refusal(method: &str) -> String {
    format!(
        "encryption ({method}) is not supported: make a copy without it, `qemu-img convert --object secret,id=s,file=PASSPHRASE \
         --image-opts -O qcow2 driver=qcow2,encrypt.key-secret=s,file.filename=IMAGE NEW`"
    )
}
