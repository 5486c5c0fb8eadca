//! ACPI tables of the `godwit-1` platform: hardware-reduced, so the guest needs no power-management timer, no
//! SMI and no legacy event blocks.

use crate::devices::{
    COM1_IRQ, COM1_PORT, KEYBOARD_COMMAND_PORT, KEYBOARD_RESET, SLEEP_CONTROL_PORT, SLEEP_TYPE_S5,
};
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

const OEM_ID: [u8; 6] = *b"GODWIT";
const OEM_TABLE_ID: [u8; 8] = *b"GODWIT1 ";
const OEM_REVISION: u32 = 1;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;

/// All tables, laid out one after the other from `address` on; the RSDP comes first.
pub(super) fn tables(vcpus: u8, address: u64) -> Vec<u8> {
    let mut blob = bytes(&Rsdp::new(OEM_ID, 0));
    let mut place = |table: Vec<u8>| {
        blob.resize(blob.len().next_multiple_of(16), 0);
        let at = address + blob.len() as u64;
        blob.extend(table);
        at
    };
    let dsdt = place(dsdt());
    let fadt = place(bytes(&fadt(dsdt)));
    let madt = place(bytes(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    blob[..rsdp.len()].copy_from_slice(&rsdp);
    blob
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn io_register(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut builder = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    builder.reset_reg = io_register(KEYBOARD_COMMAND_PORT);
    builder.reset_value = KEYBOARD_RESET;
    builder.sleep_control_reg = io_register(SLEEP_CONTROL_PORT);
    builder.sleep_status_reg = io_register(SLEEP_CONTROL_PORT);
    // IAPC_BOOT_ARCH bits 2 and 5: no VGA, no CMOS clock; without the latter Linux waits seconds for one.
    builder.iapc_boot_arch = (1u16 << 2 | 1 << 5).into();
    builder.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LAPIC_ADDRESS),
    );
    for vcpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    madt
}

fn dsdt() -> Vec<u8> {
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let sleep_type = SLEEP_TYPE_S5;
    let s5 = Name::new("_S5_".into(), &Package::new(vec![&sleep_type]));
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let ports = IO::new(COM1_PORT, COM1_PORT, 1, 8);
    let irq = Interrupt::new(true, true, false, false, COM1_IRQ);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&irq, &ports]));
    let com1 = Device::new("_SB_.COM1".into(), vec![&hid, &uid, &resources]);
    for object in [&s5 as &dyn Aml, &com1] {
        sdt.append_slice(&bytes(object));
    }
    sdt.update_checksum();
    sdt.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reachable_and_has_a_valid_checksum() {
        let base = 0xe_0000;
        let blob = tables(4, base);
        let at = |address: u64| &blob[(address - base) as usize..];
        let u32_at = |b: &[u8], o: usize| u32::from_le_bytes(b[o..o + 4].try_into().unwrap());
        let u64_at = |b: &[u8], o: usize| u64::from_le_bytes(b[o..o + 8].try_into().unwrap());
        assert_eq!(&blob[..8], b"RSD PTR ");
        assert_eq!((sum(&blob[..20]), sum(&blob[..36])), (0, 0));
        let xsdt = at(u64_at(&blob, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let length = u32_at(xsdt, 4) as usize;
        assert_eq!(sum(&xsdt[..length]), 0);
        let mut names = Vec::new();
        for entry in (36..length).step_by(8) {
            let table = at(u64_at(xsdt, entry));
            assert_eq!(sum(&table[..u32_at(table, 4) as usize]), 0);
            names.push(String::from_utf8_lossy(&table[..4]).into_owned());
            if &table[..4] == b"FACP" {
                let dsdt = at(u64_at(table, 140));
                assert_eq!(&dsdt[..4], b"DSDT");
                assert_eq!(sum(&dsdt[..u32_at(dsdt, 4) as usize]), 0);
            }
        }
        assert_eq!(names, ["FACP", "APIC"]);
    }
}
