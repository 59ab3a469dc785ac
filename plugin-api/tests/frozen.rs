//! The interface versions are frozen: names, order, sizes and types of everything that crosses the border.
//!
//! If this fails, a type of the contract was changed. Take the change back: whatever is new is a function behind the last one of
//! the root module, or belongs into an interface version of its own. For such a function, and before the first release,
//! a file may follow (run with `INSTAR_BLESS_LAYOUT=1`).

use abi_stable::abi_stability::PrefixStableAbi;
use abi_stable::type_layout::TypeLayout;
use abi_stable::StableAbi;
use instar_plugin_api::v1::{PluginManifest, PluginModuleV1_Prefix};
use instar_plugin_api::{
    BackingPointer, BitmapFacts, Context, CreateSpec, CreatedFile, CreatedImage, FactValue, Feature, Field, Footprint,
    GuestModule, ImageFacts, ImageFile, ImageReader, ImageRegion, Incoming, PluginError, ReservedRange, Role,
    SnapshotFacts, Verdict,
};
use std::fmt::Write as _;

fn describe(layout: &TypeLayout) -> String {
    let mut text = format!("{}: {} bytes, aligned to {}\n", layout.full_type(), layout.size(), layout.alignment());
    for field in layout.get_fields().into_iter().flat_map(|fields| fields.to_vec()) {
        let _ = writeln!(text, "    {}: {} ({} bytes)", field.name(), field.full_type(), field.layout().size());
        for function in field.function_range().iter() {
            let _ = writeln!(text, "        {}", function.to_string().lines().next().unwrap_or_default());
        }
    }
    text
}

/// Hold layouts against a file of this folder.
fn hold(layouts: &[&'static TypeLayout], file: &str) {
    let text: String = layouts.iter().map(|layout| describe(layout)).collect();
    let path = format!("{}/tests/{file}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("INSTAR_BLESS_LAYOUT").is_some() {
        std::fs::write(&path, &text).unwrap_or_default();
    }
    assert_eq!(text, std::fs::read_to_string(path).unwrap_or_default());
}

#[test]
fn interface_version_1_is_what_it_was() {
    let layouts = [
        <PluginManifest as StableAbi>::LAYOUT,
        <ImageReader<'static> as StableAbi>::LAYOUT,
        <PluginError as StableAbi>::LAYOUT,
        <ImageFacts as StableAbi>::LAYOUT,
        <BackingPointer as StableAbi>::LAYOUT,
        <SnapshotFacts as StableAbi>::LAYOUT,
        <BitmapFacts as StableAbi>::LAYOUT,
        <Feature as StableAbi>::LAYOUT,
        <FactValue as StableAbi>::LAYOUT,
        <Field as StableAbi>::LAYOUT,
        <Role as StableAbi>::LAYOUT,
        <Context<'static> as StableAbi>::LAYOUT,
        <Incoming as StableAbi>::LAYOUT,
        <Verdict as StableAbi>::LAYOUT,
        <GuestModule as StableAbi>::LAYOUT,
        <CreateSpec as StableAbi>::LAYOUT,
        <CreatedImage as StableAbi>::LAYOUT,
        <ImageRegion as StableAbi>::LAYOUT,
        <ReservedRange as StableAbi>::LAYOUT,
        <Footprint as StableAbi>::LAYOUT,
        <PluginModuleV1_Prefix as PrefixStableAbi>::LAYOUT,
        <ImageFile as StableAbi>::LAYOUT,
        <CreatedFile as StableAbi>::LAYOUT,
    ];
    hold(&layouts, "v1-layout.txt");
}
