//! Loading a checked library.

use super::elf;
use super::interface::Interface;
use super::trust::{Distrust, TrustedDirectory};
use abi_stable::library::{AbiHeader, AbiHeaderRef, LibraryError, ROOT_MODULE_LOADER_NAME};
use instar_plugin_api::loading::ORIGIN_SYMBOL;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

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

    /// What the dynamic loader opens: the descriptor, so that the file that was checked is the file that is loaded, whatever its
    /// name leads to by now. In a root without procfs it is the name: the checks say that only root and the caller can have
    /// changed where it leads, and both are trusted.
    fn name_to_load(&self) -> PathBuf {
        let descriptor = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        if descriptor.exists() {
            descriptor
        } else {
            self.path.clone()
        }
    }

    /// Load the library. Its constructors run.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn load(self) -> Result<LoadedLibrary, Distrust> {
        let name = self.name_to_load();
        // The dynamic loader opens it once more, and would tell a lack of descriptors in words only.
        drop(self.file.try_clone().map_err(|error| Distrust::system("cannot open it", &error))?);
        // The descriptor stays open for ever: the dynamic loader knows libraries by their names, and would take the
        // next file with the same descriptor number for this one.
        std::mem::forget(self.file);
        // SAFETY: running the constructors of a library is what loading a plugin means; where it came from was checked.
        let library = unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
            let text = error.to_string().replace(&*name.to_string_lossy(), "it");
            format!("the dynamic loader refuses it: {}", one_line(&text))
        })?;
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
