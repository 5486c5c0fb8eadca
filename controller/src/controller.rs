//! The controller as the API sees it: intents in, views and events out.

use crate::intent::{Accepted, Intent, NewJoinToken, Preview};
use crate::model::{Actor, Event};
use crate::view::View;
use godwit_wire::id::VmId;
use godwit_wire::problem::Problem;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{broadcast, watch};

/// How a server's controller is set up.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// Directory of the store, the CA and the server's key.
    pub state_dir: PathBuf,
    /// Where to listen for agents; port 0 takes a free one.
    pub agents_listen: SocketAddr,
    /// Names and addresses under which agents reach this server; all of them go into its certificate. The first
    /// is the one handed out with join tokens; the listening address when empty.
    pub agents_names: Vec<String>,
    /// Migrations one host takes part in at the same time.
    pub migrations_per_host: usize,
}

/// Why a controller could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory cannot be used.
    #[error("cannot use the state directory {path}")]
    StateDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The store cannot be opened or read.
    #[error("cannot open the store")]
    Store(#[from] crate::store::StoreError),
    /// The CA or the server's certificate cannot be used.
    #[error("cannot set up the pool's CA: {detail}")]
    Pki {
        /// Why.
        detail: String,
    },
    /// Agents could not reach it.
    #[error("cannot listen for agents on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Bytes both ways: a VM's serial console.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A handle to the running controller; clones share it.
#[derive(Clone, Debug)]
pub struct Controller {}

impl Controller {
    /// Opens the store (creating it and the CA on the first start), takes up unfinished operations and listens
    /// for agents.
    pub async fn start(_config: ControllerConfig) -> Result<Self, StartError> {
        todo!()
    }

    /// Where agents reach this server.
    pub fn agents_address(&self) -> SocketAddr {
        todo!()
    }

    /// SHA-256 of the pool's CA certificate, in hex.
    pub fn ca_fingerprint(&self) -> String {
        todo!()
    }

    /// Stops accepting and ends all loops. Operations that have not ended go on with the next start.
    pub async fn shutdown(&self) {
        todo!()
    }

    /// Everything at this instant.
    pub fn view(&self) -> Arc<View> {
        todo!()
    }

    /// Tells the version of the latest view; wakes with every new one.
    pub fn changed(&self) -> watch::Receiver<u64> {
        todo!()
    }

    /// Checks an intent, stores it and starts what takes time.
    pub async fn submit(&self, _intent: Intent, _actor: &Actor) -> Result<Accepted, Problem> {
        todo!()
    }

    /// What [`submit`](Self::submit) would do or refuse; changes nothing.
    pub fn preview(&self, _intent: &Intent) -> Result<Preview, Problem> {
        todo!()
    }

    /// A token with which one host can join until `ttl` is over.
    pub async fn create_join_token(&self, _ttl: Duration, _actor: &Actor) -> Result<NewJoinToken, Problem> {
        todo!()
    }

    /// Events after `after`, oldest first, at most `limit`; `410 compacted` when some of them are gone already.
    pub fn events_after(&self, _after: u64, _limit: usize) -> Result<Vec<Arc<Event>>, Problem> {
        todo!()
    }

    /// Events from now on. A reader that lags goes back to [`events_after`](Self::events_after).
    pub fn subscribe_events(&self) -> broadcast::Receiver<Arc<Event>> {
        todo!()
    }

    /// The serial console of a VM, from the host that has it now; it ends when the VM leaves that host, and the
    /// caller opens it again.
    pub async fn serial(&self, _vm: VmId) -> Result<Box<dyn Duplex>, Problem> {
        todo!()
    }
}
