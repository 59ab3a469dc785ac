//! `instar doctor`: whether a commit can run here, and how well it would be confined. It tries everything for real.

use crate::config::Config;
use crate::confine::Confinement;
use crate::escape::escape_path;
use crate::plugins::{Registry, SearchPath};
use crate::sandbox::{
    self, BadRequest, BufferAccess, Host, Kvm, Process, Program, Sandbox, SandboxChoice, SandboxError,
};
use instar_guest_abi::Request;
use instar_guest_protocol::end_message::Outcome;
use instar_guest_protocol::guest_message::Kind;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The state of a part of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// It works.
    Good,
    /// It does not work, and nothing needs it.
    Unneeded,
    /// A commit works, with weaker protection or speed than possible.
    Weak,
    /// A commit does not work.
    Broken,
}

/// The result of an examination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examination {
    /// The sandbox that a commit would use; `None` if the wanted one does not work.
    pub sandbox: Option<&'static str>,
    /// The other sandbox, if only that one works.
    pub other: Option<&'static str>,
    /// All parts.
    pub parts: Vec<Diagnosis>,
}

impl Examination {
    /// Return the state of the machine as a whole: that of its worst part that is needed.
    #[must_use]
    pub fn health(&self) -> Health {
        let needed = self.parts.iter().map(|part| part.health).filter(|health| *health != Health::Unneeded);
        needed.max().unwrap_or(Health::Good)
    }
}

/// The diagnosis of one part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// The part, in one word.
    pub part: &'static str,
    /// Its state.
    pub health: Health,
    /// The finding in one line, safe for a terminal.
    pub found: String,
    /// The remedy.
    pub remedy: Option<String>,
}

impl Diagnosis {
    fn good(part: &'static str, found: impl Into<String>) -> Self {
        Self { part, health: Health::Good, found: found.into(), remedy: None }
    }

