//! Loading a checked library.

use super::elf;
use super::interface::Interface;
use super::trust::{Distrust, TrustedDirectory};
use abi_stable::library::{AbiHeader, AbiHeaderRef, LibraryError, ROOT_MODULE_LOADER_NAME};
use instar_plugin_api::loading::ORIGIN_SYMBOL;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// A library with a root module that this engine understands. It stays loaded for the life of the process.
pub struct LoadedLibrary {
    /// Its root module.
    pub interface: Interface,
    /// The version of the plugin API that it was built with.
    pub api_version: String,
}

/// Identity of a file: device and inode.
pub type FileIdentity = (u64, u64);

/// A file that has passed every check that can be made without running code of it.
pub struct Candidate {
    /// Where it is, without links.
    pub path: PathBuf,
    /// Which file it is.
    pub identity: FileIdentity,
    file: File,
}

impl Candidate {
    /// Open and check the file `name` of `directory`.
    pub fn open(directory: &TrustedDirectory, name: &str) -> Result<Self, Distrust> {
        let (file, stat) = directory.open_file(name)?;
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        elf::check_library(&file, length, ROOT_MODULE_LOADER_NAME)?;
        Ok(Self { path: directory.path().join(name), identity: (stat.st_dev, stat.st_ino), file })
    }

    /// Have the dynamic loader open the descriptor, so that the file that was checked is the file that is loaded, whatever its
    /// name leads to by now. In a root without procfs it is the name: the checks say that only root and the caller can have
    /// changed where it leads, and both are trusted.
    fn open_library(&self) -> Result<Library, Distrust> {
        // SAFETY: running the constructors of a library is what loading a plugin means; where it came from was checked.
        let open = |name: &Path| unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) };
        let descriptor = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        let (name, opened) = match open(&descriptor) {
            Err(_) if !descriptor.exists() => (&self.path, open(&self.path)),
            opened => (&descriptor, opened),
        };
        opened.map_err(|error| match self.file.try_clone() {
            // It says a lack of descriptors in words only.
            Err(error) => Distrust::system("cannot open it", &error),
            Ok(_) => {
                let text = error.to_string().replace(&*name.to_string_lossy(), "it");
                format!("the dynamic loader refuses it: {}", one_line(&text)).into()
            }
        })
    }

    /// Load the library. Its constructors run.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn load(self) -> Result<LoadedLibrary, Distrust> {
        let library = self.open_library();
        // The descriptor stays open for ever: the dynamic loader knows libraries by their names, and would take the
        // next file with the same descriptor number for this one.
        std::mem::forget(self.file);
        let library = library?;
        // SAFETY: the symbol is the library header of abi_stable, whose first fields are the same for all versions; an
        // `AbiHeaderRef` is a pointer to it.
        let header = unsafe { library.get::<AbiHeaderRef>(ROOT_MODULE_LOADER_NAME.as_bytes()) }
            .map(|symbol| *symbol)
            .map_err(|_| "it does not export a plugin header".to_owned());
        // SAFETY: what this symbol is belongs to the contract.
        let origin =
            unsafe { library.get::<extern "C" fn() -> u64>(ORIGIN_SYMBOL.as_bytes()) }.map(|symbol| *symbol).ok();
        // Loaded for ever: values of the plugin and its panic hook may be anywhere.
        std::mem::forget(library);
        let header = header?.upgrade().map_err(|error| header_error(&error))?;
        let interface = Interface::open(header, origin.map(|origin| origin()))?;
        Ok(LoadedLibrary { interface, api_version: header.version_strings().version.to_string() })
    }
}

fn header_error(error: &LibraryError) -> String {
    match error {
        LibraryError::InvalidAbiHeader(found) if found.magic_string == AbiHeader::VALUE.magic_string => format!(
            "it was built with abi_stable {}.{}, this instar with {}.{}: rebuild the plugin",
            found.abi_major,
            found.abi_minor,
            AbiHeader::VALUE.abi_major,
            AbiHeader::VALUE.abi_minor
        ),
        LibraryError::InvalidAbiHeader(_) => "its plugin header is not one of abi_stable".to_owned(),
        _ => "its compiler passes arguments differently from this instar's: rebuild the plugin".to_owned(),
    }
}

/// `text` as one line of at most 300 characters.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect()
}
