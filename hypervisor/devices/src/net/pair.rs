//! The work of one queue pair, on a thread of its own: several pairs are there for guests that want several of the
//! host's cores, which one thread for all of them could not give. The first pair answers the control queue too.

use super::announce;
use super::control::MAX_COMMAND_BYTES;
use super::limit::Timer;
use super::receive::{Receiver, Waiting};
use super::ring::Ring;
use super::shared::{Shared, pairs_allowed};
use super::transmit::Transmitter;
use crate::chain::ChainError;
use crate::device::{Interrupt, QueuePosition};
use crate::sys::tap::{Attachment, Tap};
use crate::worker::{self, Poll, Service};
use std::io;
use std::sync::Arc;

/// Most commands answered before frames have their turn.
const COMMANDS_PER_TURN: usize = 16;
/// Most frames thrown away that came before the driver was ready: more than a tap device keeps.
const MAX_STALE_FRAMES: usize = 4096;

const TAP: u32 = 0;
const RECEIVE: u32 = 1;
const TRANSMIT: u32 = 2;
const CONTROL: u32 = 3;
const RECEIVE_TIMER: u32 = 4;
const TRANSMIT_TIMER: u32 = 5;
const ANNOUNCE_TIMER: u32 = 6;
const ATTENTION: u32 = 7;

/// Queues of a pair, as far as the driver has enabled them.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) receive: Option<Ring>,
    pub(super) transmit: Option<Ring>,
    pub(super) control: Option<Ring>,
}

/// Whether frames in the tap came before the driver was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backlog {
    Stale,
    Wanted,
}

/// Whether the tap is among the sources waited for. It is taken off rather than muted: a detached queue is always
/// "in error" to epoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listening {
    Yes,
    No,
}

#[derive(Debug)]
pub(super) struct Pair {
    index: u16,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
    receiver: Option<Receiver>,
    transmitter: Option<Transmitter>,
    control: Option<Ring>,
    announce_timer: Timer,
    announce_round: u32,
    backlog: Backlog,
    listening: Listening,
}

impl Pair {
    pub(super) fn new(
        index: u16,
        tap: Arc<Tap>,
        queues: Queues,
        shared: Arc<Shared>,
        features: u64,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let (ours, theirs) = (|| Arc::clone(&tap), || Arc::clone(&shared));
        Ok(Self {
            receiver: queues
                .receive
                .map(|ring| Receiver::new(ring, ours(), theirs(), features))
                .transpose()?,
            transmitter: queues
                .transmit
                .map(|ring| Transmitter::new(ring, ours(), theirs()))
                .transpose()?,
            control: queues.control,
            announce_timer: Timer::new()?,
            announce_round: 0,
            backlog: Backlog::Stale,
            listening: Listening::No,
            index,
            tap,
            shared,
            interrupt,
            features,
        })
    }

    /// Throws away frames that came before the driver was ready: they are of another time, perhaps of another host.
    pub(super) fn drop_stale_frames(&mut self) {
        if std::mem::replace(&mut self.backlog, Backlog::Wanted) == Backlog::Wanted {
            return;
        }
        let mut frame = [0; 64];
        for _ in 0..MAX_STALE_FRAMES {
            if self.tap.read(&mut frame).is_err() {
                return;
            }
        }
    }

    /// Frames that wait in the tap are for this guest.
    pub(super) fn want_backlog(&mut self) {
        self.backlog = Backlog::Wanted;
    }

    /// Where the device stands in each queue.
    pub(super) fn positions(&self) -> Vec<QueuePosition> {
        let receive = self
            .receiver
            .as_ref()
            .map(|receiver| receiver.ring.position());
        let transmit = self
            .transmitter
            .as_ref()
            .map(|transmitter| transmitter.ring.position());
        let control = self.control.as_ref().map(Ring::position);
        receive.into_iter().chain(transmit).chain(control).collect()
    }

    /// Sends the first announcement, and the others when the timer rings.
    pub(super) fn start_announcing(&mut self) {
        self.announce_round = 0;
        self.announce();
    }

    fn announce(&mut self) {
        let mac = self.shared.settings().filter.mac;
        for frame in announce::frames(mac, self.shared.config.address) {
            if let Err(error) = self.tap.write(&frame) {
                tracing::debug!(tap = self.tap.name(), %error, "announcement lost");
            }
        }
        let next = announce::gap_after(self.announce_round);
        self.announce_round += 1;
        if let Some(gap) = next
            && let Err(error) = self.announce_timer.ring_after(gap)
        {
            tracing::warn!(tap = self.tap.name(), %error, "no further announcements");
        }
    }

    fn in_use(&self) -> bool {
        self.index < pairs_allowed(self.shared.settings().pairs, self.features)
    }

    /// Does what settings that others changed ask for.
    fn attend(&mut self, poll: &Poll) {
        if self.shared.has_failed() {
            self.halt(poll);
            return;
        }
        let wanted = if self.in_use() {
            Attachment::Attached
        } else {
            self.listen(poll, Listening::No);
            Attachment::Detached
        };
        if let Err(error) = self.tap.attach(wanted) {
            tracing::warn!(tap = self.tap.name(), %error, pair = self.index, "queue stays as it is");
        }
        self.receive(poll);
    }

    fn receive(&mut self, poll: &Poll) {
        let in_use = self.in_use();
        let Some(receiver) = self.receiver.as_mut().filter(|_| in_use) else {
            return;
        };
        match receiver.serve() {
            Ok(Waiting::Frames) => self.listen(poll, Listening::Yes),
            Ok(Waiting::Buffers | Waiting::Limit | Waiting::Nothing) => {
                self.listen(poll, Listening::No);
            }
            Err(error) => self.fail(&error.to_string(), poll),
        }
    }

