//! What a bench found: raw figures on the terminal, judged figures in a JSON file.

use anyhow::{Context, bail};
use godwit_tests::program;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

/// Everything a bench found.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// What is measured, as it was at the beginning.
    commit: String,
    /// Where it is written.
    path: Option<PathBuf>,
    options: BTreeMap<String, String>,
    runs: Vec<Run>,
    figures: BTreeMap<String, Figure>,
    /// Sections to measure; all if none is named.
    chosen: Vec<String>,
    /// Sections there are.
    known: Vec<&'static str>,
    /// Sections that were begun; the last one goes on.
    begun: Vec<Section>,
    peers: Peers,
    /// What went wrong beside figures and sections.
    noted: Vec<String>,
}

/// What a section has to leave in the report, or the bench fails: one that could not measure must not pass for one that
/// did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owed {
    /// A figure with its goal.
    Figure,
    /// A figure that needs a peer, so nothing where the peers are waived.
    FigureOfPeer,
    /// Raw values: there is no goal to judge them by.
    Values,
}

/// Whether a peer that cannot be measured is a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Peers {
    #[default]
    Owed,
    /// Somebody said that this run does without.
    Waived,
}

#[derive(Debug)]
struct Section {
    name: &'static str,
    owed: Owed,
    values: usize,
    figures: usize,
    /// Why it could not be measured to its end.
    failure: Option<String>,
}

impl Section {
    fn owes(&self, peers: Peers) -> bool {
        match self.owed {
            Owed::FigureOfPeer if peers == Peers::Waived => false,
            Owed::Figure | Owed::FigureOfPeer => self.figures == 0,
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
    #[serde(rename = "<")]
    Below,
}

impl Op {
    fn sign(self) -> &'static str {
        match self {
            Self::AtLeast => ">=",
            Self::AtMost => "<=",
            Self::Below => "<",
        }
    }

    /// Never for what is not a number.
    fn holds(self, value: f64, goal: f64) -> bool {
        match self {
            Self::AtLeast => value >= goal,
            Self::AtMost => value <= goal,
            Self::Below => value < goal,
        }
    }
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
    commit: &'a str,
    options: &'a BTreeMap<String, String>,
    runs: &'a [Run],
    figures: &'a BTreeMap<String, Figure>,
    faults: &'a [String],
}

impl Report {
    /// A report about these sections; about all if none is named.
    pub(crate) fn of(sections: &[String], peers: Peers) -> Self {
        Self {
            chosen: sections.to_vec(),
            peers,
            commit: commit(),
            ..Self::default()
        }
    }

