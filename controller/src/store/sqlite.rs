//! The engine for one server: one SQLite file beside it.
//!
//! WAL with `synchronous=FULL`: a transaction is one write and one `fsync`, and what was reported as committed
//! survives the loss of power. The file is locked exclusively, so a second server on the same state directory
//! cannot start. History for watchers is kept in memory: after a restart a watcher lists again.

use super::contract::{
    Compare, Entry, Revision, Store, StoreError, Txn, TxnOutcome, Watched, Write,
};
use super::history::History;
use rusqlite::{
    Connection, ErrorCode, OptionalExtension, Transaction, TransactionBehavior, params,
};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Newest schema this program knows; entry `n` of [`MIGRATIONS`] leads from version `n` to `n + 1`.
const SCHEMA_VERSION: u32 = MIGRATIONS.len() as u32;
const MIGRATIONS: [&str; 1] = [
    "CREATE TABLE entries (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL) STRICT;
     CREATE TABLE counters (name TEXT PRIMARY KEY NOT NULL, value INTEGER NOT NULL) STRICT;
     INSERT INTO counters (name, value) VALUES ('revision', 0);",
];

/// See the module.
#[derive(Debug)]
pub struct SqliteStore {
    connection: Mutex<Connection>,
    history: History,
    path: PathBuf,
}

fn engine<E: std::error::Error + Send + Sync + 'static>(
    action: &'static str,
) -> impl FnOnce(E) -> StoreError {
    move |source| StoreError::Engine {
        action,
        source: Box::new(source),
    }
}

impl SqliteStore {
    /// Opens the file, creating it and bringing its schema up to date as needed.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut connection = Connection::open(path).map_err(engine("open its file"))?;
        configure(&mut connection).map_err(|error| in_use(path, error))?;
        migrate(&mut connection)?;
        let revision = read_revision(&connection)?;
        tracing::info!(path = %path.display(), %revision, "store opened");
        let history = History::after(revision);
        Ok(Self {
            connection: Mutex::new(connection),
            history,
            path: path.to_owned(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // An unfinished transaction is rolled back when its guard is dropped, also by a panic.
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn configure(connection: &mut Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(Duration::from_secs(1))?;
    connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // Takes the exclusive lock now instead of at the first write.
    connection.execute_batch("BEGIN IMMEDIATE; COMMIT;")
}

fn in_use(path: &Path, error: rusqlite::Error) -> StoreError {
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::InUse {
            path: path.to_owned(),
        },
        _ => engine("set up its file")(error),
    }
}

fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let action = "bring its schema up to date";
    let found: u32 = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(engine(action))?;
    if found > SCHEMA_VERSION {
        return Err(StoreError::NewerSchema {
            found,
            known: SCHEMA_VERSION,
        });
    }
    for (version, statements) in MIGRATIONS.iter().enumerate().skip(found as usize) {
        let txn = connection.transaction().map_err(engine(action))?;
        txn.execute_batch(statements).map_err(engine(action))?;
        txn.pragma_update(None, "user_version", version as u32 + 1)
            .map_err(engine(action))?;
        txn.commit().map_err(engine(action))?;
    }
    Ok(())
}

fn read_revision(connection: &Connection) -> Result<Revision, StoreError> {
    connection
        .prepare_cached("SELECT value FROM counters WHERE name = 'revision'")
        .and_then(|mut query| query.query_row([], |row| row.get::<_, i64>(0)))
        .map(|revision| Revision(revision.unsigned_abs()))
        .map_err(engine("read its revision"))
}

fn holds(txn: &Transaction<'_>, compare: &Compare) -> rusqlite::Result<bool> {
    let written = |key: &str| -> rusqlite::Result<Option<i64>> {
        txn.prepare_cached("SELECT revision FROM entries WHERE key = ?1")?
            .query_row([key], |row| row.get(0))
            .optional()
    };
    Ok(match compare {
        Compare::Absent { key } => written(key)?.is_none(),
        Compare::Unchanged { key, revision } => written(key)? == Some(revision.0.cast_signed()),
    })
}

fn apply(txn: &Transaction<'_>, writes: &[Write], revision: Revision) -> rusqlite::Result<()> {
    let revision = revision.0.cast_signed();
    for write in writes {
        match write {
            Write::Put { key, value } => txn
                .prepare_cached(
                    "INSERT INTO entries (key, value, revision) VALUES (?1, ?2, ?3)
                     ON CONFLICT (key) DO UPDATE SET value = excluded.value, revision = excluded.revision",
                )?
                .execute(params![key, value, revision])?,
            Write::Delete { key } => txn.prepare_cached("DELETE FROM entries WHERE key = ?1")?.execute([key])?,
        };
    }
    txn.prepare_cached("UPDATE counters SET value = ?1 WHERE name = 'revision'")?
        .execute([revision])?;
    Ok(())
}

impl Store for SqliteStore {
    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let connection = self.connection();
        connection
            .prepare_cached("SELECT value, revision FROM entries WHERE key = ?1")
            .and_then(|mut query| {
                query
                    .query_row([key], |row| {
                        let revision = Revision(row.get::<_, i64>(1)?.unsigned_abs());
                        Ok(Entry {
                            key: key.to_owned(),
                            value: row.get(0)?,
                            revision,
                        })
                    })
                    .optional()
            })
            .map_err(engine("read an entry"))
    }

    fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        let connection = self.connection();
        let revision = read_revision(&connection)?;
        let read = || -> rusqlite::Result<Vec<Entry>> {
            let mut query = connection.prepare_cached(
                "SELECT key, value, revision FROM entries WHERE key >= ?1 AND substr(key, 1, ?2) = ?1 ORDER BY key",
            )?;
            let characters = prefix.chars().count().cast_signed() as i64;
            query
                .query_map(params![prefix, characters], |row| {
                    let revision = Revision(row.get::<_, i64>(2)?.unsigned_abs());
                    Ok(Entry {
                        key: row.get(0)?,
                        value: row.get(1)?,
                        revision,
                    })
                })?
                .collect()
        };
        Ok((read().map_err(engine("list entries"))?, revision))
    }

