//! What the check reports.

use crate::cli::Table;

/// One guest during one half of the check.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Row {
    pub(super) vm: String,
    pub(super) from: String,
    pub(super) to: String,
    /// Figures of the migration; `None` when the guest stayed.
    pub(super) moved: Option<Moved>,
    /// Longest time the guest's own clock ticks stood still.
    pub(super) blackout_us: u64,
    pub(super) verified: bool,
}

/// Figures of one migration.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Moved {
    pub(super) rounds: u32,
    pub(super) sent_bytes: u64,
    pub(super) total_ms: u64,
    /// As the source measured it.
    pub(super) downtime_us: Option<u64>,
}

/// The rows as a table.
pub(super) fn text(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "VM",
        "FROM",
        "TO",
        ">ROUNDS",
        ">MIB",
        ">TOTAL S",
        ">DOWNTIME MS (SOURCE)",
        ">BLACKOUT MS (GUEST)",
        "VERIFIED",
    ]);
    let ms = |us: u64| format!("{:.1}", us as f64 / 1_000.0);
    for row in rows {
        let figure =
            |show: fn(&Moved) -> String| row.moved.as_ref().map_or_else(|| "-".to_owned(), show);
        table.row([
            row.vm.clone(),
            row.from.clone(),
            if row.moved.is_some() {
                row.to.clone()
            } else {
                "stayed".to_owned()
            },
            figure(|moved| moved.rounds.to_string()),
            figure(|moved| format!("{:.1}", moved.sent_bytes as f64 / f64::from(1 << 20))),
            figure(|moved| format!("{:.2}", moved.total_ms as f64 / 1_000.0)),
            figure(|moved| {
                moved.downtime_us.map_or_else(
                    || "?".to_owned(),
                    |us| format!("{:.1}", us as f64 / 1_000.0),
                )
            }),
            ms(row.blackout_us),
            if row.verified { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn the_report_shows_who_moved_who_stayed_and_what_it_cost() {
        let moved = Moved {
            rounds: 3,
            sent_bytes: 9_437_184,
            total_ms: 412,
            downtime_us: Some(8_312),
        };
        let rows = [
            Row {
                vm: "web-1".into(),
                from: "host-1".into(),
                to: "host-2".into(),
                moved: Some(moved),
                blackout_us: 10_200,
                verified: true,
            },
            Row {
                vm: "batch-1".into(),
                from: "host-3".into(),
                to: "host-3".into(),
                verified: false,
                ..Row::default()
            },
        ];
        expect![[r#"
            VM       FROM    TO      ROUNDS  MIB  TOTAL S  DOWNTIME MS (SOURCE)  BLACKOUT MS (GUEST)  VERIFIED
            web-1    host-1  host-2       3  9.0     0.41                   8.3                 10.2  yes
            batch-1  host-3  stayed       -    -        -                     -                  0.0  NO
        "#]]
        .assert_eq(&text(&rows));
    }
}
