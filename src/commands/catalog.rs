//! `nudged catalog`: event types as a file under version control, applied over gRPC.
//!
//! A catalogue file is TOML, or JSON when its name ends in `.json`: `app` (optional) and `event_types`, each with the
//! fields of `nudged.v1.EventType`, enum values by their short names and `ttl` as `24h`:
//!
//! ```toml
//! app = "ifriendspet"
//!
//! [[event_types]]
//! name = "comment.created"
//! display_name = "댓글"
//! collapse_key = "comments:{{ subject }}"
//!
//! [[event_types.templates]]
//! locale = "ko"
//! title = "{{ data.author|josa('이/가') }} 댓글을 남겼어요"
//! body = "{{ data.text }}"
//! ```
//!
//! Everything is checked here first, so that one bad type keeps all from being applied; then the differences are shown,
//! then applied, type by type. What the server has and the file has not stays, unless `--prune` is given.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::client::{ClientArgs, Connection, refusal};
use crate::api::catalogue;
use crate::api::proto::admin_service_client::AdminServiceClient;
use crate::api::proto::{DeleteEventTypeRequest, ListEventTypesRequest, PutEventTypeRequest};
use crate::domain::event_type::{Definition, MAX_EVENT_TYPES};
use crate::domain::violation::{Violation, Violations};
use crate::render::Templates;

/// The largest catalogue file, in bytes.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;
/// A value in a difference is cut here, in characters.
const MAX_SHOWN: usize = 60;

#[derive(clap::Subcommand)]
pub enum CatalogCommand {
    /// Show how a catalogue file differs from what the server has, then apply it
    Apply(ApplyArgs),
    /// Print what the server has as a catalogue file
    Export(ExportArgs),
}

#[derive(clap::Args)]
pub struct ApplyArgs {
    /// TOML, or JSON when it ends in .json
    pub file: PathBuf,
    /// Only show the differences
    #[arg(long)]
    pub dry_run: bool,
    /// Also delete event types that the file does not have
    #[arg(long)]
    pub prune: bool,
    #[command(flatten)]
    pub client: ClientArgs,
}

#[derive(clap::Args)]
pub struct ExportArgs {
    /// Where to write it, as JSON when it ends in .json; without it TOML on standard output
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub client: ClientArgs,
}

/// A catalogue file.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    app: Option<String>,
    #[serde(default)]
    event_types: Vec<Definition>,
}

pub async fn run(command: CatalogCommand) -> anyhow::Result<ExitCode> {
    match command {
        CatalogCommand::Apply(arguments) => apply(&arguments).await,
        CatalogCommand::Export(arguments) => export(&arguments).await,
    }
}

async fn apply(arguments: &ApplyArgs) -> anyhow::Result<ExitCode> {
    let file = arguments.file.display();
    let catalogue = Catalogue::read(&arguments.file)?;
    let violations = catalogue.check();
    if !violations.is_empty() {
        eprintln!("nudged: {file} is not applied:");
        for violation in &violations {
            eprintln!("  {violation}");
        }
        return Ok(ExitCode::from(super::MISUSED));
    }
    let app = arguments.client.app.clone().or(catalogue.app).unwrap_or_default();
    let mut server = Server::connect(&arguments.client, app).await?;
    let changes = Changes::between(&server.list().await?, catalogue.event_types);
    print!("{}", changes.describe(arguments.prune));
    if arguments.dry_run {
        println!("Dry run: nothing was changed.");
        return Ok(ExitCode::SUCCESS);
    }
    let (mut put, mut deleted) = (0, 0);
    for (_, wanted) in &changes.put {
        let name = &wanted.name;
        server.put(wanted).await.with_context(|| format!("declaring {name}, after {put} others"))?;
        put += 1;
    }
    if arguments.prune {
        for name in &changes.unlisted {
            server.delete(name).await.with_context(|| format!("deleting {name}, after {deleted} others"))?;
            deleted += 1;
        }
    }
    println!("{put} declared, {} unchanged, {deleted} deleted.", changes.unchanged);
    Ok(ExitCode::SUCCESS)
}

