//! Network cards: commands of the control queue, and the whole device when there is a tap to put it on.

use crate::hostile::{MEMORY_BYTES, drive};
use crate::input::Input;
use godwit_devices::device::{Start, VirtioDevice};
use godwit_devices::mock::MockDriver;
use godwit_devices::net::control::{Command, MAX_COMMAND_BYTES};
use godwit_devices::net::filter::Filter;
use godwit_devices::net::{Net, NetConfig};
use godwit_wire::devices::{MacAddress, NicLimits};
use std::cell::RefCell;

/// Names a tap device that frames may be sent to; without it only commands are tried.
pub const TAP_ENV: &str = "GODWIT_FUZZ_TAP";

const OWN: MacAddress = MacAddress([0x52, 0, 0, 0, 0, 1]);

thread_local! {
    /// Attaching to a tap takes the kernel milliseconds, so one card serves all inputs, reset between them.
    static CARD: RefCell<Option<MockDriver<Net>>> = RefCell::new(card());
}

fn card() -> Option<MockDriver<Net>> {
    let tap = std::env::var(TAP_ENV).ok()?;
    let net = Net::open(NetConfig {
        name: "fuzzed".into(),
        mac: OWN,
        tap,
        mtu: 1500,
        queue_pairs: 1,
        limits: NicLimits::default(),
        address: None,
    });
    Some(MockDriver::new(
        net.expect("the tap can be used"),
        MEMORY_BYTES,
    ))
}

/// An even first byte is a command, an odd one drives the card.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    if input.u8() & 1 == 0 {
        return command(&mut input);
    }
    CARD.with_borrow_mut(|card| {
        let Some(driver) = card else {
            return;
        };
        driver
            .activate(Start::Working)
            .expect("it can be activated");
        drive(driver, &mut input);
        let saved = driver.device().save().expect("it is paused");
        driver.reset();
        driver
            .device_mut()
            .restore(saved)
            .expect("what a card saved it restores");
        driver.device_mut().reset();
    });
}

fn command(input: &mut Input<'_>) {
    let destination = MacAddress(input.array());
    let bytes = input.rest();
    let Ok(command) = Command::parse(bytes) else {
        return;
    };
    assert!((2..=MAX_COMMAND_BYTES).contains(&bytes.len()));
    let mut filter = Filter::open(OWN);
    match command {
        Command::SetMode { mode, to } => filter.set(mode, to),
        Command::SetTable { unicast, multicast } => {
            assert!(unicast.is_bounded() && multicast.is_bounded());
            filter.promiscuous = false;
            (filter.unicast, filter.multicast) = (unicast, multicast);
        }
        Command::SetAddress(mac) => assert!(mac.is_unicast()),
        Command::AnnounceDone | Command::SetPairs(_) => {}
    }
    let _ = filter.accepts(destination);
}