    fn txn(&self, txn: &Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let mut connection = self.connection();
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(engine("begin a transaction"))?;
        for compare in &txn.compares {
            if !holds(&transaction, compare).map_err(engine("compare"))? {
                return Ok(TxnOutcome::Conflict);
            }
        }
        let present = read_revision(&transaction)?;
        if txn.writes.is_empty() {
            return Ok(TxnOutcome::Committed(present));
        }
        let revision = Revision(present.0 + 1);
        apply(&transaction, &txn.writes, revision).map_err(engine("write"))?;
        transaction.commit().map_err(engine("commit"))?;
        // Still under the connection's lock, so that history grows in the order of revisions.
        self.history.push(revision, &txn.writes);
        Ok(TxnOutcome::Committed(revision))
    }

    fn watch(&self, prefix: &str, after: Revision, wait: Duration) -> Result<Watched, StoreError> {
        Ok(self.history.watch(prefix, after, wait))
    }

    fn compact(&self, upto: Revision) -> Result<(), StoreError> {
        self.history.compact(upto);
        Ok(())
    }

    fn revision(&self) -> Result<Revision, StoreError> {
        read_revision(&self.connection())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::suite;

    #[test]
    fn sqlite_keeps_the_contract() {
        let directory = tempfile::tempdir().unwrap();
        let mut number = 0;
        suite::run(|| {
            number += 1;
            SqliteStore::open(&directory.path().join(format!("{number}.db"))).unwrap()
        });
    }

    #[test]
    fn what_was_committed_is_there_after_reopening_and_history_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.db");
        let store = SqliteStore::open(&path).unwrap();
        let revision = suite::put(&store, "a", b"1");
        drop(store);
        let store = SqliteStore::open(&path).unwrap();
        assert_eq!(store.get("a").unwrap().unwrap().value, b"1");
        assert_eq!(store.revision().unwrap(), revision);
        assert_eq!(
            store.watch("", Revision(0), Duration::ZERO).unwrap(),
            Watched::Compacted { oldest: revision }
        );
    }

    #[test]
    fn a_second_server_on_the_same_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.db");
        let _first = SqliteStore::open(&path).unwrap();
        assert!(matches!(
            SqliteStore::open(&path),
            Err(StoreError::InUse { .. })
        ));
    }

    #[test]
    fn a_file_of_a_newer_version_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.db");
        drop(SqliteStore::open(&path).unwrap());
        let connection = Connection::open(&path).unwrap();
        connection
            .pragma_update(None, "user_version", SCHEMA_VERSION + 1)
            .unwrap();
        drop(connection);
        assert!(matches!(
            SqliteStore::open(&path),
            Err(StoreError::NewerSchema { .. })
        ));
    }

    #[test]
    #[ignore = "a measurement: cargo nextest run -p godwit-controller --run-ignored only --no-capture commit"]
    fn time_of_a_commit_transaction() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let store = SqliteStore::open(&directory.path().join("store.db")).unwrap();
        let (mut vm, mut migration) = (
            suite::put(&store, "vm/1", &[0; 900]),
            suite::put(&store, "mig/1", &[0; 900]),
        );
        let mut times: Vec<Duration> = (0..500)
            .map(|round: u32| {
                let value = vec![round as u8; 900];
                let writes = [
                    "vm/1".to_owned(),
                    "mig/1".to_owned(),
                    format!("event/{round:020}"),
                ];
                let txn = Txn {
                    compares: vec![
                        Compare::Unchanged {
                            key: "vm/1".into(),
                            revision: vm,
                        },
                        Compare::Unchanged {
                            key: "mig/1".into(),
                            revision: migration,
                        },
                    ],
                    writes: writes
                        .into_iter()
                        .map(|key| Write::Put {
                            key,
                            value: value.clone(),
                        })
                        .collect(),
                };
                let begun = std::time::Instant::now();
                let TxnOutcome::Committed(revision) = store.txn(&txn).unwrap() else {
                    panic!("conflict")
                };
                (vm, migration) = (revision, revision);
                begun.elapsed()
            })
            .collect();
        times.sort();
        println!(
            "commit transaction: p50 {:?} p99 {:?} max {:?}",
            times[250], times[495], times[499]
        );
    }
}
