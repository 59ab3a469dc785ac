//! The name that somebody may have meant: of those that exist, the one with the fewest typing errors.

/// The name that is nearest to the wanted one, if it is near enough to have been meant: a third of its characters may differ, not
/// counting an extension, which names of files have in common.
/// Of several that are equally near, the first that is as long, or else the first.
///
/// ```
/// assert_eq!(instar::nearest::nearest("overlya.qcow2", ["base.qcow2", "overlay.qcow2"]), Some("overlay.qcow2"));
/// assert_eq!(instar::nearest::nearest("disk.raw", ["base.qcow2"]), None);
/// ```
pub fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted: Vec<char> = wanted.chars().collect();
    let stem = wanted.iter().rposition(|&letter| letter == '.').unwrap_or(wanted.len());
    let bound = stem / 3;
    let near = |name: &'a str| {
        // A name that differs by its length alone need not be compared.
        let longer = name.chars().count().abs_diff(wanted.len());
        let errors = if longer > bound { usize::MAX } else { errors(&wanted, name) };
        (errors <= bound).then_some((errors, longer, name))
    };
    let found = names.into_iter().filter_map(near).min_by_key(|&(errors, longer, _)| (errors, longer));
    found.map(|(_, _, name)| name)
}

/// Characters that were left out, put in, replaced, or swapped with their neighbor (the optimal string alignment distance).
fn errors(wanted: &[char], name: &str) -> usize {
    let name: Vec<char> = name.chars().collect();
    let (mut before, mut last) = (vec![0; name.len() + 1], (0..=name.len()).collect::<Vec<usize>>());
    for (row, &left) in wanted.iter().enumerate() {
        let mut this = vec![row + 1];
        for (column, &right) in name.iter().enumerate() {
            let replaced = last[column] + usize::from(left != right);
            let mut least = replaced.min(last[column + 1] + 1).min(this[column] + 1);
            if row > 0 && column > 0 && left == name[column - 1] && wanted[row - 1] == right {
                least = least.min(before[column - 1] + 1);
            }
            this.push(least);
        }
        before = std::mem::replace(&mut last, this);
    }
    last[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_are_counted() {
        for (left, right, wanted) in [
            ("top", "top", 0),
            ("", "top", 3),
            ("tpo", "top", 1),
            ("toop", "top", 1),
            ("to", "top", 1),
            ("tip", "top", 1),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(errors(&left.chars().collect::<Vec<_>>(), right), wanted, "{left} {right}");
        }
    }

    #[test]
    fn what_is_far_away_was_not_meant() {
        assert_eq!(nearest("none", ["top", "base"]), None);
        assert_eq!(nearest("bsae.qcow2", ["top.qcow2", "base.qcow2", "base.raw"]), Some("base.qcow2"));
        assert_eq!(nearest("top.qcow2", ["mid.qcow2", "base.qcow2"]), None, "only the extension is near");
        assert_eq!(nearest("", [""]), Some(""));
        assert_eq!(nearest("qcow3", ["qcow", "qcow2"]), Some("qcow2"));
    }
}
