//! What the commands print, held against golden texts.

use super::render;
use crate::resource::{
    Disk, DryRun, Event, Host, Image, Maintenance, Migration, Network, Operation, Pool, Snapshot,
    Vm,
};
use expect_test::{Expect, expect};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const VM: &str = "019300aa-0000-7000-8000-000000000001";
const POOL: &str = "019300aa-0000-7000-8000-0000000000e1";
const HOST_1: &str = "019300aa-0000-7000-8000-0000000000a1";
const HOST_2: &str = "019300aa-0000-7000-8000-0000000000a2";
const MIGRATION: &str = "019300aa-0000-7000-8000-0000000000b1";
const OPERATION: &str = "019300aa-0000-7000-8000-0000000000c1";
const MAINTENANCE: &str = "019300aa-0000-7000-8000-0000000000d1";

fn now() -> Timestamp {
    "2026-01-02T03:05:00Z".parse().expect("a time")
}

fn read<T: DeserializeOwned>(json: Value) -> T {
    serde_json::from_value(json).expect("a resource as the server sends it")
}

fn check(text: String, golden: Expect) {
    golden.assert_eq(&text);
}

fn vm_json(name: &str, state: &str) -> Value {
    json!({
        "id": VM, "name": name, "state": state, "intent": "running", "reason": null,
        "spec": { "machine_type": "godwit-1", "vcpus": 2, "memory_mib": 1536, "boot": { "kind": "pilot" }, "cpu": "x86-64-v2" },
        "host": HOST_1, "host_name": "host-1", "home": HOST_1, "epoch": 3, "lease": "watched",
        "maintenance_policy": "migrate",
        "usage": { "cpu_percent": 12.5, "rss_bytes": 73_400_320, "exits_per_s": 812.4, "dirty_bytes_per_s": 4_194_304 },
        "migration": null, "operation": null,
        "created_at": "2026-01-01T00:00:00Z", "changed_at": "2026-01-02T03:04:18Z"
    })
}

fn migration_json() -> Value {
    json!({
        "id": MIGRATION, "vm": VM, "vm_name": "db-1", "source": HOST_1, "source_name": "host-1",
        "target": HOST_2, "target_name": "host-2", "state": "open", "phase": "pre_copy", "reason": null,
        "progress": {
            "round": 2, "memory_bytes": 1_610_612_736, "transferred_bytes": 734_003_200, "content_pages": 179_200,
            "zero_pages": 213_000, "remaining_bytes": 12_582_912, "rate_bytes_per_s": 314_572_800,
            "dirty_bytes_per_s": 4_194_304, "predicted_blackout_ms": 48, "elapsed_ms": 2_340
        },
        "started_at": "2026-01-02T03:04:57Z", "ended_at": null
    })
}

fn maintenance_json(state: &str) -> Value {
    json!({
        "id": MAINTENANCE, "host": HOST_1, "host_name": "host-1", "reason": "new kernel", "state": state, "detail": null,
        "policy": { "return": "exact" },
        "plan": {
            "moves": [
                { "vm": VM, "vm_name": "db-1", "action": "migrate", "to": HOST_2, "to_name": "host-2", "predicted_s": 4.8,
                  "predicted_mib": 1600, "predicted_blackout_ms": 48, "reserve_after_mib": 2048 },
                { "vm": VM, "vm_name": "batch-1", "action": "stop_and_return", "to": null, "to_name": null,
                  "predicted_s": 75.2, "predicted_mib": 0, "predicted_blackout_ms": 0, "reserve_after_mib": -512 }
            ],
            "blockers": [
                { "vm": VM, "vm_name": "licence-1", "kind": "policy_blocks", "detail": "its maintenance policy is block",
                  "remedy": "move it by hand, or give it another policy for this maintenance" }
            ],
            "total_s": 80.0
        },
        "moved": [], "operation": null, "created_at": "2026-01-02T03:00:00Z", "changed_at": "2026-01-02T03:00:00Z",
        "ended_at": null, "actor": "local"
    })
}

