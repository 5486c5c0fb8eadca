//! What a migration will do, as text.

use crate::cli::table::Sheet;
use crate::cli::words::{bytes, mib, milliseconds_of_us, rate, seconds};
use crate::resource::{Forecast, ForecastFigures, Foreseen, MigrationOutlook};
use std::fmt::Write;

/// A forecast with what it was made from.
pub(super) fn forecast(forecast: &Forecast) -> String {
    let arrives = forecast.verdict != MigrationOutlook::WillNotConverge;
    let rounds = format!(
        "{} in {} rounds",
        seconds(forecast.seconds),
        forecast.rounds
    );
    let blackout = format!(
        "{} ms, limit {} ms",
        forecast.blackout_ms, forecast.downtime_limit_ms
    );
    let measured = &forecast.measured;
    let mut sheet = Sheet::default()
        .line("Forecast", outlook(forecast.verdict))
        .maybe(
            "Because",
            forecast.because.as_ref().map(|because| &because.detail),
        )
        .line(if arrives { "Time" } else { "Given up" }, rounds)
        .line("To send", mib(forecast.mib))
        .maybe(
            "Disks",
            (forecast.disk_bytes > 0).then(|| format!("at most {}", bytes(forecast.disk_bytes))),
        )
        .line("Blackout", blackout)
        .maybe(
            "Slowed",
            (forecast.throttle_percent > 0)
                .then(|| format!("by up to {}% of its time", forecast.throttle_percent)),
        )
        .line("Dirties", dirties(measured));
    if !measured.vcpus.is_empty() {
        let busy: Vec<_> = measured
            .vcpus
            .iter()
            .map(|vcpu| format!("{} {}%", vcpu.index, vcpu.busy_percent))
            .collect();
        sheet = sheet.line("vCPUs busy", busy.join(", "));
    }
    let link = format!(
        "{}, {}",
        rate(measured.bytes_per_s),
        from(&measured.bytes_per_s_from)
    );
    let fixed = format!(
        "{}, {}",
        milliseconds_of_us(measured.fixed_us),
        from(&measured.fixed_from)
    );
    let mut text = sheet
        .line("Link", link)
        .line("Fixed cost", fixed)
        .to_string();
    if !forecast.options.is_empty() {
        text.push_str("Any one of these would help:\n");
    }
    for option in &forecast.options {
        let _ = writeln!(text, "  - {}", option.detail);
    }
    text
}

const fn outlook(verdict: MigrationOutlook) -> &'static str {
    match verdict {
        MigrationOutlook::Converges => "converges",
        MigrationOutlook::GoesAhead => "does not converge; the guest goes ahead of its memory",
        MigrationOutlook::WillNotConverge => "will not converge under the limit",
    }
}

fn dirties(measured: &ForecastFigures) -> String {
    let mut text = rate(measured.dirty_bytes_per_s);
    if measured.dirty_from != "sampled" {
        text.push_str(", by the latest sample");
    }
    for (number, reading) in measured.dirty_series.iter().enumerate() {
        let before = if number == 0 { "; " } else { ", " };
        let after_ms = reading.after_us / 1_000;
        let _ = write!(text, "{before}{} after {after_ms} ms", bytes(reading.bytes));
    }
    text
}

fn from(basis: &str) -> &'static str {
    match basis {
        "lanes" | "pair" => "from earlier migrations between these hosts",
        "pool" => "from earlier migrations in the pool",
        _ => "assumed: nothing has been measured yet",
    }
}

/// What was foreseen when a migration began.
pub(super) fn foreseen(foreseen: &Foreseen) -> String {
    let verdict = match foreseen.verdict {
        MigrationOutlook::Converges => "converges",
        MigrationOutlook::GoesAhead => "goes ahead",
        MigrationOutlook::WillNotConverge => "will not converge",
    };
    format!(
        "{verdict}: {}, {}, blackout {} ms",
        seconds(foreseen.took_ms as f64 / 1_000.0),
        mib(foreseen.mib),
        foreseen.blackout_ms
    )
}
