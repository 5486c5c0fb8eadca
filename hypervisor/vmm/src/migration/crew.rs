//! The lanes of a source, each on a thread of its own, round after round.

use super::connection::{Class, TakesIn, expect_to_take_in, mark};
use super::lane::{Lane, PagesError};
use super::places::{Places, Turn};
use super::round::Round;
use std::net::TcpStream;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::Scope;
use std::time::Duration;

/// How often the crew's owner looks at a round under way.
const LOOK: Duration = Duration::from_millis(20);

/// All lanes, at work or resting.
pub(super) struct Crew {
    places: Arc<Places>,
    orders: Vec<Sender<Arc<Round>>>,
    done: Receiver<Result<(), PagesError>>,
    sockets: Vec<TcpStream>,
}

impl Crew {
    /// Puts every lane on a thread, where it works while there is a place for it. They end with the crew.
    pub(super) fn start<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        lanes: Vec<(Lane<'scope>, TcpStream)>,
        places: &Arc<Places>,
    ) -> Self {
        assert_eq!(lanes.len(), places.lanes(), "the places are for these");
        let (report, done) = mpsc::channel();
        let (mut orders, mut sockets) = (Vec::new(), Vec::new());
        for (number, (mut lane, socket)) in lanes.into_iter().enumerate() {
            let (order, inbox) = mpsc::channel::<Arc<Round>>();
            let (report, places) = (report.clone(), places.clone());
            scope.spawn(move || {
                let turn = Turn::new(&places, number);
                for round in inbox {
                    // A lane that panics must still be counted, or its owner waits for it for ever.
                    let sent = catch_unwind(AssertUnwindSafe(|| lane.send(&round, turn)))
                        .unwrap_or(Err(PagesError::Stopped));
                    if sent.is_err() {
                        round.stop();
                        places.drain();
                    }
                    if report.send(sent).is_err() {
                        break;
                    }
                }
            });
            orders.push(order);
            sockets.push(socket);
        }
        Self {
            places: places.clone(),
            orders,
            done,
            sockets,
        }
    }

    /// Number of lanes.
    pub(super) fn lanes(&self) -> usize {
        self.orders.len()
    }

    /// Says how long the other end may take to take in what is sent.
    pub(super) fn expect_to_take_in(&self, takes_in: TakesIn) -> std::io::Result<()> {
        self.sockets
            .iter()
            .try_for_each(|socket| expect_to_take_in(socket, takes_in))
    }

    /// Says which traffic goes first.
    pub(super) fn mark(&self, class: Class) {
        self.sockets.iter().for_each(|socket| mark(socket, class));
    }

    /// Sends a round; `observe` looks on now and then and may stop it.
    pub(super) fn send(
        &self,
        round: Round,
        mut observe: impl FnMut() -> ControlFlow<()>,
    ) -> Result<(), PagesError> {
        let round = Arc::new(round);
        self.places.begin();
        for order in &self.orders {
            // A lane that has ended has said why.
            let _ = order.send(round.clone());
        }
        let (mut left, mut outcome, mut called_off) = (self.orders.len(), Ok(()), false);
        while left > 0 {
            match self.done.recv_timeout(LOOK) {
                Ok(sent) => {
                    left -= 1;
                    // The one that failed says why; the others were only stopped by it.
                    if !called_off
                        && matches!(outcome, Ok(()) | Err(PagesError::Stopped))
                        && sent.is_err()
                    {
                        outcome = sent;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(PagesError::Stopped),
            }
            if left > 0 && !called_off && observe().is_break() {
                called_off = true;
                round.stop();
                self.hang_up();
                outcome = Err(PagesError::Stopped);
            }
        }
        outcome
    }

    fn hang_up(&self) {
        self.places.drain();
        for socket in &self.sockets {
            // It may be down already.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.hang_up();
    }
}
