//! `godwit host …`, except `godwit host run`.

use super::words::size;
use super::{ChangeOptions, Failure, Session, render};
use crate::resource::{
    ChangeHost, CreateJoinToken, DryRun, Host, HostAccepted, HostReason, HostState, JoinToken,
    LinkBandwidth,
};
use clap::{Args, Subcommand};
use jiff::Timestamp;

/// Commands about hosts.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// List hosts.
    #[command(visible_alias = "ls")]
    List {
        /// Only hosts in this state.
        #[arg(long, value_enum)]
        state: Option<HostState>,
    },
    /// Show a host.
    Show {
        /// Name or id.
        host: String,
    },
    /// Change what migrations may use of a host and its links.
    Set(SetArgs),
    /// Let no new VM be placed on a host.
    Cordon(CordonArgs),
    /// Let VMs be placed on a host again.
    Uncordon(NamedArgs),
    /// Move everything off a host that answers but is failing; it stays cordoned.
    Evacuate(EvacuateArgs),
    /// Hand a host's running VMs to VMMs of the program that its agent runs now, after an upgrade of it; each guest
    /// stands still for a moment.
    Upgrade(UpgradeArgs),
    /// Take an empty host out of the pool.
    Remove(NamedArgs),
    /// Confirm that a host that is given up is off, so that its VMs start elsewhere. Whoever says so while it runs
    /// makes VMs run twice.
    ConfirmOff(NamedArgs),
    /// Make a one-time token with which a host can join the pool.
    Token {
        /// Minutes the token can be used.
        #[arg(long, default_value_t = 60)]
        ttl_minutes: u64,
    },
}

/// A host.
#[derive(Debug, Args)]
pub struct NamedArgs {
    /// Name or id.
    host: String,
    /// Only print what would happen.
    #[arg(long)]
    dry_run: bool,
}

/// Changes of a host.
#[derive(Debug, Args)]
#[group(required = true, multiple = true, id = "changes", args = ["migration_bandwidth", "link"])]
pub struct SetArgs {
    #[command(flatten)]
    named: NamedArgs,
    /// Most that all migrations together may send from it per second, and as much to it, such as 500M; `none` lifts it.
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    migration_bandwidth: Option<u64>,
    /// The same for the link to another host, each way; may be repeated.
    #[arg(long, value_name = "HOST=SIZE", value_parser = link)]
    link: Vec<LinkBandwidth>,
}

/// 0 is no limit, for the API as well.
fn bandwidth(text: &str) -> Result<u64, String> {
    match text {
        "none" | "0" => Ok(0),
        text => size(text),
    }
}

fn link(text: &str) -> Result<LinkBandwidth, String> {
    let (host, limit) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is no link; write it as host-2=500M"))?;
    Ok(LinkBandwidth {
        host: host.to_owned(),
        bytes_per_s: bandwidth(limit)?,
    })
}

/// A host to cordon.
#[derive(Debug, Args)]
pub struct CordonArgs {
    #[command(flatten)]
    named: NamedArgs,
    /// Why; shown to everyone who looks.
    #[arg(long, default_value = "")]
    reason: String,
}

/// A host to evacuate.
#[derive(Debug, Args)]
pub struct EvacuateArgs {
    /// Name or id.
    host: String,
    /// Why; shown to everyone who looks.
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    change: ChangeOptions,
}

/// A host to upgrade.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// Name or id.
    host: String,
    #[command(flatten)]
    change: ChangeOptions,
}

impl HostCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List { state } => {
                let mut hosts = session.client.list::<Host>("/v1/hosts").await?;
                hosts
                    .items
                    .retain(|host| state.is_none_or(|state| host.state == state));
                hosts.items.sort_by(|a, b| a.name.cmp(&b.name));
                session.print(&hosts, |hosts| render::hosts(&hosts.items))
            }
            Self::Show { host } => {
                let host: Host = session.client.get(&path(&host)).await?;
                session.print(&host, |host| render::host(host, Timestamp::now()))
            }
            Self::Set(arguments) => set(session, arguments).await,
            Self::Cordon(arguments) => {
                mark(
                    session,
                    &arguments.named,
                    "cordon",
                    &HostReason {
                        reason: arguments.reason,
                    },
                )
                .await
            }
            Self::Uncordon(arguments) => {
                mark(session, &arguments, "uncordon", &HostReason::default()).await
            }
            Self::Evacuate(arguments) => evacuate(session, arguments).await,
            Self::Upgrade(arguments) => upgrade(session, arguments).await,
            Self::ConfirmOff(arguments) => {
                mark(session, &arguments, "confirm-off", &HostReason::default()).await
            }
            Self::Remove(arguments) => remove(session, arguments).await,
            Self::Token { ttl_minutes } => {
                let body = CreateJoinToken {
                    ttl_s: Some(ttl_minutes.saturating_mul(60)),
                };
                let token: JoinToken = session.client.post("/v1/join-tokens", &body).await?;
                session.print(&token, |token| {
                    format!(
                        "Run this on the new host before {:.0}; the token works once:\n\n  {}\n",
                        token.expires_at, token.command
                    )
                })
            }
        }
    }
}

