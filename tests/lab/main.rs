//! Stock Linux guests on emulated hosts: what the product does with them, shown on any machine.
//!
//! QEMU without KVM plays the hosts, each with a stock Debian kernel, `kvm_amd` and our programs; a virtual switch
//! joins them. `tests/run lab` is the way in; see `docs/guests.md`. A module uses only the modules above it in this
//! list.

mod pool;

mod guest;

mod readme;

mod debian;

mod scenario;

mod scenarios;

use anyhow::bail;
use futures_util::future::try_join;
use godwit_tests::lab::packages::lab_dir;
use godwit_tests::skip;
use guest::Guest;
use scenario::{Extent, Lab, Outcome, Scenario};
use scenarios::{DOWNTIME_LIMIT_MS, SCENARIOS};
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "usage: lab [core | try | SCENARIO...]

Without arguments all scenarios run; `core` is the short selection that every test run has.
`try` starts a pool with two hosts and a guest on each for you and ends it at Ctrl-C.";

/// How long the core may make every test run on a machine that does nothing else.
const CORE_ALLOWANCE: Duration = Duration::from_secs(600);

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = tokio::select! {
        done = run(&arguments) => done,
        _ = tokio::signal::ctrl_c() => Ok(ExitCode::FAILURE),
    };
    done.unwrap_or_else(|error| {
        eprintln!("lab: {error:#}");
        ExitCode::FAILURE
    })
}

async fn run(arguments: &[String]) -> anyhow::Result<ExitCode> {
    if arguments == ["--help"] {
        println!("{USAGE}\n\n{}", names());
        return Ok(ExitCode::SUCCESS);
    }
    if arguments == ["try"] {
        return try_out().await;
    }
    let scenarios = select(arguments)?;
    let mut lab = match Lab::prepare(&lab_dir(), &scenarios).await {
        Err(reason) if arguments == ["core"] => return Ok(skip_all(&scenarios, &reason)),
        prepared => prepared?,
    };
    let outcomes = lab.run(&scenarios).await;
    let allowance = (arguments == ["core"]).then_some(CORE_ALLOWANCE);
    Ok(report(&outcomes, allowance))
}

fn select(arguments: &[String]) -> anyhow::Result<Vec<&'static Scenario>> {
    let selected = |scenario: &&Scenario| match arguments {
        [] => true,
        [only] if only == "core" => scenario.extent == Extent::Core,
        names => names.iter().any(|name| name == scenario.name),
    };
    for name in arguments {
        if name != "core" && !SCENARIOS.iter().any(|scenario| scenario.name == name) {
            bail!("{USAGE}\n\n{}", names());
        }
    }
    Ok(SCENARIOS.iter().filter(selected).collect())
}

fn names() -> String {
    let names: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
    format!("scenarios: {}", names.join(", "))
}

/// A pool with a guest on each host, for somebody to try the product on.
async fn try_out() -> anyhow::Result<ExitCode> {
    let mut lab = Lab::prepare(&lab_dir(), &[]).await?;
    let running = lab.start_pool().await?;
    let pool = &running.pool;
    eprintln!("lab: the pool is up; its guests boot");
    let _guests = try_join(
        Guest::create_for_people(pool, "guest-1", "host-1"),
        Guest::create_for_people(pool, "guest-2", "host-2"),
    )
    .await?;
    let access = pool
        .environment()
        .map(|(name, value)| format!("{name}={value}"))
        .join(" ");
    let godwit = godwit_tests::program::godwit().display();
    println!(
        "Two hosts are up, each with a guest that runs a stock Debian kernel. In another terminal:

    export {access}
    alias godwit={godwit}
    godwit vm list
    godwit vm console guest-1      # Return for a prompt; Ctrl-] leaves
    godwit vm migrate guest-1 --to host-2 --downtime-limit-ms {DOWNTIME_LIMIT_MS} --wait

Emulated hosts are slow. Ctrl-C ends everything."
    );
    std::future::pending().await
}

/// The core is part of every test run, also where there are no Debian packages to be had.
fn skip_all(scenarios: &[&Scenario], reason: &anyhow::Error) -> ExitCode {
    for scenario in scenarios {
        skip::skip_named(
            &format!("lab {}", scenario.name),
            format!("{reason:#}").replace('\n', " "),
        );
    }
    println!("lab: 0 passed, 0 failed, {} skipped", scenarios.len());
    ExitCode::SUCCESS
}

/// Prints the table, and that it took longer than it is allowed to; the last line counts.
fn report(outcomes: &[Outcome], allowance: Option<Duration>) -> ExitCode {
    let failed = outcomes
        .iter()
        .filter(|outcome| outcome.result.is_err())
        .count();
    println!(
        "\n{:<18} {:>8}  {:<6}  shows",
        "scenario", "seconds", "result"
    );
    for outcome in outcomes {
        println!(
            "{:<18} {:>8.1}  {:<6}  {}",
            outcome.name,
            outcome.took.as_secs_f32(),
            if outcome.result.is_ok() {
                "passed"
            } else {
                "FAILED"
            },
            outcome.shows
        );
    }
    let took: Duration = outcomes.iter().map(|outcome| outcome.took).sum();
    if let Some(allowance) = allowance.filter(|allowance| took > *allowance) {
        // How busy the machine is decides too, so it is no failure.
        println!(
            "*** THE LAB'S CORE IS TOO SLOW: it took {:.0} s, and may take {} s",
            took.as_secs_f32(),
            allowance.as_secs()
        );
    }
    println!("lab: {} passed, {failed} failed", outcomes.len() - failed);
    if failed == 0 && !outcomes.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
