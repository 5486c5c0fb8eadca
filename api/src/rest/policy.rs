//! What an operator asks of a migration, judged field by field.

use crate::resource::{Compression, MigrateDisks, MigrationPolicy, Verify};
use godwit_controller::model::DisksOnMove;
use godwit_wire::migration::{self, MAX_LANES};
use godwit_wire::problem::FieldProblem;

/// Most of its time that a vCPU can be kept from running; at 100 the guest would stand still for good.
const MAX_THROTTLE_PERCENT: u8 = 99;
/// A slower migration would never end.
const LEAST_BANDWIDTH_BYTES_PER_S: u64 = 1 << 20;

/// What becomes of disks that the target does not see: they stay unless it is asked that they move.
pub(super) fn disks_on_move(
    asked: Option<MigrateDisks>,
    pool: Option<String>,
) -> Result<DisksOnMove, FieldProblem> {
    match (asked, pool) {
        (Some(MigrateDisks::Along), pool) => Ok(DisksOnMove::Along { pool }),
        (None | Some(MigrateDisks::SharedOnly), None) => Ok(DisksOnMove::SharedOnly),
        (None | Some(MigrateDisks::SharedOnly), Some(pool)) => Err(FieldProblem::new(
            "disk_pool",
            format!("no disk moves into {pool}, because disks shall not move along"),
            "ask for `\"disks\": \"along\"` too, or leave the pool out",
        )),
    }
}

/// The policy with the usual values where nothing is asked, or everything that is wrong with it.
pub(super) fn migration_policy(
    asked: MigrationPolicy,
) -> Result<migration::MigrationPolicy, Vec<FieldProblem>> {
    let usual = migration::MigrationPolicy::default();
    let mut found = Vec::new();
    let policy = migration::MigrationPolicy {
        downtime_limit_ms: positive(
            &mut found,
            "downtime_limit_ms",
            asked.downtime_limit_ms,
            "allow the guest at least 1 ms, or leave it out for the usual limit",
        )
        .unwrap_or(usual.downtime_limit_ms),
        max_rounds: match asked.max_rounds {
            Some(0) => {
                found.push(FieldProblem::new(
                    "policy.max_rounds",
                    "0 is not more than 0",
                    "allow at least 1 round, or leave it out for the usual limit",
                ));
                usual.max_rounds
            }
            asked => asked.unwrap_or(usual.max_rounds),
        },
        verify: match asked.verify {
            None => usual.verify,
            Some(Verify::Frames) => migration::Verify::Frames,
            Some(Verify::WholeMemory) => migration::Verify::WholeMemory,
        },
        lanes: at_most(
            &mut found,
            "lanes",
            asked.lanes,
            MAX_LANES,
            "use fewer lanes, or leave it out and the source chooses",
        )
        .unwrap_or(usual.lanes),
        max_bandwidth_bytes_per_s: bandwidth(&mut found, asked.max_bandwidth_bytes_per_s),
        max_throttle_percent: at_most(
            &mut found,
            "max_throttle_percent",
            asked.max_throttle_percent,
            MAX_THROTTLE_PERCENT,
            "let the guest run for some of the time; 0 never slows it",
        )
        .unwrap_or(usual.max_throttle_percent),
        compression: match asked.compression {
            None => usual.compression,
            Some(Compression::Auto) => migration::Compression::Auto,
            Some(Compression::Off) => migration::Compression::Off,
        },
        post_copy: match (asked.allow_postcopy, asked.verify) {
            (None | Some(false), _) => migration::PostCopy::Forbidden,
            (Some(true), Some(Verify::WholeMemory)) => {
                found.push(FieldProblem::new(
                    "policy.allow_postcopy",
                    "a hash of all memory needs all of it before the hand-over",
                    "ask for one of the two: allow_postcopy, or verify whole_memory",
                ));
                migration::PostCopy::Forbidden
            }
            (Some(true), _) => migration::PostCopy::Allowed,
        },
        deadline_s: positive(
            &mut found,
            "deadline_s",
            asked.deadline_s,
            "allow at least 1 s, or leave it out for no deadline",
        ),
    };
    if found.is_empty() {
        Ok(policy)
    } else {
        Err(found)
    }
}

fn positive(
    found: &mut Vec<FieldProblem>,
    field: &str,
    asked: Option<u64>,
    remedy: &str,
) -> Option<u64> {
    if asked == Some(0) {
        let field = format!("policy.{field}");
        found.push(FieldProblem::new(field, "0 is not more than 0", remedy));
    }
    asked
}

