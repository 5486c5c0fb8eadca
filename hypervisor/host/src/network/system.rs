//! Asking the kernel about links and changing them, through `ip`, `bridge` and `nft`.
//!
//! Not through a netlink library: taps that outlive the agent are made by an `ioctl` and not by netlink, packet filter
//! rules need `nft` anyway, and the batches an operator finds in the log can be tried by hand.

use super::names::Purpose;
use super::plan::{Link, Observed, Queues, Step};
use godwit_wire::devices::MacAddress;
use godwit_wire::network::VXLAN_PORT;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// How long one of the programs may take; a host with a thousand taps answers in a tenth of a second.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(20);
/// Most of what a program says that is passed on.
const MAX_WORDS_BYTES: usize = 1000;
/// Where a flood entry points from: every address that is not known.
const FLOOD_MAC: &str = "00:00:00:00:00:00";

/// Why the kernel's links cannot be seen or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SystemError {
    /// Not installed.
    #[error("the program {program} cannot be started: {cause}; install the package {package}")]
    NoProgram {
        program: String,
        package: &'static str,
        cause: io::Error,
    },
    /// It refused.
    #[error("{program} failed: {words}")]
    Failed { program: String, words: String },
    /// It hangs.
    #[error("{program} has not answered within {PROGRAM_TIMEOUT:?}")]
    Slow { program: String },
    /// Its answer is not what it should be.
    #[error("the answer of {program} cannot be read: {cause}")]
    Unreadable {
        program: String,
        cause: serde_json::Error,
    },
}

/// The programs.
#[derive(Clone, Debug, Default)]
pub(crate) struct System {
    /// What to start them through; tests enter a network namespace with it.
    pub(crate) through: Vec<String>,
}

impl System {
    /// Everything there is.
    pub(crate) async fn observe(&self) -> Result<Observed, SystemError> {
        let text = self
            .run("ip", &["-json", "-details", "link", "show"], "")
            .await?;
        let mut observed = Observed::default();
        for link in read::<Vec<RawLink>>("ip", &text)? {
            if let Some(name) = link.ifname.clone() {
                observed.links.insert(name, link.into_link());
            }
        }
        let vxlans = observed.links.iter().filter(|(_, link)| {
            link.vxlan.is_some() && matches!(link.purpose, Some(Purpose::Network { .. }))
        });
        let vxlans: Vec<String> = vxlans.map(|(name, _)| name.clone()).collect();
        for name in vxlans {
            let text = self
                .run("bridge", &["-json", "fdb", "show", "dev", &name], "")
                .await?;
            let entries = read::<Vec<RawFlood>>("bridge", &text)?;
            let peers: BTreeSet<IpAddr> = entries
                .into_iter()
                .filter(|entry| entry.mac.as_deref() == Some(FLOOD_MAC))
                .filter_map(|entry| entry.dst?.parse().ok())
                .collect();
            observed.floods.insert(name, peers);
        }
        Ok(observed)
    }

    /// Carries steps out; one that fails does not keep the others back, and the words about all that failed are
    /// returned.
    pub(crate) async fn apply(&self, steps: &[Step]) -> Result<(), SystemError> {
        // The kernel does not know the option where IPv6 is switched off.
        let ipv6 = Path::new("/proc/sys/net/ipv6").exists();
        let (mut links, mut floods) = (String::new(), String::new());
        for step in steps {
            match step {
                Step::AddFlood { name, peer } => {
                    floods += &format!("fdb append {FLOOD_MAC} dev {name} dst {peer}\n");
                }
                Step::RemoveFlood { name, peer } => {
                    floods += &format!("fdb del {FLOOD_MAC} dev {name} dst {peer}\n");
                }
                Step::Up { name } if ipv6 => {
                    // No address of the host's own on guests' links.
                    links += &format!("link set dev {name} addrgenmode none\n{}", line(step));
                }
                step => links += &line(step),
            }
        }
        let linked = self.batch("ip", &links).await;
        let flooded = self.batch("bridge", &floods).await;
        linked.and(flooded)
    }

    async fn batch(&self, program: &'static str, lines: &str) -> Result<(), SystemError> {
        if lines.is_empty() {
            return Ok(());
        }
        tracing::debug!(program, lines, "changing links");
        self.run(program, &["-force", "-batch", "-"], lines)
            .await
            .map(drop)
    }

    /// Changes packet filter rules, all or none.
    pub(crate) async fn filter(&self, rules: &str) -> Result<(), SystemError> {
        self.run("nft", &["-f", "-"], rules).await.map(drop)
    }

