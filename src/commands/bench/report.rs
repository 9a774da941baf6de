//! Samples, and the tables and JSON made of them.

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
    /// The clocks of the server's processes.
    pub cpu_us: u64,
    /// Those of the database's own.
    pub database_cpu_us: u64,
    pub wall_us: u64,
    /// The fake providers' process clock.
    pub sandbox_cpu_us: u64,
    /// The server's threads by name.
    pub threads_us: BTreeMap<String, u64>,
    /// The most private memory of a server process meanwhile.
    pub rss_anon_kib: u64,
    /// From being asked for to the provider; of pushes that tell their age.
    pub ages: Option<Ages>,
    /// From call to answer: p50, p99, p99.9, most; microseconds.
    pub answers_us: Option<[u64; 4]>,
    /// What the cost is compared with, measured in the same repeat.
    pub reference_us: Option<f64>,
}

impl Sample {
    pub fn answered(mut self, latencies: &Latencies) -> Self {
        self.answers_us = Some([latencies.at(500), latencies.at(990), latencies.at(999), latencies.max()]);
        self
    }

    /// CPU per unit, the database's included.
    pub fn cost(&self) -> f64 {
        per(self.cpu_us + self.database_cpu_us, self.units)
    }

    fn ratio(&self) -> Option<f64> {
        self.reference_us.map(|reference| self.cost() / reference)
    }

    #[expect(clippy::cast_precision_loss, reason = "microseconds of minutes fit 53 bits")]
    fn rate(&self) -> f64 {
        self.units as f64 * 1e6 / self.wall_us.max(1) as f64
    }
}

#[expect(clippy::cast_precision_loss, reason = "microseconds of minutes fit 53 bits")]
fn per(us: u64, units: u64) -> f64 {
    us as f64 / units.max(1) as f64
}

/// What a figure must be at most, and what it should be.
#[derive(Clone, Copy, Default, PartialEq, Debug, Serialize)]
pub struct Budget {
    pub must: Option<f64>,
    pub goal: Option<f64>,
}

impl Budget {
    pub const fn new(must: f64, goal: f64) -> Self {
        Self { must: Some(must), goal: Some(goal) }
    }

    pub const fn must(must: f64) -> Self {
        Self { must: Some(must), goal: None }
    }

    pub const fn goal(goal: f64) -> Self {
        Self { must: None, goal: Some(goal) }
    }

    fn verdict(self, value: f64) -> &'static str {
        match (self.must, self.goal) {
            (None, None) => "–",
            (_, Some(goal)) if value <= goal => "goal met",
            (Some(must), _) if value <= must => "must met",
            (Some(_), _) => "**missed**",
            (None, _) => "goal missed",
        }
    }

    fn show(self) -> String {
        let number = |value: Option<f64>| value.map(|value| format!("{}", (value * 100.0).round() / 100.0));
        match (number(self.must), number(self.goal)) {
            (None, None) => "–".to_owned(),
            (Some(must), None) => format!("must {must}"),
            (None, Some(goal)) => format!("goal {goal}"),
            (Some(must), Some(goal)) => format!("must {must}, goal {goal}"),
        }
    }
}

/// A line of the first table.
#[derive(Clone, Serialize)]
pub struct Row {
    pub name: String,
    /// As ratios to the reference.
    pub budget: Budget,
    pub samples: Vec<Sample>,
}

/// A figure of a line of the second table, in every repeat.
#[derive(Clone, Serialize)]
pub struct Part {
    pub name: String,
    pub values: Vec<f64>,
}

/// A line of the second table: figures of one unit. The budget is the last repeat's, and for the part it names.
#[derive(Clone, Serialize)]
pub struct Fact {
    pub name: String,
    pub unit: &'static str,
    pub parts: Vec<Part>,
    pub judged: String,
    pub budget: Budget,
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
    /// Adds a repeat's figures; `judged` is the part that the budget is about.
    pub fn fact(&mut self, name: &str, unit: &'static str, parts: &[(&str, f64)], judged: &str, budget: Budget) {
        let shown: Vec<String> = parts.iter().map(|(part, value)| format!("{part} {value:.2}")).collect();
        eprintln!("{name}: {} {unit}", shown.join(", "));
        let known = self.facts.iter().position(|fact| fact.name == name).unwrap_or(self.facts.len());
        if known == self.facts.len() {
            self.facts.push(Fact { name: name.to_owned(), unit, parts: Vec::new(), judged: judged.to_owned(), budget });
        }
        let fact = &mut self.facts[known];
        fact.budget = budget;
        for (part, value) in parts {
            match fact.parts.iter_mut().find(|known| known.name == *part) {
                Some(known) => known.values.push(*value),
                None => fact.parts.push(Part { name: (*part).to_owned(), values: vec![*value] }),
            }
        }
    }