#[test]
fn a_list_of_vms_shows_where_they_run_and_what_is_special() {
    let mut moving = vm_json("db-1", "migrating");
    moving["migration"] = migration_json();
    let mut failed = vm_json("a-vm-with-a-long-name", "failed");
    failed["reason"] = json!(
        "cannot read /srv/kernels/vmlinux-6.12.117-testguest on the host: no such file or directory"
    );
    failed["host"] = Value::Null;
    failed["host_name"] = Value::Null;
    let vms: Vec<Vm> = [vm_json("web-1", "running"), moving, failed]
        .map(read)
        .into();
    check(
        render::vms(&vms),
        expect![[r#"
            NAME                   STATE      HOST    VCPUS   MEMORY  CPU      DIRTY  NOTE
            web-1                  running    host-1      2  1.5 GiB  12%  4.0 MiB/s
            db-1                   migrating  host-1      2  1.5 GiB  12%  4.0 MiB/s  to host-2, round 2
            a-vm-with-a-long-name  failed     -           2  1.5 GiB  12%  4.0 MiB/s  cannot read /srv/kernels/vmlinux-6.12.117-testguest on the …
        "#]],
    );
}

#[test]
fn an_empty_list_is_its_titles() {
    check(
        render::vms(&[]),
        expect![[r#"
        NAME  STATE  HOST  VCPUS  MEMORY  CPU  DIRTY  NOTE
    "#]],
    );
}

#[test]
fn a_vm_is_shown_with_its_migration() {
    let mut moving = vm_json("db-1", "migrating");
    moving["migration"] = migration_json();
    check(
        render::vm(&read::<Vm>(moving), now()),
        expect![[r#"
            Name:        db-1
            Id:          019300aa-0000-7000-8000-000000000001
            State:       migrating
            Wanted:      running
            Host:        host-1 (epoch 3)
            vCPUs:       2 (x86-64-v2)
            Memory:      1.5 GiB
            Boots:       the pilot
            Lease:       watched
            Maintenance: migrate
            Post-copy:   allowed
            Uses:        12% CPU, 70.0 MiB resident, 812 exits/s, dirties 4.0 MiB/s
            Created:     27h ago
            Changed:     42s ago

            Migration
            Id:        019300aa-0000-7000-8000-0000000000b1
            VM:        db-1
            Way:       host-1 to host-2
            State:     open (pre_copy)
            Round:     2
            Sent:      700.0 MiB of 1.5 GiB memory (179200 pages, 213000 zero pages)
            Remaining: 12.0 MiB
            Rate:      300.0 MiB/s, the guest dirties 4.0 MiB/s
            Time:      2.3 s
            Downtime:  48 ms (predicted)
        "#]],
    );
}

#[test]
fn a_migration_with_disks_tells_how_far_they_are() {
    let mut moving = migration_json();
    moving["disks"] = json!([{
        "disk": VM, "name": "data", "bytes": 4_294_967_296u64, "from_pool": POOL, "from_pool_name": "local",
        "to_pool": POOL, "to_pool_name": "fast"
    }]);
    moving["progress"]["disk_bytes"] = json!(4_294_967_296u64);
    moving["progress"]["disk_remaining_bytes"] = json!(3_221_225_472u64);
    moving["progress"]["disk_transferred_bytes"] = json!(1_073_741_824u64);
    check(
        render::migration(&read::<Migration>(moving)),
        expect![[r#"
            Id:        019300aa-0000-7000-8000-0000000000b1
            VM:        db-1
            Way:       host-1 to host-2
            State:     open (pre_copy)
            Round:     2
            Sent:      700.0 MiB of 1.5 GiB memory (179200 pages, 213000 zero pages)
            Remaining: 12.0 MiB
            Disks:     data from local to fast; 1.0 GiB sent, 3.0 GiB of 4.0 GiB remain
            Rate:      300.0 MiB/s, the guest dirties 4.0 MiB/s
            Time:      2.3 s
            Downtime:  48 ms (predicted)
        "#]],
    );
}

#[test]
fn hosts_show_what_they_promised_and_what_they_use() {
    let host: Host = read(json!({
        "id": HOST_1, "name": "host-1", "address": "10.0.0.11:7072", "state": "cordoned",
        "reason": "cordoned by local: flaky memory",
        "facts": {
            "cpu": { "level": "x86-64-v3", "signature": "s", "model": "EPYC 9354" }, "cores": 64, "memory_mib": 524_288,
            "guest_memory_mib": 471_859, "kernel": "6.1.0-41-amd64", "boot_id": HOST_1
        },
        "usage": {
            "cpu_percent": 37.2, "memory_used_bytes": 107_374_182_400u64,
            "pressure": { "cpu_percent": 0.4, "memory_percent": 0.0, "io_percent": 1.25 }
        },
        "capacity": { "cores": 64, "guest_memory_mib": 471_859 },
        "committed": { "vcpus": 96, "memory_mib": 204_800, "vms": 41 },
        "maintenance": null, "last_seen": "2026-01-02T03:04:59Z", "version": "0.1.0"
    }));
    check(
        render::hosts(std::slice::from_ref(&host)),
        expect![[r#"
        NAME    STATE     VMS  CPU  MEMORY PROMISED         OF       USED  ADDRESS         NOTE
        host-1  cordoned   41  37%        200.0 GiB  460.8 GiB  100.0 GiB  10.0.0.11:7072  cordoned by local: flaky memory
    "#]],
    );
    check(
        render::host(&host, now()),
        expect![[r#"
        Name:      host-1
        Id:        019300aa-0000-7000-8000-0000000000a1
        State:     cordoned
        Reason:    cordoned by local: flaky memory
        Address:   10.0.0.11:7072
        CPU:       EPYC 9354 (x86-64-v3, 64 cores)
        Memory:    512.0 GiB, 460.8 GiB for guests
        Promised:  200.0 GiB to 41 VMs with 96 vCPUs
        Uses:      37% CPU, 100.0 GiB memory
        Pressure:  cpu 0.4%, memory 0.0%, io 1.2%
        Kernel:    6.1.0-41-amd64
        Version:   0.1.0
        Last seen: 1s ago
    "#]],
    );
}

#[test]
fn a_maintenance_is_shown_with_its_plan_and_what_blocks_it() {
    let maintenance: Maintenance = read(maintenance_json("blocked"));
    check(
        render::maintenances(std::slice::from_ref(&maintenance), now()),
        expect![[r#"
        ID                                    HOST    STATE    VMS  BLOCKERS  AGE  BY     REASON
        019300aa-0000-7000-8000-0000000000d1  host-1  blocked    2         1   5m  local  new kernel
    "#]],
    );
    check(
        render::maintenance(&maintenance, now()),
        expect![[r#"
        Id:      019300aa-0000-7000-8000-0000000000d1
        Host:    host-1
        State:   blocked
        Reason:  new kernel
        Return:  exact
        Created: 5m ago by local

        VM       ACTION           TO            TIME   MIB  BLACKOUT    RESERVE AFTER
        db-1     migrate          host-2       4.8 s  1600     48 ms          2.0 GiB
        batch-1  stop_and_return  -       1 min 15 s     0      0 ms  512.0 MiB short
        1 min 20 s in all.

        Blocked by:
          licence-1: its maintenance policy is block (policy_blocks)
            remedy: move it by hand, or give it another policy for this maintenance
    "#]],
    );
}

#[test]
fn a_maintenance_under_way_shows_what_has_become_of_each_vm() {
    let mut json = maintenance_json("drained");
    json["moved"] = json!([
        { "vm": VM, "vm_name": "db-1", "from": HOST_1, "to": HOST_2, "action": "migrate", "state": "away", "reason": null },
        { "vm": VM, "vm_name": "web-1", "from": HOST_1, "to": HOST_2, "action": "migrate", "state": "stayed",
          "reason": "moved by hand meanwhile" }
    ]);
    check(
        render::maintenance(&read(json), now()),
        expect![[r#"
        Id:      019300aa-0000-7000-8000-0000000000d1
        Host:    host-1
        State:   drained
        Reason:  new kernel
        Return:  exact
        Created: 5m ago by local

        VM     ACTION   STATE   NOTE
        db-1   migrate  away
        web-1  migrate  stayed  moved by hand meanwhile
    "#]],
    );
}

#[test]
fn operations_show_their_steps_and_why_they_failed() {
    let operation: Operation = read(json!({
        "id": OPERATION, "kind": "migrate", "subject": { "kind": "vm", "id": VM, "name": "db-1" }, "state": "failed",
        "progress": 0.5, "parent": null,
        "steps": [
            { "name": "prepare", "state": "done", "detail": "on host-2", "started_at": "2026-01-02T03:04:00Z",
              "ended_at": "2026-01-02T03:04:00.25Z" },
            { "name": "send", "state": "failed", "detail": "host-1 to host-2", "started_at": "2026-01-02T03:04:01Z", "ended_at": null }
        ],
        "error": {
            "type": "migration-failed", "title": "The migration failed", "status": 409,
            "detail": "the guest dirties memory faster than it can be sent", "remedy": "raise downtime_limit_ms"
        },
        "created_at": "2026-01-02T03:04:00Z", "ended_at": "2026-01-02T03:04:30Z", "actor": "admin"
    }));
    check(
        render::operations(std::slice::from_ref(&operation), now()),
        expect![[r#"
        ID                                    KIND     SUBJECT  STATE   DONE  AGE  BY     NOTE
        019300aa-0000-7000-8000-0000000000c1  migrate  db-1     failed   50%  60s  admin  the guest dirties memory faster than it can be sent
    "#]],
    );
    check(
        render::operation(&operation, now()),
        expect![[r#"
        Id:        019300aa-0000-7000-8000-0000000000c1
        Kind:      migrate
        Subject:   vm db-1
        State:     failed, 50% done
        Asked for: 60s ago by admin
        Ended:     30s ago
        Error:     the guest dirties memory faster than it can be sent
          remedy: raise downtime_limit_ms

        STEP     STATE    TOOK  DETAIL
        prepare  done    0.2 s  on host-2
        send     failed      -  host-1 to host-2
    "#]],
    );
}

#[test]
fn migrations_show_how_far_they_are() {
    let mut ended = migration_json();
    ended["state"] = json!("committed");
    ended["phase"] = json!("completed");
    ended["progress"]["downtime_us"] = json!(8_312);
    ended["progress"]["packet_gap_us"] = json!(9_480);
    ended["progress"]["lanes"] = json!(4);
    ended["progress"]["opened_lanes"] = json!(8);
    ended["progress"]["throttle_percent"] = json!(40);
    ended["progress"]["kept_pages"] = json!(1_024);
    ended["progress"]["saved_bytes"] = json!(104_857_600);
    ended["progress"]["prefault_ms"] = json!(120);
    ended["foreseen"] = json!({
        "verdict": "converges", "took_ms": 2_100, "mib": 720, "blackout_ms": 11, "throttle_percent": 0
    });
    ended["progress"]["blackout"] = json!({
        "predicted_us": 9_000, "pause_us": 312, "save_us": 1_100, "pages_us": 2_400, "restore_us": 1_900, "commit_us": 2_600
    });
    let migrations: Vec<Migration> = [migration_json(), ended].map(read).into();
    check(
        render::migrations(&migrations, now()),
        expect![[r#"
        VM    FROM    TO      STATE      PHASE      ROUND       SENT  REMAINING         RATE  DOWNTIME  AGE  ID
        db-1  host-1  host-2  open       pre_copy       2  700.0 MiB   12.0 MiB  300.0 MiB/s         -   3s  019300aa-0000-7000-8000-0000000000b1
        db-1  host-1  host-2  committed  completed      2  700.0 MiB   12.0 MiB  300.0 MiB/s    8.3 ms   3s  019300aa-0000-7000-8000-0000000000b1
    "#]],
    );
    check(
        render::migration(&migrations[1]),
        expect![[r#"
            Id:         019300aa-0000-7000-8000-0000000000b1
            VM:         db-1
            Way:        host-1 to host-2
            State:      committed (completed)
            Round:      2
            Sent:       700.0 MiB of 1.5 GiB memory (179200 pages, 213000 zero pages)
            Kept:       1024 pages that the target still had
            Saved:      100.0 MiB by compression
            Remaining:  12.0 MiB
            Rate:       300.0 MiB/s, the guest dirties 4.0 MiB/s
            Lanes:      4 of 8
            Slowed:     the guest is kept from running for 40% of its time
            Prefault:   120 ms
            Time:       2.3 s
            Downtime:   8.3 ms (measured)
            Packet gap: 9.5 ms
            Foreseen:   converges: 2.1 s, 720.0 MiB, blackout 11 ms
            Blackout:   pause 0.3 ms, save 1.1 ms, pages 2.4 ms, restore 1.9 ms, commit 2.6 ms, predicted 9.0 ms
        "#]],
    );
}

#[test]
fn a_dry_run_says_what_would_happen_and_why_not_elsewhere() {
    let dry_run: DryRun = read(json!({
        "dry_run": true,
        "changes": ["web-1 is created", "web-1 starts on host-2"],
        "placement": {
            "host": HOST_2, "host_name": "host-2", "score": 0.8,
            "rejections": [
                { "host": HOST_1, "host_name": "host-1", "kind": "memory", "detail": "72 MiB needed, 8 MiB of 768 MiB free",
                  "remedy": "free 64 MiB on the host" }
            ]
        }
    }));
    check(
        render::dry_run(&dry_run),
        expect![[r#"
        Dry run, nothing was changed. It would:
          - web-1 is created
          - web-1 starts on host-2

        HOST TURNED DOWN  FILTER  WHY
        host-1            memory  72 MiB needed, 8 MiB of 768 MiB free
    "#]],
    );
}

#[test]
fn a_dry_run_of_a_move_says_what_will_become_of_it() {
    let summary = "will not converge under the limit of 300 ms because of its guest";
    let dry_run: DryRun = read(json!({
        "dry_run": true,
        "changes": ["db-1 moves from host-1 to host-2", format!("the migration {summary}")],
        "forecast": {
            "verdict": "will_not_converge", "summary": summary, "downtime_limit_ms": 300, "seconds": 88.4, "mib": 4096,
            "blackout_ms": 2_730, "throttle_percent": 80, "rounds": 30, "rest_bytes": 536_870_912,
            "because": { "kind": "dirties_too_fast", "detail": "the guest dirties too fast" },
            "options": [
                { "kind": "allow_post_copy", "detail": "allow post-copy" },
                { "kind": "raise_downtime_limit", "detail": "raise the downtime limit to 3010 ms", "value": 3010 }
            ],
            "measured": {
                "dirty_from": "sampled", "dirty_bytes_per_s": 536_870_912,
                "dirty_series": [{ "after_us": 500_000, "bytes": 268_435_456 }, { "after_us": 1_000_123, "bytes": 536_870_912 }],
                "vcpus": [{ "index": 0, "busy_percent": 97 }, { "index": 1, "busy_percent": 3 }],
                "resident_bytes": 1_073_741_824, "bytes_per_s": 209_715_200, "bytes_per_s_from": "pair",
                "fixed_us": 10_000, "fixed_from": "assumed"
            }
        }
    }));
    check(
        render::dry_run(&dry_run),
        expect![[r#"
        Dry run, nothing was changed. It would:
          - db-1 moves from host-1 to host-2

        Forecast:   will not converge under the limit
        Because:    the guest dirties too fast
        Given up:   1 min 28 s in 30 rounds
        To send:    4.0 GiB
        Blackout:   2730 ms, limit 300 ms
        Slowed:     by up to 80% of its time
        Dirties:    512.0 MiB/s; 256.0 MiB after 500 ms, 512.0 MiB after 1000 ms
        vCPUs busy: 0 97%, 1 3%
        Link:       200.0 MiB/s, from earlier migrations between these hosts
        Fixed cost: 10.0 ms, assumed: nothing has been measured yet
        Any one of these would help:
          - allow post-copy
          - raise the downtime limit to 3010 ms
    "#]],
    );
}

#[test]
fn events_are_listed_one_in_each_line() {
    let event: Event = read(json!({
        "revision": 42, "time": "2026-01-02T03:04:05.678Z", "kind": "vm.started", "severity": "info",
        "subject": { "kind": "vm", "id": VM, "name": "web-1" }, "message": "web-1 runs on host-2", "actor": "admin"
    }));
    check(
        render::events(std::slice::from_ref(&event)),
        expect![[r#"
        REVISION  TIME                  SEVERITY  KIND        SUBJECT  BY     MESSAGE
              42  2026-01-02T03:04:05Z  info      vm.started  web-1    admin  web-1 runs on host-2
    "#]],
    );
    check(
        render::event(&event),
        expect!["2026-01-02T03:04:05Z  info     vm.started            web-1 runs on host-2"],
    );
}

#[test]
fn an_error_names_every_field_and_the_remedy() {
    let problem: crate::resource::Problem = read(json!({
        "type": "invalid-request", "title": "The request has fields that cannot be accepted", "status": 422,
        "detail": "spec.vcpus: 9 vCPUs is outside 1..=8",
        "fields": [{ "field": "spec.vcpus", "problem": "9 vCPUs is outside 1..=8", "remedy": "choose a number from 1 to 8" }]
    }));
    check(
        problem.to_string(),
        expect![[r#"
        The request has fields that cannot be accepted
          spec.vcpus: 9 vCPUs is outside 1..=8; choose a number from 1 to 8"#]],
    );
}

#[test]
fn images_disks_and_pools_are_listed_and_shown() {
    let pool: Pool = read(json!({
        "id": POOL, "name": "shared", "shared": true, "total_bytes": 107_374_182_400u64, "free_bytes": 53_687_091_200u64,
        "hosts": [
            { "host": HOST_1, "host_name": "host-1", "trouble": null },
            { "host": HOST_2, "host_name": "host-2", "trouble": "the file system is read-only" }
        ]
    }));
    let image: Image = read(json!({
        "id": VM, "name": "debian-13", "pool": POOL, "pool_name": "shared", "state": "ready", "reason": null,
        "format": "qcow2", "virtual_bytes": 3_221_225_472u64, "file_bytes": 419_430_400, "sha256": "0".repeat(64),
        "disks": 2, "operation": null, "created_at": "2026-01-01T00:00:00Z", "changed_at": "2026-01-01T00:00:00Z"
    }));
    let disk: Disk = read(json!({
        "id": VM, "name": "web-1-root", "pool": POOL, "pool_name": "shared", "bytes": 21_474_836_480u64,
        "format": "qcow2", "image": VM, "image_name": "debian-13", "attached_to": VM, "attached_to_name": "web-1",
        "created_with": VM, "state": "ready", "reason": null, "operation": null,
        "created_at": "2026-01-01T00:00:00Z", "changed_at": "2026-01-01T00:00:00Z"
    }));
    check(
        render::pools(std::slice::from_ref(&pool)),
        expect![[r#"
        NAME    SHARED      FREE         OF  HOSTS           ID                                    NOTE
        shared  yes     50.0 GiB  100.0 GiB  host-1, host-2  019300aa-0000-7000-8000-0000000000e1  host-2: the file system is read-only
    "#]],
    );
    check(
        render::images(std::slice::from_ref(&image)),
        expect![[r#"
        NAME       STATE  POOL    FORMAT     SIZE    ON DISK  DISKS  NOTE
        debian-13  ready  shared  qcow2   3.0 GiB  400.0 MiB      2
    "#]],
    );
    check(
        render::image(&image, now()),
        expect![[r#"
        Name:    debian-13
        Id:      019300aa-0000-7000-8000-000000000001
        State:   ready
        Pool:    shared
        Format:  qcow2
        Size:    3.0 GiB, 400.0 MiB on disk
        SHA-256: 0000000000000000000000000000000000000000000000000000000000000000
        Disks:   2 based on it
        Created: 27h ago
    "#]],
    );
    check(
        render::disks(std::slice::from_ref(&disk)),
        expect![[r#"
        NAME        STATE  POOL    FORMAT      SIZE  IMAGE      VM     NOTE
        web-1-root  ready  shared  qcow2   20.0 GiB  debian-13  web-1
    "#]],
    );
    check(
        render::disk(&disk, now()),
        expect![[r#"
        Name:      web-1-root
        Id:        019300aa-0000-7000-8000-000000000001
        State:     ready
        Pool:      shared
        Format:    qcow2
        Size:      20.0 GiB
        Image:     debian-13
        VM:        web-1
        Goes with: its VM, unless --keep-disks is given
        Created:   27h ago
    "#]],
    );
}

#[test]
fn networks_show_their_leases() {
    let network: Network = read(json!({
        "id": VM, "name": "web", "transport": { "kind": "vxlan", "vni": 100 }, "mtu": 1450,
        "subnet": { "cidr": "10.1.2.0/24", "gateway": "10.1.2.1", "dns": ["10.1.2.1", "9.9.9.9"] },
        "leases": [{ "address": "10.1.2.2", "vm": VM, "vm_name": "web-1" }], "vms": 1,
        "created_at": "2026-01-01T00:00:00Z", "changed_at": "2026-01-01T00:00:00Z"
    }));
    check(
        render::networks(std::slice::from_ref(&network)),
        expect![[r#"
            NAME  TRANSPORT   MTU  SUBNET       LEASES  VMS
            web   vxlan 100  1450  10.1.2.0/24       1    1
        "#]],
    );
    check(
        render::network(&network),
        expect![[r#"
        Name:      web
        Id:        019300aa-0000-7000-8000-000000000001
        Transport: vxlan 100
        MTU:       1450
        Subnet:    10.1.2.0/24
        Gateway:   10.1.2.1
        DNS:       10.1.2.1, 9.9.9.9
        VMs:       1

        ADDRESS   VM
        10.1.2.2  web-1
    "#]],
    );
}

#[test]
fn a_vm_is_shown_with_its_disks_and_cards() {
    let mut json = vm_json("web-1", "running");
    json["disks"] = json!([{
        "name": "root", "disk": VM, "disk_name": "web-1-root", "pool": POOL, "pool_name": "shared",
        "bytes": 21_474_836_480u64, "image_name": "debian-13", "access": "read_write"
    }]);
    json["nics"] = json!([{
        "name": "nic-1", "network": VM, "network_name": "web", "mac": "52:54:00:12:34:56", "address": "10.1.2.2",
        "queue_pairs": 2
    }]);
    check(
        render::vm(&read::<Vm>(json), now()),
        expect![[r#"
        Name:        web-1
        Id:          019300aa-0000-7000-8000-000000000001
        State:       running
        Wanted:      running
        Host:        host-1 (epoch 3)
        vCPUs:       2 (x86-64-v2)
        Memory:      1.5 GiB
        Boots:       the pilot
        Lease:       watched
        Maintenance: migrate
        Post-copy:   allowed
        Uses:        12% CPU, 70.0 MiB resident, 812 exits/s, dirties 4.0 MiB/s
        Created:     27h ago
        Changed:     42s ago

        DISK      SIZE  POOL    IMAGE      ACCESS      NAME
        root  20.0 GiB  shared  debian-13  read_write  web-1-root

        NIC    NETWORK  MAC                ADDRESS   QUEUES
        nic-1  web      52:54:00:12:34:56  10.1.2.2       2
    "#]],
    );
}

#[test]
fn a_list_of_snapshots_says_which_depend_on_disks() {
    let snapshot = |name: &str, state: &str, needs_disks: bool| {
        read::<Snapshot>(json!({
            "id": OPERATION, "name": name, "vm": VM, "vm_name": "db-1", "pool": POOL, "pool_name": "fast",
            "state": state, "reason": null, "needs_disks": needs_disks, "bytes": 178_346_000, "pause_us": 4_494,
            "operation": null, "created_at": "2026-01-02T03:04:18Z", "changed_at": "2026-01-02T03:04:20Z"
        }))
    };
    let snapshots = [
        snapshot("before-upgrade", "ready", true),
        snapshot("warm", "creating", false),
    ];
    check(
        render::snapshots(&snapshots, now()),
        expect![[r#"
        NAME            STATE     POOL       SIZE   PAUSE  AGE  DISKS                NOTE
        before-upgrade  ready     fast  170.1 MiB  4.5 ms  42s  until claimed again
        warm            creating  fast          -       -  42s  none
    "#]],
    );
}
