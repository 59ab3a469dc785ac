//! The stable contract between the instar engine and its format plugins.
//!
//! A plugin is one shared library with two halves. This crate is about the host half: it answers three
//! questions before anything is launched (what is this image, what is it backed by, may this overlay be
//! committed into that backing) and hands over the bytes of the guest half.
// `#[sabi_trait]` and the derives of abi_stable 0.11 define impls inside functions.
#![allow(non_local_definitions)]

mod types;

pub use instar_guest_abi::ErrorCode;
pub use types::{
    BackingPointer, CommitRole, CreateSpec, CreatedImage, Feature, GuestModule, ImageFacts, ImageRegion, PluginError,
    Verdict, ROLE_SINK, ROLE_SOURCE,
};
