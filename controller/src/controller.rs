//! The controller as the API sees it: intents in, views and events out.

use crate::agents::Agents;
use crate::core::{Core, Settings};
use crate::decide::decide;
use crate::decide::host::not_given_up;
use crate::drive::host_driver::HostDriver;
use crate::drive::tls_driver::TlsDriver;
use crate::intent::{Accepted, Intent, NewJoinToken, Preview};
use crate::ledger::{Blocking, Ledger};
use crate::loops;
use crate::model::limits::MAX_JOIN_TOKENS;
use crate::model::{Actor, Event, ImageState, JoinToken, Subject};
use crate::plan::contract::foresee_move;
use crate::plan::dirtying::Dirtying;
use crate::store::sqlite::SqliteStore;
use crate::store::{Store, StoreError};
use crate::view::View;
use axum::body::Body;
use godwit_channel::pki::{self, Authority, Identity};
use godwit_channel::tls::{self, Listener};
use godwit_wire::id::{ImageId, VmId};
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::storage::ImportSource;
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::DirtyRateRequest;
use jiff::Timestamp;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, watch};

pub use crate::drive::host_driver::Duplex;

/// File of the store in the state directory.
const STORE_FILE: &str = "store.db";
/// Longest life of a join token.
const MAX_TOKEN_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);

/// How long an upload waits until a host has been told to receive it.
const RECEIVER_TIME: Duration = Duration::from_secs(10);

/// How a guest is watched for a forecast.
const WATCHED: DirtyRateRequest = DirtyRateRequest {
    window_ms: 1_000,
    readings: 5,
};
/// How long that may take in all; whoever asks is waiting.
const WATCHED_WITHIN: Duration = Duration::from_secs(5);

