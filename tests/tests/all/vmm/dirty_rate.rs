//! Watching how fast a guest dirties memory.

use super::{boot_pilot, endless, verify_guest, verifying};
use godwit_tests::migration::{Flight, migrate};
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::Vmm;
use godwit_wire::migration::MigrationPhase;
use godwit_wire::problem::Problem;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{CreateRequest, DirtyRate, DirtyRateRequest};
use hyper::Method;

const MIB: u64 = 1 << 20;
const WATCHED: DirtyRateRequest = DirtyRateRequest {
    window_ms: 2_000,
    readings: 4,
};

async fn watch(vmm: &Vmm) -> DirtyRate {
    vmm.api
        .post("/v1/dirty-rate", &WATCHED)
        .await
        .expect("nothing else uses the dirty log")
}

async fn refusal(vmm: &Vmm, ask: DirtyRateRequest) -> Problem {
    let answer = vmm
        .api
        .send(Method::POST, "/v1/dirty-rate", Some(&ask))
        .await;
    answer
        .expect("an answer")
        .problem()
        .expect("it must not be watched now")
}

async fn order(vmm: &Vmm, command: &str) {
    let mut shell = vmm.shell().await.expect("the shell answers");
    shell.command(command).await.expect("done");
}

/// A pilot that dirties 20 MiB/s.
async fn dirtying(dir: &TestDir) -> (Vmm, CreateRequest) {
    let (source, request) = boot_pilot(dir, "source", 1, Mib(128)).await;
    order(&source, "fill 64").await;
    order(&source, "dirty 20 16").await;
    (source, request)
}

#[tokio::test]
async fn a_series_tells_a_working_set_from_a_rate() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, _) = boot_pilot(&dir, "vmm", 1, Mib(128)).await;
    order(&vmm, "fill 64").await;
    order(&vmm, "dirty 20 4").await;
    let small = watch(&vmm).await;
    order(&vmm, "dirty 20 64").await;
    let large = watch(&vmm).await;

    for rate in [&small, &large] {
        assert_eq!((rate.series.len(), rate.vcpus.len()), (4, 1), "{rate:?}");
        for pair in rate.series.windows(2) {
            assert!(
                pair[0].after_us < pair[1].after_us && pair[0].bytes <= pair[1].bytes,
                "nothing becomes clean by itself: {rate:?}"
            );
        }
        assert!(rate.series[3].after_us >= 2_000_000, "{rate:?}");
    }
    // 20 MiB/s in either case; a busy machine may not give the guest all its time.
    let written = |rate: &DirtyRate| rate.series[3].bytes / MIB;
    assert!((2..=10).contains(&written(&small)), "{small:?}");
    assert!((8..=64).contains(&written(&large)), "{large:?}");
    verify_guest(&vmm).await;
}

#[tokio::test]
async fn while_a_migration_is_under_way_nobody_watches_and_afterwards_anybody_can() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, mut request) = dirtying(&dir).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::start(&source, &target, &request, endless())
        .await
        .expect("take-off");
    flight
        .source_reaches(MigrationPhase::PreCopy)
        .await
        .expect("pre-copy");

    let refused = refusal(&source, WATCHED).await;

    assert_eq!((refused.status, refused.kind.as_str()), (409, "migrating"));
    flight.cancel().await.expect("cancel");
    flight
        .source_reaches(MigrationPhase::Cancelled)
        .await
        .expect("cancelled");
    assert!(watch(&source).await.bytes_per_s > 0);
    // Watching has left nothing behind that the next migration could miss.
    let second = Vmm::start(&dir, "second").await.expect("a target");
    migrate(&source, &second, &mut request, verifying())
        .await
        .expect("it lands");
    verify_guest(&second).await;
}

#[tokio::test]
async fn a_migration_does_not_wait_for_whoever_watches() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, mut request) = dirtying(&dir).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let long = DirtyRateRequest {
        window_ms: 5_000,
        readings: 1,
    };
    let flight = async {
        migrate(&source, &target, &mut request, verifying())
            .await
            .expect("it lands")
    };
    let (refused, _) = tokio::join!(refusal(&source, long), flight);
    assert_eq!((refused.status, refused.kind.as_str()), (409, "migrating"));
    verify_guest(&target).await;
}

#[tokio::test]
async fn a_window_out_of_bounds_is_refused() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, _) = boot_pilot(&dir, "vmm", 1, Mib(64)).await;
    let ask = DirtyRateRequest {
        window_ms: 60_000,
        readings: 99,
    };
    let refused = refusal(&vmm, ask).await;
    let fields: Vec<_> = refused.fields.iter().map(|f| f.field.as_str()).collect();
    assert_eq!(
        (refused.status, fields),
        (422, vec!["window_ms", "readings"])
    );
}