fn path(host: &str) -> String {
    format!("/v1/hosts/{host}")
}

async fn set(session: &Session, arguments: SetArgs) -> Result<(), Failure> {
    let change = ChangeOptions {
        dry_run: arguments.named.dry_run,
        wait: false,
    };
    let path = change.path(path(&arguments.named.host));
    let body = ChangeHost {
        migration_bandwidth_bytes_per_s: arguments.migration_bandwidth,
        link_bandwidth: arguments.link,
    };
    if change.dry_run {
        return session.print_dry_run(&session.client.patch::<DryRun>(&path, &body).await?);
    }
    let accepted: HostAccepted = session.client.patch(&path, &body).await?;
    session.print(&accepted.host, |host| render::host(host, Timestamp::now()))
}

async fn mark(
    session: &Session,
    arguments: &NamedArgs,
    verb: &str,
    body: &HostReason,
) -> Result<(), Failure> {
    let change = ChangeOptions {
        dry_run: arguments.dry_run,
        wait: false,
    };
    let path = change.path(format!("{}/{verb}", path(&arguments.host)));
    if change.dry_run {
        return session.print_dry_run(&session.client.post::<DryRun>(&path, body).await?);
    }
    let accepted: HostAccepted = session.client.post(&path, body).await?;
    session.print(&accepted.host, |host| {
        format!("{} is {}.\n", host.name, super::words::name(host.state))
    })
}

async fn evacuate(session: &Session, arguments: EvacuateArgs) -> Result<(), Failure> {
    let EvacuateArgs {
        host,
        reason,
        change,
    } = arguments;
    let path = change.path(format!("{}/evacuate", path(&host)));
    let body = HostReason { reason };
    if change.dry_run {
        return session.print_dry_run(&session.client.post::<DryRun>(&path, &body).await?);
    }
    let accepted: HostAccepted = session.client.post(&path, &body).await?;
    session
        .conclude(change, accepted.operation, || {
            format!("{host} is empty and cordoned.\n")
        })
        .await
}

async fn upgrade(session: &Session, arguments: UpgradeArgs) -> Result<(), Failure> {
    let UpgradeArgs { host, change } = arguments;
    let path = change.path(format!("{}/upgrade", path(&host)));
    let body = HostReason::default();
    if change.dry_run {
        return session.print_dry_run(&session.client.post::<DryRun>(&path, &body).await?);
    }
    let accepted: HostAccepted = session.client.post(&path, &body).await?;
    session
        .conclude(change, accepted.operation, || {
            format!("Every VM of {host} runs in a VMM of its agent's program.\n")
        })
        .await
}

async fn remove(session: &Session, arguments: NamedArgs) -> Result<(), Failure> {
    let change = ChangeOptions {
        dry_run: arguments.dry_run,
        wait: false,
    };
    let path = change.path(path(&arguments.host));
    if change.dry_run {
        return session.print_dry_run(&session.client.delete::<DryRun>(&path).await?);
    }
    let _: Option<HostAccepted> = session.client.delete(&path).await?;
    let removed = || format!("{} is no longer part of the pool.\n", arguments.host);
    session.conclude(change, None, removed).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_size_or_none() {
        assert_eq!(bandwidth("500M"), Ok(500 << 20));
        assert_eq!((bandwidth("none"), bandwidth("0")), (Ok(0), Ok(0)));
        assert!(bandwidth("fast").is_err());
    }

    #[test]
    fn a_link_is_named_by_the_host_at_its_other_end() {
        let expected = LinkBandwidth {
            host: "host-2".into(),
            bytes_per_s: 1 << 30,
        };
        assert_eq!(link("host-2=1G"), Ok(expected));
        assert!(link("host-2").is_err() && link("host-2=").is_err());
    }
}
