//! ACPI tables: hardware-reduced, so the guest needs no power-management timer, no SMI and no legacy event blocks.
//!
//! The tables of a machine type never change: a guest that was installed on one finds the same machine on every host
//! and after every update of this program.

mod dsdt;

use super::layout::{ECAM_START, IOAPIC_ADDRESS, LAPIC_ADDRESS, PCI_BUSES};
use crate::devices::{KEYBOARD_COMMAND_PORT, KEYBOARD_RESET, SLEEP_CONTROL_PORT};
use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use godwit_wire::machine::MachineType;

const OEM_ID: [u8; 6] = *b"GODWIT";
const OEM_REVISION: u32 = 1;

const fn oem_table_id(machine_type: MachineType) -> [u8; 8] {
    match machine_type {
        MachineType::Godwit1 => *b"GODWIT1 ",
        MachineType::Godwit2 => *b"GODWIT2 ",
    }
}

/// All tables, laid out one after the other from `address` on; the RSDP comes first.
pub(super) fn tables(machine_type: MachineType, vcpus: u8, address: u64) -> Vec<u8> {
    let id = oem_table_id(machine_type);
    let mut blob = bytes(&Rsdp::new(OEM_ID, 0));
    let mut place = |table: Vec<u8>| {
        blob.resize(blob.len().next_multiple_of(16), 0);
        let at = address + blob.len() as u64;
        blob.extend(table);
        at
    };
    let dsdt = place(dsdt::dsdt(machine_type, id));
    let fadt = place(bytes(&fadt(id, dsdt)));
    let madt = place(bytes(&madt(id, vcpus)));
    let mut xsdt = XSDT::new(OEM_ID, id, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if machine_type == MachineType::Godwit2 {
        xsdt.add_entry(place(bytes(&mcfg(id))));
    }
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

fn fadt(oem_table_id: [u8; 8], dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut builder = FADTBuilder::new(OEM_ID, oem_table_id, OEM_REVISION)
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

/// PCI configuration space (PCI Firmware Specification 3.2, section 4.1.2).
fn mcfg(oem_table_id: [u8; 8]) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, oem_table_id, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, *PCI_BUSES.start(), *PCI_BUSES.end());
    mcfg
}

/// Every vCPU has an APIC id below 255, which a local APIC structure can name also where the guest uses x2APIC mode.
fn madt(oem_table_id: [u8; 8], vcpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        oem_table_id,
        OEM_REVISION,
        LocalInterruptController::Address(LAPIC_ADDRESS),
    );
    for vcpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Signatures of the tables the XSDT names, every checksum on the way checked.
    fn names(blob: &[u8], base: u64) -> Vec<String> {
        let at = |address: u64| &blob[(address - base) as usize..];
        let u32_at = |b: &[u8], o: usize| u32::from_le_bytes(b[o..o + 4].try_into().unwrap());
        let u64_at = |b: &[u8], o: usize| u64::from_le_bytes(b[o..o + 8].try_into().unwrap());
        assert_eq!(&blob[..8], b"RSD PTR ");
        assert_eq!((sum(&blob[..20]), sum(&blob[..36])), (0, 0));
        let xsdt = at(u64_at(blob, 24));
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
        names
    }

    #[test]
    fn every_table_is_reachable_and_has_a_valid_checksum() {
        let base = 0xe_0000;
        assert_eq!(
            names(&tables(MachineType::Godwit1, 4, base), base),
            ["FACP", "APIC"]
        );
        assert_eq!(
            names(&tables(MachineType::Godwit2, 64, base), base),
            ["FACP", "APIC", "MCFG"]
        );
    }

    #[test]
    fn the_tables_of_a_released_machine_type_never_change() {
        let hash = |machine_type, vcpus| {
            let blob = tables(machine_type, vcpus, 0xe_0000);
            format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&blob))
        };
        expect_test::expect!["1194c960f15e0a1d2795ac696b124225"]
            .assert_eq(&hash(MachineType::Godwit1, 4));
        expect_test::expect!["71b6cea7c9d3aa6e1879dd57c86c4bf0"]
            .assert_eq(&hash(MachineType::Godwit2, 1));
        expect_test::expect!["758929b05740dea99b66bd7378fdc4a9"]
            .assert_eq(&hash(MachineType::Godwit2, 64));
    }
}
