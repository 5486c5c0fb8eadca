//! `godwit maintenance …`.

use super::{ChangeOptions, Failure, Session, render, wait, words};
use crate::resource::{
    CancelMaintenance, CreateMaintenance, DryRun, Maintenance, MaintenanceAccepted,
    MaintenanceState, ReturnPolicy, VmMaintenancePolicy, VmOverride,
};
use clap::{Args, Subcommand, ValueEnum};
use jiff::Timestamp;

/// Commands about maintenances.
#[derive(Debug, Subcommand)]
pub enum MaintenanceCommand {
    /// List maintenances.
    #[command(visible_alias = "ls")]
    List {
        /// Also those that are over.
        #[arg(long)]
        all: bool,
    },
    /// Show a maintenance with its plan.
    Show {
        /// Id, or the name of the host.
        maintenance: String,
    },
    /// Plan a maintenance of a host; with --dry-run only print the plan.
    Create(CreateArgs),
    /// Move every VM off the host.
    Start(NamedArgs),
    /// Say that the work is over: the host is checked and VMs come home.
    Finish(NamedArgs),
    /// Call a maintenance off.
    Cancel {
        #[command(flatten)]
        named: NamedArgs,
        /// Leave VMs that have moved where they are.
        #[arg(long)]
        no_restore: bool,
    },
}

/// A maintenance to be.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name or id of the host.
    host: String,
    /// Why; shown to everyone who looks.
    #[arg(long, default_value = "")]
    reason: String,
    /// What happens afterwards to the VMs that left.
    #[arg(long = "return", value_enum, default_value_t)]
    returning: ReturnPolicy,
    /// Another policy for one VM, such as `web-1=stop-and-return`.
    #[arg(long = "override", value_name = "VM=POLICY", value_parser = parse_override)]
    overrides: Vec<VmOverride>,
    /// Start it at once.
    #[arg(long, conflicts_with = "dry_run")]
    start: bool,
    /// Wait until the host is drained; only with --start.
    #[arg(long, requires = "start")]
    wait: bool,
    /// Only print the plan.
    #[arg(long)]
    dry_run: bool,
}

/// A maintenance.
#[derive(Debug, Args)]
pub struct NamedArgs {
    /// Id, or the name of the host.
    maintenance: String,
    #[command(flatten)]
    change: ChangeOptions,
}

fn parse_override(text: &str) -> Result<VmOverride, String> {
    let (vm, policy) = text.split_once('=').ok_or("write it as VM=POLICY")?;
    Ok(VmOverride {
        vm: vm.to_owned(),
        policy: VmMaintenancePolicy::from_str(policy, false)?,
    })
}

impl MaintenanceCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List { all } => {
                let mut list = session
                    .client
                    .list::<Maintenance>("/v1/maintenances")
                    .await?;
                list.items
                    .retain(|maintenance| all || !maintenance.state.is_final());
                session.print(&list, |list| {
                    render::maintenances(&list.items, Timestamp::now())
                })
            }
            Self::Show { maintenance } => {
                let maintenance = find(session, &maintenance).await?;
                session.print(&maintenance, |maintenance| {
                    render::maintenance(maintenance, Timestamp::now())
                })
            }
            Self::Create(arguments) => create(session, arguments).await,
            Self::Start(named) => {
                start(
                    session,
                    &find(session, &named.maintenance).await?,
                    named.change,
                )
                .await
            }
            Self::Finish(named) => {
                let maintenance = find(session, &named.maintenance).await?;
                let over = |m: &Maintenance| {
                    matches!(
                        m.state,
                        MaintenanceState::Done
                            | MaintenanceState::Failed
                            | MaintenanceState::Working
                    )
                };
                act(
                    session,
                    &maintenance,
                    "finish",
                    &serde_json::json!({}),
                    named.change,
                    over,
                    &[MaintenanceState::Done],
                )
                .await
            }
            Self::Cancel { named, no_restore } => {
                let maintenance = find(session, &named.maintenance).await?;
                let body = CancelMaintenance {
                    restore: !no_restore,
                };
                let over = |m: &Maintenance| m.state.is_final();
                act(
                    session,
                    &maintenance,
                    "cancel",
                    &body,
                    named.change,
                    over,
                    &[MaintenanceState::Cancelled],
                )
                .await
            }
        }
    }
}

