//! File names in a descriptor, which is written in the encoding that it names: VMware on Windows writes that of the system
//! (`encoding="GBK"`). File names here are UTF-8.

use encoding_rs::{Encoding, UTF_8};
use instar_plugin_api::std_types::RVec;
use instar_plugin_api::{ErrorCode, PluginError};
use instar_vmdk_format::Descriptor;

/// Longest name of a file in bytes (`PATH_MAX` without its end).
const LONGEST_NAME: usize = 4095;

/// A name for the engine, and the others that it may stand for.
type Names = (RVec<u8>, RVec<RVec<u8>>);

/// The names that a name in the descriptor may stand for, the likeliest first: converted to UTF-8, and as the bytes that it
/// is, since QEMU copies the encoding of a descriptor and not its names, and never converts one.
fn names(descriptor: &Descriptor, name: &[u8]) -> Vec<Vec<u8>> {
    let encoding = descriptor.encoding.as_deref().and_then(Encoding::for_label).filter(|&encoding| encoding != UTF_8);
    let converted = encoding.and_then(|encoding| encoding.decode_without_bom_handling_and_without_replacement(name));
    let converted = converted.map(|text| text.into_owned().into_bytes());
    let as_it_is = Some(name.to_vec()).filter(|name| converted.as_ref() != Some(name));
    converted.into_iter().chain(as_it_is).collect()
}

/// A name in the descriptor, as one for the engine, and the others that it may stand for.
pub fn recorded(descriptor: &Descriptor, name: &[u8]) -> Result<Names, PluginError> {
    let mut names = names(descriptor, name);
    // Conversion may make a name longer.
    names.retain(|name| name.len() <= LONGEST_NAME);
    let mut names = names.into_iter().map(RVec::from);
    match names.next() {
        Some(first) => Ok((first, names.collect())),
        None => {
            let text = format!("a file name in the descriptor has {} bytes: no path is as long as that", name.len());
            Err(PluginError::new(ErrorCode::ParseFailed, text))
        }
    }
}

/// The name of the parent, likewise. An absolute one leads into the datastore that the disk was made in
/// (`/vmfs/volumes/UUID/vm/disk.vmdk`), which is not here if the files were copied: then the parent is looked for beside its
/// child. Whether it is the parent, content IDs say.
pub fn recorded_parent(descriptor: &Descriptor, name: &[u8]) -> Result<Names, PluginError> {
    let (first, mut others) = recorded(descriptor, name)?;
    let all: Vec<RVec<u8>> = core::iter::once(&first).chain(&others).cloned().collect();
    let absolute = all.iter().filter(|name| name.starts_with(b"/"));
    let beside = absolute.filter_map(|name| name.rsplit(|&byte| byte == b'/').next().filter(|name| !name.is_empty()));
    others.extend(beside.map(|name| name.to_vec().into()));
    Ok((first, others))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_in_a_datastore_may_lie_beside_its_child() {
        let check = |line: &str, name: &[u8], wanted: &[&[u8]]| {
            let descriptor = Descriptor::parse(format!("CID=1\n{line}createType=\"vmfs\"\n").as_bytes()).unwrap();
            let (first, others) = recorded_parent(&descriptor, name).unwrap();
            let all: Vec<_> = std::iter::once(first).chain(others).collect();
            assert_eq!(all, wanted, "{line}");
        };
        check("", b"/vmfs/volumes/4e5f-1/vm/x.vmdk", &[b"/vmfs/volumes/4e5f-1/vm/x.vmdk", b"x.vmdk"]);
        check("", b"vm/x.vmdk", &[b"vm/x.vmdk"]);
        check("", b"/", &[b"/"]);
        let names: [&[u8]; 4] = ["/v/grün".as_bytes(), b"/v/gr\xfcn", "grün".as_bytes(), b"gr\xfcn"];
        check("encoding=\"windows-1252\"\n", b"/v/gr\xfcn", &names);
    }

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