    fn bad(part: &'static str, health: Health, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { part, health, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Examine everything that a commit needs. The operator may name directories with plugins (`plugin_dirs`) and a `sandbox`.
#[must_use]
pub fn examine(plugin_dirs: &[PathBuf], sandbox: Option<SandboxChoice>) -> Examination {
    let loaded = Config::load();
    let configured = loaded.as_ref().ok().and_then(Config::sandbox);
    let (mut all, sandbox, other) = sandboxes(sandbox.or(configured).unwrap_or_default());
    all.extend(confinement(&Confinement::trial()));
    let (config, directories) = match loaded {
        Ok(config) => {
            let diagnosis = match config.warnings.first() {
                None => Diagnosis::good("configuration", "can be read"),
                Some(warning) => {
                    let remedy = "set HOME to the directory of the user that runs it (`sudo -H`), or INSTAR_CONFIG";
                    Diagnosis::bad("configuration", Health::Weak, crate::escape::printable(warning), remedy)
                }
            };
            (diagnosis, config.plugin_paths())
        }
        Err(error) => {
            let remedy = "correct the file, or delete it; `instar config` shows what is in force";
            (Diagnosis::bad("configuration", Health::Broken, error.message, remedy), Vec::new())
        }
    };
    all.push(config);
    all.extend(plugins(&Registry::load(&SearchPath::for_process(plugin_dirs, &directories))));
    Examination { sandbox, other, parts: all }
}

/// Both sandboxes, the one that would be used, and the other one if only that works.
fn sandboxes(choice: SandboxChoice) -> (Vec<Diagnosis>, Option<&'static str>, Option<&'static str>) {
    let mut both = vec![try_out(&Kvm), try_out(&Process)];
    let wanted = |part: &str| choice == SandboxChoice::Auto || part == choice.name();
    let works = |one: &&Diagnosis| one.health == Health::Good;
    let used = both.iter().filter(works).map(|one| one.part).find(|part| wanted(part));
    let other = both.iter().find(works).map(|one| one.part).filter(|_| used.is_none());
    for one in both.iter_mut().filter(|one| one.health != Health::Good) {
        one.health = match used {
            None if wanted(one.part) => Health::Broken,
            // Instead of which the weaker one is used.
            Some("process") if wanted(one.part) => Health::Weak,
            _ => Health::Unneeded,
        };
    }
    (both, used, other)
}

/// Run a guest that has no image: it says so, and that takes a whole sandbox.
fn try_out(sandbox: &dyn Sandbox) -> Diagnosis {
    struct Greeting(bool);
    impl Host for Greeting {
        fn requests(&mut self, _: &dyn BufferAccess, _: &mut [Request]) -> Result<(), BadRequest> {
            Err(BadRequest("a request without an image".to_owned()))
        }
        fn message(&mut self, message: Kind) -> Result<(), BadRequest> {
            self.0 |= matches!(message, Kind::End(end) if matches!(end.outcome, Some(Outcome::Failure(_))));
            Ok(())
        }
    }
    let program = Program::new(crate::check::MODULE, Vec::new(), Vec::new(), Vec::new());
    let mut greeting = Greeting(false);
    let (part, ran) = (sandbox.name(), sandbox::run(sandbox, &program, &mut greeting));
    match ran {
        Ok(report) if greeting.0 => {
            let micros = (report.time_create + report.time_load + report.time_run).as_micros();
            Diagnosis::good(part, format!("a guest started, ran in ring {}, and ended: {micros} µs", report.ring))
        }
        Ok(_) => Diagnosis::bad(part, Health::Broken, "the guest exited without sending a result", REPORT),
        Err(error) => Diagnosis::bad(part, Health::Broken, error.to_string(), sandbox_remedy(&error)),
    }
}

const REPORT: &str = "please report this, with the processor and the kernel's version";

/// Where the process, or the system, has too little of something.
const RAISE_LIMITS: &str = "raise the limits of this process (see `ulimit -a`), or free memory";

/// What the process sandbox needs.
const PROCESS_NEEDS: &str =
    "it needs Linux 4.17 or newer with CONFIG_SECCOMP_FILTER, and, of a container's list of system calls, those of Docker's \
                             default profile: memfd_create, execveat, clone, prctl, seccomp";

fn sandbox_remedy(error: &SandboxError) -> String {
    match error {
        SandboxError::KvmUnusable { errno: libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE, .. }
        | SandboxError::ProcessUnusable {
            errno: libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE | libc::EFBIG | libc::ENOSPC,
            ..
        } => RAISE_LIMITS.into(),
        SandboxError::ProcessUnusable { errno: libc::EACCES, .. } => {
            "let programs run from files in memory: `sysctl vm.memfd_noexec=1`, and see the log of the security module"
                .into()
        }
        SandboxError::ProcessUnusable { .. } => PROCESS_NEEDS.into(),
        SandboxError::KvmMissing => missing_remedy(&cpuinfo()),
        SandboxError::KvmPermission { .. } => permission_remedy(),
        SandboxError::KvmUnusable { .. } => unusable_remedy(&cpuinfo(), is_kvm()),
        _ => REPORT.into(),
    }
}

/// What the kernel says of the processors (`proc(5)`); nothing if it may not be read.
fn cpuinfo() -> String {
    fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

/// The kernel's module for the virtualization that the processor's flags name: `None` where they name none, and an error
/// where there are no flags.
fn module(cpuinfo: &str) -> Result<Option<&'static str>, ()> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).ok_or(())?;
    let has = |flag: &str| flags.split_ascii_whitespace().any(|known| known == flag);
    Ok(has("vmx").then_some("kvm_intel").or(has("svm").then_some("kvm_amd")))
}

/// Where a processor without virtualization gets it.
const ENABLE: &str =
    "the processor's flags name neither vmx nor svm: enable VT-x or AMD-V in the firmware; in a virtual \
                      machine, nested virtualization in its hypervisor";

/// Why there may be no `/dev/kvm`, by what the processor says of itself.
fn missing_remedy(cpuinfo: &str) -> String {
    let module = match module(cpuinfo) {
        Ok(Some(module)) => module,
        Ok(None) => return ENABLE.into(),
        Err(()) => "kvm_intel` or `modprobe kvm_amd",
    };
    format!(
        "in a container, start it with the device (`--device /dev/kvm`); on a machine, load the kernel's module with \
         `modprobe {module}`"
    )
}

/// Whether `/dev/kvm` is the kernel's device (`KVM_MINOR` of `linux/miscdevice.h`), where it can be looked at.
fn is_kvm() -> bool {
    const MISC: (u32, u32) = (10, 232);
    let is = |device: fs::Metadata| (rustix::fs::major(device.rdev()), rustix::fs::minor(device.rdev())) == MISC;
    fs::metadata("/dev/kvm").map_or(true, is)
}

/// Why KVM may run nothing. A processor that can is not to blame, and neither is any if the device is another one.
fn unusable_remedy(cpuinfo: &str, is_kvm: bool) -> String {
    if !is_kvm {
        return "/dev/kvm is not the kernel's device: something else was put in its place, as in a container".into();
    }
    match module(cpuinfo) {
        Ok(None) => ENABLE.into(),
        Ok(Some(_)) | Err(()) => "see `dmesg | grep -i kvm`: the firmware may have locked virtualization, another \
                                  hypervisor may hold it"
            .into(),
    }
}

fn permission_remedy() -> String {
    let group = fs::metadata("/dev/kvm").ok().map(|device| device.gid());
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    match group.map(|id| (id, group_name(&groups, id))) {
        Some((0, _)) | None => {
            "let a group own the device (udev does: install qemu's or systemd's rules), and join that group".into()
        }
        Some((_, Some(name))) => format!("join the group {name} with `usermod -aG {name} $USER`, and log in again"),
        Some((id, None)) => format!("join the group with the number {id}, which owns the device, and log in again"),
    }
}

/// The name of a group in the lines of `/etc/group` (`group(5)`), if it is a plain one.
fn group_name(groups: &str, id: u32) -> Option<&str> {
    let mut fields = groups.lines().map(|line| line.split(':'));
    let name = fields.find_map(|mut field| {
        let name = field.next()?;
        (field.nth(1)?.parse() == Ok(id)).then_some(name)
    });
    name.filter(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c)))
}

