//! Samples, and the table and JSON made of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Value, json};

use super::control::Ages;
use super::load::Latencies;

/// One measurement of one row.
#[derive(Clone, Default, Serialize)]
pub struct Sample {
    /// Deliveries, or calls.
    pub units: u64,
    /// The server's process clock.
    pub cpu_us: u64,
    pub wall_us: u64,
    /// The fake providers' process clock.
    pub sandbox_cpu_us: u64,
    /// The server's threads by name.
    pub threads_us: BTreeMap<String, u64>,
    /// The most private memory of the server meanwhile.
    pub rss_anon_kib: u64,
    /// From being asked for to the provider; of pushes that tell their age.
    pub ages: Option<Ages>,
    /// From call to answer: p50, p99, p99.9, most; microseconds.
    pub answers_us: Option<[u64; 4]>,
    /// The reference's cost of a push in the same repeat.
    pub reference_us: Option<f64>,
}

impl Sample {
    pub fn answered(mut self, latencies: &Latencies) -> Self {
        self.answers_us = Some([latencies.at(500), latencies.at(990), latencies.at(999), latencies.max()]);
        self
    }

    #[expect(clippy::cast_precision_loss, reason = "microseconds of minutes fit 53 bits")]
    pub fn cost(&self) -> f64 {
        self.cpu_us as f64 / self.units.max(1) as f64
    }

    fn ratio(&self) -> Option<f64> {
        self.reference_us.map(|reference| self.cost() / reference)
    }

    #[expect(clippy::cast_precision_loss, reason = "microseconds of minutes fit 53 bits")]
    fn rate(&self) -> f64 {
        self.units as f64 * 1e6 / self.wall_us.max(1) as f64
    }
}

/// A line of the first table.
#[derive(Clone, Serialize)]
pub struct Row {
    pub name: String,
    /// The budget, as ratios to the reference: must, goal.
    pub budget: Option<(f64, f64)>,
    pub samples: Vec<Sample>,
}

/// A line of the second table: one figure with its unit.
#[derive(Clone, Serialize)]
pub struct Fact {
    pub name: String,
    pub value: String,
    pub budget: String,
}

#[derive(Default, Serialize)]
pub struct Report {
    pub about: BTreeMap<String, Value>,
    pub rows: Vec<Row>,
    pub facts: Vec<Fact>,
}

/// Least, median, most.
fn spread(values: impl Iterator<Item = f64>) -> Option<(f64, f64, f64)> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (first, last) = (*values.first()?, *values.last()?);
    Some((first, values[values.len() / 2], last))
}

impl Report {
    pub fn fact(&mut self, name: &str, value: String, budget: &str) {
        eprintln!("{name}: {value}");
        self.facts.push(Fact { name: name.to_owned(), value, budget: budget.to_owned() });
    }

    pub fn sample(&mut self, name: &str, budget: Option<(f64, f64)>, sample: Sample) {
        let reference = sample.reference_us.map(|us| format!(", reference {us:.2}")).unwrap_or_default();
        eprintln!("{name}: {:.2} us{reference}, {:.0}/s", sample.cost(), sample.rate());
        match self.rows.iter_mut().find(|row| row.name == name) {
            Some(row) => row.samples.push(sample),
            None => self.rows.push(Row { name: name.to_owned(), budget, samples: vec![sample] }),
        }
    }

    pub fn json(&self) -> String {
        let value = json!(self);
        format!("{value:#}\n")
    }

    /// Markdown.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for (key, value) in &self.about {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = writeln!(text, "- {key}: {value}");
        }
        text.push_str(
            "\n| Work | nudged us | reference us | ratio (spread) | must, goal | per s | ms to the provider p50/p99/p99.9 \
             | ms to the answer p50/p99/p99.9 | MiB | providers us |\n|---|---|---|---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let _ = writeln!(text, "{}", line(row));
        }
        text.push_str("\n| What | Measured | Budget |\n|---|---|---|\n");
        for fact in &self.facts {
            let _ = writeln!(text, "| {} | {} | {} |", fact.name, fact.value, fact.budget);
        }
        text.push_str("\nCPU of the server's threads, us per unit (median repeat):\n\n");
        for row in &self.rows {
            let Some(sample) = median(row) else { continue };
            let _ = writeln!(text, "- {}: {}", row.name, threads(sample));
        }
        text
    }
}

