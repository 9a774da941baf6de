//! `nudged import`: devices, choices and subscriptions from a file, over gRPC.
//!
//! A file is CSV with a header, or NDJSON with an object a line; columns and keys are the fields of `RegisterDeviceRequest`
//! (and `created_at`), `SetOptInRequest`, or `SubscribeRequest` (and `active`). Items are numbered by their line. What is
//! refused, here or by the server, is written to a report with its line, and the rest goes on.
//!
//! An import is named after the file's contents unless it is given a name, so the same command run again goes on where
//! the server says; a changed file begins anew, which is harmless: what stands already is left as it is. At most
//! [`WINDOW`] lines are unacknowledged, and going on begins that much earlier, because answers may have been lost with
//! the process that waited for them: so whatever is refused is in the report, once.

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod report;
mod rows;
mod wire;

use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::client::{ClientArgs, refusal};
use crate::api::proto::push_service_client::PushServiceClient;
use crate::api::proto::{ImportProgress, ImportStart};
use crate::runtime::{Instant, Runtime};

use self::report::{Refused, Report};
use self::rows::{Format, Line, Lines, Table};
use self::wire::{Devices, OptIns, Subscriptions, Target};

/// Lines that may be unacknowledged.
const WINDOW: u64 = 4_096;
/// Messages between the reader and the connection.
const QUEUE: usize = 256;
/// Attempts in a row without any progress before giving up.
const MAX_ATTEMPTS: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Between two lines about the progress.
const TELL_EVERY: Duration = Duration::from_secs(2);

#[derive(clap::Subcommand)]
pub enum ImportCommand {
    /// Device tokens with their users
    Devices(ImportArgs),
    /// Choices: who agreed to be notified, of what, since when
    OptIns(ImportArgs),
    /// Who follows which topic
    Subscriptions(ImportArgs),
}

#[derive(clap::Args)]
pub struct ImportArgs {
    /// CSV with a header, or NDJSON
    pub file: PathBuf,
    /// Without it by the file's name: .csv, or .ndjson, .jsonl, .json
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Check everything and write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// A name to go on by; without it one made from the file's contents
    #[arg(long, value_name = "NAME")]
    pub import_id: Option<String>,
    /// When the data were taken, for lines without `observed_at`: what people said later stands
    #[arg(long, value_name = "TIME")]
    pub observed_at: Option<String>,
    /// Where refused lines are reported, as NDJSON; without it FILE.refused.ndjson
    #[arg(long, value_name = "FILE")]
    pub refused: Option<PathBuf>,
    #[command(flatten)]
    pub client: ClientArgs,
}

pub async fn run(command: ImportCommand, runtime: Runtime) -> anyhow::Result<ExitCode> {
    match command {
        ImportCommand::Devices(arguments) => Job::<Devices>::new(arguments, runtime)?.run().await,
        ImportCommand::OptIns(arguments) => Job::<OptIns>::new(arguments, runtime)?.run().await,
        ImportCommand::Subscriptions(arguments) => Job::<Subscriptions>::new(arguments, runtime)?.run().await,
    }
}

/// One file on its way.
struct Job<T: Target> {
    arguments: ImportArgs,
    runtime: Runtime,
    table: Table,
    start: ImportStart,
    report: Report,
    begun: Instant,
    told_at: Instant,
    /// Of earlier connections.
    before: Counts,
    /// Of this one.
    now: Counts,
    /// Lines refused without asking the server.
    refused_here: u64,
    /// The highest line known to be done; `None` before the server's first answer.
    acknowledged: Option<u64>,
    target: std::marker::PhantomData<T>,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    applied: u64,
    unchanged: u64,
    refused: u64,
}

/// How a connection ended, other than well.
enum Trouble {
    /// Another attempt may help.
    Broken(Status),
    Fatal(anyhow::Error),
}

