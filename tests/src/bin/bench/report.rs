//! What a bench found: raw figures on the terminal, judged figures in a JSON file.

use anyhow::{Context, bail};
use godwit_tests::program;
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::Command;

/// Everything a bench found.
#[derive(Debug, Default)]
pub(crate) struct Report {
    options: BTreeMap<String, String>,
    runs: Vec<Run>,
    figures: BTreeMap<String, Figure>,
    /// Sections to measure; all if none is named.
    chosen: Vec<String>,
    /// Sections there are.
    known: Vec<&'static str>,
    /// Sections that were begun; the last one goes on.
    begun: Vec<Section>,
}

/// What a section has to leave in the report, or the bench fails: one that could not measure must not pass for one that
/// did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owed {
    /// A figure with its goal.
    Figure,
    /// Raw values: there is no goal to judge them by.
    Values,
}

#[derive(Debug)]
struct Section {
    name: &'static str,
    owed: Owed,
    values: usize,
    figures: usize,
}

impl Section {
    fn owes(&self) -> bool {
        match self.owed {
            Owed::Figure => self.figures == 0,
            Owed::Values => self.values == 0,
        }
    }
}

/// Raw values of one measurement, in the order they were taken.
#[derive(Debug, Serialize)]
struct Run {
    name: String,
    unit: String,
    values: Vec<f64>,
}

/// Which side of its goal a figure has to be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Op {
    #[serde(rename = ">=")]
    AtLeast,
    #[serde(rename = "<=")]
    AtMost,
}

#[derive(Debug, Serialize)]
struct Figure {
    value: f64,
    unit: &'static str,
    goal: f64,
    op: Op,
    holds: bool,
}

#[derive(Serialize)]
struct File<'a> {
    machine: String,
    commit: String,
    options: &'a BTreeMap<String, String>,
    runs: &'a [Run],
    figures: &'a BTreeMap<String, Figure>,
}

impl Report {
    /// A report about these sections; about all if none is named.
    pub(crate) fn of(sections: &[String]) -> Self {
        Self {
            chosen: sections.to_vec(),
            ..Self::default()
        }
    }

    /// Whether the section is to be measured; if so, all that follows belongs to it.
    pub(crate) fn begins(&mut self, name: &'static str, owed: Owed) -> bool {
        self.known.push(name);
        let chosen = self.chosen.is_empty() || self.chosen.iter().any(|chosen| chosen == name);
        if chosen {
            self.begun.push(Section {
                name,
                owed,
                values: 0,
                figures: 0,
            });
        }
        chosen
    }

    /// Notes under which circumstances the bench ran.
    pub(crate) fn option(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.options.insert(name.into(), value.into());
    }

    /// Prints raw values and their spread; returns their median.
    pub(crate) fn raw(&mut self, name: &str, unit: &str, values: &[f64]) -> f64 {
        let sorted = sorted(values);
        let list = values
            .iter()
            .map(|value| format!("{value:.3}"))
            .collect::<Vec<_>>()
            .join(" ");
        let median = quantile(&sorted, 0.5);
        println!("{name} [{unit}]: {list}");
        println!(
            "  n={} min={:.3} p50={median:.3} p90={:.3} max={:.3}",
            values.len(),
            quantile(&sorted, 0.0),
            quantile(&sorted, 0.9),
            quantile(&sorted, 1.0)
        );
        if let Some(section) = self.begun.last_mut() {
            section.values += values.len();
        }
        self.runs.push(Run {
            name: name.to_owned(),
            unit: unit.to_owned(),
            values: values.to_vec(),
        });
        median
    }

    /// Judges a figure.
    pub(crate) fn figure(
        &mut self,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        op: Op,
        goal: f64,
    ) {
        let name = name.into();
        let holds = match op {
            Op::AtLeast => value >= goal,
            Op::AtMost => value <= goal,
        };
        let sign = if op == Op::AtLeast { ">=" } else { "<=" };
        println!(
            "{} {name} = {value:.3} {unit} (goal {sign} {goal})",
            if holds { "HOLDS" } else { "MISSES" }
        );
        if let Some(section) = self.begun.last_mut() {
            section.figures += 1;
        }
        self.figures.insert(
            name,
            Figure {
                value,
                unit,
                goal,
                op,
                holds,
            },
        );
    }

    /// Writes the JSON file; an error if a figure misses its goal, or if a section was chosen that left nothing or is
    /// none.
    pub(crate) fn finish(&self, name: &str) -> anyhow::Result<()> {
        let file = File {
            machine: machine(),
            commit: commit(),
            options: &self.options,
            runs: &self.runs,
            figures: &self.figures,
        };
        let folder = program::target_dir().join("bench");
        std::fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{name}.json"));
        std::fs::write(&path, serde_json::to_string_pretty(&file)? + "\n")
            .context("write the report")?;
        println!("wrote {}", path.display());
        let faults = self.faults();
        if faults.is_empty() {
            return Ok(());
        }
        bail!("{}", faults.join("; "))
    }

