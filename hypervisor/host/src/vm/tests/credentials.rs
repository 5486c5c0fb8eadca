//! What the ends of a migration prove themselves with passes through the agent and stays nowhere.

use super::fake::Host;
use super::{prepare, receiving, sending};
use crate::vm::Command;
use godwit_wire::id::{MigrationId, VmId};
use godwit_wire::migration::{MigrationIdentity, MigrationToken};
use godwit_wire::vmm_api::{IncomingRequest, OutgoingRequest};
use std::path::Path;

const KEY: &str = "a-key-that-nobody-writes-down";
const TOKEN: &str = "a-token-that-nobody-writes-down";

pub(super) fn identity() -> MigrationIdentity {
    MigrationIdentity {
        authority_pem: "authority".into(),
        certificate_pem: "certificate".into(),
        key_pem: KEY.into(),
    }
}

pub(super) fn token() -> MigrationToken {
    MigrationToken(TOKEN.into())
}

/// How many files were searched.
fn assert_nowhere_below(directory: &Path) -> usize {
    let mut searched = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let (path, kind) = entry
            .map(|entry| (entry.path(), entry.file_type()))
            .unwrap();
        let kind = kind.unwrap();
        if kind.is_dir() {
            searched += assert_nowhere_below(&path);
        } else if kind.is_file() {
            let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
            assert!(
                !text.contains(KEY) && !text.contains(TOKEN),
                "{path:?} tells"
            );
            searched += 1;
        }
    }
    searched
}

#[tokio::test]
async fn the_target_gets_its_identity_and_the_agent_keeps_none_of_it() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    receiving(&mut host, vm).await;
    let told: IncomingRequest = serde_json::from_value(host.fakes.handover(vm)).unwrap();
    assert_eq!(told.identity, Some(identity()));
    assert!(assert_nowhere_below(host.registry.context().state.root()) > 0);
}

#[tokio::test]
async fn the_source_gets_token_and_identity_and_the_agent_keeps_none_of_it() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    sending(&mut host, vm).await;
    let told: OutgoingRequest = serde_json::from_value(host.fakes.handover(vm)).unwrap();
    assert_eq!((told.token, told.identity), (token(), Some(identity())));
    assert!(assert_nowhere_below(host.registry.context().state.root()) > 0);
}

#[tokio::test]
async fn a_prepared_target_tells_its_token_again_when_asked_with_another_certificate() {
    let host = Host::new().await;
    let vm = VmId::fresh();
    let ask = prepare(MigrationId::fresh(), 4, 7);
    let mut again = ask.clone();
    again.identity = Some(MigrationIdentity {
        certificate_pem: "another certificate".into(),
        ..identity()
    });
    let prepare = |ask| host.registry.ask(vm, |reply| Command::Prepare(ask, reply));
    let ready = prepare(ask).await.unwrap();
    assert_eq!(ready.token, token());
    assert_eq!(prepare(again).await.unwrap(), ready);
}

#[test]
fn a_command_in_a_log_shows_no_key() {
    let shown = format!("{:?}", prepare(MigrationId::fresh(), 1, 1));
    assert!(!shown.contains(KEY), "{shown}");
}
