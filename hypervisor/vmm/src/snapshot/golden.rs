//! Snapshots of every released version are read for ever, and what is written now is what that version's program reads:
//! a field may be added, none may go or change.
//!
//! `golden/snapshot-v1` is a machine of two vCPUs with a disk, a balloon and a source of randomness, running the pilot.

use super::manifest::{FileSeal, Manifest, SnapshotError};
use super::save::piece_checksum;
use crate::machine::SavedMachine;
use ciborium::Value;

const MANIFEST: &[u8] = include_bytes!("../../golden/snapshot-v1/manifest.json");
const STATE: &[u8] = include_bytes!("../../golden/snapshot-v1/state.cbor");

/// Fields that version 1 has got since its first release; programs that do not know them pass over them.
const ADDED: [&str; 1] = ["manifest.memory_file"];
/// What depends on the rest of the file.
const DERIVED: [&str; 1] = ["seal"];

/// Where `written` is not what `golden` is, as paths.
fn differences(golden: &Value, written: &Value, path: &str, found: &mut Vec<String>) {
    match (golden, written) {
        (Value::Map(golden), Value::Map(written)) => {
            let get = |map: &[(Value, Value)], key: &Value| {
                map.iter()
                    .find(|(name, _)| name == key)
                    .map(|(_, value)| value.clone())
            };
            let at = |key: &Value| {
                let key = key.as_text().unwrap_or("?");
                match path {
                    "" => key.to_owned(),
                    _ => format!("{path}.{key}"),
                }
            };
            for (key, value) in golden {
                match get(written, key) {
                    Some(now) => differences(value, &now, &at(key), found),
                    None => found.push(format!("{} is gone", at(key))),
                }
            }
            for (key, _) in written {
                if get(golden, key).is_none() && !ADDED.contains(&at(key).as_str()) {
                    found.push(format!("{} is new", at(key)));
                }
            }
        }
        (Value::Array(golden), Value::Array(written)) if golden.len() == written.len() => {
            for (index, (golden, written)) in golden.iter().zip(written).enumerate() {
                differences(golden, written, &format!("{path}[{index}]"), found);
            }
        }
        (golden, written) if golden == written || DERIVED.contains(&path) => {}
        _ => found.push(format!("{path} is another")),
    }
}

fn assert_same(golden: &Value, written: &Value) {
    let mut found = Vec::new();
    differences(golden, written, "", &mut found);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_manifest_of_version_1_is_read_and_written() {
    let manifest = Manifest::decode(MANIFEST).unwrap();
    assert_eq!(
        (manifest.version, manifest.spec.vcpus, manifest.memory_bytes),
        (1, 2, 64 << 20)
    );
    assert_eq!(manifest.state, FileSeal::of(STATE));
    let values = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
    assert_same(&values(MANIFEST), &values(&manifest.encode().unwrap()));
}

#[test]
fn the_machine_of_version_1_is_read_and_written() {
    let machine: SavedMachine = ciborium::from_reader(STATE).unwrap();
    let mut written = Vec::new();
    ciborium::into_writer(&machine, &mut written).unwrap();
    let values = |bytes: &[u8]| ciborium::from_reader::<Value, _>(bytes).unwrap();
    assert_same(&values(STATE), &values(&written));
}

#[test]
fn a_field_that_a_later_program_added_is_passed_over() {
    let text = std::str::from_utf8(MANIFEST).unwrap();
    let (head, _) = text.split_once("},\"seal\":").unwrap();
    let inner = format!(
        "{},\"later\":{{\"x\":1}}}}",
        &head["{\"manifest\":".len()..]
    );
    let seal = super::manifest::checksum(inner.as_bytes());
    let later = format!("{{\"manifest\":{inner},\"seal\":\"{seal}\"}}");
    assert_eq!(
        Manifest::decode(later.as_bytes()).unwrap(),
        Manifest::decode(MANIFEST).unwrap()
    );
    let edited = later.replace("\"later\":{\"x\":1}", "\"later\":{\"x\":2}");
    assert!(Manifest::decode(edited.as_bytes()).is_err());
}

#[test]
fn a_manifest_of_another_version_is_refused_by_its_number() {
    let text = std::str::from_utf8(MANIFEST).unwrap();
    let (head, _) = text.split_once(",\"seal\":").unwrap();
    let inner = &head["{\"manifest\":".len()..];
    assert_eq!(inner.matches("\"version\":1,").count(), 1, "{inner}");
    for other in [0, 2] {
        let inner = inner.replace("\"version\":1,", &format!("\"version\":{other},"));
        let seal = super::manifest::checksum(inner.as_bytes());
        let sealed = format!("{{\"manifest\":{inner},\"seal\":\"{seal}\"}}");
        let refused = Manifest::decode(sealed.as_bytes());
        assert!(
            matches!(refused, Err(SnapshotError::Version { found }) if found == other),
            "{refused:?}"
        );
    }
}

#[test]
fn a_change_of_the_format_is_noticed() {
    let machine: Value = ciborium::from_reader(STATE).unwrap();
    let mut changed = machine.clone();
    let Value::Map(fields) = &mut changed else {
        panic!("the state is a map");
    };
    fields.retain(|(key, _)| key.as_text() != Some("serial"));
    fields.push((Value::Text("extra".into()), Value::Null));
    let mut found = Vec::new();
    differences(&machine, &changed, "", &mut found);
    assert_eq!(found, ["serial is gone", "extra is new"]);
}

#[test]
fn checksums_of_memory_are_xxh3_128_and_zero_for_zeros() {
    let hex = |piece: &[u8]| {
        let sum = piece_checksum(piece);
        sum.map(|byte| format!("{byte:02x}")).concat()
    };
    assert_eq!(hex(&[0; 4096]), "0".repeat(32));
    assert_eq!(hex(&[1; 4096]), "d8fc4d31a9d8d440556a649ec73d6d78");
}
