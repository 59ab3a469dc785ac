//! All plugins of the process.

use super::library::{Candidate, FileIdentity};
use super::plugin::Plugin;
use super::search::{is_plugin_name, SearchPath};
use super::trust::{Distrust, TrustedDirectory};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// A library or directory that was examined but not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The library or directory.
    pub path: PathBuf,
    /// Why: one clause.
    pub reason: String,
    /// No more files could be opened: the reason says nothing of the library or directory.
    pub out_of_descriptors: bool,
}

/// The loaded plugins.
#[derive(Debug, Default)]
pub struct Registry {
    plugins: Vec<Plugin>,
    skipped: Vec<Skipped>,
    conflicts: HashMap<String, Vec<PathBuf>>,
    /// The first directory that the operator named and that cannot be used, or whatever could not be opened for lack of
    /// descriptors.
    refused: Option<Skipped>,
    /// Images are looked at in a thread that is confined.
    aside: bool,
}

impl Registry {
    /// Load every plugin of the search path. What cannot be used is in [`skipped`](Self::skipped).
    ///
    /// * A library hides those of the same file name in later directories, also when it cannot be loaded itself: another
    ///   version than the one that was asked for is never taken silently.
    /// * The same file, found twice, is loaded once.
    /// * Two libraries of different names that claim the same format: neither is used.
    #[must_use]
    pub fn load(search: &SearchPath) -> Self {
        let mut registry = Self::default();
        let mut names = HashMap::new();
        let mut files = HashSet::new();
        for directory in search.directories() {
            registry.load_directory(directory, search.is_requested(directory), &mut names, &mut files);
        }
        registry.remove_conflicts();
        registry
    }

    /// Examine images in a confined thread, for a process that has to write a new file afterwards and so cannot be
    /// [confined](crate::confine) itself.
    #[must_use]
    pub fn looking_aside(self) -> Self {
        Self { aside: true, ..self }
    }

    /// Whether images are examined in a confined thread.
    #[must_use]
    pub fn looks_aside(&self) -> bool {
        self.aside
    }

    fn load_directory(
        &mut self,
        path: &Path,
        requested: bool,
        names: &mut HashMap<String, PathBuf>,
        files: &mut HashSet<FileIdentity>,
    ) {
        let directory = match TrustedDirectory::open(path) {
            Ok(Some(directory)) => directory,
            Ok(None) => {
                if requested {
                    self.refuse(path, "the directory does not exist".to_owned());
                }
                return;
            }
            Err(why) if requested => return self.refuse(path, why),
            // Nobody asks about a directory without plugins.
            Err(why) if !why.out_of_descriptors && !holds_plugins(path) => return,
            Err(why) => return self.distrust(path, why),
        };
        let found = match directory.names(is_plugin_name) {
            Ok(found) => found,
            Err(why) => return self.distrust(path, why),
        };
        for name in found {
            let file = directory.path().join(&name);
            if let Some(earlier) = names.get(&name) {
                if *earlier != file {
                    self.skip(&file, format!("hidden by {}", earlier.display()));
                }
                continue;
            }
            names.insert(name.clone(), file.clone());
            match Candidate::open(&directory, &name) {
                Ok(candidate) => {
                    if files.insert(candidate.identity) {
                        match Plugin::load(candidate) {
                            Ok(plugin) => self.plugins.push(plugin),
                            Err(why) => self.distrust(&file, why),
                        }
                    } else {
                        self.skip(&file, "it is the same file as one that is loaded already".to_owned());
                    }
                }
                Err(why) => self.distrust(&file, why),
            }
        }
    }

    /// A directory that the operator named cannot be used.
    fn refuse(&mut self, path: &Path, reason: impl Into<Distrust>) {
        self.skip(path, reason);
        self.refused = self.refused.take().or_else(|| self.skipped.last().cloned());
    }

    /// Something cannot be used. Without descriptors that says nothing of it, and nobody may go on without it: the formats of
    /// images that it recognizes would be taken for others.
    fn distrust(&mut self, path: &Path, why: Distrust) {
        if why.out_of_descriptors {
            self.refuse(path, why);
        } else {
            self.skip(path, why);
        }
    }

    fn skip(&mut self, path: &Path, why: impl Into<Distrust>) {
        let Distrust { clause, out_of_descriptors } = why.into();
        self.skipped.push(Skipped { path: path.to_owned(), reason: clause, out_of_descriptors });
    }

    /// Drop every plugin that claims a name which another one claims as well.
    fn remove_conflicts(&mut self) {
        let mut claims: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, plugin) in self.plugins.iter().enumerate() {
            let own: HashSet<&str> = std::iter::once(plugin.name()).chain(plugin.aliases()).collect();
            for name in own {
                claims.entry(name.to_owned()).or_default().push(index);
            }
        }
        let mut dropped: Vec<Option<String>> = vec![None; self.plugins.len()];
        for (name, claimants) in claims.into_iter().filter(|(_, claimants)| claimants.len() > 1) {
            let paths: Vec<PathBuf> = claimants.iter().map(|&i| self.plugins[i].path().to_owned()).collect();
            for &index in &claimants {
                let others: Vec<String> = claimants
                    .iter()
                    .filter(|&&other| other != index)
                    .map(|&other| self.plugins[other].path().display().to_string())
                    .collect();
                dropped[index] = Some(format!("it claims the format {name}, as does {}", others.join(" and ")));
            }
            self.conflicts.insert(name, paths);
        }
        let plugins = std::mem::take(&mut self.plugins);
        for (plugin, reason) in plugins.into_iter().zip(dropped) {
            match reason {
                None => self.plugins.push(plugin),
                Some(reason) => self.skip(plugin.path(), reason),
            }
        }
    }

    /// The plugins that can be used, in the order in which they were found.
    #[must_use]
    pub fn plugins(&self) -> &[Plugin] {
        &self.plugins
    }

    /// Return the libraries and directories that were examined but not used.
    #[must_use]
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Return the first directory that the operator named and that cannot be used, or the first directory or library that
    /// could not be opened for lack of descriptors: continuing without it would use other plugins than requested.
    #[must_use]
    pub fn refused(&self) -> Option<&Skipped> {
        self.refused.as_ref()
    }

    /// The plugin of a format, by name or alias.
    #[must_use]
    pub fn by_format(&self, name: &str) -> Option<&Plugin> {
        self.plugins.iter().find(|plugin| plugin.name() == name || plugin.aliases().any(|alias| alias == name))
    }

    /// Return the libraries that claim this format, if it is unusable because there are several.
    #[must_use]
    pub fn conflict(&self, name: &str) -> Option<&[PathBuf]> {
        self.conflicts.get(name).map(Vec::as_slice)
    }
}

/// Whether a directory that is not trusted has plugins in it.
fn holds_plugins(path: &Path) -> bool {
    std::fs::read_dir(path)
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_str().is_some_and(is_plugin_name)))
}
