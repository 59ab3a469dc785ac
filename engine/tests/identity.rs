//! An identity that proves which image another one was made on stands for the name of that image.

#![allow(clippy::unwrap_used)]

use instar::cancel::Cancel;
use instar::image::{resolve_backing, Access, BackingChoice, Descent, Gate, NamedFile, Roots};
use instar_guest_abi::ErrorCode;
use instar_test_lab::{built, PluginDir};

/// What becomes of `-b parent` (or of no `-b`) for an image with this word, where the parent has that one.
fn resolve(word: &str, parent: &str, named: bool) -> Result<(), (ErrorCode, String)> {
    let plugins = PluginDir::new();
    plugins.copy("panic", &built("instar_test_plugin_panicking"));
    let registry = plugins.load();
    let yard = tempfile::tempdir().unwrap();
    let (top, base) = (yard.path().join("top"), yard.path().join("parent"));
    std::fs::write(&top, format!("PANIC {word}")).unwrap();
    std::fs::write(&base, format!("PANIC {parent}")).unwrap();
    let (image, base) = (NamedFile::new(&top), NamedFile::new(&base));
    let gate = Gate::within(Roots::of(&image, &[]).unwrap());
    let access = Access::ReadOnly;
    let overlay = image.open(access, ErrorCode::ImageNotFound).unwrap().identify_as(&registry, None, "-f").unwrap();
    let cancel = Cancel::new();
    let mut descent = Descent::new(&registry, &gate, &top, 4, &cancel);
    let choice = BackingChoice { base: named.then_some(&base), format: None, access };
    match resolve_backing(&mut descent, &overlay, choice) {
        Ok(target) => {
            assert_eq!(Some(target.backing.opened.identity), base.identity());
            assert!(target.between.is_empty());
            Ok(())
        }
        Err(error) => Err((error.code, error.to_string())),
    }
}

#[test]
fn a_proven_parent_needs_no_name() {
    assert_eq!(resolve("child   ", "parent  ", true), Ok(()));
    assert_eq!(resolve("nameless", "parent  ", true), Ok(()));
}

#[test]
fn what_is_not_proven_is_not_in_the_chain() {
    for (word, parent) in [("unproven", "parent  "), ("child   ", "stranger"), ("nameless", "stranger")] {
        let (code, text) = resolve(word, parent, true).unwrap_err();
        assert_eq!(code, ErrorCode::NotInChain, "{word} {parent}: {text}");
    }
}

#[test]
fn without_an_option_only_the_name_counts() {
    assert_eq!(resolve("child   ", "parent  ", false).unwrap_err().0, ErrorCode::BackingNotFound);
    let (code, text) = resolve("nameless", "parent  ", false).unwrap_err();
    assert!(code == ErrorCode::NoBacking && text.contains("name that with `instar commit -b`"), "{text}");
}

/// The parent of an image whose format records none is the file that the operator names, whatever it is.
#[test]
fn a_parent_that_no_image_records_is_named() {
    for parent in ["parent  ", "stranger", "unsaid  "] {
        assert_eq!(resolve("unsaid  ", parent, true), Ok(()), "{parent}");
    }
    let (code, text) = resolve("unsaid  ", "parent  ", false).unwrap_err();
    assert!(code == ErrorCode::NoBacking && text.contains("name the parent with `instar commit -b`"), "{text}");
}

/// Nobody has named a parent for the image that is committed into: it is the lowest.
#[test]
fn below_an_image_that_records_nothing_there_is_nothing() {
    let plugins = PluginDir::new();
    plugins.copy("panic", &built("instar_test_plugin_panicking"));
    let registry = plugins.load();
    let yard = tempfile::tempdir().unwrap();
    let top = yard.path().join("top");
    std::fs::write(&top, "PANIC unsaid  ").unwrap();
    let image = NamedFile::new(&top);
    let gate = Gate::within(Roots::of(&image, &[]).unwrap());
    let opened = image.open(Access::ReadOnly, ErrorCode::ImageNotFound).unwrap();
    let opened = opened.identify_as(&registry, None, "-f").unwrap();
    assert!(opened.facts.backing.is_some());
    let cancel = Cancel::new();
    let below = Descent::new(&registry, &gate, &top, 4, &cancel).open_below(&opened, Access::ReadOnly).unwrap();
    assert!(below.is_empty());
}
