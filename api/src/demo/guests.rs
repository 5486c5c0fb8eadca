//! The demo's six guests: small and idle to large and busy.

use super::DemoError;
use super::shell::Shell;
use crate::cli::Table;
use crate::client::{Client, StreamItem};
use crate::resource::{
    Boot, CpuBaseline, CreateVm, Event, LeasePolicy, List, MachineSpec, MachineType,
    OperationState, Vm, VmAccepted, VmMaintenancePolicy,
};
use futures_util::future::try_join_all;
use pilot::{Dirtying, Filled};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// How long all guests may take to run.
const GUESTS_START: Duration = Duration::from_secs(30);

/// What a guest is and does.
#[derive(Clone, Copy, Debug)]
struct Role {
    name: &'static str,
    vcpus: u8,
    memory_mib: u64,
    /// Memory it fills with provable content.
    fill_mib: u64,
    /// How fast it rewrites memory.
    dirty_mib_per_s: u64,
    /// How much of it.
    working_set_mib: u64,
}

const ROLES: [Role; 6] = [
    Role {
        name: "web-1",
        vcpus: 1,
        memory_mib: 32,
        fill_mib: 8,
        dirty_mib_per_s: 0,
        working_set_mib: 0,
    },
    Role {
        name: "web-2",
        vcpus: 1,
        memory_mib: 48,
        fill_mib: 16,
        dirty_mib_per_s: 1,
        working_set_mib: 2,
    },
    Role {
        name: "api-1",
        vcpus: 2,
        memory_mib: 64,
        fill_mib: 24,
        dirty_mib_per_s: 2,
        working_set_mib: 4,
    },
    Role {
        name: "cache-1",
        vcpus: 1,
        memory_mib: 96,
        fill_mib: 48,
        dirty_mib_per_s: 8,
        working_set_mib: 8,
    },
    Role {
        name: "db-1",
        vcpus: 2,
        memory_mib: 128,
        fill_mib: 64,
        dirty_mib_per_s: 4,
        working_set_mib: 16,
    },
    Role {
        name: "batch-1",
        vcpus: 1,
        memory_mib: 192,
        fill_mib: 96,
        dirty_mib_per_s: 6,
        working_set_mib: 12,
    },
];

/// A guest that runs and whose shell answers.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) id: Uuid,
    pub(super) name: &'static str,
    pub(super) shell: Shell,
    role: Role,
    host: String,
}

impl Guest {
    /// Asks the guest; says which guest when that fails.
    pub(super) async fn ask<T: std::str::FromStr<Err = pilot::ReplyError>>(
        &mut self,
        command: &str,
    ) -> Result<T, DemoError> {
        self.shell
            .ask(command)
            .await
            .map_err(|source| DemoError::Guest {
                vm: self.name.to_owned(),
                source,
            })
    }
}

/// Creates the VMs, spread over the hosts, and waits until all run.
pub(super) async fn create(client: &Client, hosts: u8) -> Result<Vec<Vm>, DemoError> {
    let now: List<Event> = client
        .get("/v1/events?limit=1")
        .await
        .map_err(DemoError::api("reading the revision"))?;
    let known: List<Vm> = client
        .list("/v1/vms")
        .await
        .map_err(DemoError::api("listing the VMs"))?;
    let mut starting = BTreeMap::new();
    for (role, number) in ROLES.iter().zip((1..=hosts).cycle()) {
        // A directory that was used before has them already.
        if let Some(vm) = known.items.iter().find(|vm| vm.name == role.name) {
            starting.insert(vm.id, None);
            continue;
        }
        let body = CreateVm {
            name: role.name.to_owned(),
            spec: Some(MachineSpec {
                machine_type: MachineType::Godwit2,
                vcpus: role.vcpus,
                memory_mib: role.memory_mib,
                boot: Boot::Pilot,
                cpu: CpuBaseline::V2,
            }),
            template: None,
            disks: Vec::new(),
            nics: Vec::new(),
            cloud_init: None,
            vsock: None,
            console: Default::default(),
            memory_backing: Default::default(),
            start: true,
            host: Some(format!("host-{number}")),
            lease: LeasePolicy::Watched,
            maintenance_policy: VmMaintenancePolicy::Migrate,
            post_copy: Default::default(),
        };
        let accepted: VmAccepted = client
            .post("/v1/vms", &body)
            .await
            .map_err(DemoError::api(format!("creating {}", role.name)))?;
        starting.insert(
            accepted.vm.id,
            accepted.operation.map(|operation| operation.id),
        );
    }
    match tokio::time::timeout(
        GUESTS_START,
        wait_until_running(client, now.revision, starting),
    )
    .await
    {
        Ok(vms) => vms,
        Err(_) => Err(DemoError::TooSlow {
            what: "the start of all guests".to_owned(),
            limit_s: GUESTS_START.as_secs(),
        }),
    }
}

