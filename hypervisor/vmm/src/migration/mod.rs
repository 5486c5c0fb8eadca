//! Live migration between two VMM processes.
//!
//! ```text
//! hand_over    pure: who may still go back, and when only the store decides
//! ledger       what the API tells of a migration; the one place its state changes
//! pace         pure: the limit on what all lanes send together
//! link_rate    pure: how fast the link carries pages, from the latest rounds
//! lane_choice  pure: how many lanes are to carry pages, from what they were seen to carry
//! squeeze      pure: whether compressing pays
//! round        one pass over dirty memory, shared out among the lanes
//! places       how many lanes take work at a time, the others resting until the round ends
//! claims       pages that a guest which runs at the target already still lacks, each sent once
//! maps         sets of missing pages on the wire
//! disks        what of the disks that go with the guest is to be sent, and how fast they may be written
//! compare      which pages need not be sent, because the target has kept them
//! connection   TCP, or TLS on it
//! stream       frames on a connection
//! sockets      all connections, for whoever calls the migration off
//! lane, crew   connections that carry pages, each with a thread, at the source
//! source       the sending end
//! target       the receiving end
//! packet_gap   how long the guest's network was silent because of the hand-over
//! watching     how fast a guest dirties memory, when no migration is under way
//! ```
//!
//! Whether to copy another round, to pause the guest or to give up is decided by
//! [`convergence`](godwit_wire::migration::convergence), which the controller foresees migrations with.
//!
//! Whatever fails before the source has sent `Done` leaves the source running: its memory is untouched, and the
//! next attempt starts with every page dirty, so no dirty bit can be lost.
//!
//! Disks whose content goes along are copied in the same rounds, memory last in each. The source's disks stay as they
//! are and its own until the guest runs at the target; the target's are durable before it is ready.
//!
//! Post-copy (only where the policy allows it): `Done` names pages that are still missing. The source keeps its
//! memory as it is and sends them, wanted ones first; connections that break are made again. Both halves stay until
//! the target has everything.

mod claims;
mod compare;
mod connection;
mod crew;
mod disks;
mod hand_over;
mod lane;
mod lane_choice;
mod ledger;
mod link_rate;
mod maps;
mod pace;
mod packet_gap;
mod places;
mod round;
mod sockets;
mod source;
mod squeeze;
mod stream;
mod target;
mod watching;

pub use hand_over::{HandOverError, Memory, SourceHandOver, TargetHandOver};
pub use ledger::Ledger;
pub use source::{AtRest, Outgoing, SourceMachine, StandsStill, send_machine};
pub use stream::StreamError;
pub use target::{Incoming, MigrationListener, TargetMachine, ThisCpu, receive_machine};
pub use watching::watch_dirtying;