    async fn run(
        &self,
        program: &str,
        arguments: &[&str],
        input: &str,
    ) -> Result<Vec<u8>, SystemError> {
        let mut words: Vec<&str> = self.through.iter().map(String::as_str).collect();
        words.push(program);
        words.extend(arguments);
        let cannot_start = |cause| SystemError::NoProgram {
            program: program.to_owned(),
            package: if program == "nft" {
                "nftables"
            } else {
                "iproute2"
            },
            cause,
        };
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(cannot_start)?;
        let mut stdin = child.stdin.take();
        let talk = async {
            if let Some(stdin) = &mut stdin {
                // One that has ended early tells why on its own.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            drop(stdin);
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(PROGRAM_TIMEOUT, talk)
            .await
            .map_err(|_| SystemError::Slow {
                program: program.to_owned(),
            })?
            .map_err(cannot_start)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().chars().take(MAX_WORDS_BYTES);
        Err(SystemError::Failed {
            program: program.to_owned(),
            words: said.collect::<String>().replace('\n', "; "),
        })
    }
}

/// A step as a line of `ip -batch`. Names are ours or were given by the kernel or checked by the API: none has spaces.
fn line(step: &Step) -> String {
    match step {
        Step::AddBridge { name } => {
            format!(
                "link add name {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n"
            )
        }
        Step::AddTap { name, queues } => {
            let several = match queues {
                Queues::One => "",
                Queues::Several => " multi_queue",
            };
            format!("tuntap add dev {name} mode tap vnet_hdr{several}\n")
        }
        Step::AddVlan { name, lower, tag } => {
            format!("link add link {lower} name {name} type vlan id {tag}\n")
        }
        Step::AddVxlan { name, vni, local } => {
            format!(
                "link add name {name} type vxlan id {vni} local {local} dstport {VXLAN_PORT} learning\n"
            )
        }
        Step::Alias { name, purpose } => format!("link set dev {name} alias {}\n", purpose.alias()),
        Step::SetMtu { name, mtu } => format!("link set dev {name} mtu {mtu}\n"),
        Step::Join { name, bridge } => format!("link set dev {name} master {bridge}\n"),
        Step::Up { name } => format!("link set dev {name} up\n"),
        Step::Delete { name } => format!("link del dev {name}\n"),
        Step::AddFlood { .. } | Step::RemoveFlood { .. } => String::new(),
    }
}

fn read<'a, T: Deserialize<'a>>(program: &str, text: &'a [u8]) -> Result<T, SystemError> {
    // An empty answer is how an old `bridge` says that there is nothing.
    let text = if text.trim_ascii().is_empty() {
        b"[]"
    } else {
        text
    };
    serde_json::from_slice(text).map_err(|cause| SystemError::Unreadable {
        program: program.to_owned(),
        cause,
    })
}

/// One entry of `ip -json -details link show`; only what we look at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawLink {
    ifname: Option<String>,
    ifindex: u32,
    address: Option<String>,
    mtu: u32,
    master: Option<String>,
    link: Option<String>,
    ifalias: Option<String>,
    flags: Vec<String>,
    linkinfo: RawInfo,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawInfo {
    info_kind: Option<String>,
    info_data: Value,
}

/// One entry of `bridge -json fdb show`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawFlood {
    mac: Option<String>,
    dst: Option<String>,
}

impl RawLink {
    fn into_link(self) -> Link {
        let data = &self.linkinfo.info_data;
        let kind = self.linkinfo.info_kind.as_deref();
        let id = data["id"].as_u64();
        let address = |name: &str| data[name].as_str().and_then(|text| text.parse().ok());
        let vlan = match kind {
            Some("vlan") => id.and_then(|id| u16::try_from(id).ok()).zip(self.link),
            _ => None,
        };
        let vxlan = match kind {
            Some("vxlan") => id
                .and_then(|id| u32::try_from(id).ok())
                .map(|id| (id, address("local").or_else(|| address("local6")))),
            _ => None,
        };
        Link {
            index: self.ifindex,
            address: self
                .address
                .and_then(|text| text.parse::<MacAddress>().ok()),
            master: self.master,
            mtu: self.mtu,
            purpose: self.ifalias.as_deref().and_then(Purpose::from_alias),
            up: self.flags.iter().any(|flag| flag == "UP"),
            queues: match data["multi_queue"].as_bool() {
                Some(true) => Queues::Several,
                _ => Queues::One,
            },
            vlan,
            vxlan,
            kind: self.linkinfo.info_kind,
        }
    }
}
