//! What a migration will do, as the API shows it.

use crate::resource as api;
use godwit_controller::model;
use godwit_controller::plan::dirtying::DirtySource;
use godwit_controller::plan::estimate::Basis;
use godwit_controller::plan::forecast::{Because, Forecast, Remedy, Verdict};

/// A forecast.
pub(super) fn forecast(forecast: &Forecast) -> api::Forecast {
    let (verdict, course, because, options) = match &forecast.verdict {
        Verdict::Converges(course) => (api::MigrationOutlook::Converges, course, None, &[][..]),
        Verdict::GoesAhead(course) => (api::MigrationOutlook::GoesAhead, course, None, &[][..]),
        Verdict::WillNot {
            course,
            because,
            options,
        } => (
            api::MigrationOutlook::WillNotConverge,
            course,
            Some(because),
            options.as_slice(),
        ),
    };
    api::Forecast {
        verdict,
        summary: forecast.to_string(),
        downtime_limit_ms: forecast.limit_ms,
        seconds: (course.seconds * 10.0).round() / 10.0,
        mib: course.mib.0,
        disk_bytes: forecast.disks.0,
        blackout_ms: course.blackout_ms,
        throttle_percent: course.throttle_percent,
        rounds: course.rounds,
        rest_bytes: course.rest.0,
        because: because.map(reason),
        options: options.iter().map(option).collect(),
        measured: measured(forecast),
    }
}

fn reason(because: &Because) -> api::ForecastReason {
    api::ForecastReason {
        kind: because.name().to_owned(),
        detail: because.to_string(),
    }
}

fn option(remedy: &Remedy) -> api::ForecastOption {
    api::ForecastOption {
        kind: remedy.name().to_owned(),
        detail: remedy.to_string(),
        value: remedy.value(),
    }
}

fn measured(forecast: &Forecast) -> api::ForecastFigures {
    let (dirtying, figures) = (&forecast.dirtying, &forecast.figures);
    let dirty_from = match dirtying.source {
        DirtySource::Sampled => "sampled",
        DirtySource::LastKnown => "last_known",
    };
    let readings = dirtying.series.iter().map(|reading| api::DirtyReading {
        after_us: reading.after_us,
        bytes: reading.bytes,
    });
    let vcpus = dirtying.vcpus.iter().map(|vcpu| api::VcpuBusy {
        index: vcpu.index,
        busy_percent: vcpu.busy_percent,
    });
    api::ForecastFigures {
        dirty_from: dirty_from.to_owned(),
        dirty_bytes_per_s: dirtying.bytes_per_s,
        dirty_series: readings.collect(),
        vcpus: vcpus.collect(),
        resident_bytes: forecast.resident.0,
        bytes_per_s: figures.bytes_per_s,
        bytes_per_s_from: basis(figures.bytes_per_s_from).to_owned(),
        fixed_us: figures.fixed_us,
        fixed_from: basis(figures.fixed_from).to_owned(),
    }
}

const fn basis(basis: Basis) -> &'static str {
    match basis {
        Basis::Lanes => "lanes",
        Basis::Pair => "pair",
        Basis::Pool => "pool",
        Basis::Assumed => "assumed",
    }
}

/// What was foreseen when a migration began.
pub(super) fn foreseen(foreseen: &model::Foreseen) -> api::Foreseen {
    api::Foreseen {
        verdict: match foreseen.outcome {
            model::ForeseenOutcome::Converges => api::MigrationOutlook::Converges,
            model::ForeseenOutcome::GoesAhead => api::MigrationOutlook::GoesAhead,
            model::ForeseenOutcome::WillNotConverge => api::MigrationOutlook::WillNotConverge,
        },
        took_ms: foreseen.took_ms,
        mib: foreseen.mib,
        blackout_ms: foreseen.blackout_ms,
        throttle_percent: foreseen.throttle_percent,
    }
}
