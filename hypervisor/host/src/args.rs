//! The agent's command line.

use clap::{Args, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Port of a server whose URL does not name one.
const DEFAULT_SERVER_PORT: u16 = 7071;

/// What becomes of the VMs when the agent is told to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OnExit {
    /// They run on; the next agent adopts them.
    #[default]
    KeepVms,
    /// They are killed, and nothing is left running.
    KillVms,
}

/// Options of `godwit host`.
#[derive(Clone, Debug, Args)]
pub struct HostArgs {
    /// Directory for the host's identity, its lease and its VMs; kept over restarts.
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// The server, as `https://ADDRESS:PORT`.
    #[arg(long, value_name = "URL")]
    pub server: String,
    /// One-time token from `godwit host token`; not needed once the host has joined.
    #[arg(
        long,
        value_name = "TOKEN",
        env = "GODWIT_JOIN_TOKEN",
        hide_env_values = true
    )]
    pub join: Option<String>,
    /// Name operators know the host by; the system's host name if not given.
    #[arg(long)]
    pub name: Option<String>,
    /// Where the agent listens, with the address by which the pool reaches this host; VMs arrive there too.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Ports on which VMs arrive, such as 49152-49215: one for each VM that is on its way here. Any free ones if not
    /// given.
    #[arg(long, value_name = "FIRST-LAST", value_parser = port_range)]
    pub migration_ports: Option<PortRange>,
    /// Memory that guests may use; all but a tenth (at least 512 MiB) if not given.
    #[arg(long, value_name = "MIB")]
    pub guest_memory_mib: Option<u64>,
    /// For how long the memory of a VM that has moved away is kept, so that only what has changed is sent when it comes
    /// home; 0 keeps none.
    #[arg(long, value_name = "MINUTES", default_value_t = 60)]
    pub keep_memory_minutes: u64,
    /// How much of it at most. In any case it takes only memory that no VM here has been promised, and makes way for
    /// VMs that start or arrive.
    #[arg(long, value_name = "MIB")]
    pub keep_memory_mib: Option<u64>,
    /// A storage pool: a name and a directory that exists, on this host or shared with others; may be repeated. If none
    /// is given, a pool `default` is kept in the state directory.
    #[arg(long, value_name = "NAME=DIR", value_parser = storage_pool)]
    pub storage: Vec<StoragePool>,
    /// What becomes of the VMs on SIGTERM and SIGINT.
    #[arg(long, value_enum, default_value_t)]
    pub on_exit: OnExit,
    /// End when the process that started the agent ends, and let the kernel kill VMs whose agent died.
    #[arg(long)]
    pub die_with_parent: bool,
    /// Program whose `vmm` command runs a VM; this program if not given.
    #[arg(long, value_name = "FILE", hide = true)]
    pub vmm_program: Option<PathBuf>,
}

/// TCP ports, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest; never 0.
    pub first: u16,
    /// The highest; never below the lowest.
    pub last: u16,
}

fn port_range(text: &str) -> Result<PortRange, String> {
    let (first, last) = text
        .split_once('-')
        .ok_or("give the first and the last port, as in 49152-49215")?;
    let port = |text: &str| match text.parse() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(format!("{text:?} is no port: use 1 to 65535")),
    };
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(format!(
            "{first} is above {last}: give the lower port first"
        ));
    }
    Ok(PortRange { first, last })
}

/// A storage pool on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoragePool {
    /// What operators call it.
    pub name: String,
    /// Where it is.
    pub directory: PathBuf,
}

/// Longest name of a pool.
const MAX_POOL_NAME_BYTES: usize = 32;

fn storage_pool(text: &str) -> Result<StoragePool, String> {
    let (name, directory) = text
        .split_once('=')
        .ok_or("give a name and a directory, as in fast=/srv/fast")?;
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > MAX_POOL_NAME_BYTES || !name.bytes().all(allowed) {
        return Err(format!(
            "{name:?} is no name of a pool: use 1 to {MAX_POOL_NAME_BYTES} of a-z, 0-9 and -"
        ));
    }
    let directory = PathBuf::from(directory);
    if !directory.is_absolute() {
        return Err(format!("{} is no full path", directory.display()));
    }
    Ok(StoragePool {
        name: name.to_owned(),
        directory,
    })
}

/// `host:port` of a server's URL.
pub(crate) fn server_authority(url: &str) -> Result<String, &'static str> {
    let rest = url
        .strip_prefix("https://")
        .ok_or("it must begin with https://")?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(['/', '?', '#', '@']) {
        return Err("it must have no path, query or user");
    }
    let parsed: http::uri::Authority = authority
        .parse()
        .map_err(|_| "it must name an address and a port")?;
    if parsed.host().is_empty() {
        return Err("it must name an address");
    }
    match parsed.port_u16() {
        Some(_) => Ok(authority.to_owned()),
        None if authority == parsed.host() => Ok(format!("{authority}:{DEFAULT_SERVER_PORT}")),
        None => Err("its port must be a number from 0 to 65535"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storage_pool_is_a_name_and_a_full_path() {
        let pool = storage_pool("fast=/srv/a=b").unwrap();
        assert_eq!(
            (pool.name.as_str(), pool.directory.to_str()),
            ("fast", Some("/srv/a=b"))
        );
        for wrong in [
            "",
            "fast",
            "=/srv",
            "fast=",
            "fast=srv",
            "Fast=/srv",
            "a b=/srv",
        ] {
            assert!(storage_pool(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_range_of_ports_has_a_first_and_a_last_one() {
        let (first, last) = (49_152, 49_215);
        assert_eq!(port_range("49152-49215"), Ok(PortRange { first, last }));
        assert_eq!(port_range("9-9"), Ok(PortRange { first: 9, last: 9 }));
        for wrong in [
            "", "9", "-9", "9-", "0-9", "9-8", "9-65536", "9-10-11", "a-b",
        ] {
            assert!(port_range(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_server_is_an_https_address_with_or_without_a_port() {
        assert_eq!(
            server_authority("https://10.0.0.1:7071").unwrap(),
            "10.0.0.1:7071"
        );
        assert_eq!(
            server_authority("https://pool.example/").unwrap(),
            "pool.example:7071"
        );
        assert_eq!(server_authority("https://[::1]:9").unwrap(), "[::1]:9");
        for wrong in [
            "",
            "10.0.0.1",
            "http://10.0.0.1",
            "https://",
            "https://a/b",
            "https://a:x",
            "https://a:70000",
        ] {
            assert!(server_authority(wrong).is_err(), "{wrong}");
        }
    }
}
