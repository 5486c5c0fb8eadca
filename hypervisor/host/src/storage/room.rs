//! When a machine that stands still for want of room may run again. Pure.
//!
//! ```text
//! waiting ──room was short and is not any more──▶ resume
//!    │ room was never short: something else stalls the disk
//!    └──▶ resume, at most MAX_TRIES times ──▶ left to the operator
//! ```

use super::pool::Room;
use godwit_wire::unit::Bytes;

/// Free space that lets machines run again, or a twentieth of a small pool: less would be full again at once.
pub(crate) const ROOM_TO_RESUME: Bytes = Bytes(64 << 20);
/// Times a machine is resumed although its pool was not seen to be full: another disk error may have passed.
const MAX_TRIES: u32 = 3;

/// What to do about a machine that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RoomStep {
    /// There is no room, or nothing more to try.
    Wait,
    /// Let it run.
    Resume,
}

/// Memory of one machine's pauses.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RoomWatch {
    was_short: bool,
    tries: u32,
}

impl RoomWatch {
    /// Decides on the room there is now.
    pub(crate) fn look(&mut self, room: Room) -> RoomStep {
        if !is_enough(room) {
            self.was_short = true;
            return RoomStep::Wait;
        }
        if std::mem::take(&mut self.was_short) {
            return RoomStep::Resume;
        }
        if self.tries < MAX_TRIES {
            self.tries += 1;
            return RoomStep::Resume;
        }
        RoomStep::Wait
    }

    /// The machine has run for long enough to start anew.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }
}

fn is_enough(room: Room) -> bool {
    room.free >= ROOM_TO_RESUME.min(Bytes(room.total.0 / 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn room(free: u64) -> Room {
        Room {
            total: Bytes(100 << 30),
            free: Bytes(free),
        }
    }

    #[test]
    fn a_machine_waits_for_room_and_then_runs() {
        let mut watch = RoomWatch::default();
        for _ in 0..10 {
            assert_eq!(watch.look(room(0)), RoomStep::Wait);
            assert_eq!(watch.look(room(ROOM_TO_RESUME.0 - 1)), RoomStep::Wait);
            assert_eq!(watch.look(room(ROOM_TO_RESUME.0)), RoomStep::Resume);
        }
    }

    #[test]
    fn a_disk_that_stalls_although_there_is_room_is_left_to_the_operator() {
        let mut watch = RoomWatch::default();
        for _ in 0..MAX_TRIES {
            assert_eq!(watch.look(room(1 << 40)), RoomStep::Resume);
        }
        assert_eq!(watch.look(room(1 << 40)), RoomStep::Wait);
        watch.forget();
        assert_eq!(watch.look(room(1 << 40)), RoomStep::Resume);
    }

    #[test]
    fn a_small_pool_needs_only_its_share() {
        let small = Room {
            total: Bytes(40 << 20),
            free: Bytes(2 << 20),
        };
        assert_eq!(RoomWatch::default().look(small), RoomStep::Resume);
    }
}