/// How a server's controller is set up.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// Directory of the store, the CA and the server's key.
    pub state_dir: PathBuf,
    /// Where to listen for agents; port 0 takes a free one.
    pub agents_listen: SocketAddr,
    /// Names and addresses under which agents and API users reach this server; they go into its certificate.
    pub agents_names: Vec<String>,
    /// Migrations one host takes part in at the same time before it is known what its links carry.
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
    Store(#[from] StoreError),
    /// The CA or the server's certificate cannot be used.
    #[error("cannot set up the pool's CA")]
    Pki(#[from] pki::PkiError),
    /// TLS does not accept the server's certificate.
    #[error("cannot set up TLS")]
    Tls(#[from] tls::TlsError),
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

/// A handle to the running controller; clones share it.
#[derive(Clone, Debug)]
pub struct Controller {
    core: Arc<Core>,
    pool: Option<Arc<Pool>>,
}

/// What only a server with a network has.
#[derive(Debug)]
struct Pool {
    authority: Arc<Authority>,
    identity: Identity,
    address: SocketAddr,
}

impl Controller {
    /// Opens the store (creating it and the CA on the first start), takes up unfinished operations and listens
    /// for agents.
    pub async fn start(config: ControllerConfig) -> Result<Self, StartError> {
        prepare_directory(&config.state_dir).map_err(|source| StartError::StateDir {
            path: config.state_dir.clone(),
            source,
        })?;
        let store = Arc::new(SqliteStore::open(&config.state_dir.join(STORE_FILE))?);
        let authority = Arc::new(Authority::load_or_create(&config.state_dir)?);
        let identity = authority.issue_server(&config.agents_names)?;
        let driver = Arc::new(TlsDriver::new(&identity, authority.clone())?);
        let settings = Settings {
            migrations_per_host: config.migrations_per_host.max(1),
        };
        let core = Self::core(store, Blocking::Elsewhere, driver, settings)?;
        let tls = tls::server_for_hosts_and_joiners(&identity)?;
        let listening = |source| StartError::Listen {
            address: config.agents_listen,
            source,
        };
        let listener = Listener::bind(config.agents_listen, tls)
            .await
            .map_err(listening)?;
        let address = listener.local_address().map_err(listening)?;
        let agents = Agents {
            core: core.clone(),
            authority: Some(authority.clone()),
        };
        let stopping = core.stopping.clone();
        core.tasks
            .spawn(tls::serve(listener, agents.router(), async move {
                stopping.cancelled().await
            }));
        loops::spawn(&core);
        let view = core.view();
        tracing::info!(
            agents = %address, hosts = view.hosts.len(), vms = view.vms.len(),
            unfinished_operations = view.active_operations().count(), "controller started"
        );
        Ok(Self {
            core,
            pool: Some(Arc::new(Pool {
                authority,
                identity,
                address,
            })),
        })
    }

    fn core(
        store: Arc<dyn Store>,
        blocking: Blocking,
        driver: Arc<dyn HostDriver>,
        settings: Settings,
    ) -> Result<Arc<Core>, StoreError> {
        Ok(Arc::new(Core::new(
            Ledger::open(store, blocking)?,
            driver,
            settings,
        )))
    }

    /// A controller without a network, for simulations.
    #[cfg(test)]
    pub(crate) fn simulated(
        store: Arc<dyn Store>,
        driver: Arc<dyn HostDriver>,
        settings: Settings,
    ) -> (Self, Agents) {
        let core =
            Self::core(store, Blocking::Here, driver, settings).expect("a store in memory opens");
        loops::spawn(&core);
        (
            Self {
                core: core.clone(),
                pool: None,
            },
            Agents {
                core,
                authority: None,
            },
        )
    }

    /// Where agents reach this server.
    pub fn agents_address(&self) -> SocketAddr {
        self.pool().address
    }

    /// SHA-256 of the pool's CA certificate, in hex.
    pub fn ca_fingerprint(&self) -> String {
        self.pool().authority.fingerprint().to_string()
    }

    /// The server's certificate from the pool's CA, for an API that listens beyond loopback.
    pub fn server_identity(&self) -> &Identity {
        &self.pool().identity
    }

    fn pool(&self) -> &Pool {
        self.pool
            .as_deref()
            .expect("a controller that was started has a network")
    }

    /// Stops accepting and ends all loops. Operations that have not ended go on with the next start.
    pub async fn shutdown(&self) {
        self.core.stopping.cancel();
        self.core.tasks.close();
        self.core.tasks.wait().await;
        tracing::info!("controller stopped");
    }

    /// Everything at this instant.
    pub fn view(&self) -> Arc<View> {
        self.core.view()
    }

    /// Tells the version of the latest view; wakes with every new one.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.core.ledger.changed()
    }

    /// Checks an intent, stores it and starts what takes time.
    pub async fn submit(&self, intent: Intent, actor: &Actor) -> Result<Accepted, Problem> {
        let decision = self
            .core
            .ledger
            .change(|view, draft| {
                // Known for sure only during a turn.
                if let Intent::ConfirmHostOff { host } = &intent
                    && !self.core.pulses.is_given_up(*host)
                {
                    return Err(not_given_up(&view.host_name(*host)));
                }
                decide(view, draft, &intent, actor)
            })
            .await?;
        match &intent {
            Intent::StartVm { vm, .. } | Intent::StopVm { vm, .. } => {
                self.core.forgive_restarts(*vm)
            }
            Intent::RemoveHost { host } => {
                self.core.pulses.forget(*host);
                self.core.ledger.forget_observed(*host);
            }
            _ => {}
        }
        crate::operation::spawn_all(&self.core);
        Ok(decision.accepted)
    }

    /// As [`preview`](Self::preview); of a migration it also says what will become of it, for which the guest is
    /// watched for a second. Where it cannot be watched, what is known of it must do.
    pub async fn foresee(&self, intent: &Intent) -> Result<Preview, Problem> {
        let mut preview = self.preview(intent)?;
        let Intent::MigrateVm { vm, policy, .. } = intent else {
            return Ok(preview);
        };
        let Some(target) = preview.placement.as_ref().map(|placement| placement.host) else {
            return Ok(preview);
        };
        let owner = self.view().vms.get(vm).and_then(|vm| vm.owner);
        let Some(source) = owner.and_then(|owner| self.core.address(owner)) else {
            return Ok(preview);
        };
        let asked = self.core.driver.dirty_rate(source, *vm, &WATCHED);
        let watched = match tokio::time::timeout(WATCHED_WITHIN, asked).await {
            Ok(Ok(rate)) => Some(Dirtying::sampled(rate)),
            Ok(Err(error)) => {
                tracing::info!(%vm, %error, "the guest was not watched");
                None
            }
            Err(_) => None,
        };
        let view = self.view();
        if let (Some(watched), Some(vm)) = (watched, view.vms.get(vm)) {
            let disks = preview
                .forecast
                .as_ref()
                .map_or(Bytes(0), |known| known.disks);
            let forecast = foresee_move(&view, vm, target, policy, disks, Some(watched));
            preview.forecast = Some(forecast);
        }
        Ok(preview)
    }

    /// What [`submit`](Self::submit) would do or refuse; changes nothing.
    pub fn preview(&self, intent: &Intent) -> Result<Preview, Problem> {
        let actor = Actor::new("dry-run");
        self.core
            .ledger
            .rehearse(|view, draft| decide(view, draft, intent, &actor))
            .map(|decision| decision.preview)
    }

    /// A token with which one host can join until `ttl` is over.
    pub async fn create_join_token(
        &self,
        ttl: Duration,
        actor: &Actor,
    ) -> Result<NewJoinToken, Problem> {
        if ttl.is_zero() || ttl > MAX_TOKEN_LIFE {
            let problem = format!("{} s is outside 1 s to 7 days", ttl.as_secs());
            let field = FieldProblem::new("ttl_s", problem, "choose a time within the limits");
            return Err(Problem::invalid(vec![field]));
        }
        let token = pki::JoinToken::fresh(self.pool().authority.fingerprint())
            .map_err(|error| Problem::internal(error.to_string()))?;
        let digest = pki::secret_digest(&token.secret);
        let expires_at = Timestamp::now()
            .checked_add(ttl)
            .map_err(|error| Problem::internal(error.to_string()))?;
        self.core
            .ledger
            .change(|_, draft| {
                if draft.tokens().len() >= MAX_JOIN_TOKENS {
                    let detail = format!("there are {MAX_JOIN_TOKENS} tokens already");
                    return Err(Problem::conflict("too-many-tokens", detail)
                        .with_remedy("wait until some expire"));
                }
                draft.put_token(
                    digest.clone(),
                    JoinToken {
                        actor: actor.clone(),
                        expires_at,
                        used: None,
                    },
                );
                draft.info(
                    "token.created",
                    Subject::pool(),
                    actor,
                    format!("{actor} made a join token"),
                );
                Ok(())
            })
            .await?;
        Ok(NewJoinToken {
            token: token.to_string(),
            expires_at,
        })
    }

    /// Events after `after`, oldest first, at most `limit`; `410 compacted` when some of them are gone already.
    pub fn events_after(&self, after: u64, limit: usize) -> Result<Vec<Arc<Event>>, Problem> {
        self.core.ledger.events_after(after, limit)
    }

    /// Events from now on. A reader that lags goes back to [`events_after`](Self::events_after).
    pub fn subscribe_events(&self) -> broadcast::Receiver<Arc<Event>> {
        self.core.ledger.subscribe_events()
    }

    /// Sends the bytes of an image that waits for them to the host that receives them: `length` bytes, as announced.
    /// Waits until a host has been told.
    pub async fn upload_image(
        &self,
        image: ImageId,
        length: u64,
        content: Body,
    ) -> Result<(), Problem> {
        let receiver = |view: &View| {
            let Some(image) = view.images.get(&image) else {
                return Some(Err(Problem::not_found("image", image)));
            };
            match (&image.source, &image.state) {
                (ImportSource::Upload { bytes }, _) if bytes.0 != length => {
                    let detail = format!("{length} bytes come and {} were announced", bytes.0);
                    Some(Err(Problem::conflict("wrong-length", detail)
                        .with_remedy("create the image anew with the right length")))
                }
                (ImportSource::Upload { .. }, ImageState::Uploading { host }) => {
                    Some(Ok((image.pool, *host)))
                }
                (ImportSource::Upload { .. }, ImageState::Importing) => None,
                _ => {
                    let detail = format!("{} does not wait for bytes", image.name);
                    Some(Err(Problem::conflict("not-uploading", detail).with_remedy(
                        "create another image with an upload as its source",
                    )))
                }
            }
        };
        let waiting = tokio::time::timeout(RECEIVER_TIME, self.core.until(receiver));
        let (pool, host) = waiting.await.map_err(|_| {
            let detail = "no host is ready to receive the image yet";
            Problem::conflict("no-receiver", detail).with_remedy("try again in a moment")
        })??;
        let address = self.core.address(host);
        let address = address.ok_or_else(|| Problem::not_found("host", host))?;
        let driver = &self.core.driver;
        let sent = driver.upload_image(address, pool, image, length, content);
        sent.await
            .map(drop)
            .map_err(godwit_channel::CallError::into_problem)
    }

    /// The serial console of a VM, from the host that has it now; it ends when the VM leaves that host, and the
    /// caller opens it again.
    pub async fn serial(&self, vm: VmId) -> Result<Box<dyn Duplex>, Problem> {
        let view = self.view();
        let record = view
            .vms
            .get(&vm)
            .ok_or_else(|| Problem::not_found("VM", vm))?;
        let address = record.owner.and_then(|owner| self.core.address(owner));
        let Some(address) = address else {
            return Err(
                Problem::conflict("not-running", format!("{} is off", record.name))
                    .with_remedy("start it"),
            );
        };
        self.core
            .driver
            .serial(address, vm)
            .await
            .map_err(godwit_channel::CallError::into_problem)
    }
}

/// Only the server's user may look in: the CA's key is there.
fn prepare_directory(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
}
