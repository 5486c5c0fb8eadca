//! Values in an operator's words.

use godwit_wire::unit::Bytes;
use jiff::Timestamp;
use serde::Serialize;

/// The name an enum has in the API.
pub(super) fn name(value: impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => "?".to_owned(),
    }
}

/// A value that may be absent.
pub(super) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// `12s`, `5m`, `3h`, `2d`: how long ago `then` was.
pub(super) fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(then.as_second()).max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

pub(super) fn bytes(count: u64) -> String {
    Bytes(count).to_string()
}

pub(super) fn rate(bytes_per_s: u64) -> String {
    format!("{}/s", Bytes(bytes_per_s))
}

/// Mebibytes as `512 MiB` or `1.5 GiB`.
pub(super) fn mib(count: u64) -> String {
    bytes(count.saturating_mul(1 << 20))
}

pub(super) fn percent(value: f64) -> String {
    format!("{value:.0}%")
}

/// Seconds as `0.4 s` or `3 min 20 s`.
pub(super) fn seconds(value: f64) -> String {
    if value < 60.0 {
        format!("{value:.1} s")
    } else {
        let whole = value.round() as u64;
        format!("{} min {} s", whole / 60, whole % 60)
    }
}

/// Microseconds as milliseconds.
pub(super) fn milliseconds_of_us(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1000.0)
}

/// A size on the command line: `512M`, `20G`, `1.5T`, or a plain number of bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no size; write it as 512M, 20G or 1T");
    let trimmed = text.trim_end_matches(['B', 'b']).trim_end_matches(['i']);
    let (number, unit) = match trimmed.char_indices().last() {
        Some((at, 'K' | 'k')) => (&trimmed[..at], 1u64 << 10),
        Some((at, 'M' | 'm')) => (&trimmed[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&trimmed[..at], 1 << 30),
        Some((at, 'T' | 't')) => (&trimmed[..at], 1 << 40),
        _ => (trimmed, 1),
    };
    let value: f64 = number.parse().map_err(|_| bad())?;
    let bytes = value * unit as f64;
    if !bytes.is_finite() || bytes < 1.0 || bytes > u64::MAX as f64 / 2.0 {
        return Err(bad());
    }
    Ok(bytes.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_told_in_the_largest_unit_that_still_says_something() {
        let at = |second| Timestamp::from_second(second).expect("in range");
        let told: Vec<_> = [0, 119, 120, 7_199, 7_200, 172_799, 172_800]
            .map(|s| age(at(0), at(s)))
            .into();
        assert_eq!(told, ["0s", "119s", "2m", "119m", "2h", "47h", "2d"]);
        assert_eq!(
            age(at(10), at(5)),
            "0s",
            "a clock that runs behind is no reason to worry the operator"
        );
    }

    #[test]
    fn a_size_is_read_with_its_unit() {
        assert_eq!(size("20G"), Ok(20 << 30));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert_eq!(size("512"), Ok(512));
        for bad in ["", "G", "-1G", "many", "0"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn long_times_are_told_in_minutes() {
        assert_eq!(seconds(0.42), "0.4 s");
        assert_eq!(seconds(200.2), "3 min 20 s");
    }
}