impl<T: Target> Job<T> {
    fn new(arguments: ImportArgs, runtime: Runtime) -> anyhow::Result<Self> {
        let format = Format::of(&arguments.file, arguments.format)?;
        let observed_at = match &arguments.observed_at {
            None => None,
            Some(text) => Some(rows::parse_time(text).with_context(|| format!("--observed-at {text}"))?),
        };
        let table = Table { file: arguments.file.clone(), format, columns: T::COLUMNS, observed_at };
        table.check()?;
        let import_id = match (&arguments.import_id, arguments.dry_run) {
            (Some(given), _) => given.clone(),
            (None, true) => String::new(),
            (None, false) => name_of(&table)?,
        };
        let app_id = arguments.client.app.clone().unwrap_or_default();
        let start = ImportStart { app_id, import_id, dry_run: arguments.dry_run };
        let report = arguments.refused.clone().unwrap_or_else(|| {
            let mut name = arguments.file.clone().into_os_string();
            name.push(if arguments.dry_run { ".dry-run.refused.ndjson" } else { ".refused.ndjson" });
            PathBuf::from(name)
        });
        let begun = runtime.instant();
        Ok(Self {
            arguments,
            runtime,
            table,
            start,
            report: Report::new(report),
            begun,
            told_at: begun,
            before: Counts::default(),
            now: Counts::default(),
            refused_here: 0,
            acknowledged: None,
            target: std::marker::PhantomData,
        })
    }

