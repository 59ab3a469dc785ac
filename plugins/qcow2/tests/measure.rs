//! What the plugin measures is what `qemu-img measure` says.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use instar_plugin_api::std_types::{ROption, RVec, Tuple2};
use instar_plugin_api::{CreateSpec, Footprint, FormatPlugin, PluginError};
use instar_plugin_qcow2::Qcow2;
use std::process::Command;

fn spec(virtual_size: u64, options: &str) -> CreateSpec {
    let options = options.split(',').filter(|option| !option.is_empty());
    CreateSpec {
        virtual_size,
        file_name: RVec::new(),
        backing: ROption::RNone,
        backing_facts: ROption::RNone,
        options: options.map(|o| o.split_once('=').unwrap()).map(|(k, v)| Tuple2(k.into(), v.into())).collect(),
    }
}

fn measure(virtual_size: u64, options: &str) -> Result<Footprint, PluginError> {
    Qcow2::measure(&spec(virtual_size, options), &[])
}

/// What is required for an empty disk, and for a full one; `None` where QEMU refuses.
fn oracle(virtual_size: u64, options: &str) -> Option<(u64, u64)> {
    let mut command = Command::new("qemu-img");
    command.args(["measure", "-O", "qcow2", "--output=json", "--size", &virtual_size.to_string()]);
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    let output = command.output().expect("qemu-img is needed");
    let text = String::from_utf8(output.stdout).unwrap();
    let number = |key: &str| {
        let rest = text.split_once(key)?.1;
        let digits: String =
            rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    number("\"required\"").zip(number("\"fully-allocated\""))
}

#[test]
fn it_is_what_qemu_measures() {
    let sizes = [0, 1, 512, 65536, 1_000_000, (1 << 30) + 512, 10 << 30, 3 << 40];
    let options = [
        "",
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=512",
        "refcount_bits=64",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k,refcount_bits=8",
        "extended_l2=on,cluster_size=2M",
        "compat=0.10",
        "compat=0.10,cluster_size=1024",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full,cluster_size=4k",
        "extended_l2=on,cluster_size=8k",
        "compat=0.10,refcount_bits=1",
    ];
    let mut compared = 0;
    for size in sizes {
        for options in options {
            let measured = measure(size, options);
            let Some((required, fully_allocated)) = oracle(size, options) else {
                assert!(measured.is_err(), "{size} {options}: {measured:?}");
                continue;
            };
            let measured = measured.unwrap_or_else(|error| panic!("{size} {options}: {}", error.message));
            assert_eq!(measured.required(0), Some(required), "{size} {options}");
            assert_eq!(measured.fully_allocated(), Some(fully_allocated), "{size} {options}");
            assert_eq!(measured.virtual_size, size.next_multiple_of(512));
            compared += 1;
        }
    }
    assert!(compared > 80, "{compared}");
}

#[test]
fn absurd_sizes_are_refused() {
    for size in [u64::MAX, i64::MAX as u64, 1 << 62] {
        assert!(measure(size, "").is_err() && measure(size, "cluster_size=2M").is_err(), "{size}");
    }
    assert!(measure(1 << 20, "bogus=1").is_err());
}
