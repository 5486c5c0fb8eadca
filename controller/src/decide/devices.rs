//! Devices as operators ask for them, made into what hosts are told: disks that exist or are to be made, cards with
//! addresses.

use super::storage::{disk_name_is_free, plan_disk, record, room_for_disks};
use crate::intent::{NewDevices, NewDiskSource, NewNic, NewVmDisk, NicAddress};
use crate::ledger::Draft;
use crate::model::{Disk, DiskState, Network, Vm, name};
use crate::view::View;
use godwit_wire::devices::{DiskAccess, DiskSource, MacAddress, Nic, NicAttach};
use godwit_wire::id::{DiskId, NetworkId};
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::storage::DiskOrigin;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// Writes `asked` into the VM's machine; gives the records of disks that are to be made.
pub(super) fn apply(
    view: &View,
    draft: &Draft<'_>,
    vm: &mut Vm,
    asked: &NewDevices,
) -> Result<Vec<Disk>, Problem> {
    let mut problems = Vec::new();
    let mut new_disks = Vec::new();
    if let Some(disks) = &asked.disks {
        let mut made = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            match self::disk(view, draft, vm, disk, index, &mut new_disks) {
                Ok(disk) => made.push(disk),
                Err(problem) => problems.push(at(&format!("disks[{index}]"), problem)),
            }
        }
        vm.spec.devices.disks = made;
    }
    if let Some(nics) = &asked.nics {
        let mut cards = Cards::new(view, vm);
        let mut made = Vec::new();
        for (index, nic) in nics.iter().enumerate() {
            match cards.card(nic, index) {
                Ok(nic) => made.push(nic),
                Err(problem) => problems.push(at(&format!("nics[{index}]"), problem)),
            }
        }
        vm.spec.devices.nics = made;
    }
    if let Some(asked) = &asked.cloud_init {
        let mut seed = asked.clone();
        if seed.instance_id.is_empty() {
            // The guest is set up anew only when the operator says so.
            let before = vm.spec.devices.cloud_init.as_ref();
            seed.instance_id =
                before.map_or_else(|| vm.id.to_string(), |before| before.instance_id.clone());
        }
        if seed.hostname.is_empty() {
            seed.hostname.clone_from(&vm.name);
        }
        vm.spec.devices.cloud_init = Some(seed);
    }
    if asked.vsock.is_some() {
        vm.spec.devices.vsock = asked.vsock;
    }
    if let Some(console) = asked.console {
        vm.spec.devices.console = console;
    }
    if let Some(backing) = asked.memory_backing {
        vm.spec.devices.memory_backing = backing;
    }
    if !problems.is_empty() {
        return Err(Problem::invalid(problems));
    }
    for (index, disk) in new_disks.iter().enumerate() {
        disk_name_is_free(view, &disk.name)?;
        if new_disks[..index]
            .iter()
            .any(|other| other.name == disk.name)
        {
            let detail = format!("two disks would be called {}", disk.name);
            return Err(Problem::conflict("name-taken", detail)
                .with_remedy("give the VM's disks different names"));
        }
    }
    room_for_disks(view, new_disks.len())?;
    Ok(new_disks)
}

fn at(path: &str, problem: FieldProblem) -> FieldProblem {
    FieldProblem {
        field: format!("{path}.{}", problem.field),
        ..problem
    }
}

/// The path of a device's field is the same whether the machine or the request names it.
pub(super) fn in_request(mut problem: FieldProblem) -> FieldProblem {
    for device in [
        "disks",
        "nics",
        "cloud_init",
        "vsock",
        "console",
        "memory_backing",
    ] {
        if let Some(rest) = problem.field.strip_prefix("spec.")
            && rest.starts_with(device)
        {
            problem.field = rest.to_owned();
            break;
        }
    }
    problem
}

fn disk(
    view: &View,
    draft: &Draft<'_>,
    vm: &Vm,
    asked: &NewVmDisk,
    index: usize,
    new_disks: &mut Vec<Disk>,
) -> Result<godwit_wire::devices::Disk, FieldProblem> {
    let (pool, disk, usual_name) = match &asked.source {
        NewDiskSource::Existing(id) => {
            let disk = may_attach(view, vm, *id, asked.access)?;
            (disk.pool, disk.id, format!("disk-{}", index + 1))
        }
        NewDiskSource::New {
            pool,
            bytes,
            format,
            from,
        } => {
            let plan = plan_disk(view, *pool, *bytes, *format, from)?;
            let device = asked.name.clone().unwrap_or_else(|| match (index, from) {
                (0, DiskOrigin::Image { .. } | DiskOrigin::Disk { .. }) => "root".into(),
                _ => format!("disk-{}", index + 1),
            });
            let full_name = format!("{}-{device}", vm.name);
            if let Some(problem) = name::problem("name", &full_name) {
                return Err(problem);
            }
            let disk = record(draft, full_name, plan, from.clone(), Some(vm.id));
            let found = (disk.pool, disk.id, device);
            new_disks.push(disk);
            found
        }
    };
    Ok(godwit_wire::devices::Disk {
        name: asked.name.clone().unwrap_or(usual_name),
        source: DiskSource::Volume { pool, disk },
        access: asked.access,
        limits: asked.limits,
        on_error: asked.on_error,
    })
}