async fn wait_until_running(
    client: &Client,
    revision: u64,
    starting: BTreeMap<Uuid, Option<Uuid>>,
) -> Result<Vec<Vm>, DemoError> {
    let mut running: BTreeMap<Uuid, Vm> = BTreeMap::new();
    let mut follow = client.follow(revision);
    while running.len() < starting.len() {
        match follow
            .next()
            .await
            .map_err(DemoError::api("following the start of the guests"))?
        {
            StreamItem::Vm(vm)
                if starting.contains_key(&vm.id)
                    && vm.state == crate::resource::VmState::Running =>
            {
                running.insert(vm.id, *vm);
            }
            StreamItem::Operation(operation)
                if operation.state == OperationState::Failed
                    && starting.values().any(|id| *id == Some(operation.id)) =>
            {
                if let Some(problem) = operation.error {
                    let action = format!("starting {}", operation.subject.name);
                    return Err(DemoError::api(action)(problem.into()));
                }
            }
            _ => {}
        }
    }
    Ok(running.into_values().collect())
}

/// Fills the guests' memory and lets them rewrite it.
pub(super) async fn put_to_work(client: &Client, vms: Vec<Vm>) -> Result<Vec<Guest>, DemoError> {
    let working = vms.into_iter().filter_map(|vm| {
        let role = *ROLES.iter().find(|role| role.name == vm.name)?;
        Some(put_one_to_work(client, vm, role))
    });
    let mut guests = try_join_all(working).await?;
    guests.sort_by_key(|guest| guest.role.memory_mib);
    Ok(guests)
}

async fn put_one_to_work(client: &Client, vm: Vm, role: Role) -> Result<Guest, DemoError> {
    let attached = Shell::attach(client, &vm.id.to_string()).await;
    let shell = attached.map_err(|source| DemoError::Guest {
        vm: vm.name.clone(),
        source,
    })?;
    let host = vm.host_name.unwrap_or_default();
    let mut guest = Guest {
        id: vm.id,
        name: role.name,
        shell,
        role,
        host,
    };
    guest
        .ask::<Filled>(&format!("fill {}", role.fill_mib))
        .await?;
    if role.dirty_mib_per_s > 0 {
        guest
            .ask::<Dirtying>(&format!(
                "dirty {} {}",
                role.dirty_mib_per_s, role.working_set_mib
            ))
            .await?;
    }
    Ok(guest)
}

/// Shows what runs where.
pub(super) fn print(guests: &[Guest]) {
    let mut table = Table::new(&[
        "VM",
        "HOST",
        ">VCPUS",
        ">MEMORY MIB",
        ">FILLED MIB",
        ">DIRTIES MIB/S",
    ]);
    for Guest { role, host, .. } in guests {
        table.row([
            role.name.to_owned(),
            host.clone(),
            role.vcpus.to_string(),
            role.memory_mib.to_string(),
            role.fill_mib.to_string(),
            role.dirty_mib_per_s.to_string(),
        ]);
    }
    print!("\n{table}");
}
