//! The formats: what is fuzzed with one is fuzzed with all of them.

use instar_plugin_api::{
    Context, CreateSpec, CreatedImage, FormatPlugin, GuestModule, ImageFacts, ImageFile, ImageReader, PluginError,
    ReadImage, Role, Verdict,
};
use instar_plugin_vmdk::Vmdk;
use instar_testkit::FormatKit;
use instar_vmdk_testkit::{CowdKit, SeSparseKit, EXTENT};
use std::fmt;

/// All formats. A line here is all that a further one needs; if it brings chains of its own, they are a target with a corpus.
pub static FORMATS: [Format; 10] = [
    Format::of::<instar_plugin_parallels::Parallels>(&instar_parallels_testkit::Kit),
    Format::packed("sesparse", &SeSparseKit),
    Format::packed("vmfssparse", &CowdKit(512)),
    Format::of::<instar_plugin_vhdx::Vhdx>(&instar_vhdx_testkit::Kit),
    Format::of::<instar_plugin_vdi::Vdi>(&instar_vdi_testkit::Kit),
    Format::of::<instar_plugin_vpc::Vpc>(&instar_vhd_testkit::Kit),
    Format::of::<instar_plugin_qcow::Qcow>(&instar_qcow_testkit::Kit),
    Format::of::<instar_plugin_qcow2::Qcow2>(&instar_qcow2_testkit::Kit),
    Format::of::<Vmdk>(&instar_vmdk_testkit::Kit),
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
    /// [`FormatPlugin::create`].
    pub create: fn(&CreateSpec) -> Result<CreatedImage, PluginError>,
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
            create: P::create,
            guest_module: P::guest_module,
        }
    }

    /// A disk of VMware's with one extent, as one image.
    const fn packed(label: &'static str, kit: &'static dyn FormatKit) -> Self {
        Self {
            label,
            packed: true,
            probe: packed_probe,
            files: packed_files,
            facts: packed_facts,
            ..Self::of::<Vmdk>(kit)
        }
    }
}

/// The two files of a packed image.
struct Parts<'a>(&'a ImageReader<'a>);

impl ReadImage for Parts<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        let left = usize::try_from((EXTENT as u64).saturating_sub(offset)).unwrap_or(0).min(buffer.len());
        self.0.read_at(offset, &mut buffer[..left])
    }

    fn read_file_at(&self, _: usize, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        self.0.read_at(offset.saturating_add(EXTENT as u64), buffer)
    }
}

fn packed<T>(image: &ImageReader<'_>, extents: usize, ask: Ask<T>) -> Result<T, PluginError> {
    let extent = image
        .length()
        .checked_sub(EXTENT as u64)
        .ok_or_else(|| PluginError::new(instar_guest_abi::ErrorCode::OverlayCorrupt, "it ends before its extent"))?;
    ask(&ImageReader::with_files(EXTENT as u64, &[extent][..extents], &Parts(image)))
}

fn packed_probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
    if image.length() < EXTENT as u64 {
        return Ok(0);
    }
    packed(image, 0, Vmdk::probe)
}

/// None: the extent is in the image.
fn packed_files(image: &ImageReader<'_>) -> Result<Vec<ImageFile>, PluginError> {
    let files = packed(image, 0, Vmdk::files)?;
    if files.len() == 1 {
        return Ok(Vec::new());
    }
    Err(PluginError::new(instar_guest_abi::ErrorCode::UnsupportedFormat, "it has not one extent"))
}

fn packed_facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
    packed_files(image)?;
    packed(image, 1, Vmdk::facts)
}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label)
    }
}
