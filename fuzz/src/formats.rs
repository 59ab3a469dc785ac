//! The formats: what is fuzzed with one is fuzzed with all of them.

use instar_plugin_api::{
    Context, FormatPlugin, GuestModule, ImageFacts, ImageFile, ImageReader, PluginError, Role, Verdict,
};
use instar_testkit::FormatKit;
use std::fmt;

/// All formats. A line here is all that a further one needs; if it brings chains of its own, they are a target with a corpus.
pub static FORMATS: [Format; 7] = [
    Format::of::<instar_plugin_vhdx::Vhdx>(&instar_vhdx_testkit::Kit),
    Format::of::<instar_plugin_vdi::Vdi>(&instar_vdi_testkit::Kit),
    Format::of::<instar_plugin_vpc::Vpc>(&instar_vhd_testkit::Kit),
    Format::of::<instar_plugin_qcow::Qcow>(&instar_qcow_testkit::Kit),
    Format::of::<instar_plugin_qcow2::Qcow2>(&instar_qcow2_testkit::Kit),
    Format::of::<instar_plugin_vmdk::Vmdk>(&instar_vmdk_testkit::Kit),
    Format::of::<instar_plugin_raw::Raw>(&instar_raw_testkit::Kit),
];

type Ask<T> = fn(&ImageReader<'_>) -> Result<T, PluginError>;

/// A format: the host half of its plugin, and its testkit, which has the guest half.
pub struct Format {
    /// What the plugin calls it.
    pub name: &'static str,
    /// What it is called here: the plugin's name, or that of a kind of its images.
    pub label: &'static str,
    /// An image of it is a descriptor and the extent behind it, of which the driver is told as of two files.
    pub packed: bool,
    /// Images, checker and driver.
    pub kit: &'static dyn FormatKit,
    /// [`FormatPlugin::probe`].
    pub probe: Ask<u32>,
    /// [`FormatPlugin::files`].
    pub files: Ask<Vec<ImageFile>>,
    /// [`FormatPlugin::facts`].
    pub facts: Ask<ImageFacts>,
    /// [`FormatPlugin::verdict`].
    pub verdict: fn(Role, &ImageFacts, &Context) -> Verdict,
    /// [`FormatPlugin::next_identity`].
    pub next_identity: fn(&ImageFacts, &ImageFacts) -> Vec<u8>,
    /// [`FormatPlugin::guest_module`].
    pub guest_module: fn() -> GuestModule,
}

impl Format {
    const fn of<P: FormatPlugin>(kit: &'static dyn FormatKit) -> Self {
        Self {
            name: P::NAME,
            label: P::NAME,
            packed: false,
            kit,
            probe: P::probe,
            files: P::files,
            facts: P::facts,
            verdict: P::verdict,
            next_identity: P::next_identity,
            guest_module: P::guest_module,
        }
    }
}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label)
    }
}
