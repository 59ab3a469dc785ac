//! vmdk: header and descriptor on any bytes, and the whole guest operation over images in memory with a few fields changed.
//!
//! The same is asked as of [qcow2](super::commit): nothing panics; a refusal before the first change has changed nothing; a
//! commit that succeeds has not changed what the overlay reads, if that could be said before.

use self::common::pair::{files, run, views, Files, OVERLAY};
use self::common::{le32, Spec, State, View, GRAIN};
use super::commit::{apply, overlay_changed, quietly, Order, CHANGE, MAX_LENGTH};
use instar_guest_abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_commit::{Options, Step};
use instar_guest_sdk::memory::MemoryDevices;
use instar_vmdk_format::{create, CreateOptions, Descriptor, Header, Subformat, FOOTER_BYTES};
use std::sync::OnceLock;

#[path = "../../plugins/vmdk/driver/tests/common/mod.rs"]
mod common;

/// Header, footer and descriptor.
pub fn header(data: &[u8]) {
    if let Some(Ok(header)) = data.first_chunk().map(Header::parse) {
        assert!(header.directory_entries() <= instar_vmdk_format::MAX_DIRECTORY && header.directory_entries() > 0);
        assert_eq!(Header::parse(&header.encode()).map(|again| again.capacity), Ok(header.capacity));
    }
    let _ = data.first_chunk::<FOOTER_BYTES>().map(Header::parse_footer);
    for text in [data, data.get(512..).unwrap_or_default()] {
        if let Ok(descriptor) = Descriptor::parse(text) {
            for id in std::iter::once(&descriptor.content_id).chain(&descriptor.parent_id) {
                let digits = std::str::from_utf8(&text[id.digits.clone()]).unwrap();
                assert_eq!(u32::from_str_radix(digits, 16), Ok(id.value));
                let next = instar_vmdk_format::next_content_id(id.value);
                if let Ok(replacement) = id.replacement(next, 512) {
                    assert_eq!((replacement.len(), u32::from_str_radix(&replacement, 16)), (digits.len(), Ok(next)));
                }
            }
        }
    }
}

/// Images that are as they should be.
#[must_use]
pub fn header_seeds() -> Vec<Vec<u8>> {
    let options = |subformat, parent| CreateOptions {
        virtual_size: 1 << 30,
        file_name: b"x.vmdk".to_vec(),
        content_id: 0x1234_5678,
        parent,
        subformat,
        zeroed_grains: true,
        adapter_type: "ide".into(),
        hardware_version: "4".into(),
    };
    let all = [
        options(Subformat::MonolithicSparse, None),
        options(Subformat::StreamOptimized, Some((b"base.vmdk".to_vec(), 0xabc))),
    ];
    let bytes = |options: &CreateOptions| {
        let mut bytes = vec![0; 2048];
        for (offset, region) in create(options).unwrap().image.regions {
            let at = offset as usize;
            if let Some(place) = bytes.get_mut(at..at + region.len()) {
                place.copy_from_slice(&region);
            }
        }
        bytes
    };
    all.iter().map(bytes).collect()
}

/// Pairs that make sense, of many kinds.
fn pairs() -> &'static [Files] {
    static PAIRS: OnceLock<Vec<Files>> = OnceLock::new();
    PAIRS.get_or_init(|| {
        let size = 600 * GRAIN;
        let data = |grains: &[usize], seed| grains.iter().map(|&g| (g, State::Data(seed))).collect::<Vec<_>>();
        let top = Spec::new(size, 7, 5).with(data(&[0, 1, 5, 513, 599], 0x21)).with([(7, State::Zero)]);
        let base = Spec::new(size, 5, 4).with(data(&[0, 3, 40], 0x43)).with([(2, State::Zero)]);
        let root = Spec::new(size, 4, u32::MAX).with(data(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 513], 0x66));
        let streamed = Spec { compressed: true, redundant: false, ..top.clone() };
        [
            (top.clone(), base.clone()),
            (top.clone(), Spec { lazy_tables: true, ..base.clone() }),
            (streamed.clone(), Spec { redundant: false, zeroed: false, grains: vec![], ..base.clone() }),
            (Spec { footer: true, ..streamed }, base),
        ]
        .iter()
        .map(|(top, base)| files(top, base, Some(&root)))
        .collect()
    })
}

/// Whether what the test's own reader says of an image can be held against the driver.
fn comparable(bytes: &[u8]) -> bool {
    let footer = bytes.len() - 1024;
    let at_end = common::le64(bytes, 56) == u64::MAX;
    le32(bytes, 20) == GRAIN / 512
        && le32(bytes, 24) == 0
        && (!at_end || bytes[8..44] == bytes[footer + 8..footer + 44])
}

/// Commit a pair of images after the changes that the input describes.
pub fn commit(input: &[u8]) {
    let Some(&which) = input.first() else { return };
    let mut files = pairs()[usize::from(which) % pairs().len()].clone();
    for change in input.chunks_exact(CHANGE).take(4) {
        let device = if change[1] % 2 == 0 { OVERLAY } else { DEVICE_OUTPUT };
        apply(files.get_mut(&device).unwrap(), change, Order::Little);
    }
    // The host has looked at the headers before.
    let small = |bytes: &[u8]| {
        bytes.first_chunk().map(Header::parse).is_some_and(|header| header.is_ok_and(|h| h.virtual_size() <= 64 << 20))
    };
    if !files.values().all(|bytes| small(bytes)) {
        return;
    }
    let before = quietly(|| files.values().all(|bytes| comparable(bytes)).then(|| views(&files).1));
    let mut io = MemoryDevices::new(files.clone());
    match run(&mut io, Options::default(), MAX_LENGTH) {
        Ok(_) => {
            if let Ok(Some(overlay)) = before {
                assert!(views(&io.files).1 == overlay, "the overlay reads something else");
                [OVERLAY, DEVICE_OUTPUT].iter().for_each(|device| View::new(&io.files[device]).assert_consistent());
            }
        }
        Err(failure) => {
            assert_ne!(failure.error.code, ErrorCode::InternalOverflow, "{}", failure.error);
            if matches!(failure.step, Step::Check | Step::Plan) {
                assert_eq!(io.log, vec![], "{:?} {}", failure.step, failure.error);
            } else if failure.step == Step::Write {
                // But for the parent's content ID.
                let entries = |files: &Files| quietly(|| View::new(&files[&OVERLAY]).entries);
                if let (true, Ok(was)) = (overlay_changed(&io), entries(&files)) {
                    assert_eq!(entries(&io.files).ok(), Some(was), "{}", failure.error);
                }
            }
        }
    }
}