    async fn run(mut self) -> anyhow::Result<ExitCode> {
        let (mut attempts, mut pause) = (0, FIRST_PAUSE);
        loop {
            let before = self.acknowledged;
            match self.attempt().await {
                Ok(()) => return self.summary(),
                Err(Trouble::Fatal(error)) => return Err(error),
                Err(Trouble::Broken(status)) => {
                    if self.acknowledged > before {
                        (attempts, pause) = (0, FIRST_PAUSE);
                    }
                    attempts += 1;
                    if attempts >= MAX_ATTEMPTS {
                        let done = self.acknowledged.unwrap_or(0);
                        return Err(refusal(&status).context(format!(
                            "{done} lines are done; run the same command again to go on with the rest"
                        )));
                    }
                    eprintln!("nudged: {}; trying again", refusal(&status));
                    self.runtime.sleep(pause).await;
                    pause = (2 * pause).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// One connection, from where things stand to the end of the file.
    async fn attempt(&mut self) -> Result<(), Trouble> {
        let counts = std::mem::take(&mut self.now);
        self.before = self.before.plus(counts);
        let (channel, bearer) = match self.arguments.client.connect().await {
            Ok(connected) => connected,
            // An address that never answered is more likely wrong than down.
            Err(error) if self.acknowledged.is_none() => return Err(Trouble::Fatal(error)),
            Err(error) => return Err(Trouble::Broken(Status::unavailable(format!("{error:#}")))),
        };
        let mut client = PushServiceClient::with_interceptor(channel, bearer);
        let (sender, receiver) = mpsc::channel(QUEUE);
        let send_failed = |_| Trouble::Broken(Status::unavailable("the connection ended"));
        sender.send(T::start(self.start.clone())).await.map_err(send_failed)?;
        let mut answers = T::open(&mut client, ReceiverStream::new(receiver)).await.map_err(trouble)?;
        let first = answers.message().await.map_err(trouble)?.map(T::progress).unwrap_or_default();
        let from = self.begin(first.acknowledged_up_to)?;

        let mut lines = self.table.lines().map_err(Trouble::Fatal)?;
        lines.skip_to(from).map_err(Trouble::Fatal)?;
        let mut sender = Some(sender);
        let (mut waiting, mut sent) = (None, from);
        let (mut acknowledged, mut open) = (from, true);
        loop {
            if waiting.is_none() && sender.is_some() {
                waiting = self.next_item(&mut lines)?;
                if waiting.is_none() {
                    sender = None;
                }
            }
            let may_send =
                waiting.as_ref().is_some_and(|(line, _)| *line <= acknowledged + WINDOW || sent == acknowledged);
            tokio::select! {
                biased;
                answer = answers.message() => {
                    let Some(answer) = answer.map_err(trouble)? else {
                        return Err(Trouble::Broken(Status::unavailable("the stream ended early")));
                    };
                    let progress = T::progress(answer);
                    self.note(&progress)?;
                    // What the server knew before this stream says nothing of what this stream sent.
                    acknowledged = acknowledged.max(progress.acknowledged_up_to.min(sent));
                    if progress.done == Some(true) {
                        return Ok(());
                    }
                }
                place = reserve(sender.as_ref()), if open && may_send => {
                    let Ok(place) = place else {
                        // The answers say why.
                        open = false;
                        continue;
                    };
                    let (line, request) = waiting.take().expect("there is one when it may be sent");
                    sent = line;
                    place.send(request);
                }
            }
        }
    }

    /// Where to go on: what this process knows, else a window before what the server knows.
    fn begin(&mut self, position: u64) -> Result<u64, Trouble> {
        if let Some(acknowledged) = self.acknowledged {
            return Ok(acknowledged);
        }
        let from = position.saturating_sub(WINDOW);
        self.acknowledged = Some(from);
        self.report.open(from, position > 0).map_err(Trouble::Fatal)?;
        if position > 0 {
            println!("Going on after line {position}.");
        }
        Ok(from)
    }

    /// The next line that can be sent; what cannot is reported.
    fn next_item(&mut self, lines: &mut Lines) -> Result<Option<(u64, T::Request)>, Trouble> {
        while let Some(Line { number, row }) = lines.next().map_err(Trouble::Fatal)? {
            match row.and_then(|row| T::item(number, row)) {
                Ok(request) => return Ok(Some((number, request))),
                Err(violations) => {
                    self.refused_here += 1;
                    self.report.add(&Refused::here(number, violations)).map_err(Trouble::Fatal)?;
                }
            }
        }
        Ok(None)
    }

    fn note(&mut self, progress: &ImportProgress) -> Result<(), Trouble> {
        for refused in &progress.refused {
            self.report.add(&Refused::by_server(refused)).map_err(Trouble::Fatal)?;
        }
        self.report.flush().map_err(Trouble::Fatal)?;
        let ImportProgress { acknowledged_up_to, applied, unchanged, refused_count, .. } = progress;
        self.now = Counts { applied: *applied, unchanged: *unchanged, refused: *refused_count };
        self.acknowledged = self.acknowledged.max(Some(*acknowledged_up_to));
        let now = self.runtime.instant();
        if now - self.told_at >= TELL_EVERY {
            self.told_at = now;
            println!("Line {acknowledged_up_to}: {}.", self.counts());
        }
        Ok(())
    }

    fn counts(&self) -> String {
        let Counts { applied, unchanged, refused } = self.before.plus(self.now);
        let refused = refused + self.refused_here;
        let applied_word = if self.start.dry_run { "would be applied" } else { "applied" };
        format!("{applied} {applied_word}, {unchanged} unchanged, {refused} refused")
    }

    fn summary(mut self) -> anyhow::Result<ExitCode> {
        self.report.flush()?;
        let took = (self.runtime.instant() - self.begun).as_secs_f64();
        let what = if self.start.dry_run { "Dry run, nothing was written" } else { "Done" };
        println!("{what}: {} in {took:.1} s.", self.counts());
        if self.report.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        println!("What was refused, by line, is in {}.", self.report.path().display());
        Ok(ExitCode::FAILURE)
    }
}

impl Counts {
    fn plus(self, other: Self) -> Self {
        Self {
            applied: self.applied + other.applied,
            unchanged: self.unchanged + other.unchanged,
            refused: self.refused + other.refused,
        }
    }
}

async fn reserve<R>(sender: Option<&mpsc::Sender<R>>) -> Result<mpsc::Permit<'_, R>, ()> {
    match sender {
        Some(sender) => sender.reserve().await.map_err(|_| ()),
        None => std::future::pending().await,
    }
}

fn trouble(status: Status) -> Trouble {
    match status.code() {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unauthenticated => Trouble::Fatal(refusal(&status)),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Trouble::Broken(status),
    }
}

/// A name by what is imported: the file's contents and how they are read.
fn name_of(table: &Table) -> anyhow::Result<String> {
    let reading = || format!("reading {}", table.file.display());
    let mut file = std::fs::File::open(&table.file).with_context(reading)?;
    let mut digest = Sha256::new();
    digest.update(format!("{:?} {:?} ", table.format, table.observed_at.map(|at| (at.seconds, at.nanos))));
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = file.read(&mut buffer).with_context(reading)?;
        if read == 0 {
            break;
        }
        digest.update(&buffer[..read]);
    }
    let mut half = [0; 16];
    half.copy_from_slice(&digest.finalize()[..16]);
    Ok(format!("file-{:032x}", u128::from_be_bytes(half)))
}
