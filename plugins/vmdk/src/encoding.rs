//! File names in a descriptor, which is written in the encoding that it names: VMware on Windows writes that of the system
//! (`encoding="GBK"`). File names here are UTF-8.

use encoding_rs::{Encoding, UTF_8};
use instar_vmdk_format::Descriptor;

/// The names that a name in the descriptor may stand for, the likeliest first: converted to UTF-8, and as the bytes that it
/// is, since QEMU copies the encoding of a descriptor and not its names, and never converts one.
pub fn names(descriptor: &Descriptor, name: &[u8]) -> Vec<Vec<u8>> {
    let encoding = descriptor.encoding.as_deref().and_then(Encoding::for_label).filter(|&encoding| encoding != UTF_8);
    let converted = encoding.and_then(|encoding| encoding.decode_without_bom_handling_and_without_replacement(name));
    let converted = converted.map(|text| text.into_owned().into_bytes());
    let as_it_is = Some(name.to_vec()).filter(|name| converted.as_ref() != Some(name));
    converted.into_iter().chain(as_it_is).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_converted_and_kept() {
        let check = |encoding: &str, name: &[u8], wanted: &[&[u8]]| {
            let line = if encoding.is_empty() { String::new() } else { format!("encoding=\"{encoding}\"\n") };
            let descriptor = Descriptor::parse(format!("CID=1\n{line}createType=\"vmfs\"\n").as_bytes()).unwrap();
            assert_eq!(names(&descriptor, name), wanted, "{encoding}");
        };
        check("windows-1252", b"plain.vmdk", &[b"plain.vmdk"]);
        check("windows-1252", b"gr\xfcn", &["grün".as_bytes(), b"gr\xfcn"]);
        check("GBK", b"\xc3\xa8", &["猫".as_bytes(), b"\xc3\xa8"]);
        check("Shift_JIS", b"\x83\x66", &["デ".as_bytes(), b"\x83\x66"]);
        check("UTF-8", "grün".as_bytes(), &["grün".as_bytes()]);
        check("UTF-8", b"gr\xfcn", &[b"gr\xfcn"]);
        check("", b"gr\xfcn", &[b"gr\xfcn"]);
        check("no such thing", b"gr\xfcn", &[b"gr\xfcn"]);
        check("GBK", b"\xff\xff", &[b"\xff\xff"]);
    }
}
