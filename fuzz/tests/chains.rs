//! A sample of drawn chains (`make chains`), with a fixed seed.
#![allow(missing_docs, clippy::panic)]

use instar_fuzz::formats::FORMATS;
use instar_fuzz::operations::{drawn_chain, DrawnChain};

#[test]
fn a_sample_of_drawn_chains_has_no_finding() {
    let chains: Vec<DrawnChain> = (0..200).map(|number| drawn_chain(2026, number)).collect();
    let findings: Vec<_> = chains.iter().filter_map(|chain| chain.finding.as_ref()).collect();
    assert!(findings.is_empty(), "{findings:#?}");
    let committed: Vec<&DrawnChain> = chains.iter().filter(|chain| chain.admitted).collect();
    assert!(committed.len() > 100, "{} are committed", committed.len());
    // Of any depth; of each format there is an image that is committed into, or, if it is no sink, one that is merged.
    for depth in 1..=8 {
        assert!(committed.iter().any(|chain| chain.formats.len() == depth + 1), "none is {depth} deep");
    }
    for format in &FORMATS {
        let takes_part = |chain: &&&DrawnChain| match format.kit.has_sink() {
            true => chain.formats[chain.target] == format.label,
            false => chain.formats[..chain.target].contains(&format.label),
        };
        assert!(committed.iter().filter(takes_part).count() > 3, "{}", format.label);
    }
}
