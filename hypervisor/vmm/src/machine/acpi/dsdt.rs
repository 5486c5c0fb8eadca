//! The DSDT: devices the guest cannot find by looking for them.

use super::{OEM_ID, OEM_REVISION, bytes};
use crate::devices::{COM1_IRQ, COM1_PORT, SLEEP_TYPE_S5};
use crate::machine::layout::{ECAM_BYTES, ECAM_START, MMIO_WINDOW, PCI_BUSES, POWER_BUTTON_IRQ};
use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else,
    Equal, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Notify, Or, Package,
    Path, ResourceTemplate, Return, Store, Uuid,
};
use acpi_tables::sdt::Sdt;
use godwit_wire::machine::MachineType;

/// Identifies the `_OSC` capabilities of a PCI host bridge (PCI Firmware Specification 3.2, section 4.5.1).
const PCI_HOST_BRIDGE_OSC: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// All that is granted of `_OSC`'s control field: the PCI Express capability structure (bit 4). There is no hot
/// plug, no error reporting and no power management of links that the guest could take over.
const OSC_GRANTED: u8 = 1 << 4;
const OSC_UNRECOGNIZED_UUID: u8 = 1 << 2;
const OSC_UNRECOGNIZED_REVISION: u8 = 1 << 3;
const OSC_CAPABILITIES_MASKED: u8 = 1 << 4;
/// What a device notifies its driver of: for a button, that it was pressed (ACPI 6.5, section 4.8.3.1.2.1).
const BUTTON_PRESSED: u8 = 0x80;

/// The table for machines of `machine_type`.
pub(super) fn dsdt(machine_type: MachineType, oem_table_id: [u8; 8]) -> Vec<u8> {
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, oem_table_id, OEM_REVISION);
    let sleep_type = SLEEP_TYPE_S5;
    sdt.append_slice(&bytes(&Name::new(
        "_S5_".into(),
        &Package::new(vec![&sleep_type]),
    )));
    sdt.append_slice(&com1());
    match machine_type {
        MachineType::Godwit1 => {}
        MachineType::Godwit2 => {
            for object in [power_button(), reserved_memory(), host_bridge()] {
                sdt.append_slice(&object);
            }
        }
    }
    sdt.update_checksum();
    sdt.as_slice().to_vec()
}

fn com1() -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let ports = IO::new(COM1_PORT, COM1_PORT, 1, 8);
    let irq = Interrupt::new(true, true, false, false, COM1_IRQ);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&irq, &ports]));
    bytes(&Device::new(
        "_SB_.COM1".into(),
        vec![&hid, &uid, &resources],
    ))
}

/// A button, and the Generic Event Device that reports it. A platform without ACPI's fixed hardware has no other
/// way to raise an event. The interrupt has one meaning, so no register need be read to find out which.
fn power_button() -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let mut objects = bytes(&Device::new("_SB_.PWRB".into(), vec![&hid, &uid]));
    let hid = Name::new("_HID".into(), &"ACPI0013");
    let irq = Interrupt::new(true, true, false, false, POWER_BUTTON_IRQ);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&irq]));
    let button = Path::new("\\_SB_.PWRB");
    let pressed = Notify::new(&button, &BUTTON_PRESSED);
    let event = Method::new("_EVT".into(), 1, true, vec![&pressed]);
    objects.extend(bytes(&Device::new(
        "_SB_.GED_".into(),
        vec![&hid, &uid, &resources, &event],
    )));
    objects
}

/// Claims the configuration space, without which Linux does not use it.
fn reserved_memory() -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let ecam = Memory32Fixed::new(true, ECAM_START as u32, ECAM_BYTES as u32);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam]));
    bytes(&Device::new(
        "_SB_.RSVD".into(),
        vec![&hid, &uid, &resources],
    ))
}

fn host_bridge() -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let number = |name: &str| Name::new(name.into(), &aml::ZERO);
    let (uid, address, segment, bus) = (
        number("_UID"),
        number("_ADR"),
        number("_SEG"),
        number("_BBN"),
    );
    let buses =
        AddressSpace::new_bus_number(u16::from(*PCI_BUSES.start()), u16::from(*PCI_BUSES.end()));
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        MMIO_WINDOW.start as u32,
        (MMIO_WINDOW.end - 1) as u32,
        None,
    );
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &window]));
    let mut children = Vec::new();
    for object in [&hid, &cid, &uid, &address, &segment, &bus, &resources] {
        children.extend(bytes(object));
    }
    children.extend(operating_system_capabilities());
    let children = Verbatim(children);
    bytes(&Device::new("_SB_.PCI0".into(), vec![&children]))
}

/// `_OSC`: which features of the bus the guest's system takes over (ACPI 6.5, section 6.2.11).
fn operating_system_capabilities() -> Vec<u8> {
    let (uuid, revision, buffer) = (Arg(0), Arg(1), Arg(3));
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let granted = Local(0);
    let (first, third) = (0u8, 8u8);
    let name_status = CreateDWordField::new(&status, &buffer, &first);
    let name_control = CreateDWordField::new(&control, &buffer, &third);
    let grant = And::new(&granted, &control, &OSC_GRANTED);
    let flag_revision = Or::new(&status, &status, &OSC_UNRECOGNIZED_REVISION);
    let is_other_revision = NotEqual::new(&revision, &aml::ONE);
    let judge_revision = If::new(&is_other_revision, vec![&flag_revision]);
    let flag_masked = Or::new(&status, &status, &OSC_CAPABILITIES_MASKED);
    let is_masked = NotEqual::new(&control, &granted);
    let judge_control = If::new(&is_masked, vec![&flag_masked]);
    let answer = Store::new(&control, &granted);
    let ours = Uuid::new(PCI_HOST_BRIDGE_OSC);
    let is_ours = Equal::new(&uuid, &ours);
    let judge = If::new(
        &is_ours,
        vec![
            &name_control,
            &grant,
            &judge_revision,
            &judge_control,
            &answer,
        ],
    );
    let flag_uuid = Or::new(&status, &status, &OSC_UNRECOGNIZED_UUID);
    let otherwise = Else::new(vec![&flag_uuid]);
    let done = Return::new(&buffer);
    bytes(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![&name_status, &judge, &otherwise, &done],
    ))
}

/// Objects that are bytes already.
struct Verbatim(Vec<u8>);

impl acpi_tables::Aml for Verbatim {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
