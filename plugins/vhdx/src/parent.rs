//! The parent of a differencing disk: the names that may lead to it.

use instar_plugin_api::BackingPointer;
use instar_vhdx_format::{keys, Locator};
use instar_windows_names as windows;

/// The keys of paths, in the order in which they are to be tried (\[MS-VHDX\] 2.6.2.6.3).
const PATHS: [&str; 3] = [keys::RELATIVE, keys::VOLUME, keys::ABSOLUTE];

/// The names that the locator may mean, and the first path as it stands there, for people.
///
/// A path with the GUID of a volume (`\\?\Volume{…}\disks\base.vhdx`) is one with a drive that nobody knows here either: what is
/// behind the volume is looked for.
pub fn pointer(locator: &Locator) -> (BackingPointer, Option<String>) {
    let paths: Vec<String> = PATHS.iter().filter_map(|key| locator.value(key)?.text()).collect();
    let candidates = paths.iter().flat_map(|path| windows::candidates(&without_volume(path)));
    let pointer = windows::pointer(candidates, "vhdx");
    (pointer, paths.into_iter().next())
}

/// A path whose volume is named by its GUID, as one with a drive.
fn without_volume(path: &str) -> String {
    const PREFIX: &str = r"\\?\Volume{";
    let is_volume = path.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX));
    match path.split_once('}').filter(|_| is_volume) {
        Some((_, rest)) => format!("C:{rest}"),
        None => path.to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_names_in_their_order() {
        let id = "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}";
        let pairs = [
            (keys::ABSOLUTE, r"\\?\d:\vms\disks\base.vhdx".to_owned()),
            (keys::VOLUME, r"\\?\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\other\base.vhdx".to_owned()),
            (keys::LINKAGE, id.to_owned()),
            (keys::RELATIVE, r"..\up\parent.vhdx".to_owned()),
        ];
        let locator = Locator::parse(&Locator::encode(&pairs).unwrap(), 0).unwrap();
        let (pointer, recorded) = pointer(&locator);
        let names: Vec<_> = pointer.names().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        let wanted = [
            "../up/parent.vhdx",
            "parent.vhdx",
            "other/base.vhdx",
            "base.vhdx",
            "vms/disks/base.vhdx",
            "disks/base.vhdx",
        ];
        assert_eq!(names, wanted);
        assert_eq!(recorded.as_deref(), Some(r"..\up\parent.vhdx"));
        let none = Locator::parse(&Locator::encode(&[(keys::LINKAGE, id.to_owned())]).unwrap(), 0).unwrap();
        assert!(super::pointer(&none).0.name.is_empty());
    }
}
