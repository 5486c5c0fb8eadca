//! Two islands with a cable of their own between them: three links, each of which can be cut in either direction.
//!
//! ```text
//!            mainland (the server)
//!             │               │
//!           eth0            eth0
//!        island 0 ── peer ── island 1
//! ```
//!
//! An island has one address, whichever cable a packet takes. A cut loses packets without a word, as a broken cable or
//! switch would; they are dropped by the packet filter of an island, so nothing of the mainland's is changed.

use crate::network::{self, Island};
use crate::test_dir::TestDir;
use anyhow::Context;
use std::net::IpAddr;
use std::process::Command;

/// The packet filter of each island: what comes in and goes out by these interfaces is lost.
const FILTER: &str = "\
add table inet cuts
add set inet cuts arriving { type ifname; }
add set inet cuts leaving { type ifname; }
add chain inet cuts input { type filter hook input priority 0; policy accept; }
add chain inet cuts output { type filter hook output priority 0; policy accept; }
add rule inet cuts input iifname @arriving drop
add rule inet cuts output oifname @leaving drop
";
/// The cable between the islands, at both of its ends.
const PEER: &str = "peer";
/// The cable to the mainland, at the island.
const MAINLAND: &str = "eth0";

/// One direction of an island's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the other island.
    ToPeer,
    /// To the mainland.
    ToMainland,
    /// From the mainland.
    FromMainland,
}

/// Both islands.
#[derive(Debug)]
pub struct Links {
    islands: [Island; 2],
}

impl Links {
    /// Makes the islands and their cables.
    ///
    /// # Errors
    /// What `ip` or `nft` says.
    pub fn new(dir: &TestDir) -> anyhow::Result<Self> {
        let links = Self {
            islands: [
                Island::named(dir, "island-0")?,
                Island::named(dir, "island-1")?,
            ],
        };
        links.connect().context("a cable between two islands")?;
        let filter = dir.join("cuts.nft");
        std::fs::write(&filter, FILTER)?;
        let filter = filter.display().to_string();
        for island in &links.islands {
            island.run(&["nft", "-f", &filter])?;
        }
        Ok(links)
    }

    /// Where both islands reach the mainland.
    pub fn mainland_ip(&self) -> IpAddr {
        self.islands[0].mainland_ip
    }

    /// Address of an island, 0 or 1.
    pub fn ip(&self, island: usize) -> IpAddr {
        self.islands[island].island_ip
    }

    /// The words before a command that make it run on an island, 0 or 1.
    pub fn wrapper(&self, island: usize) -> Vec<String> {
        self.islands[island].wrapper()
    }

    /// From now on what goes that way from an island, 0 or 1, or comes to it, is lost.
    ///
    /// # Errors
    /// What `nft` says.
    pub fn cut(&self, island: usize, way: Way) -> anyhow::Result<()> {
        self.change("add", island, way)
    }

    /// It arrives again.
    ///
    /// # Errors
    /// What `nft` says; also when the way is not cut.
    pub fn mend(&self, island: usize, way: Way) -> anyhow::Result<()> {
        self.change("delete", island, way)
    }

    fn change(&self, verb: &str, island: usize, way: Way) -> anyhow::Result<()> {
        let (at, set, cable) = match way {
            Way::ToPeer => (1 - island, "arriving", PEER),
            Way::ToMainland => (island, "leaving", MAINLAND),
            Way::FromMainland => (island, "arriving", MAINLAND),
        };
        let change = format!("{verb} element inet cuts {set} {{ \"{cable}\" }}");
        self.islands[at].run(&["nft", &change])
    }

    fn connect(&self) -> anyhow::Result<()> {
        let [first, second] = &self.islands;
        let second_pid = second.holder_pid().to_string();
        first.run(&[
            "ip",
            "link",
            "add",
            PEER,
            "type",
            "veth",
            "peer",
            "name",
            PEER,
            "netns",
            &second_pid,
        ])?;
        for (island, other) in [(first, second), (second, first)] {
            let (own, theirs) = (
                island.island_ip.to_string(),
                format!("{}/32", other.island_ip),
            );
            island.run(&["ip", "link", "set", PEER, "up"])?;
            island.run(&["ip", "route", "add", &theirs, "dev", PEER, "src", &own])?;
        }
        // The server has the address of the first island's cable.
        let server = format!("{}/32", first.mainland_ip);
        let via = second.mainland_ip.to_string();
        second.run(&["ip", "route", "add", &server, "via", &via])
    }
}

/// Whether such links can be made here; the error is the reason to skip.
pub fn available() -> Result<(), String> {
    network::available()?;
    let table = "add table inet cuts; add set inet cuts arriving { type ifname; }";
    network::run(Command::new("unshare").args(["--net", "nft", table]))
        .map_err(|error| format!("no packet filter in network namespaces: {error:#}"))
}
