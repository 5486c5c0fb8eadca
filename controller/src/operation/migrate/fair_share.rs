//! Keeping a migration that runs to its share of what hosts and links may carry. The share changes with every migration
//! that begins or ends beside it and with the operator's limits; the source is told when it does.

use super::bounded;
use super::drive::status;
use crate::model::Migration;
use crate::operation::context::{Context, LAST_PAUSE};
use crate::plan::fairness::share;
use godwit_wire::migration::MigrationPhase;
use godwit_wire::vmm_api::MigrationBandwidth;
use std::convert::Infallible;

/// Bytes per second that a source may send; `None` without a limit.
type Share = Option<u64>;

/// Tells the source its share, and whenever that changes, as long as it sends; never ends. What it was told when it
/// began says nothing: repeated after a restart of the server, that was not heeded.
pub(super) async fn keep_to_share(context: &Context<'_>, migration: &Migration) -> Infallible {
    let mut told: Option<Share> = None;
    loop {
        let changed = context.core.until(|view| {
            let sends = status(view, migration.source, migration).is_some_and(|status| {
                matches!(
                    status.phase,
                    MigrationPhase::PreCopy | MigrationPhase::PostCopy
                )
            });
            if !sends {
                return None;
            }
            let share = share(view, migration);
            (told != Some(share)).then_some(share)
        });
        let share = changed.await;
        let command = MigrationBandwidth {
            migration: migration.id,
            epoch: migration.epoch,
            max_bytes_per_s: share,
        };
        let answer = match context.core.address(migration.source) {
            Some(source) => {
                let driver = &context.core.driver;
                bounded(driver.set_migration_bandwidth(source, migration.vm, &command)).await
            }
            None => Err("its host is gone".to_owned()),
        };
        match answer {
            Ok(()) => told = Some(share),
            Err(error) => {
                tracing::debug!(migration = %migration.id, error, "the source was not told its share yet");
                tokio::time::sleep(LAST_PAUSE).await;
            }
        }
    }
}
