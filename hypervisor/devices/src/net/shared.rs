//! What the queue pairs of a card and the card itself share.

use super::control::{self, Command};
use super::feature::{self, ConfigSpace};
use super::filter::Filter;
use super::frame_times::FrameTimes;
use super::limit::Limit;
use super::{Link, NetConfig};
use crate::counters::counters;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// What the driver has set, and what it is to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) filter: Arc<Filter>,
    /// Queue pairs in use; they are the first ones.
    pub(super) pairs: u16,
    pub(super) link: Link,
    /// The driver was asked to announce itself and has not done so yet.
    pub(super) announce: bool,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: NetConfig,
    settings: Mutex<Settings>,
    pub(super) counters: Counters,
    pub(super) frame_times: Arc<FrameTimes>,
    pub(super) receive_limit: Limit,
    pub(super) transmit_limit: Limit,
    /// The driver broke the rules: nothing more is done until a reset.
    failed: AtomicBool,
    /// Rings for each queue pair when settings changed that it must act on.
    attention: Vec<EventFd>,
}

impl Shared {
    pub(super) fn new(config: NetConfig) -> std::io::Result<Self> {
        let attention = (0..config.queue_pairs)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            settings: Mutex::new(Settings {
                filter: Arc::new(Filter::open(config.mac)),
                pairs: 1,
                link: Link::Up,
                announce: false,
            }),
            counters: Counters::default(),
            frame_times: Arc::default(),
            receive_limit: Limit::new(config.limits.receive_bytes_per_s),
            transmit_limit: Limit::new(config.limits.transmit_bytes_per_s),
            failed: AtomicBool::new(false),
            attention,
            config,
        })
    }

    pub(super) fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what the driver set.
    pub(super) fn reset(&self) {
        let mut settings = self.settings();
        settings.filter = Arc::new(Filter::open(self.config.mac));
        settings.pairs = 1;
        settings.announce = false;
        self.failed.store(false, Ordering::Release);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Gives whether this was the first failure.
    pub(super) fn fail(&self) -> bool {
        let first = !self.failed.swap(true, Ordering::AcqRel);
        self.ring_all();
        first
    }

    pub(super) fn attention(&self, pair: u16) -> &EventFd {
        &self.attention[usize::from(pair)]
    }

    pub(super) fn set_link(&self, link: Link) {
        self.settings().link = link;
    }

    pub(super) fn config_space(&self) -> ConfigSpace {
        let settings = self.settings();
        ConfigSpace {
            mac: settings.filter.mac,
            link: settings.link,
            announce: settings.announce,
            queue_pairs: self.config.queue_pairs.into(),
            mtu: self.config.mtu,
        }
    }

    /// Carries out what the driver asks, if it accepted the feature that allows it; gives the answer.
    pub(super) fn carry_out(&self, bytes: &[u8], features: u64) -> u8 {
        let command = match Command::parse(bytes) {
            Ok(command) if features & command.feature() != 0 => command,
            Ok(command) => {
                tracing::debug!(
                    card = self.config.name,
                    ?command,
                    "command without its feature"
                );
                return control::ERROR;
            }
            Err(refusal) => {
                tracing::debug!(card = self.config.name, %refusal, "command refused");
                return control::ERROR;
            }
        };
        let mut settings = self.settings();
        match command {
            Command::SetMode { mode, to } => Arc::make_mut(&mut settings.filter).set(mode, to),
            Command::SetTable { unicast, multicast } => {
                let filter = Arc::make_mut(&mut settings.filter);
                (filter.unicast, filter.multicast) = (unicast, multicast);
            }
            Command::SetAddress(mac) => Arc::make_mut(&mut settings.filter).mac = mac,
            Command::AnnounceDone => settings.announce = false,
            Command::SetPairs(pairs) => {
                if pairs == 0 || pairs > self.config.queue_pairs.into() {
                    return control::ERROR;
                }
                settings.pairs = pairs;
                drop(settings);
                self.ring_all();
            }
        }
        control::OK
    }

    fn ring_all(&self) {
        for bell in &self.attention {
            // A full counter is readable, which is all that is wanted.
            let _ = bell.write(1);
        }
    }
}

/// Queue pairs in use before the driver says more, among `offered`.
pub(super) fn pairs_allowed(pairs: u16, features: u64) -> u16 {
    if features & feature::MQ == 0 {
        1
    } else {
        pairs
    }
}

counters! {
    /// Frames given to the guest.
    rx_packets,
    /// Their bytes.
    rx_bytes,
    /// Frames for the guest that were lost: no room, too long, or the link is down.
    rx_dropped,
    /// Frames that the guest's filter did not want.
    rx_filtered,
    /// How often receiving waited for its rate limit.
    rx_limited,
    /// Frames sent by the guest.
    tx_packets,
    /// Their bytes.
    tx_bytes,
    /// Frames from the guest that were lost: malformed, or the host did not take them.
    tx_dropped,
    /// How often sending waited for its rate limit.
    tx_limited,
}
