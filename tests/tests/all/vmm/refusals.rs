//! Whatever cannot be built is refused with the field at fault and the way out, and leaves nothing behind.

use godwit_tests::program;
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, Vmm, new_vm};
use godwit_wire::machine::{Boot, MachineSpec};
use godwit_wire::problem::Problem;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{CreateRequest, VmmState};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn linux_spec(kernel: &Path, initrd: Option<PathBuf>, cmdline: &str) -> MachineSpec {
    let boot = Boot::Linux {
        kernel: kernel.to_owned(),
        initrd,
        cmdline: cmdline.to_owned(),
    };
    MachineSpec {
        boot,
        ..vmm::pilot(1, Mib(64))
    }
}

#[tokio::test]
async fn a_bad_spec_is_refused_with_its_field_and_a_remedy() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let not_elf = dir.join("kernel.txt");
    std::fs::write(&not_elf, "not a kernel").expect("a file");
    let missing = dir.join("no-such-kernel");
    let empty = dir.join("empty");
    std::fs::write(&empty, []).expect("a file");
    let cases = [
        ("spec.vcpus", vmm::pilot(0, Mib(64))),
        ("spec.vcpus", vmm::pilot(65, Mib(64))),
        ("spec.memory_mib", vmm::pilot(1, Mib(1))),
        ("spec.memory_mib", vmm::pilot(1, Mib(1 << 40))),
        // Within what a machine may have, beyond what this host has.
        ("spec.memory_mib", vmm::pilot(1, Mib(200 * 1024))),
        ("spec.boot.kernel", linux_spec(&missing, None, "")),
        ("spec.boot.kernel", linux_spec(&not_elf, None, "")),
        ("spec.boot.kernel", linux_spec(dir.path(), None, "")),
        ("spec.boot.kernel", linux_spec(&empty, None, "")),
        (
            "spec.boot.kernel",
            linux_spec(Path::new("relative/vmlinux"), None, ""),
        ),
        (
            "spec.boot.cmdline",
            linux_spec(&not_elf, None, &"x".repeat(4096)),
        ),
    ];
    for (number, (field, spec)) in cases.into_iter().enumerate() {
        let vmm = Vmm::start(&dir, &format!("vmm-{number}"))
            .await
            .expect("an empty VMM");
        let problem = refusal(&vmm, &new_vm(spec)).await;
        assert_eq!(problem.status, 422, "{problem:?}");
        let found = problem.fields.iter().find(|found| found.field == field);
        let found = found.unwrap_or_else(|| panic!("{field} is not named in {problem:?}"));
        assert!(!found.remedy.is_empty(), "{problem:?}");
        let info = vmm.info().await.expect("the VMM lives");
        assert!(
            matches!(info.state, VmmState::Empty | VmmState::Created),
            "{:?}",
            info.state
        );
    }
}

/// Files are opened when the machine boots, everything else is judged when it is built.
async fn refusal(vmm: &Vmm, request: &CreateRequest) -> Problem {
    let error = match vmm.create(request).await {
        Err(error) => error,
        Ok(_) => vmm
            .command("boot", request.epoch)
            .await
            .expect_err("one of the two is refused"),
    };
    error
        .downcast()
        .unwrap_or_else(|error| panic!("{:?}: {error:#}", request.spec))
}

#[tokio::test]
async fn a_vmm_that_refused_a_machine_takes_a_good_one() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let vmm = Vmm::start(&dir, "vmm").await.expect("an empty VMM");
    vmm.create(&new_vm(vmm::pilot(0, Mib(64))))
        .await
        .expect_err("a machine without a CPU");
    assert_eq!(vmm.info().await.expect("info").state, VmmState::Empty);
    vmm.create(&new_vm(vmm::pilot(1, Mib(64))))
        .await
        .expect("a good machine");
}

#[tokio::test]
async fn a_body_that_is_not_a_request_is_refused() {
    let dir = TestDir::new();
    let vmm = Vmm::start(&dir, "vmm").await.expect("an empty VMM");
    for body in [
        serde_json::json!({}),
        serde_json::json!([1, 2]),
        serde_json::json!({"spec": {"vcpus": "many"}}),
    ] {
        let answer = vmm
            .api
            .send(hyper::Method::PUT, "/v1/machine", Some(&body))
            .await
            .expect("an answer");
        assert!(answer.status.is_client_error(), "{body}: {}", answer.status);
        answer.problem().expect("a problem body");
    }
    let answer = vmm
        .api
        .send(hyper::Method::GET, "/v1/no-such-thing", None::<&()>)
        .await
        .expect("an answer");
    assert_eq!(answer.status, 404);
}

/// A machine that arrives from elsewhere boots only when its guest restarts: too late to find out.
#[tokio::test]
async fn a_machine_whose_kernel_is_missing_is_not_even_built() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let vmm = Vmm::start(&dir, "vmm").await.expect("an empty VMM");
    let missing = linux_spec(&dir.join("no-such-kernel"), None, "");
    let error = vmm
        .create(&new_vm(missing))
        .await
        .expect_err("a machine without a kernel");
    assert!(format!("{error:#}").contains("no-such-kernel"), "{error:#}");
    let info = vmm.info().await.expect("the VMM lives");
    assert_eq!(info.state, VmmState::Empty);
}

#[test]
fn a_lone_vmm_with_a_missing_kernel_says_so_and_fails() {
    let dir = TestDir::new();
    let missing = dir.join("no-such-kernel");
    let output = run_vmm(&[
        "--kernel",
        &missing.to_string_lossy(),
        "--memory-mib",
        "64",
        "--vcpus",
        "1",
    ]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(
        said.contains("kernel") && said.contains("no-such-kernel"),
        "{said}"
    );
}

#[test]
fn a_lone_vmm_with_impossible_numbers_says_so_and_fails() {
    for (flag, value) in [("--vcpus", "0"), ("--vcpus", "99"), ("--memory-mib", "1")] {
        let output = run_vmm(&["--pilot", flag, value]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{flag} {value}");
        assert!(
            said.contains(flag.trim_start_matches("--")) || said.contains("memory_mib"),
            "{flag} {value}: {said}"
        );
    }
}

#[test]
fn a_vmm_that_cannot_listen_says_so_and_leaves_nothing_behind() {
    let dir = TestDir::new();
    let socket = dir.join("no-such-folder").join("vmm.sock");
    let output = run_vmm(&["--api-socket", &socket.to_string_lossy()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(said.contains("no-such-folder"), "{said}");
    assert_eq!(
        std::fs::read_dir(dir.path()).expect("the folder").count(),
        0
    );
}

#[test]
fn a_vmm_that_may_not_use_kvm_says_so_and_fails() {
    require!(skip::kvm());
    let mut unprivileged = Command::new("setpriv");
    unprivileged.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
    let allowed = Command::new("setpriv")
        .args(["--reuid=65534", "--", "test", "-w", "/dev/kvm"])
        .status();
    if !allowed.is_ok_and(|status| status.code() == Some(1)) {
        return skip::skip("cannot become a user who may not use /dev/kvm");
    }
    unprivileged.arg(program::godwit()).args(["vmm", "--pilot"]);
    let output = unprivileged
        .stdin(std::process::Stdio::null())
        .output()
        .expect("setpriv starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(
        said.contains("/dev/kvm") && said.to_lowercase().contains("permi"),
        "{said}"
    );
}

fn run_vmm(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command
        .arg("30")
        .arg(program::godwit())
        .arg("vmm")
        .args(arguments);
    command
        .stdin(std::process::Stdio::null())
        .output()
        .expect("the program starts")
}
