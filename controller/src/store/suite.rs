//! What every engine must do; run by each engine's tests.

use super::*;
use std::time::Duration;

/// Runs everything on fresh, empty stores.
pub(super) fn run<S: Store>(mut fresh: impl FnMut() -> S) {
    an_empty_store_has_revision_zero(&fresh());
    a_value_reads_back_with_the_revision_that_wrote_it(&fresh());
    a_transaction_whose_compare_fails_writes_nothing(&fresh());
    only_one_of_two_writers_with_the_same_view_wins(&fresh());
    only_one_of_two_creators_of_a_key_wins(&fresh());
    a_list_holds_exactly_the_prefix_in_order(&fresh());
    a_transaction_without_writes_does_not_move_the_revision(&fresh());
    limits_are_refused_before_anything_is_written(&fresh());
    a_watch_tells_whole_transactions_in_order(&fresh());
    a_watch_wakes_when_something_is_written(fresh());
    a_watch_from_before_the_compaction_bound_is_told_so(&fresh());
}

/// Writes without conditions.
pub(super) fn put(store: &dyn Store, key: &str, value: &[u8]) -> Revision {
    committed(
        store,
        &Txn {
            compares: vec![],
            writes: vec![write(key, value)],
        },
    )
}

fn write(key: &str, value: &[u8]) -> Write {
    Write::Put {
        key: key.into(),
        value: value.into(),
    }
}

fn committed(store: &dyn Store, txn: &Txn) -> Revision {
    match store.txn(txn).unwrap() {
        TxnOutcome::Committed(revision) => revision,
        TxnOutcome::Conflict => panic!("unexpected conflict"),
    }
}

fn unchanged(key: &str, revision: Revision) -> Compare {
    Compare::Unchanged {
        key: key.into(),
        revision,
    }
}

fn an_empty_store_has_revision_zero(store: &dyn Store) {
    assert_eq!(store.revision().unwrap(), Revision(0));
    assert_eq!(store.get("a").unwrap(), None);
    assert_eq!(store.list("").unwrap(), (vec![], Revision(0)));
}

fn a_value_reads_back_with_the_revision_that_wrote_it(store: &dyn Store) {
    let first = put(store, "a", b"1");
    let second = put(store, "b", b"2");
    assert_eq!((first, second), (Revision(1), Revision(2)));
    let entry = store.get("a").unwrap().unwrap();
    assert_eq!(
        (entry.value.as_slice(), entry.revision),
        (b"1".as_slice(), first)
    );
    let third = committed(
        store,
        &Txn {
            compares: vec![],
            writes: vec![Write::Delete { key: "a".into() }],
        },
    );
    assert_eq!(third, Revision(3));
    assert_eq!(store.get("a").unwrap(), None);
}

fn a_transaction_whose_compare_fails_writes_nothing(store: &dyn Store) {
    let revision = put(store, "a", b"1");
    let txn = Txn {
        compares: vec![
            unchanged("a", revision),
            Compare::Absent { key: "a".into() },
        ],
        writes: vec![write("a", b"2"), write("b", b"2")],
    };
    assert_eq!(store.txn(&txn).unwrap(), TxnOutcome::Conflict);
    assert_eq!(store.get("a").unwrap().unwrap().value, b"1");
    assert_eq!(store.get("b").unwrap(), None);
    assert_eq!(store.revision().unwrap(), revision);
}

fn only_one_of_two_writers_with_the_same_view_wins(store: &dyn Store) {
    let seen = put(store, "owner", b"none");
    let claim = |who: &[u8]| Txn {
        compares: vec![unchanged("owner", seen)],
        writes: vec![write("owner", who)],
    };
    committed(store, &claim(b"first"));
    assert_eq!(store.txn(&claim(b"second")).unwrap(), TxnOutcome::Conflict);
    assert_eq!(store.get("owner").unwrap().unwrap().value, b"first");
    committed(
        store,
        &Txn {
            compares: vec![],
            writes: vec![Write::Delete {
                key: "owner".into(),
            }],
        },
    );
    assert_eq!(
        store.txn(&claim(b"third")).unwrap(),
        TxnOutcome::Conflict,
        "deleted is not unchanged"
    );
}

