//! The process around one machine.
//!
//! ```text
//! args        command line
//! admission   pure: which request is allowed in which state
//! driver      the one thread that changes the machine's state
//! api         HTTP + JSON on a UNIX socket
//! serial      the console: a UNIX socket, or this process's terminal
//! ```

mod admission;
mod api;
mod args;
mod device_args;
mod driver;
mod serial;

pub use args::VmmArgs;
pub use device_args::DeviceArgs;

use driver::{Driver, DriverHandle, Outcome};
use godwit_channel::uds;
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::{Command, CreateRequest, RestoreRequest, StopReason, VerifyMemory};
use std::io;

/// The process ends with an error.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The command line asks for something that cannot be.
    #[error("{0}")]
    Refused(Problem),
    /// A socket cannot be listened on.
    #[error("a socket cannot be set up")]
    Socket(#[from] uds::BindError),
    /// The operating system refused something.
    #[error("{what}")]
    Os {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The guest cannot go on.
    #[error("the guest cannot go on: {0}")]
    Fault(String),
}

/// Runs one VMM until its machine is gone or it is told to end. `builtin` is the pilot's ELF image.
pub fn run(args: VmmArgs, builtin: &'static [u8]) -> Result<(), VmmError> {
    let os = |what| move |source| VmmError::Os { what, source };
    if args.die_with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
            .map_err(|error| os("the parent's death cannot be watched")(error.into()))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(os("the runtime cannot be started"))?;
    let outcome = runtime.block_on(serve(args, builtin));
    // Console input may sit in a read that nothing ends.
    runtime.shutdown_background();
    outcome
}

async fn serve(args: VmmArgs, builtin: &'static [u8]) -> Result<(), VmmError> {
    let os = |what| move |source| VmmError::Os { what, source };
    let (driver, mut ended) =
        DriverHandle::start(builtin).map_err(os("the driver cannot be started"))?;
    let terminate = terminate_signal().map_err(os("signals cannot be watched"))?;

    // Both sockets are bound before anything is served, so a caller that sees the API has the console too.
    let api = args
        .api_socket
        .as_deref()
        .map(uds::Listener::bind)
        .transpose()?;
    let console = args
        .serial_socket
        .as_deref()
        .map(uds::Listener::bind)
        .transpose()?;
    let (close, closed) = tokio::sync::watch::channel(());
    if let Some(listener) = console {
        tokio::spawn(serial::serve(listener, driver.clone()));
    }
    let api_task = api.map(|listener| {
        let mut closed = closed.clone();
        let router = api::router(driver.clone());
        tokio::spawn(uds::serve(listener, router, async move {
            let _ = closed.changed().await;
        }))
    });

    let outcome = tokio::select! {
        outcome = ended.recv() => Ok(outcome.unwrap_or(Outcome::Dismissed)),
        () = terminate => Ok(Outcome::Dismissed),
        outcome = run_alone(&args, &driver) => outcome,
    };
    drop(close);
    if let Some(task) = api_task {
        let _ = task.await;
    }
    driver.dismiss().await;
    for socket in [&args.api_socket, &args.serial_socket]
        .into_iter()
        .flatten()
    {
        let _ = std::fs::remove_file(socket);
    }
    match outcome? {
        Outcome::Dismissed | Outcome::Stopped(_) => Ok(()),
        Outcome::Fault(detail) => Err(VmmError::Fault(detail)),
    }
}

/// A VMM that was started with a machine on its command line boots it and ends with it; one that is commanded
/// through its socket waits for commands.
async fn run_alone(args: &VmmArgs, driver: &DriverHandle) -> Result<Outcome, VmmError> {
    let (vm, epoch) = (VmId::fresh(), Epoch(1));
    let begin = match (&args.restore, args.spec()) {
        (Some(directory), _) => {
            let request = RestoreRequest {
                vm,
                epoch,
                lease: None,
                attachments: Default::default(),
                directory: std::path::absolute(directory).unwrap_or_else(|_| directory.clone()),
                verify: if args.verify {
                    VerifyMemory::Full
                } else {
                    VerifyMemory::Changed
                },
            };
            let driver = driver.clone();
            tokio::task::spawn_blocking(move || driver.restore(request))
                .await
                .unwrap_or_else(|error| Err(Problem::internal(error.to_string())))
                .map_err(VmmError::Refused)?;
            Driver::resume
        }
        (None, Some(spec)) => {
            let request = CreateRequest {
                attachments: Default::default(),
                vm,
                epoch,
                spec,
                lease: None,
            };
            driver
                .call(|d| d.create(request))
                .await
                .map_err(VmmError::Refused)?;
            Driver::boot
        }
        (None, None) => return std::future::pending().await,
    };
    // What is typed from now on waits in the serial port until the guest reads it.
    let terminal = args
        .serial_socket
        .is_none()
        .then(|| serial::attach_terminal(driver));
    driver
        .call(move |d| begin(d, Command { epoch }))
        .await
        .map_err(VmmError::Refused)?;
    let outcome = match driver.wait_until_over().await {
        Outcome::Stopped(StopReason::Failed { detail }) => Outcome::Fault(detail),
        outcome => outcome,
    };
    if let Some(terminal) = terminal {
        terminal.finish(driver).await;
    }
    Ok(outcome)
}

fn terminate_signal() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
