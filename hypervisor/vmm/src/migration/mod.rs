//! Live migration between two VMM processes.
//!
//! ```text
//! convergence  pure: another round, pause now, or give up
//! hand_over    pure: who may still go back, and when only the store decides
//! ledger       what the API tells of a migration; the one place its state changes
//! stream       frames on a connection
//! pages        guest memory as frames
//! source       the sending end
//! target       the receiving end
//! ```
//!
//! Whatever fails before the source has sent `Done` leaves the source running: its memory is untouched, and the
//! next attempt starts with every page dirty, so no dirty bit can be lost.

mod convergence;
mod hand_over;
mod ledger;
mod pages;
mod source;
mod stream;
mod target;

pub use hand_over::{HandOverError, SourceHandOver, TargetHandOver};
pub use ledger::Ledger;
pub use source::{Outgoing, SourceMachine, send_machine};
pub use stream::StreamError;
pub use target::{Incoming, MigrationListener, TargetMachine, ThisCpu, receive_machine};
