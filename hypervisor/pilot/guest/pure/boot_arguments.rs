//! The kernel command line.

use super::constants::{TICK_PERIOD_US, TICK_PERIOD_US_MAX, TICK_PERIOD_US_MIN, VCPUS_MAX};
use super::text::parse_decimal;

/// How many vCPUs to start, from `vcpus=N`; one when it is absent or not a number.
pub fn vcpus(command_line: &[u8]) -> usize {
    let asked = number(command_line, b"vcpus=").unwrap_or(1);
    asked.clamp(1, VCPUS_MAX as u64) as usize
}

/// The tick period, from `tick_us=N`.
pub fn tick_us(command_line: &[u8]) -> u64 {
    let asked = number(command_line, b"tick_us=").unwrap_or(TICK_PERIOD_US);
    asked.clamp(TICK_PERIOD_US_MIN, TICK_PERIOD_US_MAX)
}

/// The last argument of that name whose value is a number.
fn number(command_line: &[u8], name: &[u8]) -> Option<u64> {
    command_line
        .split(|byte| byte.is_ascii_whitespace())
        .filter_map(|word| word.strip_prefix(name))
        .filter_map(parse_decimal)
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_vcpus_argument_counts() {
        assert_eq!(vcpus(b""), 1);
        assert_eq!(vcpus(b"console=ttyS0 vcpus=4"), 4);
        assert_eq!(vcpus(b"vcpus=2 vcpus=3 quiet"), 3);
        assert_eq!(vcpus(b"xvcpus=2"), 1);
        assert_eq!(vcpus(b"vcpus=two"), 1);
    }

    #[test]
    fn the_count_stays_within_what_the_guest_can_start() {
        assert_eq!(vcpus(b"vcpus=0"), 1);
        assert_eq!(vcpus(b"vcpus=100000"), VCPUS_MAX);
    }

    #[test]
    fn the_tick_period_stays_within_its_bounds() {
        assert_eq!(tick_us(b""), TICK_PERIOD_US);
        assert_eq!(tick_us(b"vcpus=2 tick_us=10000"), 10_000);
        assert_eq!(tick_us(b"tick_us=0"), TICK_PERIOD_US_MIN);
        assert_eq!(tick_us(b"tick_us=18446744073709551615"), TICK_PERIOD_US_MAX);
    }
}
