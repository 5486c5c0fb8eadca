//! Emulated hosts: QEMU without KVM, each with a stock Debian kernel, `kvm_amd` and our programs, joined by a virtual
//! switch. The lab and the bench stand on them. A module uses only the modules above it in this list.

pub mod packages;

pub mod modules;

pub mod images;

pub mod switch;

pub mod shell;

pub mod machine;
