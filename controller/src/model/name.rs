//! Names of VMs and hosts.

use godwit_wire::problem::FieldProblem;

/// Longest name: fits a DNS label, so that it can become a guest's host name.
pub const MAX_NAME_BYTES: usize = 63;

/// Judges a name: `[a-z0-9]` followed by up to 62 of `[a-z0-9.-]`, and not the text of a UUID, because paths
/// accept a name or an id in the same place.
pub fn problem(field: &str, name: &str) -> Option<FieldProblem> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let well_formed = name.len() <= MAX_NAME_BYTES
        && name.bytes().next().is_some_and(plain)
        && name
            .bytes()
            .all(|byte| plain(byte) || byte == b'.' || byte == b'-');
    if !well_formed {
        return Some(FieldProblem::new(
            field,
            format!("{name:?} is not a name"),
            "use 1 to 63 characters out of a-z, 0-9, '.' and '-', the first a letter or a digit",
        ));
    }
    uuid::Uuid::parse_str(name).ok().map(|_| {
        FieldProblem::new(
            field,
            format!("{name} reads like an id"),
            "choose a name that is not a UUID",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::problem;

    #[test]
    fn names_that_fit_a_dns_label_are_accepted_and_others_are_not() {
        let longest = "a".repeat(63);
        for good in ["a", "web-1", "0.db.example", &longest] {
            assert!(problem("name", good).is_none(), "{good}");
        }
        let too_long = "a".repeat(64);
        for bad in [
            "",
            "-a",
            ".a",
            "A",
            "a_b",
            "ä",
            "a b",
            &too_long,
            "0192f0c1-7a0e-7000-8000-000000000000",
        ] {
            assert!(problem("name", bad).is_some(), "{bad}");
        }
    }
}
