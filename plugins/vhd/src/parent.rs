//! The parent of a differencing disk: the names that may lead to it, and its identity.

use instar_plugin_api::{BackingPointer, ImageReader, PluginError};
use instar_vhd_format::{codes, creators, Footer, Header, Locator, MAX_LOCATOR_BYTES};
use instar_windows_names as windows;

/// What is recorded of the parent.
pub struct Parent {
    /// The names, and the format.
    pub pointer: BackingPointer,
    /// Its unique ID; nothing if it has none that counts.
    pub identity: Vec<u8>,
    /// The name as it stands in the header, or else in a locator; for people.
    pub recorded: Option<String>,
}

/// Read what is recorded of the parent.
///
/// The names come in this order: the relative path (`W2ru`, then `MacX`, which XenServer writes), the base name of the header's
/// name beside the child, the absolute path (`W2ku`), then the header's name as a path, which Hyper-V makes it. A program that
/// moves the images of a chain together leaves the first of them right.
///
/// # Errors
/// Those of the reader.
pub fn read(image: &ImageReader<'_>, footer: &Footer, header: &Header) -> Result<Parent, PluginError> {
    let name = String::from_utf16(&header.parent_name().collect::<Vec<u16>>()).ok().filter(|name| !name.is_empty());
    let mut found: [Vec<String>; 3] = Default::default();
    for locator in header.locators() {
        let place = match locator.code {
            codes::W2RU => 0,
            codes::MACX => 1,
            codes::W2KU => 2,
            _ => continue,
        };
        found[place].extend(text(image, &locator)?);
    }
    let [relative, urls, absolute] = found;
    let recorded = name.clone().or_else(|| relative.first().or(absolute.first()).cloned());
    let mut names: Vec<String> = relative.iter().flat_map(|path| windows::candidates(path)).collect();
    names.extend(urls.iter().flat_map(|url| of_url(url)));
    names.extend(name.as_deref().and_then(windows::base_name));
    names.extend(absolute.iter().flat_map(|path| windows::candidates(path)));
    names.extend(name.iter().flat_map(|path| windows::candidates(path)));
    let id = header.parent_id();
    // XenServer puts a disk on a raw parent so (`vhd_parent_raw`). Other programs that leave the ID out say nothing by it.
    let (identity, format) = match (id == [0; 16], footer.creator() == creators::XEN) {
        (true, true) => (Vec::new(), "raw"),
        (true, false) => (Vec::new(), "vpc"),
        (false, _) => (id.to_vec(), "vpc"),
    };
    Ok(Parent { pointer: windows::pointer(names, format), identity, recorded })
}

/// The text of a locator; `None` if it lies outside the file, is too long, or is no text.
fn text(image: &ImageReader<'_>, locator: &Locator) -> Result<Option<String>, PluginError> {
    let length = u64::from(locator.length);
    let end = locator.offset.checked_add(length);
    if length > MAX_LOCATOR_BYTES || end.is_none_or(|end| end > image.length()) {
        return Ok(None);
    }
    let bytes = image.read_vec(locator.offset, usize::try_from(length).unwrap_or(0))?;
    let text = if locator.code == codes::MACX {
        String::from_utf8(bytes).ok()
    } else {
        let units: Vec<u16> = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
        String::from_utf16(&units).ok()
    };
    // Some programs end a name with zeroes.
    let text = text.map(|text| text.trim_end_matches('\0').to_owned());
    Ok(text.filter(|text| !text.is_empty() && !text.contains('\0')))
}

/// The names that a file URL (RFC 8089) stands for: its path as it is, then its base name.
fn of_url(url: &str) -> Vec<String> {
    let Some(rest) = url.strip_prefix("file:") else { return Vec::new() };
    let path = match rest.strip_prefix("//") {
        // "file://./base.vhd" is XenServer's relative path, which no RFC knows; the others begin with a host.
        Some(relative) if relative.starts_with("./") => relative,
        Some(with_host) => with_host.find('/').map_or("", |at| &with_host[at..]),
        None => rest,
    };
    decoded(path).map_or_else(Vec::new, |path| windows::candidates(&path))
}

/// A path of a URL, with what is percent-encoded in it decoded; `None` if that is not UTF-8.
fn decoded(path: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|digits| first == b'%' && digits.iter().all(u8::is_ascii_hexdigit));
        let byte = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).ok().filter(|path| !path.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_become_names() {
        for (url, wanted) in [
            ("file://./base.vhd", &["base.vhd"][..]),
            ("file://./sub/b%C3%A4se%20%25.vhd", &["sub/bäse %.vhd", "bäse %.vhd"]),
            ("file:///srv/base.vhd", &["/srv/base.vhd", "srv/base.vhd", "base.vhd"]),
            ("file://localhost/srv/base.vhd", &["/srv/base.vhd", "srv/base.vhd", "base.vhd"]),
            ("file://./100%", &["100%"]),
            ("file://./%ff", &[]),
            ("file://./%00", &[]),
            ("http://host/base.vhd", &[]),
            ("file://host", &[]),
        ] {
            assert_eq!(of_url(url), wanted, "{url}");
        }
    }
}