/// The maintenance with this id, or the one of this host that is not over.
async fn find(session: &Session, name: &str) -> Result<Maintenance, Failure> {
    if uuid::Uuid::parse_str(name).is_ok() {
        return Ok(session
            .client
            .get(&format!("/v1/maintenances/{name}"))
            .await?);
    }
    let list = session
        .client
        .list::<Maintenance>("/v1/maintenances")
        .await?;
    let latest = list
        .items
        .into_iter()
        .rfind(|maintenance| maintenance.host_name == name && !maintenance.state.is_final());
    latest.ok_or_else(|| {
        let problem = godwit_wire::problem::Problem::not_found("maintenance of host", name)
            .with_remedy("`godwit maintenance list --all` shows the maintenances there are");
        Failure::Client(crate::client::ClientError::Problem(problem.into()))
    })
}

async fn create(session: &Session, arguments: CreateArgs) -> Result<(), Failure> {
    let CreateArgs {
        host,
        reason,
        returning,
        overrides,
        start: starts,
        wait,
        dry_run,
    } = arguments;
    let body = CreateMaintenance {
        host,
        reason,
        returning,
        overrides,
    };
    let change = ChangeOptions { dry_run, wait };
    let path = change.path("/v1/maintenances".to_owned());
    if dry_run {
        let dry_run: DryRun = session.client.post(&path, &body).await?;
        return session.print(&dry_run, render::dry_run);
    }
    let accepted: MaintenanceAccepted = session.client.post(&path, &body).await?;
    if starts {
        return start(session, &accepted.maintenance, change).await;
    }
    session.print(&accepted.maintenance, |maintenance| {
        render::maintenance(maintenance, Timestamp::now())
    })
}

async fn start(
    session: &Session,
    maintenance: &Maintenance,
    change: ChangeOptions,
) -> Result<(), Failure> {
    let drained = [MaintenanceState::Drained, MaintenanceState::Working];
    let over = |m: &Maintenance| {
        drained.contains(&m.state)
            || m.state.is_final()
            || matches!(
                m.state,
                MaintenanceState::Failed | MaintenanceState::Blocked
            )
    };
    act(
        session,
        maintenance,
        "start",
        &serde_json::json!({}),
        change,
        over,
        &drained,
    )
    .await
}

async fn act(
    session: &Session,
    maintenance: &Maintenance,
    verb: &str,
    body: &impl serde::Serialize,
    change: ChangeOptions,
    over: impl Fn(&Maintenance) -> bool,
    wanted: &[MaintenanceState],
) -> Result<(), Failure> {
    let path = change.path(format!("/v1/maintenances/{}/{verb}", maintenance.id));
    if change.dry_run {
        return session.print_dry_run(&session.client.post::<DryRun>(&path, body).await?);
    }
    let accepted: MaintenanceAccepted = session.client.post(&path, body).await?;
    if !change.wait {
        return session.print(&accepted.maintenance, |maintenance| {
            format!(
                "Maintenance of {}: {}.\n",
                maintenance.host_name,
                words::name(maintenance.state)
            )
        });
    }
    // The answer was made after the change, so what is read from now on is not the state before it.
    let ended = wait::for_maintenance(&session.client, maintenance.id, over).await?;
    session.print(&ended, |maintenance| {
        render::maintenance(maintenance, Timestamp::now())
    })?;
    if wanted.contains(&ended.state) {
        return Ok(());
    }
    Err(Failure::Maintenance {
        remedy: format!("`godwit maintenance show {}` tells more", ended.id),
        state: words::name(ended.state),
        detail: ended
            .detail
            .map(|detail| format!(": {detail}"))
            .unwrap_or_default(),
        host: ended.host_name,
    })
}