    fn faults(&self) -> Vec<String> {
        let missed = self.figures.iter().filter(|(_, figure)| !figure.holds);
        let missed: Vec<&str> = missed.map(|(name, _)| name.as_str()).collect();
        let empty = self.begun.iter().filter(|section| section.owes());
        let empty: Vec<&str> = empty.map(|section| section.name).collect();
        let chosen = self.chosen.iter().map(String::as_str);
        let unknown: Vec<&str> = chosen.filter(|name| !self.known.contains(name)).collect();
        let mut faults = Vec::new();
        if !missed.is_empty() {
            faults.push(format!("goals missed: {}", missed.join(", ")));
        }
        if !empty.is_empty() {
            faults.push(format!(
                "sections that measured nothing, for the reason printed above: {}",
                empty.join(", ")
            ));
        }
        if !unknown.is_empty() {
            faults.push(format!(
                "no such sections: {}; there are: {}",
                unknown.join(", "),
                self.known.join(", ")
            ));
        }
        faults
    }
}

/// Raw values of several measurements that are taken in turns, by name, in the order of their first value.
#[derive(Debug, Default)]
pub(crate) struct Samples(Vec<(String, Vec<f64>)>);

impl Samples {
    /// Adds a value to those of `name`, and prints it: the next may take its time.
    pub(crate) fn push(&mut self, name: impl Into<String>, value: f64) {
        let name = name.into();
        println!("    {name} {value:.3}");
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name, vec![value])),
        }
    }

    /// The values of `name`; none if there are none.
    pub(crate) fn values(&self, name: &str) -> &[f64] {
        self.0
            .iter()
            .find(|(known, _)| known == name)
            .map_or(&[], |(_, values)| values)
    }

    /// Their median; not a number if there are none.
    pub(crate) fn median(&self, name: &str) -> f64 {
        quantile_of(self.values(name), 0.5)
    }

    /// Prints all of them and puts them into the report as `group.name`.
    pub(crate) fn report(&self, report: &mut Report, group: &str, unit: &str) {
        for (name, values) in &self.0 {
            report.raw(&format!("{group}.{name}"), unit, values);
        }
    }
}

/// The value that `share` of some values do not exceed; not a number if there are none.
pub(crate) fn quantile_of(values: &[f64], share: f64) -> f64 {
    quantile(&sorted(values), share)
}

/// The largest of some values.
pub(crate) fn maximum(values: &[f64]) -> f64 {
    quantile(&sorted(values), 1.0)
}

/// The mean of some values.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    // Between two values for a median of an even number.
    let at = share * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted
        .get(low)
        .zip(sorted.get(high))
        .map_or(f64::NAN, |(low, high)| low + (high - low) * at.fract())
}

fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("unknown CPU");
    let memory = read("/proc/meminfo");
    let memory_kib: u64 = memory
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or(0);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let model = model.trim_start_matches(['\t', ' ', ':']);
    format!(
        "{model}, {cores} cores, {} GiB, Linux {}",
        memory_kib >> 20,
        kernel.trim()
    )
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .current_dir(program::checkout())
            .args(arguments)
            .output()
            .ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let head = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let clean = git(&["status", "--porcelain"]).is_some_and(|changes| changes.is_empty());
    if clean {
        head
    } else {
        format!("{head}+changes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chosen_section_that_measured_nothing_fails_by_name() {
        let mut report = Report::of(&[]);
        assert!(report.begins("boot", Owed::Figure));
        // Raw values alone are no figure.
        report.raw("boot_ms", "ms", &[1.0]);
        assert!(report.begins("rest", Owed::Figure));
        report.figure("rest_ms", 1.0, "ms", Op::AtMost, 2.0);
        assert!(report.begins("block", Owed::Values));
        report.raw("block", "MiB/s", &[1.0]);
        assert!(report.begins("net", Owed::Values));
        let faults = report.faults();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].ends_with(": boot, net"), "{faults:?}");
    }

    #[test]
    fn a_section_that_was_not_chosen_owes_nothing() {
        let mut report = Report::of(&["rest".to_owned()]);
        assert!(!report.begins("boot", Owed::Figure));
        assert!(report.begins("rest", Owed::Figure));
        report.figure("rest_ms", 1.0, "ms", Op::AtMost, 2.0);
        assert_eq!(report.faults(), [""; 0]);
    }

    #[test]
    fn missed_goals_and_sections_that_are_none_are_named() {
        let mut report = Report::of(&["rest".to_owned(), "boots".to_owned()]);
        assert!(!report.begins("boot", Owed::Figure));
        assert!(report.begins("rest", Owed::Figure));
        report.figure("rest_ms", 3.0, "ms", Op::AtMost, 2.0);
        assert_eq!(
            report.faults(),
            [
                "goals missed: rest_ms",
                "no such sections: boots; there are: boot, rest"
            ]
        );
    }
}