async fn export(arguments: &ExportArgs) -> anyhow::Result<ExitCode> {
    let app = arguments.client.app.clone();
    let event_types = Server::connect(&arguments.client, app.clone().unwrap_or_default()).await?.list().await?;
    let catalogue = Catalogue { app, event_types: event_types.into_values().collect() };
    match &arguments.file {
        None => print!("{}", catalogue.write(false)?),
        Some(file) => {
            let text = catalogue.write(is_json(file))?;
            std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
            println!("{} event types are in {}.", catalogue.event_types.len(), file.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn is_json(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"))
}

impl Catalogue {
    fn read(file: &Path) -> anyhow::Result<Self> {
        let reading = || format!("reading {}", file.display());
        let size = std::fs::metadata(file).with_context(reading)?.len();
        anyhow::ensure!(size <= MAX_FILE_BYTES, "{} is larger than {MAX_FILE_BYTES} bytes", file.display());
        Self::parse(&std::fs::read_to_string(file).with_context(reading)?, is_json(file)).with_context(reading)
    }

    fn parse(text: &str, json: bool) -> anyhow::Result<Self> {
        Ok(if json { serde_json::from_str(text)? } else { toml::from_str(text)? })
    }

    fn write(&self, json: bool) -> anyhow::Result<String> {
        Ok(if json { serde_json::to_string_pretty(self)? + "\n" } else { toml::to_string_pretty(self)? })
    }

    /// Everything the server would refuse, with paths in the file.
    fn check(&self) -> Vec<Violation> {
        let mut violations = Vec::new();
        if self.event_types.len() > MAX_EVENT_TYPES {
            violations.push(Violation::new("event_types", format!("has more than {MAX_EVENT_TYPES} entries")));
        }
        let mut names = BTreeSet::new();
        for (at, definition) in self.event_types.iter().enumerate() {
            let path = format!("event_types[{at}]");
            if !names.insert(&definition.name) {
                let twice = format!("{:?} is in the file twice", definition.name);
                violations.push(Violation::new(format!("{path}.name"), twice));
            }
            if let Err(found) = Templates::compile(&path, definition.clone()) {
                violations.extend(found);
            }
        }
        violations
    }
}

/// The catalogue as the server has it.
struct Server {
    client: AdminServiceClient<Connection>,
    app: String,
}

impl Server {
    async fn connect(arguments: &ClientArgs, app: String) -> anyhow::Result<Self> {
        let (channel, bearer) = arguments.connect().await?;
        Ok(Self { client: AdminServiceClient::with_interceptor(channel, bearer), app })
    }

    /// By name.
    async fn list(&mut self) -> anyhow::Result<BTreeMap<String, Definition>> {
        let mut listed = BTreeMap::new();
        let mut request = ListEventTypesRequest { app_id: self.app.clone(), ..ListEventTypesRequest::default() };
        loop {
            let answer = self.client.list_event_types(request.clone()).await.map_err(|status| refusal(&status))?;
            let page = answer.into_inner();
            for event_type in page.event_types {
                let mut violations = Violations::default();
                let definition = catalogue::definition(&mut violations, event_type);
                if let Err(found) = violations.finish() {
                    let name = definition.name;
                    anyhow::bail!("{name} is of a newer version of nudged than this command: {}", found[0]);
                }
                listed.insert(definition.name.clone(), definition);
            }
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                return Ok(listed);
            }
        }
    }

    async fn put(&mut self, definition: &Definition) -> anyhow::Result<()> {
        let event_type = Some(catalogue::declared(definition));
        let request = PutEventTypeRequest { app_id: self.app.clone(), event_type };
        self.client.put_event_type(request).await.map_err(|status| refusal(&status))?;
        Ok(())
    }

    async fn delete(&mut self, name: &str) -> anyhow::Result<()> {
        let request = DeleteEventTypeRequest { app_id: self.app.clone(), name: name.to_owned() };
        self.client.delete_event_type(request).await.map_err(|status| refusal(&status))?;
        Ok(())
    }
}

/// What applying a file comes to.
#[derive(Debug, Default)]
struct Changes {
    /// What stands, if anything does, and what is wanted; in the order of the file.
    put: Vec<(Option<Definition>, Definition)>,
    unchanged: usize,
    /// On the server and not in the file.
    unlisted: Vec<String>,
}

impl Changes {
    fn between(server: &BTreeMap<String, Definition>, file: Vec<Definition>) -> Self {
        let names: BTreeSet<&str> = file.iter().map(|definition| definition.name.as_str()).collect();
        let unlisted = server.keys().filter(|name| !names.contains(name.as_str())).cloned().collect();
        let mut changes = Self { unlisted, ..Self::default() };
        for wanted in file {
            match server.get(&wanted.name) {
                Some(standing) if *standing == wanted => changes.unchanged += 1,
                standing => changes.put.push((standing.cloned(), wanted)),
            }
        }
        changes
    }

    fn describe(&self, prune: bool) -> String {
        let mut text = String::new();
        for (standing, wanted) in &self.put {
            match standing {
                None => {
                    let _ = writeln!(text, "+ {}", wanted.name);
                }
                Some(standing) => {
                    let _ = writeln!(text, "~ {}", wanted.name);
                    describe_change(&mut text, standing, wanted);
                }
            }
        }
        for name in &self.unlisted {
            let _ = if prune {
                writeln!(text, "- {name}")
            } else {
                writeln!(text, "  {name} is not in the file and stays; --prune deletes it")
            };
        }
        text
    }
}

fn describe_change(text: &mut String, standing: &Definition, wanted: &Definition) {
    let (before, after) = (flat(standing), flat(wanted));
    let paths: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let mut differ = false;
    for path in paths {
        let _ = match (before.get(path), after.get(path)) {
            (Some(old), Some(new)) if old == new => continue,
            (Some(old), Some(new)) => writeln!(text, "    {path}: {} → {}", shown(old), shown(new)),
            (Some(old), None) => writeln!(text, "    {path}: {} is left out", shown(old)),
            (None, Some(new)) => writeln!(text, "    {path}: {} is new", shown(new)),
            (None, None) => continue,
        };
        differ = true;
    }
    if !differ {
        text.push_str("    the templates are in another order\n");
    }
}

/// Every field by its path; templates by their language.
fn flat(definition: &Definition) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    let Ok(serde_json::Value::Object(map)) = serde_json::to_value(definition) else { return fields };
    for (key, value) in map {
        if key != "templates" {
            fields.insert(key, value.to_string());
        }
    }
    for template in &definition.templates {
        for (name, source) in template.fields() {
            let source = serde_json::Value::from(source).to_string();
            fields.insert(format!("templates[{}].{name}", template.locale), source);
        }
    }
    fields
}

fn shown(value: &str) -> String {
    if value.chars().nth(MAX_SHOWN).is_none() {
        return value.to_owned();
    }
    value.chars().take(MAX_SHOWN - 1).chain(['…']).collect()
}

/// What files are read by, for [`crate::fuzzing`].
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing {
    use super::Catalogue;

    /// A file that was understood, in both of its written forms.
    #[derive(PartialEq, Eq, Debug)]
    pub struct Read {
        pub toml: String,
        pub json: String,
        pub types: usize,
        pub violations: usize,
    }

    #[must_use]
    pub fn read(text: &str, json: bool) -> Option<Read> {
        let catalogue = Catalogue::parse(text, json).ok()?;
        let written = |json| catalogue.write(json).expect("texts, numbers and flags can be written");
        Some(Read {
            toml: written(false),
            json: written(true),
            types: catalogue.event_types.len(),
            violations: catalogue.check().len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
        app = "ifriendspet"

        [[event_types]]
        name = "comment.created"
        display_name = "댓글"
        ttl = "24h"
        collapse_key = "comments:{{ subject }}"

        [[event_types.templates]]
        locale = "ko"
        title = "{{ data.author|josa('이/가') }} 댓글을 남겼어요"

        [[event_types.templates]]
        locale = "en"
        title = "{{ data.author }} commented"

        [[event_types]]
        name = "sale"
        purpose = "ADVERTISING"
        lane = "BULK"
        on_maybe = "DROP"
        priority = "NORMAL"
    "#;

    fn file() -> Catalogue {
        Catalogue::parse(FILE, false).expect("a catalogue")
    }

    #[test]
    fn a_catalogue_reads_back_from_both_formats() {
        let catalogue = file();
        assert_eq!(catalogue.check(), []);
        assert_eq!(catalogue.event_types.len(), 2);
        for json in [false, true] {
            let text = catalogue.write(json).expect("written");
            assert_eq!(Catalogue::parse(&text, json).expect(&text), catalogue);
        }
        let unknown = Catalogue::parse("[[event_types]]\nname = \"a\"\ntitel = \"x\"", false);
        assert!(format!("{:#}", unknown.expect_err("a typo")).contains("titel"));
    }

    #[test]
    fn the_example_can_be_applied() {
        let example = Catalogue::parse(include_str!("../../examples/catalog.toml"), false).expect("a catalogue");
        assert_eq!(example.check(), []);
        assert_eq!(example.event_types.len(), 4);
    }

    #[test]
    fn everything_wrong_is_found_before_anything_is_applied() {
        let mut catalogue = file();
        catalogue.event_types[1].name = "comment.created".into();
        catalogue.event_types[0].templates[1].title = Some("{{ data.author|jossa('이/가') }}".into());
        let fields: Vec<String> = catalogue.check().into_iter().map(|violation| violation.field).collect();
        assert_eq!(fields, ["event_types[0].templates[1].title", "event_types[1].name"]);
    }

    #[test]
    fn differences_are_told_by_field() {
        let wanted = file().event_types;
        let mut standing = wanted[0].clone();
        standing.display_name = None;
        standing.group = Some("old".into());
        standing.templates[1].title = Some("new comment".into());
        let server: BTreeMap<String, Definition> =
            [standing, Definition { name: "gone".into(), ..Definition::default() }]
                .into_iter()
                .map(|definition| (definition.name.clone(), definition))
                .collect();
        let changes = Changes::between(&server, wanted.clone());
        assert_eq!(
            changes.describe(true),
            "~ comment.created\n    \
                 display_name: \"댓글\" is new\n    \
                 group: \"old\" is left out\n    \
                 templates[en].title: \"new comment\" → \"{{ data.author }} commented\"\n\
             + sale\n\
             - gone\n"
        );
        assert!(changes.describe(false).contains("gone is not in the file and stays"));
        let same = wanted.iter().map(|definition| (definition.name.clone(), definition.clone())).collect();
        let changes = Changes::between(&same, wanted.clone());
        assert_eq!((changes.put.len(), changes.unchanged, changes.describe(true).as_str()), (0, 2, ""));
        let mut turned = wanted.clone();
        turned[0].templates.reverse();
        assert!(Changes::between(&same, turned).describe(true).contains("another order"));
    }
}