    fn transmit(&mut self, poll: &Poll) {
        let Some(transmitter) = &mut self.transmitter else {
            return;
        };
        if let Err(error) = transmitter.serve() {
            self.fail(&error.to_string(), poll);
        }
    }

    fn answer_commands(&mut self, poll: &Poll) {
        let Some(ring) = &mut self.control else {
            return;
        };
        let done = answer_some(ring, &self.shared, self.features);
        ring.signal();
        if let Err(error) = done {
            self.fail(&error.to_string(), poll);
        }
    }

    fn listen(&mut self, poll: &Poll, wanted: Listening) {
        if self.listening == wanted {
            return;
        }
        let changed = match wanted {
            Listening::Yes => poll.add(&*self.tap, TAP),
            Listening::No => poll.remove(&*self.tap),
        };
        match changed {
            Ok(()) => self.listening = wanted,
            Err(error) => tracing::error!(tap = self.tap.name(), %error, "epoll refuses the tap"),
        }
    }

    fn fail(&mut self, why: &str, poll: &Poll) {
        let card = &self.shared.config.name;
        tracing::warn!(
            card,
            why,
            "the driver broke the rules; the card has stopped"
        );
        if self.shared.fail() {
            self.interrupt.needs_reset(why);
        }
        self.halt(poll);
    }

    /// Serves nothing but calls for attention from now on.
    fn halt(&mut self, poll: &Poll) {
        self.listen(poll, Listening::No);
        self.announce_round = announce::ROUNDS;
    }

    fn look_at_everything(&mut self, poll: &Poll) {
        self.attend(poll);
        if self.shared.has_failed() {
            return;
        }
        self.transmit(poll);
        self.answer_commands(poll);
        if (1..announce::ROUNDS).contains(&self.announce_round) {
            self.announce();
        }
    }
}

impl Service for Pair {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(worker::borrow(self.shared.attention(self.index)), ATTENTION)?;
        poll.add(&self.announce_timer, ANNOUNCE_TIMER)?;
        if let Some(receiver) = &self.receiver {
            poll.add(receiver.ring.doorbell(), RECEIVE)?;
            poll.add(&receiver.timer, RECEIVE_TIMER)?;
        }
        if let Some(transmitter) = &self.transmitter {
            poll.add(transmitter.ring.doorbell(), TRANSMIT)?;
            poll.add(&transmitter.timer, TRANSMIT_TIMER)?;
        }
        if let Some(control) = &self.control {
            poll.add(control.doorbell(), CONTROL)?;
        }
        // Attaches or detaches the tap's queue, and looks for buffers, as the first thing.
        self.shared.attention(self.index).write(1)?;
        Ok(())
    }

    fn ready(&mut self, token: u32, poll: &Poll) {
        // Every source is quietened first, also by a device that has stopped: epoll goes on telling otherwise.
        match (token, &self.receiver, &self.transmitter, &self.control) {
            (RECEIVE, Some(receiver), ..) => receiver.ring.hear(),
            (TRANSMIT, _, Some(transmitter), _) => transmitter.ring.hear(),
            (CONTROL, _, _, Some(control)) => control.hear(),
            (RECEIVE_TIMER, Some(receiver), ..) => log_timer(receiver.timer.silence()),
            (TRANSMIT_TIMER, _, Some(transmitter), _) => log_timer(transmitter.timer.silence()),
            (ANNOUNCE_TIMER, ..) => log_timer(self.announce_timer.silence()),
            (ATTENTION, ..) => {
                // Nothing to read means that it was read before.
                let _ = self.shared.attention(self.index).read();
            }
            _ => {}
        }
        if self.shared.has_failed() {
            self.halt(poll);
            return;
        }
        match token {
            TAP | RECEIVE | RECEIVE_TIMER => self.receive(poll),
            TRANSMIT | TRANSMIT_TIMER => self.transmit(poll),
            CONTROL => self.answer_commands(poll),
            ANNOUNCE_TIMER => self.announce(),
            ATTENTION => self.attend(poll),
            _ => {}
        }
    }

    fn quiesce(&mut self, poll: &Poll) {
        self.listen(poll, Listening::No);
        if let Some(receiver) = &mut self.receiver {
            receiver.give_back();
        }
    }

    fn resume(&mut self, poll: &Poll) {
        self.drop_stale_frames();
        self.look_at_everything(poll);
    }
}

fn log_timer(done: io::Result<()>) {
    if let Err(error) = done {
        tracing::error!(%error, "a timer cannot be silenced");
    }
}

/// Why the control queue stops.
#[derive(Debug, thiserror::Error)]
enum ControlError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("a command leaves no room for its answer")]
    NoRoom,
}

fn answer_some(ring: &mut Ring, shared: &Shared, features: u64) -> Result<(), ControlError> {
    for _ in 0..COMMANDS_PER_TURN {
        let Some(chain) = ring.pop()? else {
            if ring.has_more_or_rings()? {
                continue;
            }
            return Ok(());
        };
        if chain.writable_bytes() == 0 {
            return Err(ControlError::NoRoom);
        }
        // One byte more than is looked at, so that longer commands are seen to be.
        let mut bytes = vec![0; MAX_COMMAND_BYTES + 1];
        let len = chain.read(ring.memory(), 0, &mut bytes);
        let answer = shared.carry_out(&bytes[..len], features);
        chain.write(ring.memory(), 0, &[answer]);
        ring.publish(&[(chain.head(), 1)])?;
    }
    ring.come_back();
    Ok(())
}