    pub fn sample(&mut self, name: &str, budget: Budget, sample: Sample) {
        let reference = sample.reference_us.map(|us| format!(", reference {us:.2}")).unwrap_or_default();
        eprintln!(
            "{name}: {:.2} us (database {:.2}){reference}, {:.0}/s",
            sample.cost(),
            per(sample.database_cpu_us, sample.units),
            sample.rate()
        );
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
            "\n| Work | CPU us | of it the database's | reference us | ratio (spread) | budget | verdict | per s \
             | ms to the provider p50/p99/p99.9 | ms to the answer p50/p99/p99.9 | MiB | providers' us |\n\
             |---|---|---|---|---|---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let _ = writeln!(text, "{}", line(row));
        }
        if !self.facts.is_empty() {
            text.push_str("\n| What | Measured (spread) | Budget | Verdict |\n|---|---|---|---|\n");
        }
        for fact in &self.facts {
            let _ = writeln!(text, "{}", fact_line(fact));
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

fn threads(sample: &Sample) -> String {
    let mut costs: Vec<(f64, &String)> = sample
        .threads_us
        .iter()
        .map(|(name, us)| (per(*us, sample.units), name))
        .filter(|(us, _)| *us >= 0.01)
        .collect();
    costs.sort_by(|a, b| b.0.total_cmp(&a.0));
    costs.iter().map(|(us, name)| format!("{name} {us:.2}")).collect::<Vec<_>>().join(", ")
}

#[expect(clippy::cast_precision_loss, reason = "microseconds of minutes fit 53 bits")]
fn line(row: &Row) -> String {
    let number =
        |values: Option<(f64, f64, f64)>| values.map_or("–".to_owned(), |(_, median, _)| format!("{median:.2}"));
    let of = |figure: &dyn Fn(&Sample) -> f64| number(spread(row.samples.iter().map(figure)));
    let cost = of(&Sample::cost);
    let database = of(&|sample| per(sample.database_cpu_us, sample.units));
    let reference = number(spread(row.samples.iter().filter_map(|sample| sample.reference_us)));
    let ratios = spread(row.samples.iter().filter_map(Sample::ratio));
    let ratio =
        ratios.map_or("–".to_owned(), |(least, median, most)| format!("**{median:.2}** ({least:.2}–{most:.2})"));
    let verdict = ratios.map_or("–", |(_, median, _)| row.budget.verdict(median));
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
    let providers = of(&|sample| per(sample.sandbox_cpu_us, sample.units));
    format!(
        "| {} | {cost} | {database} | {reference} | {ratio} | {} | {verdict} | {rate} | {ages} | {answers} | {memory} \
         | {providers} |",
        row.name,
        row.budget.show()
    )
}

fn fact_line(fact: &Fact) -> String {
    let parts: Vec<String> = fact
        .parts
        .iter()
        .filter_map(|part| {
            let (least, median, most) = spread(part.values.iter().copied())?;
            let range = if part.values.len() > 1 { format!(" ({least:.1}–{most:.1})") } else { String::new() };
            let name = if part.name.is_empty() { String::new() } else { format!("{} ", part.name) };
            Some(format!("{name}{median:.1}{range}"))
        })
        .collect();
    let judged = fact.parts.iter().find(|part| part.name == fact.judged);
    let median = judged.and_then(|part| spread(part.values.iter().copied())).map(|(_, median, _)| median);
    let verdict = median.map_or("–", |median| fact.budget.verdict(median));
    let of = if fact.judged.is_empty() || fact.budget == Budget::default() {
        String::new()
    } else {
        format!(" ({})", fact.judged)
    };
    format!("| {} | {} {} | {}{of} | {verdict} |", fact.name, parts.join(", "), fact.unit, fact.budget.show())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_shows_median_and_spread_of_its_ratios() {
        let mut report = Report::default();
        for (cpu_us, reference) in [(600, 5.0), (800, 5.0), (700, 4.0)] {
            let sample =
                Sample { units: 100, cpu_us, database_cpu_us: 100, reference_us: Some(reference), ..Sample::default() };
            report.sample("broadcast", Budget::new(2.0, 1.5), sample);
        }
        let table = report.table();
        assert!(
            table.contains("| broadcast | 8.00 | 1.00 | 5.00 | **1.80** (1.40–2.00) | must 2, goal 1.5 | must met |"),
            "{table}"
        );
        assert!(serde_json::from_str::<Value>(&report.json()).is_ok());
    }

    #[test]
    fn a_fact_is_judged_by_the_median_of_its_part() {
        let mut report = Report::default();
        for p99 in [3.0, 9.0, 6.0] {
            report.fact("wait", "ms", &[("p50", 1.0), ("p99", p99)], "p99", Budget::new(8.0, 5.0));
        }
        let table = report.table();
        assert!(
            table.contains("| wait | p50 1.0 (1.0–1.0), p99 6.0 (3.0–9.0) ms | must 8, goal 5 (p99) | must met |"),
            "{table}"
        );
        assert_eq!(Budget::goal(1.0).verdict(2.0), "goal missed");
        assert_eq!(Budget::must(1.0).verdict(2.0), "**missed**");
    }
}