    /// The same, written after each section and at the end: whoever is in the way of a long bench must not lose what it
    /// has measured.
    pub(crate) fn written_as(self, name: &str) -> Self {
        let file = format!("bench/{name}.json");
        Self {
            path: Some(program::target_dir().join(file)),
            ..self
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
                failure: None,
            });
        }
        chosen
    }

    /// Notes what became of the section that was begun last. One that failed is a fault, and the others go on.
    pub(crate) fn ends(&mut self, outcome: anyhow::Result<()>) {
        if let (Err(error), Some(section)) = (outcome, self.begun.last_mut()) {
            println!("*** {} FAILED: {error:#}", section.name);
            section.failure = Some(format!("{error:#}"));
        }
        let last = self.begun.last().map_or("nothing", |section| section.name);
        let mut faults = self.faults_so_far();
        faults.push(format!("it went no further than {last}"));
        if let Err(error) = self.write(&faults) {
            println!("*** what was measured so far is not written: {error:#}");
        }
    }

    /// Says loudly that a peer takes no part in the section that goes on: a fault, unless peers are waived.
    pub(crate) fn peer_is_missing(&mut self, peer: &str, why: &str) {
        let section = self.begun.last().map_or("bench", |section| section.name);
        println!("*** {section}: {peer} IS NOT MEASURED: {why}");
        self.options
            .insert(format!("{section}_{peer}_missing"), why.to_owned());
        if self.peers == Peers::Owed {
            self.noted
                .push(format!("{section}: {peer} is not measured: {why}"));
        }
    }

    /// Notes a fault that is none of a figure or a section.
    pub(crate) fn fault(&mut self, fault: impl Into<String>) {
        let fault = fault.into();
        println!("*** {fault}");
        self.noted.push(fault);
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
        let holds = op.holds(value, goal);
        println!(
            "{} {name} = {value:.3} {unit} (goal {} {goal})",
            if holds { "HOLDS" } else { "MISSES" },
            op.sign()
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

    /// Writes the JSON file; an error if a figure misses its goal, if a peer or a section that was chosen is not measured,
    /// or if such a section is none.
    pub(crate) fn finish(&self) -> anyhow::Result<()> {
        let faults = self.faults();
        self.write(&faults)?;
        if let Some(path) = &self.path {
            println!("wrote {}", path.display());
        }
        if faults.is_empty() {
            return Ok(());
        }
        bail!("{}", faults.join("; "))
    }

    fn write(&self, faults: &[String]) -> anyhow::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let file = File {
            machine: machine(),
            commit: &self.commit,
            options: &self.options,
            runs: &self.runs,
            figures: &self.figures,
            faults,
        };
        std::fs::create_dir_all(path.parent().context("a folder")?)?;
        let fresh = path.with_extension("fresh");
        std::fs::write(&fresh, serde_json::to_string_pretty(&file)? + "\n")
            .and_then(|()| std::fs::rename(&fresh, path))
            .context("write the report")
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = self.faults_so_far();
        let chosen = self.chosen.iter().map(String::as_str);
        let unknown: Vec<&str> = chosen.filter(|name| !self.known.contains(name)).collect();
        if !unknown.is_empty() {
            faults.push(format!(
                "no such sections: {}; there are: {}",
                unknown.join(", "),
                self.known.join(", ")
            ));
        }
        faults
    }

    /// Those of the sections that were begun.
    fn faults_so_far(&self) -> Vec<String> {
        let missed = self.figures.iter().filter(|(_, figure)| !figure.holds);
        let missed: Vec<&str> = missed.map(|(name, _)| name.as_str()).collect();
        let failed = self.begun.iter().filter_map(|section| {
            let failure = section.failure.as_ref()?;
            Some(format!("{} failed: {failure}", section.name))
        });
        let empty = self
            .begun
            .iter()
            .filter(|section| section.failure.is_none() && section.owes(self.peers));
        let empty: Vec<&str> = empty.map(|section| section.name).collect();
        let mut faults = self.noted.clone();
        faults.extend(failed);
        if !missed.is_empty() {
            faults.push(format!("goals missed: {}", missed.join(", ")));
        }
        if !empty.is_empty() {
            faults.push(format!(
                "sections that measured nothing, for the reason printed above: {}",
                empty.join(", ")
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
        let mut report = Report::of(&[], Peers::Owed);
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
        let mut report = Report::of(&["rest".to_owned()], Peers::Owed);
        assert!(!report.begins("boot", Owed::Figure));
        assert!(report.begins("rest", Owed::Figure));
        report.figure("rest_ms", 1.0, "ms", Op::AtMost, 2.0);
        assert_eq!(report.faults(), [""; 0]);
    }

    #[test]
    fn missed_goals_and_sections_that_are_none_are_named() {
        let mut report = Report::of(&["rest".to_owned(), "boots".to_owned()], Peers::Owed);
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

    #[test]
    fn a_section_that_failed_is_a_fault_and_the_others_count_all_the_same() {
        let mut report = Report::of(&[], Peers::Owed);
        assert!(report.begins("boot", Owed::Figure));
        report.ends(Err(anyhow::anyhow!("no guest").context("take off")));
        assert!(report.begins("rest", Owed::Figure));
        report.figure("rest_ms", 3.0, "ms", Op::AtMost, 2.0);
        report.ends(Ok(()));
        assert_eq!(
            report.faults(),
            ["boot failed: take off: no guest", "goals missed: rest_ms"]
        );
    }

    #[test]
    fn a_missing_peer_is_a_fault_unless_peers_are_waived() {
        for (peers, faults) in [
            (Peers::Owed, &["zero: qemu is not measured: gone"][..]),
            (Peers::Waived, &[][..]),
        ] {
            let mut report = Report::of(&[], peers);
            assert!(report.begins("zero", Owed::Figure));
            report.figure("zero_s", 1.0, "s", Op::AtMost, 2.0);
            report.peer_is_missing("qemu", "gone");
            assert_eq!(report.faults(), faults, "{peers:?}");
            assert_eq!(report.options["zero_qemu_missing"], "gone");
        }
    }

    #[test]
    fn a_section_of_nothing_but_a_peer_owes_a_figure_unless_peers_are_waived() {
        for (peers, faults) in [(Peers::Owed, 1), (Peers::Waived, 0)] {
            let mut report = Report::of(&[], peers);
            assert!(report.begins("boot", Owed::FigureOfPeer));
            assert_eq!(report.faults().len(), faults, "{peers:?}");
        }
    }

    #[test]
    fn below_is_strict_and_what_is_not_a_number_meets_no_goal() {
        assert!(Op::Below.holds(0.999, 1.0));
        assert!(!Op::Below.holds(1.0, 1.0));
        for op in [Op::AtLeast, Op::AtMost, Op::Below] {
            assert!(!op.holds(f64::NAN, 1.0), "{op:?}");
        }
    }
}
