//! `godwit network …`.

use super::{ChangeOptions, Failure, Session, render};
use crate::resource::{CreateNetwork, DryRun, Network, NetworkAccepted, Subnet, Transport};
use clap::{Args, Subcommand};

/// Commands about networks.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// List networks.
    #[command(visible_alias = "ls")]
    List,
    /// Show a network and its leases.
    Show {
        /// Name or id.
        network: String,
    },
    /// Make a network.
    Create(CreateArgs),
    /// Delete a network that no VM is plugged into.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id.
        network: String,
        /// Only print what would happen.
        #[arg(long)]
        dry_run: bool,
    },
}

/// A network to be.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Unique among networks: a-z, 0-9, '.' and '-'.
    name: String,
    #[command(flatten)]
    transport: TransportArgs,
    /// Addresses to give to VMs, such as 10.1.0.0/16.
    #[arg(long, value_name = "CIDR")]
    subnet: Option<String>,
    /// Router that VMs are told.
    #[arg(long, value_name = "ADDRESS", requires = "subnet")]
    gateway: Option<String>,
    /// Name servers that VMs are told.
    #[arg(
        long,
        value_name = "ADDRESS",
        requires = "subnet",
        value_delimiter = ','
    )]
    dns: Vec<String>,
    /// Largest frame payload; 1500, or 1450 for a VXLAN, when absent.
    #[arg(long)]
    mtu: Option<u16>,
    /// Only print what would happen.
    #[arg(long)]
    dry_run: bool,
}

/// How its frames get from host to host.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct TransportArgs {
    /// A VXLAN between the hosts, with this identifier.
    #[arg(long, value_name = "VNI")]
    vxlan: Option<u32>,
    /// A VLAN on an interface that every host has.
    #[arg(long, value_name = "UPLINK:TAG", value_parser = vlan)]
    vlan: Option<(String, u16)>,
    /// A bridge that exists on every host.
    #[arg(long, value_name = "BRIDGE")]
    bridge: Option<String>,
    /// On each host by itself: VMs reach those on the same host.
    #[arg(long)]
    local: bool,
}

fn vlan(text: &str) -> Result<(String, u16), String> {
    let (uplink, tag) = text
        .rsplit_once(':')
        .ok_or("write it as UPLINK:TAG, such as eth0:100")?;
    let tag = tag.parse().map_err(|_| format!("{tag:?} is no VLAN tag"))?;
    Ok((uplink.to_owned(), tag))
}

impl NetworkCommand {
    /// Asks the server and prints what it says.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List => {
                let mut networks = session.client.list::<Network>("/v1/networks").await?;
                networks.items.sort_by(|a, b| a.name.cmp(&b.name));
                session.print(&networks, |networks| render::networks(&networks.items))
            }
            Self::Show { network } => {
                let network: Network = session.client.get(&path(&network)).await?;
                session.print(&network, render::network)
            }
            Self::Create(arguments) => create(session, arguments).await,
            Self::Delete { network, dry_run } => {
                let change = ChangeOptions {
                    dry_run,
                    wait: false,
                };
                let path = change.path(path(&network));
                if dry_run {
                    return session.print_dry_run(&session.client.delete::<DryRun>(&path).await?);
                }
                let _: Option<NetworkAccepted> = session.client.delete(&path).await?;
                let deleted = || format!("{network} deleted.\n");
                session.conclude(change, None, deleted).await
            }
        }
    }
}

fn path(network: &str) -> String {
    format!("/v1/networks/{network}")
}

async fn create(session: &Session, arguments: CreateArgs) -> Result<(), Failure> {
    let CreateArgs {
        name,
        transport,
        subnet,
        gateway,
        dns,
        mtu,
        dry_run,
    } = arguments;
    let TransportArgs {
        vxlan,
        vlan,
        bridge,
        local: _,
    } = transport;
    let transport = match (vxlan, vlan, bridge) {
        (Some(vni), _, _) => Transport::Vxlan { vni },
        (_, Some((uplink, tag)), _) => Transport::Vlan { uplink, tag },
        (_, _, Some(bridge)) => Transport::Bridge { bridge },
        (None, None, None) => Transport::Local,
    };
    let body = CreateNetwork {
        name,
        transport,
        mtu,
        subnet: subnet.map(|cidr| Subnet { cidr, gateway, dns }),
    };
    let change = ChangeOptions {
        dry_run,
        wait: false,
    };
    let path = change.path("/v1/networks".to_owned());
    if dry_run {
        return session.print_dry_run(&session.client.post::<DryRun>(&path, &body).await?);
    }
    let accepted: NetworkAccepted = session.client.post(&path, &body).await?;
    session.print(&accepted.network, |network| {
        format!("{} created.\n", network.name)
    })
}