/// The sample with the median cost.
fn median(row: &Row) -> Option<&Sample> {
    let mut samples: Vec<&Sample> = row.samples.iter().collect();
    samples.sort_by(|a, b| a.cost().total_cmp(&b.cost()));
    samples.get(samples.len() / 2).copied()
}

#[expect(clippy::cast_precision_loss, reason = "microseconds of minutes fit 53 bits")]
fn threads(sample: &Sample) -> String {
    let units = sample.units.max(1) as f64;
    let mut costs: Vec<(f64, &String)> =
        sample.threads_us.iter().map(|(name, us)| (*us as f64 / units, name)).filter(|(us, _)| *us >= 0.01).collect();
    costs.sort_by(|a, b| b.0.total_cmp(&a.0));
    costs.iter().map(|(us, name)| format!("{name} {us:.2}")).collect::<Vec<_>>().join(", ")
}

#[expect(clippy::cast_precision_loss, reason = "microseconds of minutes fit 53 bits")]
fn line(row: &Row) -> String {
    let number =
        |values: Option<(f64, f64, f64)>| values.map_or("–".to_owned(), |(_, median, _)| format!("{median:.2}"));
    let cost = number(spread(row.samples.iter().map(Sample::cost)));
    let reference = number(spread(row.samples.iter().filter_map(|sample| sample.reference_us)));
    let ratio = spread(row.samples.iter().filter_map(Sample::ratio))
        .map_or("–".to_owned(), |(least, median, most)| format!("**{median:.2}** ({least:.2}–{most:.2})"));
    let budget = row.budget.map_or("–".to_owned(), |(must, goal)| format!("{must}, {goal}"));
    let rate =
        spread(row.samples.iter().map(Sample::rate)).map_or("–".to_owned(), |(_, rate, _)| format!("{rate:.0}"));
    let ms = |us: u64| format!("{:.1}", us as f64 / 1000.0);
    let middle = median(row);
    let ages = middle.and_then(|sample| sample.ages).filter(|ages| ages.count > 0);
    let ages = ages
        .map_or("–".to_owned(), |ages| format!("{} / {} / {}", ms(ages.p50_us), ms(ages.p99_us), ms(ages.p999_us)));
    let answers = middle
        .and_then(|sample| sample.answers_us)
        .map_or("–".to_owned(), |[p50, p99, p999, _]| format!("{} / {} / {}", ms(p50), ms(p99), ms(p999)));
    let memory = row.samples.iter().map(|sample| sample.rss_anon_kib).max().unwrap_or(0) / 1024;
    let providers = number(spread(row.samples.iter().map(|s| s.sandbox_cpu_us as f64 / s.units.max(1) as f64)));
    format!(
        "| {} | {cost} | {reference} | {ratio} | {budget} | {rate} | {ages} | {answers} | {memory} | {providers} |",
        row.name
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_shows_median_and_spread_of_its_ratios() {
        let mut report = Report::default();
        for (cpu_us, reference) in [(700, 5.0), (900, 5.0), (800, 4.0)] {
            let sample = Sample { units: 100, cpu_us, reference_us: Some(reference), ..Sample::default() };
            report.sample("broadcast", Some((2.0, 1.5)), sample);
        }
        let table = report.table();
        assert!(table.contains("| broadcast | 8.00 | 5.00 | **1.80** (1.40–2.00) | 2, 1.5 |"), "{table}");
        assert!(serde_json::from_str::<Value>(&report.json()).is_ok());
    }
}