fn only_one_of_two_creators_of_a_key_wins(store: &dyn Store) {
    let create = Txn {
        compares: vec![Compare::Absent { key: "n".into() }],
        writes: vec![write("n", b"1")],
    };
    committed(store, &create);
    assert_eq!(store.txn(&create).unwrap(), TxnOutcome::Conflict);
}

fn a_list_holds_exactly_the_prefix_in_order(store: &dyn Store) {
    for key in ["vm/2", "vm/1", "vn/1", "vm", "vm/é", "host/1"] {
        put(store, key, key.as_bytes());
    }
    let (entries, revision) = store.list("vm/").unwrap();
    assert_eq!(
        entries.iter().map(|e| e.key.as_str()).collect::<Vec<_>>(),
        ["vm/1", "vm/2", "vm/é"]
    );
    assert_eq!(revision, Revision(6));
    assert_eq!(store.list("").unwrap().0.len(), 6);
}

fn a_transaction_without_writes_does_not_move_the_revision(store: &dyn Store) {
    let revision = put(store, "a", b"1");
    let check = Txn {
        compares: vec![unchanged("a", revision)],
        writes: vec![],
    };
    assert_eq!(committed(store, &check), revision);
    assert_eq!(store.revision().unwrap(), revision);
}

fn limits_are_refused_before_anything_is_written(store: &dyn Store) {
    let large = Txn {
        compares: vec![],
        writes: vec![write("a", &vec![0; MAX_VALUE_BYTES + 1])],
    };
    assert!(matches!(
        store.txn(&large),
        Err(StoreError::TooLarge { .. })
    ));
    let twice = Txn {
        compares: vec![],
        writes: vec![write("a", b"1"), Write::Delete { key: "a".into() }],
    };
    assert!(matches!(
        store.txn(&twice),
        Err(StoreError::WrittenTwice { .. })
    ));
    let long = Txn {
        compares: vec![],
        writes: vec![write(&"k".repeat(1_000), b"1")],
    };
    assert!(matches!(store.txn(&long), Err(StoreError::TooLarge { .. })));
    assert_eq!(store.revision().unwrap(), Revision(0));
}

fn a_watch_tells_whole_transactions_in_order(store: &dyn Store) {
    put(store, "a/1", b"1");
    let second = committed(
        store,
        &Txn {
            compares: vec![],
            writes: vec![write("a/2", b"2"), write("b/1", b"2")],
        },
    );
    let third = committed(
        store,
        &Txn {
            compares: vec![],
            writes: vec![Write::Delete { key: "a/1".into() }],
        },
    );
    let Watched::Changes(changes) = store.watch("a/", Revision(1), Duration::ZERO).unwrap() else {
        panic!("compacted")
    };
    assert_eq!(
        changes
            .iter()
            .map(|c| (c.revision, c.key()))
            .collect::<Vec<_>>(),
        [(second, "a/2"), (third, "a/1")]
    );
}

fn a_watch_wakes_when_something_is_written(store: impl Store) {
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            store
                .watch("a", Revision(0), Duration::from_secs(30))
                .unwrap()
        });
        put(&store, "b", b"0");
        put(&store, "a", b"1");
        let Watched::Changes(changes) = waiting.join().unwrap() else {
            panic!("compacted")
        };
        assert_eq!(changes.len(), 1);
    });
}

fn a_watch_from_before_the_compaction_bound_is_told_so(store: &dyn Store) {
    for _ in 0..3 {
        put(store, "a", b"1");
    }
    store.compact(Revision(2)).unwrap();
    let oldest = Revision(2);
    assert_eq!(
        store.watch("", Revision(1), Duration::ZERO).unwrap(),
        Watched::Compacted { oldest }
    );
    assert!(
        matches!(store.watch("", oldest, Duration::ZERO).unwrap(), Watched::Changes(c) if c.len() == 1)
    );
    assert_eq!(
        store.get("a").unwrap().unwrap().revision,
        Revision(3),
        "values outlive their history"
    );
}

#[test]
fn memory_keeps_the_contract() {
    run(memory::MemoryStore::new);
}
