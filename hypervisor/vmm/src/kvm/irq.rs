//! Message-signalled interrupts and doorbells, as the PCI bus needs them: an irqfd with a route per interrupt, an
//! ioeventfd per doorbell.

use super::KvmError;
use godwit_devices::pci::{InterruptLine, MsiMessage, Platform};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Pins of the IOAPIC: KVM's interrupts up to here are wired to the chips as on a PC.
const CHIP_GSIS: u32 = 24;
/// Pins of each of the two older interrupt controllers.
const PIC_PINS: u32 = 8;
/// Most interrupts KVM routes (`KVM_MAX_IRQ_ROUTES` on x86).
const MAX_GSIS: u32 = 4096;

/// The interrupts of one VM.
#[derive(Clone, Debug)]
pub struct Interrupts {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    vm: Arc<VmFd>,
    /// Interrupts in use, and what they deliver once routed.
    routes: Mutex<BTreeMap<u32, Option<MsiMessage>>>,
}

impl Interrupts {
    /// For a VM with its interrupt chips, whose routes are still KVM's own.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            shared: Arc::new(Shared {
                vm,
                routes: Mutex::default(),
            }),
        }
    }
}

impl Shared {
    /// KVM takes the whole table at once.
    fn commit(&self, routes: &BTreeMap<u32, Option<MsiMessage>>) -> Result<(), KvmError> {
        let messages = routes
            .iter()
            .filter_map(|(gsi, message)| message.map(|message| msi_route(*gsi, message)));
        let entries: Vec<_> = chip_routes().chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|error| KvmError::Call {
            call: "KVM_SET_GSI_ROUTING",
            source: io::Error::other(format!("{error:?}")),
        })?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(KvmError::during("KVM_SET_GSI_ROUTING"))
    }
}

/// KVM's own routes: both kinds of chips hear the first sixteen, the IOAPIC all of them.
fn chip_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    (0..CHIP_GSIS).flat_map(|gsi| {
        let pic = match gsi / PIC_PINS {
            0 => Some(KVM_IRQCHIP_PIC_MASTER),
            1 => Some(KVM_IRQCHIP_PIC_SLAVE),
            _ => None,
        };
        let pic = pic.map(|chip| chip_route(gsi, chip, gsi % PIC_PINS));
        pic.into_iter()
            .chain([chip_route(gsi, KVM_IRQCHIP_IOAPIC, gsi)])
    })
}

fn chip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

#[derive(Debug)]
struct Line {
    shared: Arc<Shared>,
    gsi: u32,
    event: EventFd,
}

impl InterruptLine for Line {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        let mut routes = lock(&self.shared.routes);
        routes.insert(self.gsi, Some(message));
        self.shared.commit(&routes).map_err(io::Error::other)
    }

    fn signal(&self) {
        // KVM takes it at once; it cannot overflow.
        let _ = self.event.write(1);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.shared.vm.unregister_irqfd(&self.event, self.gsi);
        // The route itself goes with the next change of the table; nothing signals it any more.
        lock(&self.shared.routes).remove(&self.gsi);
    }
}

impl Platform for Interrupts {
    fn interrupt_line(&self) -> io::Result<Box<dyn InterruptLine>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let mut routes = lock(&self.shared.routes);
        let gsi = (CHIP_GSIS..MAX_GSIS)
            .find(|gsi| !routes.contains_key(gsi))
            .ok_or_else(|| io::Error::other("all of KVM's interrupts are in use"))?;
        self.shared
            .vm
            .register_irqfd(&event, gsi)
            .map_err(|error| io::Error::other(KvmError::during("KVM_IRQFD")(error)))?;
        routes.insert(gsi, None);
        Ok(Box::new(Line {
            shared: self.shared.clone(),
            gsi,
            event,
        }))
    }

    fn place_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        self.shared
            .vm
            .register_ioevent(doorbell, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|error| io::Error::other(KvmError::during("KVM_IOEVENTFD")(error)))
    }

    fn remove_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        self.shared
            .vm
            .unregister_ioevent(doorbell, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|error| io::Error::other(KvmError::during("KVM_IOEVENTFD")(error)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chips_keep_the_wires_of_a_pc() {
        let wires: Vec<_> = chip_routes()
            .map(|entry| (entry.gsi, entry.type_))
            .collect();
        assert_eq!(wires.len(), 16 + 24);
        assert!(
            wires
                .iter()
                .all(|(gsi, kind)| *gsi < CHIP_GSIS && *kind == KVM_IRQ_ROUTING_IRQCHIP)
        );
    }
}
