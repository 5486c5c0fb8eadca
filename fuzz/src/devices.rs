//! The small devices, whole: entropy, balloon, console.

use crate::hostile::{MEMORY_BYTES, drive, move_on};
use crate::input::Input;
use godwit_devices::balloon::Balloon;
use godwit_devices::console::VirtioConsole;
use godwit_devices::device::{SavedBody, Start, VirtioDevice};
use godwit_devices::mock::MockDriver;
use godwit_devices::rng::Rng;
use godwit_wire::unit::{Bytes, Mib};
use std::io;

/// The first byte chooses the device; an odd choice restores a state of the input's first.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 6 {
        0 => hostile(rng, &mut input),
        1 => hostile(balloon, &mut input),
        2 => hostile(console, &mut input),
        3 => restored(rng(), &mut input),
        4 => restored(balloon(), &mut input),
        _ => restored(console(), &mut input),
    }
}

fn rng() -> Rng {
    Rng::new().expect("the host has entropy")
}

fn balloon() -> Balloon {
    let (balloon, control) = Balloon::new(Bytes(MEMORY_BYTES));
    control.keep(Mib(0));
    balloon
}

fn console() -> VirtioConsole {
    let (console, input) = VirtioConsole::new(Box::new(io::sink()));
    input.send(b"something to read").expect("it is empty");
    console
}

fn hostile<D: VirtioDevice>(make: fn() -> D, input: &mut Input<'_>) {
    let mut driver = MockDriver::new(make(), MEMORY_BYTES);
    driver
        .activate(Start::Working)
        .expect("it can be activated");
    drive(&mut driver, input);
    move_on(driver, make());
}

fn restored<D: VirtioDevice>(mut device: D, input: &mut Input<'_>) {
    let length = input.u8();
    if let Ok(saved) = ciborium::from_reader::<SavedBody, _>(input.bytes(length.into())) {
        let _ = device.restore(saved);
    }
    let mut driver = MockDriver::new(device, MEMORY_BYTES);
    driver.activate(Start::Paused).expect("it can be activated");
    driver.device_mut().resume().expect("its thread lives");
    drive(&mut driver, input);
}
