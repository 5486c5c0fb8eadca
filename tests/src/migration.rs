//! Migrations between two VMM processes, the test playing agents and store.

use crate::vmm::Vmm;
use anyhow::{Context, bail};
use godwit_channel::pki::Authority;
use godwit_wire::id::{Epoch, MigrationId};
use godwit_wire::migration::{
    MigrationIdentity, MigrationPhase, MigrationPolicy, MigrationRole, MigrationStatus,
    MigrationToken,
};
use godwit_wire::vmm_api::{
    CreateRequest, IncomingReady, IncomingRequest, KeptMemory, MigrationCommand, OutgoingRequest,
};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::time::Instant;

/// A migration ends, one way or the other, within this time.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// How long one long poll waits.
const POLL_MS: u64 = 5_000;

/// A migration under way between `source` and `target`.
#[derive(Debug)]
pub struct Flight<'a> {
    /// The VMM the guest runs in.
    pub source: &'a Vmm,
    /// The VMM the guest shall run in.
    pub target: &'a Vmm,
    /// Its id.
    pub migration: MigrationId,
    /// The VM's epoch at the source.
    pub epoch: Epoch,
    /// Where the target listens.
    pub address: SocketAddr,
    /// What it gave out.
    pub token: MigrationToken,
    /// What the source proves itself with, on an encrypted flight.
    pub identity: Option<MigrationIdentity>,
    /// What earlier flights showed of the cost of a blackout.
    pub fixed_cost_us: Option<u64>,
    /// Names of the disks whose content the source sends.
    pub leaving_disks: BTreeSet<String>,
}

impl<'a> Flight<'a> {
    /// Makes `target` ready for the VM of `request`, which runs in `source` under `request.epoch`. The request's
    /// attachments are the target's.
    pub async fn prepare(
        source: &'a Vmm,
        target: &'a Vmm,
        request: &CreateRequest,
    ) -> anyhow::Result<Self> {
        Self::prepare_with(source, target, request, MigrationId::fresh(), None).await
    }

    /// The same with connections that are encrypted and prove who is at their ends.
    pub async fn prepare_encrypted(
        source: &'a Vmm,
        target: &'a Vmm,
        request: &CreateRequest,
    ) -> anyhow::Result<Self> {
        let migration = MigrationId::fresh();
        let identities = fresh_identities(migration)?;
        Self::prepare_with(source, target, request, migration, Some(identities)).await
    }

    /// The same for a VM that comes home to memory that was kept of it.
    pub async fn prepare_home(
        source: &'a Vmm,
        target: &'a Vmm,
        request: &CreateRequest,
        kept: KeptMemory,
    ) -> anyhow::Result<Self> {
        let migration = MigrationId::fresh();
        let identities = Some(fresh_identities(migration)?);
        Self::prepare_all(
            source,
            target,
            request,
            (migration, identities, Some(kept)),
            BTreeSet::new(),
        )
        .await
    }

    /// The same for a VM whose disks of these names the source has to itself; `request` says where the target has room
    /// for them.
    pub async fn prepare_with_disks(
        source: &'a Vmm,
        target: &'a Vmm,
        request: &CreateRequest,
        disks: &[&str],
    ) -> anyhow::Result<Self> {
        let disks: BTreeSet<_> = disks.iter().map(|name| (*name).to_owned()).collect();
        let alone = (MigrationId::fresh(), None, None);
        let flight = Self::prepare_all(source, target, request, alone, disks.clone()).await?;
        Ok(Self {
            leaving_disks: disks,
            ..flight
        })
    }

    /// Both ends' identities are given, source first, or none.
    pub async fn prepare_with(
        source: &'a Vmm,
        target: &'a Vmm,
        request: &CreateRequest,
        migration: MigrationId,
        identities: Option<Identities>,
    ) -> anyhow::Result<Self> {
        let all = (migration, identities, None);
        Self::prepare_all(source, target, request, all, BTreeSet::new()).await
    }

    async fn prepare_all(
        source: &'a Vmm,
        target: &'a Vmm,
        request: &CreateRequest,
        (migration, identities, kept): (MigrationId, Option<Identities>, Option<KeptMemory>),
        arriving_disks: BTreeSet<String>,
    ) -> anyhow::Result<Self> {
        let incoming = IncomingRequest {
            attachments: request.attachments.clone(),
            vm: request.vm,
            epoch: request.epoch,
            spec: request.spec.clone(),
            lease: request.lease.clone(),
            migration,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            last_port: None,
            kept,
            arriving_disks,
            identity: identities.as_ref().map(|(_, target)| target.clone()),
        };
        let ready: IncomingReady = target
            .api
            .put("/v1/incoming", &incoming)
            .await
            .context("prepare the target")?;
        Ok(Self {
            source,
            target,
            migration,
            epoch: request.epoch,
            address: ready.address,
            token: ready.token,
            identity: identities.map(|(source, _)| source),
            fixed_cost_us: None,
            leaving_disks: BTreeSet::new(),
        })
    }

