//! Documents that must not drift from the code: the API reference, the error reasons, and what `deploy/` names.
//!
//! `NUDGED_WRITE_DOCS=1 cargo test --test it documents` writes `docs/api.md` anew.

use std::collections::BTreeSet;
use std::path::PathBuf;

use nudged::api::reasons;
use nudged::telemetry::names;

use super::api_reference;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn the_api_reference_says_what_the_proto_comments_say() {
    let made = api_reference::markdown();
    if std::env::var_os("NUDGED_WRITE_DOCS").is_some() {
        std::fs::write(root().join("docs/api.md"), &made).unwrap();
    }
    let kept = read("docs/api.md");
    let different = made.lines().zip(kept.lines()).find(|(made, kept)| made != kept);
    assert!(
        made == kept,
        "docs/api.md is not what the proto comments say: NUDGED_WRITE_DOCS=1 cargo test --test it documents\n{different:?}"
    );
}

#[test]
fn every_error_reason_has_its_section_with_cause_and_remedy() {
    // From the source, so that a constant which ALL forgot is noticed, too.
    let source = read("src/api/reasons.rs");
    let constants: BTreeSet<&str> = source
        .lines()
        .filter_map(|line| line.strip_prefix("pub const ")?.split_once(": &str = \"")?.1.strip_suffix("\";"))
        .filter(|value| value.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'))
        .collect();
    let listed: BTreeSet<&str> = reasons::ALL.iter().copied().collect();
    assert_eq!(constants, listed, "reasons::ALL lists every constant");

    let page = read("docs/errors.md");
    let sections: Vec<(&str, &str)> =
        page.split("\n## ").skip(1).filter_map(|section| section.split_once('\n')).collect();
    let documented: Vec<&str> = sections.iter().map(|(name, _)| *name).collect();
    assert_eq!(documented.iter().copied().collect::<BTreeSet<_>>(), listed, "docs/errors.md has a section each");
    assert_eq!(documented.len(), listed.len(), "one section each");
    for (name, text) in sections {
        for part in ["Code: ", "**Cause.** ", "**What to do.** "] {
            assert!(text.contains(part), "docs/errors.md, {name}: no {part:?}");
        }
    }
}

#[test]
fn dashboards_and_alerts_name_metrics_that_exist() {
    let known: BTreeSet<&str> = names::ALL.iter().map(|metric| metric.name).collect();
    for file in ["deploy/grafana/nudged.json", "deploy/prometheus/alerts.yml"] {
        let text = read(file);
        let named = metrics_in(&text);
        assert!(named.len() > 5, "{file} names metrics: {named:?}");
        for name in named {
            let series = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            let histogram = |base: &str| {
                names::ALL.iter().any(|metric| metric.name == base && metric.kind == names::Kind::Histogram)
            };
            assert!(known.contains(name) || series.is_some_and(histogram), "{file}: {name} is no metric of ours");
        }
    }
    let dashboard: serde_json::Value = serde_json::from_str(&read("deploy/grafana/nudged.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "panel ids are distinct");
}

/// Words that look like our metrics' names.
fn metrics_in(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("nudged_") || *word == names::PROCESS_START_TIME_SECONDS)
        .collect()
}

#[test]
fn links_in_the_documents_lead_somewhere() {
    let mut files = vec![root().join("README.md"), root().join("ARCHITECTURE.md"), root().join("CONTRIBUTING.md")];
    files.extend(std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "md")) {
        let text = std::fs::read_to_string(file).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            if link.starts_with("https://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { file.clone() } else { file.parent().unwrap().join(path) };
            assert!(target.exists(), "{}: {link} leads nowhere", file.display());
            if !anchor.is_empty() {
                let text = std::fs::read_to_string(&target).unwrap();
                let found = text.lines().any(|line| line.starts_with('#') && anchor_of(line) == anchor);
                assert!(found, "{}: no heading for {link}", file.display());
            }
        }
    }
}

/// As Markdown viewers make them: lower case, blanks to hyphens, punctuation dropped.
fn anchor_of(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

/// A source file and the modules that it is, `tests` left out: a file's own tests are named by the file.
struct Source {
    path: PathBuf,
    modules: Vec<String>,
    text: String,
}

impl Source {
    fn all() -> Vec<Self> {
        let mut found = Vec::new();
        for folder in ["src", "tests"] {
            gather(&root().join(folder), &[], &mut found);
        }
        // A file that another one includes under a name of its own.
        let mut aliases = Vec::new();
        for source in &found {
            for (path, rest) in source.text.split("#[path = \"").skip(1).filter_map(|rest| rest.split_once("\"]")) {
                let alias = rest.trim_start().trim_start_matches("pub ").strip_prefix("mod ");
                let Some((alias, _)) = alias.and_then(|rest| rest.split_once(';')) else { continue };
                let Ok(path) = source.path.with_file_name(path).canonicalize() else { continue };
                let text = std::fs::read_to_string(&path).unwrap();
                let modules = source.modules.iter().cloned().chain([alias.to_owned()]).collect();
                aliases.push(Self { path, modules, text });
            }
        }
        found.append(&mut aliases);
        found
    }

    fn has(&self, name: &str) -> bool {
        [format!("fn {name}("), format!("fn {name}<")].iter().any(|known| self.text.contains(known))
    }
}

fn gather(path: &std::path::Path, above: &[&str], found: &mut Vec<Source>) {
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap();
        let here = [above, &[name]].concat();
        if path.is_dir() {
            gather(&path, &here, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push(Source { modules: modules_of(here.into_iter()), path, text });
        }
    }
}

fn modules_of<'a>(parts: impl Iterator<Item = &'a str>) -> Vec<String> {
    let names =
        parts.map(|part| part.trim_end_matches(".rs")).filter(|name| !matches!(*name, "mod" | "main" | "tests"));
    names.map(str::to_owned).collect()
}

/// What the document names is a function in a file of just that module, or a module.
fn is_ours(code: &str, sources: &[Source]) -> bool {
    let parts = modules_of(code.split("::"));
    let Some((name, modules)) = parts.split_last() else { return false };
    sources
        .iter()
        .any(|source| source.modules.ends_with(&parts) || (source.modules.ends_with(modules) && source.has(name)))
}

#[test]
fn the_tables_of_faults_name_tests_that_exist() {
    let page = read("docs/reliability.md");
    let sources = Source::all();
    let mut named = 0;
    for code in page.split('`').skip(1).step_by(2).filter(|code| code.contains("::")) {
        assert!(is_ours(code, &sources), "docs/reliability.md names {code}, which is no function or module of ours");
        named += 1;
    }
    assert!(named > 60, "only {named} tests are named");
    assert!(is_ours("documents::the_tables_of_faults_name_tests_that_exist", &sources));
    let elsewhere = "reload::the_tables_of_faults_name_tests_that_exist";
    assert!(!is_ours(elsewhere, &sources), "a test of another module is not found");
}
