//! `godwit demo`: a whole pool on this machine, and the main job done before the operator's eyes.
//!
//! ```text
//! godwit demo ──▶ godwit server                     (one temporary directory holds everything)
//!             ├─▶ godwit host run  host-1 ──▶ godwit vmm …
//!             ├─▶ godwit host run  host-2 ──▶ godwit vmm …
//!             └─▶ godwit host run  host-3 ──▶ godwit vmm …
//! ```
//! It speaks to the pool through the REST API only, as an operator's own program would. However it ends, it leaves
//! no process, socket or file behind. Where guests cannot run, `--lab` offers emulated hosts instead.

mod machine;

mod lab;

mod pool;

mod shell;

mod guests;

mod table;

mod check;

use crate::client::ClientError;
use lab::LabError;
use machine::KvmError;
use pool::{Pool, PoolError, PoolPlan};
use shell::ShellError;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// Longest time `--check` may take before it is called off.
const CHECK_TIME_LIMIT: Duration = Duration::from_secs(240);

/// Options of the demo.
#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    /// Do the main job unattended and check every part of it: fill and dirty guest memory, take host-1 into
    /// maintenance, verify every guest, bring the VMs home, verify again. The exit status says whether all held.
    #[arg(long)]
    check: bool,
    /// Start two emulated hosts, each with a stock Debian guest, for machines without a usable /dev/kvm. They are built
    /// from a checkout's `tests/run` and Debian packages, and slow.
    #[arg(long, conflicts_with_all = ["check", "hosts", "api", "state_dir"])]
    lab: bool,
    /// Number of hosts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=8), value_name = "COUNT")]
    hosts: u8,
    /// Where the REST API and the console listen; a free port is taken when this one is not free.
    #[arg(long, default_value = "127.0.0.1:7070", value_name = "ADDRESS")]
    api: SocketAddr,
    /// Directory for state and logs, kept afterwards; a temporary one when absent.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// Why the demo could not go on.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Guests cannot run here.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The lab cannot be started.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The API demands TLS and a token beyond loopback, which a demo does without.
    #[error(
        "the demo's API cannot listen on {address}, which can be reached from other machines\n  remedy: choose a loopback address, such as 127.0.0.1:7070"
    )]
    NotLoopback {
        /// What was asked for.
        address: SocketAddr,
    },
    /// A process of the pool did not do its part.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The API refused.
    #[error("{action}")]
    Api {
        /// What was tried.
        action: String,
        /// What the API said.
        #[source]
        source: ClientError,
    },
    /// A guest did not answer as it should.
    #[error("guest {vm}")]
    Guest {
        /// Which guest.
        vm: String,
        /// What happened.
        #[source]
        source: ShellError,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {limit_s} s")]
    TooSlow {
        /// What was waited for.
        what: String,
        /// For how long.
        limit_s: u64,
    },
    /// The check found that something does not hold.
    #[error("the check failed:\n  - {}", failures.join("\n  - "))]
    CheckFailed {
        /// Everything that did not hold.
        failures: Vec<String>,
    },
    /// Ctrl-C during the check.
    #[error("interrupted")]
    Interrupted,
    /// Something was left behind.
    #[error("the demo left something behind:\n  - {}", left.join("\n  - "))]
    Leftovers {
        /// What.
        left: Vec<String>,
    },
    /// Signals cannot be received.
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
}

impl DemoError {
    fn api(action: impl Into<String>) -> impl FnOnce(ClientError) -> Self {
        let action = action.into();
        |source| Self::Api { action, source }
    }
}

/// Runs the demo until Ctrl-C, or the check until its end. The lab takes this process over.
pub async fn run(arguments: DemoArgs) -> Result<(), DemoError> {
    if arguments.lab {
        return Err(lab::become_lab().into());
    }
    if !arguments.api.ip().is_loopback() {
        return Err(DemoError::NotLoopback {
            address: arguments.api,
        });
    }
    machine::check_kvm()?;
    let mut terminate = signal(SignalKind::terminate()).map_err(DemoError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DemoError::Signals)?;
    let began = Instant::now();
    let mut pool = Pool::new(PoolPlan {
        hosts: arguments.hosts,
        api: arguments.api,
        state_dir: arguments.state_dir,
    })?;
    let outcome = tokio::select! {
        outcome = show(&mut pool, arguments.check) => outcome,
        _ = interrupt.recv() => stopped(arguments.check),
        _ = terminate.recv() => stopped(arguments.check),
    };
    if outcome.is_err() {
        pool.print_log_tails();
    }
    eprintln!("Stopping…");
    let left = pool.tear_down().await;
    match (outcome, left.is_empty()) {
        (Err(error), _) => Err(error),
        (Ok(()), false) => Err(DemoError::Leftovers { left }),
        (Ok(()), true) => {
            if arguments.check {
                println!(
                    "All held, in {:.1} s. Nothing is left behind.",
                    began.elapsed().as_secs_f64()
                );
            } else {
                println!("Nothing is left behind.");
            }
            Ok(())
        }
    }
}

/// Ctrl-C is how a demo ends, but not how a check passes.
fn stopped(check: bool) -> Result<(), DemoError> {
    if check {
        Err(DemoError::Interrupted)
    } else {
        Ok(())
    }
}

async fn show(pool: &mut Pool, check: bool) -> Result<(), DemoError> {
    println!("Starting a control plane and {} hosts…", pool.host_count());
    pool.start().await?;
    println!("Console: {}/", pool.client().server());
    let guests = guests::create(pool.client(), pool.host_count()).await?;
    let mut guests = guests::put_to_work(pool.client(), guests).await?;
    guests::print(&guests);
    if check {
        return match tokio::time::timeout(CHECK_TIME_LIMIT, check::run(pool.client(), &mut guests))
            .await
        {
            Ok(outcome) => outcome,
            Err(_) => Err(DemoError::TooSlow {
                what: "the check".to_owned(),
                limit_s: CHECK_TIME_LIMIT.as_secs(),
            }),
        };
    }
    println!(
        "\nOpen the console at {0}/ or try, in another terminal:\n\n  \
         export GODWIT_SERVER={0}\n  \
         godwit vm list\n  \
         godwit maintenance create host-1 --reason \"new kernel\" --start --wait\n  \
         godwit vm console web-1\n  \
         godwit maintenance finish host-1 --wait\n\n\
         Ctrl-C stops everything and leaves nothing behind.",
        pool.client().server()
    );
    Err(pool.wait_for_a_death().await)
}
