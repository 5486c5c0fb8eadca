//! A defect in the guest itself: said on the console, then everything stops.

use core::panic::PanicInfo;

use crate::console;
use crate::power;
use crate::pure::text::Text;

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    let mut line = Text::new();
    line.push("\npilot: panic");
    if let Some(location) = info.location() {
        line.push_key("file").push(location.file());
        line.push_pair("line", location.line().into());
    }
    if let Some(message) = info.message().as_str() {
        line.push_key("message").push(message);
    }
    console::print_line(&line);
    power::stop_all()
}
