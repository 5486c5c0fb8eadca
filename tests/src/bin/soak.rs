//! `soak [COUNT [SEED]]`: moves a verifying, dirtying guest COUNT times from VMM to VMM.
//!
//! Started by `tests/run soak`, which builds everything with optimisation first.

use anyhow::{Context, bail};
use godwit_tests::{skip, soak};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

const DEFAULT_LANDINGS: u64 = 10_000;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(verdict) => {
            println!("soak: {verdict}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<soak::Verdict> {
    skip::kvm().map_err(anyhow::Error::msg)?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |text: &String| {
        text.parse::<u64>()
            .with_context(|| format!("{text:?} is not a number"))
    };
    let (landings, seed) = match arguments.as_slice() {
        [] => (DEFAULT_LANDINGS, fresh_seed()),
        [landings] => (number(landings)?, fresh_seed()),
        [landings, seed] => (number(landings)?, number(seed)?),
        _ => bail!("usage: soak [COUNT [SEED]]"),
    };
    soak::run(landings, seed).await
}

fn fresh_seed() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
