//! Asks for the pages that the guest waits for, one at a time on each urgent lane.

use super::TargetError;
use super::lanes::Content;
use super::pull::{Link, Pull};
use crate::migration::stream::FrameStream;
use godwit_wire::migration::{FrameHeader, FrameKind, MAX_FRAME_PAGES};
use godwit_wire::unit::PAGE_BYTES;
use std::sync::Arc;
use std::time::Instant;

/// An urgent lane's end at the target.
pub(super) struct Urgent {
    pub(super) pull: Arc<Pull>,
    pub(super) stream: FrameStream,
    pub(super) link: Link,
}

impl Urgent {
    /// Serves faults until the lane ends.
    pub(super) fn run(mut self) {
        let mut payload = vec![0; MAX_FRAME_PAGES as usize * PAGE_BYTES as usize];
        loop {
            match self.pull.next_wanted(&self.link) {
                Ok(Some(address)) => {
                    let asked = Instant::now();
                    if let Err(error) = self.fetch(address, &mut payload) {
                        self.pull.ask_again(address);
                        return self.pull.broke(self.link.number, &error.to_string());
                    }
                    self.pull.waited(asked.elapsed());
                }
                Ok(None) => return,
                Err(error) => return self.pull.broke(self.link.number, &error.to_string()),
            }
        }
    }

    fn fetch(&mut self, address: u64, payload: &mut [u8]) -> Result<(), TargetError> {
        self.stream.send_frame(FrameHeader::want(address), &[])?;
        let mut room = Vec::new();
        loop {
            let announced = self.stream.announced()?;
            let header = announced.header;
            let payload = match header.kind {
                FrameKind::Pages | FrameKind::Zero => &mut payload[..header.length as usize],
                FrameKind::Served => &mut [],
                other => {
                    return Err(TargetError::OutOfTurn {
                        got: format!("{other:?}"),
                        expected: "pages",
                    });
                }
            };
            self.stream.read_payload(&announced, payload)?;
            if header.kind == FrameKind::Served {
                // Should it still be missing, then it is on its way on another lane.
                return Ok(());
            }
            if header.round != self.pull.round {
                return Err(TargetError::WrongRound {
                    got: header.round,
                    expected: self.pull.round,
                });
            }
            self.pull
                .fill(&header, Content::of(&header, payload, &mut room)?)?;
        }
    }
}
