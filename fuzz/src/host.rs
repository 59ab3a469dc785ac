//! The plugins' host halves: what a file is, what its header says, and what part it may take.

use crate::formats::{Format, FORMATS};
use instar_plugin_api::{
    Context, ImageFacts, ImageReader, Incoming, PluginError, ReadImage, Role, Verdict, READ_BUDGET, VALUES_MAX,
};
use std::cell::Cell;

/// A file, or several, as the engine lets a plugin read it: so much, and no more.
struct Budget<'a> {
    files: Vec<&'a [u8]>,
    left: Cell<u64>,
}

impl ReadImage for Budget<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        self.left.set(self.left.get().saturating_sub(buffer.len().max(512) as u64));
        if self.left.get() == 0 {
            return Err(PluginError::new(instar_guest_abi::ErrorCode::ScratchTooSmall, "it reads too much"));
        }
        self.files[0].read_at(offset, buffer)
    }

    fn read_file_at(&self, file: usize, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        self.files[file + 1].read_at(offset, buffer)
    }
}

fn reading<T>(bytes: &[u8], others: &[&[u8]], call: impl FnOnce(&ImageReader<'_>) -> T) -> T {
    let lengths: Vec<u64> = others.iter().map(|other| other.len() as u64).collect();
    let files = std::iter::once(bytes).chain(others.iter().copied()).collect();
    let budget = Budget { files, left: Cell::new(READ_BUDGET) };
    call(&ImageReader::with_files(bytes.len() as u64, &lengths, &budget))
}

/// The facts of an image in one file, as the engine believes them.
pub fn look(format: &Format, bytes: &[u8]) -> Option<ImageFacts> {
    // What comes in several files has no other files here.
    facts(format, bytes, &[]).filter(|_| reading(bytes, &[], format.files).is_ok_and(|files| files.is_empty()))
}

fn facts(format: &Format, bytes: &[u8], others: &[&[u8]]) -> Option<ImageFacts> {
    let facts = reading(bytes, others, format.facts).ok()?;
    let length: usize = bytes.len() + others.iter().map(|other| other.len()).sum::<usize>();
    // The engine calls the plugin faulty otherwise.
    assert_eq!((facts.format.as_str(), facts.file_length), (format.name, length as u64));
    let mut left = VALUES_MAX;
    for feature in &facts.features {
        left = left.saturating_sub(feature.value.weight(left).expect("values are bounded"));
    }
    Some(facts).filter(|facts| facts.virtual_size <= i64::MAX as u64)
}

/// What the plugin of a format says.
pub fn verdict(format: &Format, role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
    let verdict = (format.verdict)(role, own, context);
    assert!(verdict.code == 0 || !verdict.reason.is_empty(), "a refusal says why: {verdict:?}");
    verdict
}

/// All plugins look at any bytes. Those after the first two, which say where the first file ends, may be several files.
pub fn host(data: &[u8]) {
    let [high, low, bytes @ ..] = data else { return };
    let split = (usize::from(*high) << 8 | usize::from(*low)).min(bytes.len());
    let (first, other) = if split == 0 { (bytes, &[][..]) } else { bytes.split_at(split) };
    let mut all = Vec::new();
    for format in &FORMATS {
        let (probed, files) = (reading(first, &[], format.probe), reading(first, &[], format.files));
        assert!(probed.is_ok_and(|probability| probability <= 100), "memory can be read");
        let others = vec![other; files.map_or(0, |files| files.len()).min(64)];
        let alone = facts(format, first, &[]);
        let whole = (!others.is_empty()).then(|| facts(format, first, &others)).flatten();
        all.extend(alone.into_iter().chain(whole).map(|facts| (format, facts)));
    }
    for (format, own) in &all {
        for (_, other) in &all {
            for role in [Role::Read, Role::Write, Role::Empty, Role::Below] {
                let context = Incoming::from_layers([other]).map(|incoming| Context::writing(Some(other), incoming));
                let verdict = verdict(format, role, own, &context.expect("there is a layer"));
                assert!(verdict.max_length <= i64::MAX as u64, "{verdict:?}");
            }
        }
    }
}

/// Whole headers, and a descriptor with extents.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let descriptor = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\nisNativeSnapshot=\"no\"\n\
        createType=\"twoGbMaxExtentFlat\"\nparentFileNameHint=\"base.vmdk\"\n# Extent description\n\
        RW 2048 FLAT \"a-f001.vmdk\" 0\nRW 63 SPARSE \"a-s002.vmdk\"\n\n# The Disk Data Base\nddb.adapterType = \"ide\"\n";
    let whole = |bytes: Vec<u8>| [vec![0, 0], bytes].concat();
    let mut seeds: Vec<Vec<u8>> = crate::parsers::header_seeds().into_iter().map(whole).collect();
    seeds.extend(crate::parallels::seeds().into_iter().map(whole));
    seeds.extend(crate::vdi::header_seeds().into_iter().map(whole));
    seeds.extend(crate::vmdk::header_seeds().into_iter().map(whole));
    seeds.extend(crate::vhd::header_seeds().into_iter().map(whole));
    let sparse = &crate::vmdk::header_seeds()[0][..512];
    let length = u16::try_from(descriptor.len()).unwrap_or(0).to_be_bytes();
    seeds.push([&length[..], descriptor.as_bytes(), sparse].concat());
    seeds.push([&length[..], descriptor.as_bytes()].concat());
    seeds
}
