//! Another parent: at every instant the descriptor names the one or the other, whole.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::ImageId;
use instar_guest_sdk::conformance::{verify_odd_parents, verify_parent, verify_parents, ImageKit, ParentKit, Relinks};
use instar_guest_sdk::crash::Crashes;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::Parent;
use instar_vmdk_testkit::{build, device, le32, le64, DescriptorKit, Kit, Spec, State, View};

const CRASHES: Crashes = Crashes { drawn: 3, seed: 1 };
const SIZE: u64 = 40 * 1024 + 512;

fn base() -> Parent<'static> {
    let identity = ImageId::new(&0x0bad_beef_u32.to_be_bytes());
    Parent { name: b"../a b/grand.vmdk", format: "vmdk", identity, virtual_size: SIZE }
}

fn short() -> Parent<'static> {
    Parent { name: b"c", identity: ImageId::new(&7u32.to_be_bytes()), ..base() }
}

fn spec() -> Spec {
    Spec::new(SIZE as usize, 0x1234_5678, 0x9abc_def0).with([
        (0, State::Data(1)),
        (7, State::Data(2)),
        (40, State::Data(3)),
    ])
}

fn all_is_done(image: &[u8]) -> (Relinks, Vec<u8>) {
    let (report, changed) = verify_parents(&Kit, image, &[base(), short()], CRASHES);
    assert!(report.changed == 3 && report.refused == 1, "{report:?}");
    assert_eq!(Kit.recorded(&changed), Some(Kit.expected(&base())));
    let others = |image: &[u8]| {
        let text = View::new(image).text();
        text.lines().filter(|line| !line.starts_with("parent")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(others(&changed), others(image));
    let behind = 512 + le64(image, 36) as usize * 512;
    assert!(changed[..512] == image[..512] && changed[behind..] == image[behind..]);
    (report, changed)
}

#[test]
fn a_descriptor_of_a_sector_is_changed_in_one() {
    for spec in [spec(), Spec { compressed: true, ..spec() }, Spec { compressed: true, footer: true, ..spec() }] {
        let (report, _) = all_is_done(&build(&spec));
        assert_eq!(report.states, 3 * 2, "before and afterwards");
    }
}

#[test]
fn a_longer_one_is_changed_by_way_of_another_place() {
    for spec in [spec(), Spec { compressed: true, ..spec() }, Spec { redundant: false, lazy_tables: true, ..spec() }] {
        for descriptor in [2, 20] {
            let (report, _) = all_is_done(&build(&Spec { descriptor, ..spec.clone() }));
            assert!(report.states >= 24, "{report:?}");
        }
    }
}

/// A crash may leave the descriptor behind the end, from where the next change takes it home.
#[test]
fn a_descriptor_that_stands_behind_the_grains_goes_home() {
    let mut image = build(&Spec { descriptor: 2, ..spec() });
    let at = image.len();
    let text = image[512..1536].to_vec();
    image[512..1536].fill(0x99);
    image.extend(text);
    image[28..36].copy_from_slice(&(at as u64 / 512).to_le_bytes());
    let (_, changed) = verify_parent(&Kit, &image, Some(&base()), CRASHES).unwrap();
    assert_eq!(le64(&changed, 28), 1);
    assert_eq!(Kit.recorded(&changed), Some(Kit.expected(&base())));
}

/// A descriptor in a file, whose text has `length` bytes. The line with the parent's name ends at byte `at`; at the least, if
/// that is 0.
fn file(length: usize, at: usize) -> Vec<u8> {
    let filler = |bytes: usize| if bytes == 0 { String::new() } else { format!("#{}\r\n", "-".repeat(bytes - 3)) };
    let front = "# Disk DescriptorFile\r\nversion=1\r\nencoding=\"UTF-8\"\r\nCID=12345678\r\nparentCID=9abcdef0\r\n\
                 parentFileNameHint=\"middle-000001.vmdk\"\r\n";
    let end = format!("createType=\"vmfs\"\r\nRW {} VMFS \"x-flat.vmdk\"\r\nchangeTrackPath=\"x-ctk\"\r\n", SIZE / 512);
    let front = filler(at.saturating_sub(front.len())) + front;
    let behind = filler(length - front.len() - end.len());
    (front + &end + &behind).into_bytes()
}

#[test]
fn a_file_of_a_sector_takes_any_name() {
    let kit = DescriptorKit(SIZE);
    let long = format!("{}base.vmdk", "directory/".repeat(150));
    let long = Parent { name: long.as_bytes(), ..base() };
    for length in [300, 490, 511] {
        for padding in [0, 100] {
            let mut image = file(length, 0);
            image.resize(length + padding, 0);
            let (report, changed) = verify_parents(&kit, &image, &[base(), long, short()], CRASHES);
            // From the long one on, nothing fits but what is as long.
            println!("{length} {padding} {report:?}");
            assert!(report.changed >= 2 && report.states > 8, "{report:?}");
            assert!(kit.recorded(&changed).is_some());
            let (_, changed) = verify_parent(&kit, &image, Some(&short()), CRASHES).unwrap();
            if padding == 0 {
                assert!(changed.len() < length && !changed.contains(&0), "the file ends with its text");
            }
        }
    }
}

#[test]
fn a_longer_file_keeps_its_other_sectors() {
    let kit = DescriptorKit(SIZE);
    let image = file(1300, 400);
    let name = |name: &'static [u8]| Parent { name, ..base() };
    let (_, shorter) = verify_parent(&kit, &image, Some(&name(b"middle.vmdk")), CRASHES).unwrap();
    assert_eq!((shorter.len(), &shorter[512..]), (image.len(), &image[512..]));
    let text = String::from_utf8(shorter.clone()).unwrap();
    assert!(text.contains("parentFileNameHint=\"middle.vmdk\"       \r\n"), "{text}");
    let (_, umlaut) = verify_parent(&kit, &image, Some(&name("gr\u{fc}n.vmdk".as_bytes())), CRASHES).unwrap();
    assert_eq!((umlaut.len(), &umlaut[512..]), (image.len(), &image[512..]));
    // The spaces make room again.
    let (_, again) = verify_parent(&kit, &shorter, Some(&name(b"middle-000001.vmdk")), CRASHES).unwrap();
    assert_eq!(kit.recorded(&again), Some(kit.expected(&name(b"middle-000001.vmdk"))));
    let error = verify_parent(&kit, &image, Some(&name(b"middle-0000011.vmdk")), CRASHES).unwrap_err();
    assert!(error.text.contains("at most 18 bytes, or set parentCID=0badbeef"), "{error}");
    // The longest name that the refusal offers, and one that shrinks the text to a sector.
    verify_parent(&kit, &image, Some(&name(b"123456789012345678")), CRASHES).unwrap();
    let (_, shrunk) = verify_parent(&kit, &file(520, 0), Some(&name(b"m")), CRASHES).unwrap();
    assert_eq!(shrunk.len(), 520 - 17);
    // Over the end of a sector, nothing can be done.
    let image = file(1300, 520);
    let error = verify_parent(&kit, &image, Some(&name(b"m")), CRASHES).unwrap_err();
    assert!(error.text.contains("sector: set parentCID="), "{error}");
}

#[test]
fn what_cannot_be_recorded_is_refused() {
    let image = build(&Spec { descriptor: 20, ..spec() });
    assert_eq!(verify_odd_parents(&Kit, &image, &base(), CRASHES), 10, "all but a longer one, and that in Unicode");
    let refused = |kit: &dyn ParentKit, image: &[u8], parent: Option<Parent<'_>>, words: &str| {
        let error = verify_parent(kit, image, parent.as_ref(), CRASHES).unwrap_err();
        assert!(error.text.contains(words), "{error}");
    };
    refused(&Kit, &image, None, "cannot be without one");
    refused(&Kit, &image, Some(Parent { format: "qcow2", identity: None, ..base() }), "the new one is a qcow2");
    refused(&Kit, &image, Some(Parent { virtual_size: SIZE + 512, ..base() }), "both have to be equal");
    refused(&Kit, &image, Some(Parent { name: b"a\"b", ..base() }), "cannot stand in this descriptor");
    refused(&Kit, &image, Some(Parent { identity: ImageId::new(&[0xff; 4]), ..base() }), "says that there is none");
    let alone = build(&Spec { parent: u32::MAX, ..spec() });
    refused(&Kit, &alone, Some(base()), "has no parent that could be another one");
    let footer = build(&Spec { descriptor: 2, compressed: true, footer: true, ..spec() });
    refused(&Kit, &footer, Some(base()), "no room for another one");
    let little = build(&Spec { descriptor: 2, ..spec() });
    let long = "n".repeat(800);
    refused(&Kit, &little, Some(Parent { name: long.as_bytes(), ..base() }), "room for 1024 bytes only");
    let mut damaged = image.clone();
    let table = le32(&image, le64(&image, 56) as usize * 512) * 512;
    damaged.copy_within(table + 28..table + 32, table);
    let mut io = MemoryDevices::new([(0, damaged.clone())]);
    let mut source = Kit.open_source(&mut io, &device(0, &damaged, u64::MAX)).unwrap();
    assert!(source.plan_parent(&mut io, Some(&base())).unwrap_err().text.contains("overlaps"));
    let foreign = String::from_utf8(file(490, 0)).unwrap().replace("UTF-8", "GBK");
    let umlaut = Parent { name: "gr\u{fc}n.vmdk".as_bytes(), ..base() };
    refused(&DescriptorKit(SIZE), foreign.as_bytes(), Some(umlaut), "cannot stand in this descriptor");
    assert!(verify_parent(&DescriptorKit(SIZE), &file(490, 0), Some(&umlaut), CRASHES).is_ok());
    assert!(DescriptorKit(SIZE).content(&image, None) != image);
}
