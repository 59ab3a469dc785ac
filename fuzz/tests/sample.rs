//! A sample of each target with a fixed seed.
#![allow(missing_docs)]

use instar_fuzz::generator::{input, Random};
use instar_fuzz::TARGETS;

#[test]
fn no_target_has_a_finding() {
    for target in TARGETS {
        let (seeds, mut random) = ((target.seeds)(), Random::new(2026));
        assert!(!seeds.is_empty());
        let count = if target.name.ends_with("commit") { 1500 } else { 20_000 };
        for _ in 0..count {
            (target.run)(&input(&seeds, &mut random));
        }
    }
}