/// Less than [`LEAST_BANDWIDTH_BYTES_PER_S`] would only keep the migration waiting.
fn bandwidth(found: &mut Vec<FieldProblem>, asked: Option<u64>) -> Option<u64> {
    if let Some(asked) = asked.filter(|asked| *asked < LEAST_BANDWIDTH_BYTES_PER_S) {
        found.push(FieldProblem::new(
            "policy.max_bandwidth_bytes_per_s",
            format!("{asked} is less than {LEAST_BANDWIDTH_BYTES_PER_S}"),
            "allow at least 1 MiB per second, or leave it out for no limit",
        ));
    }
    asked
}

fn at_most(
    found: &mut Vec<FieldProblem>,
    field: &str,
    asked: Option<u32>,
    most: u8,
    remedy: &str,
) -> Option<u8> {
    let asked = asked?;
    match u8::try_from(asked) {
        Ok(asked) if asked <= most => Some(asked),
        _ => {
            let problem = format!("{asked} is more than {most}");
            found.push(FieldProblem::new(
                format!("policy.{field}"),
                problem,
                remedy,
            ));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_asked_is_as_usual() {
        assert_eq!(
            migration_policy(MigrationPolicy::default()),
            Ok(migration::MigrationPolicy::default())
        );
    }

    #[test]
    fn disks_stay_unless_it_is_asked_that_they_move() {
        let pool = || Some("fast".to_owned());
        assert_eq!(disks_on_move(None, None), Ok(DisksOnMove::SharedOnly));
        assert_eq!(
            disks_on_move(Some(MigrateDisks::Along), pool()),
            Ok(DisksOnMove::Along { pool: pool() })
        );
        for stay in [None, Some(MigrateDisks::SharedOnly)] {
            let problem = disks_on_move(stay, pool()).expect_err("nothing would go there");
            assert_eq!(problem.field, "disk_pool");
        }
    }

    #[test]
    fn limits_that_are_just_within_reach_are_taken_as_they_are() {
        let asked = MigrationPolicy {
            downtime_limit_ms: Some(1),
            max_rounds: Some(3),
            verify: Some(Verify::WholeMemory),
            lanes: Some(16),
            max_bandwidth_bytes_per_s: Some(1 << 20),
            max_throttle_percent: Some(99),
            compression: Some(Compression::Off),
            allow_postcopy: Some(false),
            deadline_s: Some(1),
        };
        let policy = migration::MigrationPolicy {
            downtime_limit_ms: 1,
            max_rounds: 3,
            verify: migration::Verify::WholeMemory,
            lanes: 16,
            max_bandwidth_bytes_per_s: Some(1 << 20),
            max_throttle_percent: 99,
            compression: migration::Compression::Off,
            post_copy: migration::PostCopy::Forbidden,
            deadline_s: Some(1),
        };
        assert_eq!(migration_policy(asked), Ok(policy));
    }

    #[test]
    fn every_limit_out_of_reach_is_named_with_its_remedy() {
        let asked = MigrationPolicy {
            downtime_limit_ms: Some(0),
            lanes: Some(17),
            max_bandwidth_bytes_per_s: Some(1000),
            max_throttle_percent: Some(300),
            max_rounds: Some(0),
            verify: Some(Verify::WholeMemory),
            allow_postcopy: Some(true),
            deadline_s: Some(0),
            ..MigrationPolicy::default()
        };
        let found = migration_policy(asked).expect_err("mistakes");
        let told: String = found
            .iter()
            .map(|found| format!("{}: {}; {}\n", found.field, found.problem, found.remedy))
            .collect();
        expect_test::expect![[r#"
            policy.downtime_limit_ms: 0 is not more than 0; allow the guest at least 1 ms, or leave it out for the usual limit
            policy.max_rounds: 0 is not more than 0; allow at least 1 round, or leave it out for the usual limit
            policy.lanes: 17 is more than 16; use fewer lanes, or leave it out and the source chooses
            policy.max_bandwidth_bytes_per_s: 1000 is less than 1048576; allow at least 1 MiB per second, or leave it out for no limit
            policy.max_throttle_percent: 300 is more than 99; let the guest run for some of the time; 0 never slows it
            policy.allow_postcopy: a hash of all memory needs all of it before the hand-over; ask for one of the two: allow_postcopy, or verify whole_memory
            policy.deadline_s: 0 is not more than 0; allow at least 1 s, or leave it out for no deadline
        "#]]
        .assert_eq(&told);
    }
}
