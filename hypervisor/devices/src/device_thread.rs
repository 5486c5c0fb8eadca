//! The thread behind a device that keeps all of its queues on one, from one driver to the next.

use crate::device::{DeviceError, QueuePosition, Start};
use crate::worker::{Service, Worker};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Whether the driver has kept the rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Health {
    #[default]
    Well,
    /// It has not; nothing is served until a reset.
    Failed,
}

/// A service that has all of a device's queues.
pub(crate) trait QueueService: Service {
    /// Where it stands in each of them.
    fn positions(&self) -> Vec<QueuePosition>;

    /// Whether the driver has kept the rules.
    fn health(&self) -> Health;
}

/// A device's thread, while a driver is there.
pub(crate) struct DeviceThread<S> {
    name: &'static str,
    worker: Option<Worker<S>>,
    /// Whether a restored state says that the driver broke the rules before it was saved.
    restored: Health,
}

impl<S> fmt::Debug for DeviceThread<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceThread")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<S: QueueService> DeviceThread<S> {
    /// For the device called `name`, whose driver has not come yet.
    pub(crate) const fn new(name: &'static str) -> Self {
        Self {
            name,
            worker: None,
            restored: Health::Well,
        }
    }

    /// The health a service begins with.
    pub(crate) const fn restored(&self) -> Health {
        self.restored
    }

    /// Takes over a saved health, before [`Self::start`].
    pub(crate) fn restore(&mut self, health: Health) {
        self.restored = health;
    }

    /// Starts the thread.
    pub(crate) fn start(&mut self, service: S, start: Start) -> Result<(), DeviceError> {
        let worker = Worker::start(self.name, service, start);
        self.worker = Some(worker.map_err(|error| error.of(self.name))?);
        Ok(())
    }

    /// See [`VirtioDevice::pause`](crate::device::VirtioDevice::pause).
    pub(crate) fn pause(&self) -> Result<Vec<QueuePosition>, DeviceError> {
        let Some(worker) = &self.worker else {
            return Ok(Vec::new());
        };
        let paused = worker.pause().and_then(|()| worker.call(|s| s.positions()));
        paused.map_err(|error| error.of(self.name))
    }

    /// See [`VirtioDevice::resume`](crate::device::VirtioDevice::resume).
    pub(crate) fn resume(&self) -> Result<(), DeviceError> {
        let resumed = self.worker.as_ref().map_or(Ok(()), Worker::resume);
        resumed.map_err(|error| error.of(self.name))
    }

    /// Whether the driver has kept the rules so far.
    pub(crate) fn health(&self) -> Result<Health, DeviceError> {
        Ok(self
            .call(|service| service.health())?
            .unwrap_or(self.restored))
    }

    /// Lets the thread do `work`; nothing when there is none.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> T + Send + 'static,
    ) -> Result<Option<T>, DeviceError> {
        let answer = self.worker.as_ref().map(|worker| worker.call(work));
        answer.transpose().map_err(|error| error.of(self.name))
    }

    /// Ends the thread and gives its service back.
    pub(crate) fn stop(&mut self) -> Option<S> {
        self.worker.take().and_then(Worker::stop)
    }

    /// Ends the thread and forgets what was restored.
    pub(crate) fn reset(&mut self) {
        self.worker = None;
        self.restored = Health::Well;
    }
}