/// One writer, or any number of readers.
fn may_attach<'v>(
    view: &'v View,
    vm: &Vm,
    id: DiskId,
    access: DiskAccess,
) -> Result<&'v Disk, FieldProblem> {
    let bad = |problem: String, remedy: &str| Err(FieldProblem::new("disk", problem, remedy));
    let Some(disk) = view.disks.get(&id) else {
        let problem = format!("there is no disk {id}");
        return bad(problem, "`godwit disk list` shows the disks");
    };
    if disk.state != DiskState::Ready || disk.operation.is_some() {
        let problem = format!("the disk {} is busy or not ready", disk.name);
        return bad(problem, "wait until it is ready");
    }
    let other = view.users_of(id).iter().find(|(user, theirs)| {
        *user != vm.id && (access == DiskAccess::ReadWrite || *theirs == DiskAccess::ReadWrite)
    });
    if let Some((user, theirs)) = other {
        let user = view
            .vms
            .get(user)
            .map_or_else(|| user.to_string(), |vm| vm.name.clone());
        let how = match theirs {
            DiskAccess::ReadWrite => "writes",
            DiskAccess::ReadOnly => "reads",
        };
        let problem = format!("{user} {how} the disk {}", disk.name);
        return bad(
            problem,
            "clone the disk; only one VM writes a disk, and then nobody else reads it",
        );
    }
    Ok(disk.as_ref())
}

/// Makes network cards; remembers what it has given out.
struct Cards<'v> {
    view: &'v View,
    vm: Vm,
    addresses: BTreeSet<(NetworkId, Ipv4Addr)>,
    macs: BTreeSet<MacAddress>,
}

impl<'v> Cards<'v> {
    fn new(view: &'v View, vm: &Vm) -> Self {
        let others = view.vms.values().filter(|other| other.id != vm.id);
        let cards = others.flat_map(|other| other.spec.devices.nics.iter());
        Self {
            view,
            vm: vm.clone(),
            addresses: BTreeSet::new(),
            macs: cards.map(|nic| nic.mac).collect(),
        }
    }

    fn card(&mut self, asked: &NewNic, index: usize) -> Result<Nic, FieldProblem> {
        let Some(network) = self.view.networks.get(&asked.network) else {
            return Err(FieldProblem::new(
                "network",
                format!("there is no network {}", asked.network),
                "`godwit network list` shows the networks",
            ));
        };
        let name = asked
            .name
            .clone()
            .unwrap_or_else(|| format!("nic-{}", index + 1));
        let attach = NicAttach::Network {
            network: asked.network,
        };
        // A card that stays keeps its addresses.
        let before = self.vm.spec.devices.nics.iter();
        let before = before
            .clone()
            .find(|nic| nic.name == name && nic.attach == attach)
            .cloned();
        let mac = self.mac(asked.mac, before.as_ref().map(|nic| nic.mac), index)?;
        let address = self.address(network, asked.address, before.and_then(|nic| nic.address))?;
        Ok(Nic {
            name,
            mac,
            attach,
            address,
            queue_pairs: asked.queue_pairs.unwrap_or(1),
            limits: asked.limits,
        })
    }

    fn mac(
        &mut self,
        asked: Option<MacAddress>,
        before: Option<MacAddress>,
        index: usize,
    ) -> Result<MacAddress, FieldProblem> {
        if let Some(mac) = asked {
            return match self.macs.insert(mac) {
                true => Ok(mac),
                false => Err(FieldProblem::new(
                    "mac",
                    format!("{mac} belongs to another card"),
                    "leave it out, or choose another",
                )),
            };
        }
        let (_, low) = self.vm.id.0.as_u64_pair();
        let numbers = (0..).map(|step| low.wrapping_add(index as u64).wrapping_add(step));
        let own = numbers.map(MacAddress::local);
        let mac = before
            .into_iter()
            .chain(own)
            .find(|mac| self.macs.insert(*mac))
            .expect("there are more addresses than cards");
        Ok(mac)
    }

    fn address(
        &mut self,
        network: &Network,
        asked: NicAddress,
        before: Option<Ipv4Addr>,
    ) -> Result<Option<Ipv4Addr>, FieldProblem> {
        let bad =
            |problem: String, remedy: &str| Err(FieldProblem::new("address", problem, remedy));
        let (id, own) = (network.id(), self.vm.id);
        let Some(subnet) = &network.network.subnet else {
            return match asked {
                NicAddress::Fixed(address) => bad(
                    format!(
                        "the network {} has no subnet to give {address} from",
                        network.name()
                    ),
                    "leave the address to the guest, or use a network with a subnet",
                ),
                NicAddress::Auto | NicAddress::Unmanaged => Ok(None),
            };
        };
        let holder = |address| self.view.lease(id, address).filter(|vm| *vm != own);
        let is_free = |address: &Ipv4Addr| {
            holder(*address).is_none() && !self.addresses.contains(&(id, *address))
        };
        let address = match asked {
            NicAddress::Unmanaged => return Ok(None),
            NicAddress::Fixed(address) if !subnet.can_give(address) => {
                return bad(
                    format!(
                        "{address} is no machine's address in {}/{}",
                        subnet.address, subnet.prefix
                    ),
                    "choose an address inside the subnet, or leave it out",
                );
            }
            NicAddress::Fixed(address) if !is_free(&address) => {
                let whose = holder(address)
                    .and_then(|vm| self.view.vms.get(&vm))
                    .map_or_else(|| "another card".to_owned(), |vm| vm.name.clone());
                return bad(
                    format!("{address} belongs to {whose}"),
                    "leave it out for the lowest free address",
                );
            }
            NicAddress::Fixed(address) => address,
            NicAddress::Auto => {
                let kept = before.filter(|address| subnet.can_give(*address));
                let free = kept.into_iter().chain(subnet.addresses()).find(is_free);
                match free {
                    Some(address) => address,
                    None => {
                        return bad(
                            format!("the subnet of {} has no free address", network.name()),
                            "delete VMs on it, or use another network",
                        );
                    }
                }
            }
        };
        self.addresses.insert((id, address));
        Ok(Some(address))
    }
}