    /// Prepares the target and starts the source.
    pub async fn start(
        source: &'a Vmm,
        target: &'a Vmm,
        request: &CreateRequest,
        policy: MigrationPolicy,
    ) -> anyhow::Result<Self> {
        let flight = Self::prepare(source, target, request).await?;
        flight.send(policy).await?;
        Ok(flight)
    }

    /// Starts the source.
    pub async fn send(&self, policy: MigrationPolicy) -> anyhow::Result<MigrationStatus> {
        let Self {
            epoch,
            migration,
            address,
            ..
        } = *self;
        let outgoing = OutgoingRequest {
            epoch,
            migration,
            target: address,
            token: self.token.clone(),
            policy,
            fixed_cost_us: self.fixed_cost_us,
            leaving_disks: self.leaving_disks.clone(),
            identity: self.identity.clone(),
        };
        self.source
            .api
            .post("/v1/outgoing", &outgoing)
            .await
            .context("start the source")
    }

    /// Waits until the target asks for the commit, grants it under the next epoch and waits until the source
    /// knows. Returns the source's last word.
    pub async fn land(&self) -> anyhow::Result<MigrationStatus> {
        self.target_reaches(MigrationPhase::AwaitingCommit).await?;
        self.commit().await?;
        wait_for_phase(self.source, MigrationPhase::Completed)
            .await
            .context("source")
    }

    /// Waits until the target is in `phase`.
    pub async fn target_reaches(&self, phase: MigrationPhase) -> anyhow::Result<MigrationStatus> {
        wait_for_phase(self.target, phase).await.context("target")
    }

    /// Waits until the source is in `phase`.
    pub async fn source_reaches(&self, phase: MigrationPhase) -> anyhow::Result<MigrationStatus> {
        wait_for_phase(self.source, phase).await.context("source")
    }

    /// The store gives the VM to the target: tells the target to run.
    pub async fn commit(&self) -> anyhow::Result<MigrationStatus> {
        self.tell(self.target, "commit", self.epoch.next()).await
    }

    /// The operator calls it off.
    pub async fn cancel(&self) -> anyhow::Result<MigrationStatus> {
        self.tell(self.source, "cancel", self.epoch).await
    }

    /// The store voids the migration: tells the source to run again.
    pub async fn abort_source(&self) -> anyhow::Result<MigrationStatus> {
        self.tell(self.source, "abort", self.epoch).await
    }

    /// Says `verb` about this migration to one end.
    pub async fn tell(
        &self,
        vmm: &Vmm,
        verb: &str,
        epoch: Epoch,
    ) -> anyhow::Result<MigrationStatus> {
        let command = MigrationCommand {
            migration: self.migration,
            epoch,
        };
        vmm.api
            .post(&format!("/v1/migration/{verb}"), &command)
            .await
            .with_context(|| verb.to_owned())
    }
}

/// What both ends prove themselves with, the source's first.
type Identities = (MigrationIdentity, MigrationIdentity);

fn fresh_identities(migration: MigrationId) -> anyhow::Result<Identities> {
    let authority = Authority::create()?;
    Ok((
        authority.issue_migration(migration, MigrationRole::Source)?,
        authority.issue_migration(migration, MigrationRole::Target)?,
    ))
}

/// Moves the VM of `request` and counts its epoch up, as the store would.
pub async fn migrate(
    source: &Vmm,
    target: &Vmm,
    request: &mut CreateRequest,
    policy: MigrationPolicy,
) -> anyhow::Result<MigrationStatus> {
    let status = Flight::start(source, target, request, policy)
        .await?
        .land()
        .await?;
    request.epoch = request.epoch.next();
    Ok(status)
}

/// What a VMM says about its latest migration, as soon as its sequence is beyond `after`.
pub async fn status_after(vmm: &Vmm, after: u64) -> anyhow::Result<MigrationStatus> {
    vmm.api
        .get(&format!("/v1/migration?after={after}&wait_ms={POLL_MS}"))
        .await
}

/// Waits until a VMM's migration is in `phase`; another final phase is an error.
pub async fn wait_for_phase(vmm: &Vmm, phase: MigrationPhase) -> anyhow::Result<MigrationStatus> {
    let deadline = Instant::now() + PATIENCE;
    let mut after = 0;
    loop {
        let status = status_after(vmm, after).await?;
        if status.phase == phase {
            return Ok(status);
        }
        if status.phase.is_final() || Instant::now() > deadline {
            bail!("waiting for {phase:?}, but the migration is {status:?}");
        }
        after = status.sequence;
    }
}
