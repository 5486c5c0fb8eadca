//! Tap devices, and a bridge between them, that last as long as the test that made them.

use anyhow::{Context, ensure};
use std::process::Command;

/// A tap device in this process's network namespace, up, with nothing at its other end.
#[derive(Debug)]
pub struct Tap {
    /// Its name.
    pub name: String,
}

impl Tap {
    /// Makes one for a card with a single queue pair. `label` tells taps of one process apart; at most 4 bytes.
    pub fn new(label: &str) -> anyhow::Result<Self> {
        Self::with_options(label, &["vnet_hdr"])
    }

    /// Makes one for a card with several queue pairs; `label` is as above.
    pub fn multi_queue(label: &str) -> anyhow::Result<Self> {
        Self::with_options(label, &["vnet_hdr", "multi_queue"])
    }

    fn with_options(label: &str, options: &[&str]) -> anyhow::Result<Self> {
        let name = format!("gw{label}{}", std::process::id());
        ensure!(name.len() <= 15, "{name} is too long for an interface");
        let add = ["tuntap", "add", "dev", &name, "mode", "tap"];
        ip(&[&add, options].concat())?;
        let tap = Self { name };
        ip(&["link", "set", &tap.name, "up"])?;
        Ok(tap)
    }

    /// Gives the host's end an address with its prefix length.
    pub fn address(&self, address: &str) -> anyhow::Result<()> {
        ip(&["addr", "add", address, "dev", &self.name])
    }

    /// Tells the host who is at the other end.
    pub fn neighbour(&self, address: &str, mac: &str) -> anyhow::Result<()> {
        ip(&[
            "neigh",
            "replace",
            address,
            "lladdr",
            mac,
            "nud",
            "permanent",
            "dev",
            &self.name,
        ])
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.name]);
    }
}

/// A bridge of this process's network namespace, up.
#[derive(Debug)]
pub struct Bridge {
    name: String,
}

impl Bridge {
    /// Makes one that the host can be reached on at `address`, which has its prefix length. `label` is as for taps.
    pub fn new(label: &str, address: &str) -> anyhow::Result<Self> {
        let name = format!("gw{label}{}", std::process::id());
        ip(&["link", "add", &name, "type", "bridge"])?;
        let bridge = Self { name };
        ip(&["addr", "add", address, "dev", &bridge.name])?;
        ip(&["link", "set", &bridge.name, "up"])?;
        Ok(bridge)
    }

    /// Plugs a tap device in.
    pub fn plug(&self, tap: &Tap) -> anyhow::Result<()> {
        ip(&["link", "set", &tap.name, "master", &self.name])
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.name]);
    }
}

/// Whether taps and bridges can be made here; the error is the reason to skip.
pub fn available() -> Result<(), String> {
    let made = Tap::new("try").map(drop);
    made.map_err(|error| format!("no tap devices: {error:#}"))
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("ip (Debian: iproute2)")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
