//! What is promised of every driver.
#![allow(missing_docs)]

use instar_guest_sdk::conformance::{verify_drawn, verify_resizes};
use instar_guest_sdk::crash::Crashes;
use instar_raw_testkit::Kit;

#[test]
fn raw_conforms() {
    let report = verify_drawn(&Kit, 0..24, Crashes { drawn: 2, seed: 1 });
    assert!(report.committed >= 20 && report.states > 100, "{report:?}");
}

#[test]
fn raw_images_get_other_sizes() {
    let report = verify_resizes(&Kit, 0..24, Crashes { drawn: 2, seed: 1 });
    assert!(report.committed == 72 && report.states > 120, "{report:?}");
}