/// A commit works without them as well: the sandbox handles the metadata.
fn confinement(trial: &Confinement) -> [Diagnosis; 2] {
    let one = |part, state: Result<String, &str>, remedy: &str| match state {
        Ok(found) => Diagnosis::good(part, found),
        Err(why) => Diagnosis::bad(part, Health::Weak, format!("not in force: {why}"), remedy),
    };
    [
        one(
            "landlock",
            trial.paths().map(str::to_owned),
            "use a kernel of version 5.13 or newer with Landlock in `lsm=` of its command line; a container may have to allow it",
        ),
        one(
            "seccomp",
            trial.calls().map(|count| format!("a filter of {count} system calls was accepted")),
            "use a kernel with CONFIG_SECCOMP_FILTER; a container may have to allow it",
        ),
    ]
}

fn plugins(registry: &Registry) -> Vec<Diagnosis> {
    let mut all = Vec::new();
    for plugin in registry.plugins() {
        let found = format!("{} {} from {}", plugin.name(), plugin.version(), escape_path(plugin.path()));
        all.push(Diagnosis::good("plugin", crate::escape::printable(&found)));
    }
    if all.is_empty() {
        let remedy =
            "install instar's plugins, or name their directory with --plugin-dir; `instar plugins` shows where \
                      they are looked for";
        all.push(Diagnosis::bad("plugin", Health::Broken, "none is loaded: no format is known", remedy));
    }
    for skipped in registry.skipped() {
        let found = format!("skipped: {}: {}", escape_path(&skipped.path), skipped.reason);
        let (health, remedy) = if skipped.out_of_descriptors {
            (Health::Broken, RAISE_LIMITS.to_owned())
        } else {
            (Health::Weak, skipped_remedy(&skipped.path))
        };
        all.push(Diagnosis::bad("plugin", health, crate::escape::printable(&found), remedy));
    }
    all
}

fn skipped_remedy(path: &Path) -> String {
    if path.is_dir() {
        let path = crate::escape::shell_path(path);
        return format!("let nobody but root and you change it, and the directories above it (`chmod go-w {path}`)");
    }
    format!(
        "replace {} by one that was built for this version, owned by root and writable by nobody else; or remove it",
        escape_path(path)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_is_that_of_the_processor() {
        assert!(missing_remedy("processor\t: 0\nflags\t\t: fpu vmx sse\n").contains("modprobe kvm_intel"));
        assert!(missing_remedy("flags : svm\n").contains("modprobe kvm_amd"));
        assert!(missing_remedy("flags : fpu vmxnot\n").contains("nested virtualization"));
        assert!(missing_remedy("").contains("kvm_intel` or `modprobe kvm_amd"));
        // A processor that can is not blamed.
        assert!(
            !unusable_remedy("flags : vmx\n", true).contains("enable")
                && unusable_remedy("flags : fpu\n", true).contains("enable")
        );
    }

    #[test]
    fn groups_by_number() {
        let groups = "root:x:0:\nkvm:x:106:me\nodd$(x):x:107:\nshort\n";
        assert_eq!(group_name(groups, 106), Some("kvm"));
        assert_eq!(group_name(groups, 107), None);
        assert_eq!(group_name(groups, 5), None);
    }

    #[test]
    fn a_kernel_without_confinement_is_weak_and_not_broken() {
        let [paths, calls] = confinement(&Confinement::of(Err("this".into()), Ok(7)));
        assert_eq!((paths.health, calls.health), (Health::Weak, Health::Good));
        assert!(paths.found.contains("this") && paths.remedy.is_some() && calls.found.contains('7'));
    }
}
