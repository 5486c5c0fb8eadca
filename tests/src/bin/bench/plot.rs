//! Draws a bench's JSON file as an SVG: a panel for each group of measurements, a row for each measurement, its median
//! as a bar and every single value as a dot.

use anyhow::{Context, ensure};
use godwit_tests::program;
use serde::Deserialize;
use std::fmt::Write as _;
use std::path::PathBuf;

/// What is drawn, in this order: the group, its title, and which direction is better.
const PANELS: [(&str, &str); 11] = [
    (
        "throughput",
        "Throughput, idle 4 GiB guest of random data (more is better)",
    ),
    (
        "throughput_ratio_to_tcp",
        "Throughput as a share of plain TCP's on as many connections (more is better)",
    ),
    ("downtime", "Downtime, idle 4 GiB guest (less is better)"),
    (
        "downtime_parts",
        "What the downtime consists of, and what the guest saw",
    ),
    (
        "local_hand_over",
        "Hand-over to a new VMM on the same host, 4 GiB guest (less is better)",
    ),
    (
        "local_hand_over_parts",
        "What its blackout consists of, and what the guest saw",
    ),
    (
        "dirtying",
        "Time to arrive, guest outruns the link (less is better)",
    ),
    ("dirtying_blackout", "Its blackout"),
    (
        "dirtying_prediction_error",
        "How far its blackout was from the prediction (less is better)",
    ),
    (
        "return_bytes_share",
        "Sent of a 4 GiB guest that comes home with 5 % of it changed (less is better)",
    ),
    (
        "zero",
        "Time to arrive, 8 GiB guest, mostly untouched (less is better)",
    ),
];

const WIDTH: f64 = 900.0;
const LABEL_WIDTH: f64 = 250.0;
const VALUE_WIDTH: f64 = 110.0;
const ROW: f64 = 20.0;
const BAR: f64 = 12.0;
const TITLE: f64 = 34.0;
const FOOT: f64 = 30.0;

const OURS: &str = "#0b7285";
const PEERS: &str = "#868e96";
const YARDSTICK: &str = "#ced4da";
const INK: &str = "#212529";

#[derive(Deserialize)]
struct Measured {
    machine: String,
    commit: String,
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    name: String,
    unit: String,
    values: Vec<f64>,
}

/// `plot [JSON [SVG]]`.
pub(crate) fn draw(arguments: &[String]) -> anyhow::Result<()> {
    let given = |at: usize| arguments.get(at).map(PathBuf::from);
    let json = given(0).unwrap_or_else(|| program::target_dir().join("bench/migration.json"));
    let svg = given(1).unwrap_or_else(|| json.with_extension("svg"));
    let text = std::fs::read_to_string(&json).with_context(|| json.display().to_string())?;
    let measured: Measured = serde_json::from_str(&text)?;
    std::fs::write(&svg, picture(&measured)?).with_context(|| svg.display().to_string())?;
    println!("wrote {}", svg.display());
    Ok(())
}

fn picture(measured: &Measured) -> anyhow::Result<String> {
    let (mut body, mut y) = (String::new(), 10.0);
    for (group, title) in PANELS {
        let rows: Vec<_> = measured
            .runs
            .iter()
            .filter_map(|run| Some((row(&run.name, group)?, run)))
            .filter(|(_, run)| !run.values.is_empty())
            .collect();
        if !rows.is_empty() {
            y = panel(&mut body, y, title, &rows)?;
        }
    }
    ensure!(!body.is_empty(), "there is nothing to draw");
    text(
        &mut body,
        (10.0, y + 16.0),
        "11",
        "start",
        &format!("{}; {}", measured.machine, measured.commit),
    )?;
    let height = y + FOOT;
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         font-family=\"system-ui, sans-serif\" fill=\"{INK}\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    ))
}

/// What a measurement is called in its group; nothing if it is not in it. One that is a group by itself is ours.
fn row<'a>(name: &'a str, group: &str) -> Option<&'a str> {
    match name.strip_prefix(group)? {
        "" => Some("godwit"),
        rest => rest.strip_prefix('.'),
    }
}

/// Draws one panel from `y` on; returns where it ends.
fn panel(body: &mut String, y: f64, title: &str, rows: &[(&str, &Run)]) -> anyhow::Result<f64> {
    let all = || rows.iter().flat_map(|(_, run)| run.values.iter().copied());
    let largest = all().fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / largest;
    text(body, (10.0, y + 20.0), "14", "start", title)?;
    let mut top = y + TITLE;
    for (name, run) in rows {
        let middle = top + ROW / 2.0;
        let median = crate::report::quantile_of(&run.values, 0.5);
        let label = name.replace('_', " ");
        text(body, (LABEL_WIDTH - 8.0, middle + 4.0), "12", "end", &label)?;
        writeln!(
            body,
            "<rect x=\"{LABEL_WIDTH}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{}\"/>",
            middle - BAR / 2.0,
            median * scale,
            colour(name)
        )?;
        for value in &run.values {
            writeln!(
                body,
                "<circle cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"2\" fill=\"none\" stroke=\"{INK}\" stroke-opacity=\"0.5\"/>",
                LABEL_WIDTH + value * scale
            )?;
        }
        let value = format!("{} {}", brief(median), run.unit);
        text(body, (WIDTH - 10.0, middle + 4.0), "12", "end", &value)?;
        top += ROW;
    }
    Ok(top + 10.0)
}

fn colour(name: &str) -> &'static str {
    match name {
        _ if name.starts_with("qemu") => PEERS,
        _ if name.starts_with("tcp") => YARDSTICK,
        _ => OURS,
    }
}

/// Three digits that say something.
fn brief(value: f64) -> String {
    match value {
        _ if value >= 100.0 => format!("{value:.0}"),
        _ if value >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn text(
    body: &mut String,
    (x, y): (f64, f64),
    size: &str,
    anchor: &str,
    content: &str,
) -> anyhow::Result<()> {
    let content = content.replace('&', "&amp;").replace('<', "&lt;");
    writeln!(
        body,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\">{content}</text>"
    )?;
    Ok(())
}
