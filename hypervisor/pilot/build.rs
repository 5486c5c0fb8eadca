//! Builds the freestanding guest with a direct call of the compiler.
//!
//! Cargo cannot build one package for two targets with different code generation flags, and the
//! bare-metal target is not installed everywhere; the host's own target with the right flags does.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

/// `core` is precompiled with SSE; the guest's own code must not use it, because interrupt
/// handlers do not save vector registers and some KVM backends cannot emulate vector arithmetic.
const TARGET_FEATURES: &str = "-sse,-sse2,-sse3,-ssse3,-sse4.1,-sse4.2,-avx,-avx2,+soft-float";

fn main() {
    println!("cargo:rerun-if-changed=guest");
    println!("cargo:rerun-if-env-changed=RUSTC_LINKER");

    let target = variable("TARGET");
    let target = target.to_string_lossy();
    assert!(
        target.starts_with("x86_64-") && target.contains("linux"),
        "the pilot guest runs on x86-64 and is built with a Linux toolchain, not for {target}"
    );

    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let output = PathBuf::from(variable("OUT_DIR")).join("pilot.elf");
    let script = manifest_dir.join("guest/pilot.ld");

    let mut compiler = Command::new(variable("RUSTC"));
    compiler
        .current_dir(&manifest_dir)
        .args(["guest/main.rs", "--crate-name", "pilot_guest"])
        .args(["--crate-type", "bin", "--edition", "2024"])
        .args(["--target", &target])
        .args([
            "-C",
            "opt-level=2",
            "-C",
            "codegen-units=1",
            "-C",
            "panic=abort",
        ])
        .args(["-C", "debuginfo=0", "-C", "strip=symbols"])
        .args(["-C", "relocation-model=static", "-C", "no-redzone=yes"])
        .args(["-C", "target-feature=+crt-static"])
        .arg("-C")
        .arg(format!("target-feature={TARGET_FEATURES}"));
    for argument in [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,--image-base=0x200000",
        "-Wl,--no-eh-frame-hdr",
        "-Wl,-z,max-page-size=4096",
        "-Wl,-z,norelro",
    ] {
        compiler.arg("-C").arg(format!("link-arg={argument}"));
    }
    compiler
        .arg("-C")
        .arg(format!("link-arg=-Wl,-T,{}", script.display()));
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut argument = OsString::from("linker=");
        argument.push(linker);
        compiler.arg("-C").arg(argument);
    }
    compiler.arg("-o").arg(&output);

    let status = compiler
        .status()
        .unwrap_or_else(|error| panic!("cannot start {compiler:?}: {error}"));
    assert!(status.success(), "the guest did not build: {compiler:?}");
}

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo did not set {name}"))
}
