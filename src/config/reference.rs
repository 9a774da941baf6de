//! What every key means, in one table: the source of `docs/nudged.toml`, of the tables in `docs/config.md`, and of what
//! `nudged config print` shows for keys that nobody set. Tests hold it against the code that reads the keys.

use std::fmt::Write as _;

use Preset::{Absent, Value};

/// A table of the file, as it is written: `grpc.tls`, `apps.<app_id>.apns`, `keys` (a list of tables).
pub struct Section {
    pub path: &'static str,
    pub title: &'static str,
    /// Whether a reload applies a change; otherwise it takes a restart.
    pub live: bool,
    pub keys: &'static [Key],
}

pub struct Key {
    pub name: &'static str,
    pub default: Preset,
    /// For people, in Markdown. Full sentences.
    pub help: &'static str,
    /// Its value is shown nowhere.
    pub secret: bool,
}

/// What holds when nobody sets a key.
#[derive(Clone, Copy)]
pub enum Preset {
    /// As TOML.
    Value(&'static str),
    /// In words, and an example as TOML (empty: the key that names a file is the better one).
    Absent(&'static str, &'static str),
}

/// Live though its section is not.
const LIVE: &[&str] = &["grpc.default_app"];

/// The app in examples.
const APP: &str = "ifriendspet";

const fn key(name: &'static str, default: Preset, help: &'static str) -> Key {
    Key { name, default, help, secret: false }
}

const fn secret(name: &'static str, default: Preset, help: &'static str) -> Key {
    Key { name, default, help, secret: true }
}

/// In the order of the documentation.
pub const SECTIONS: &[Section] = &[
    Section {
        path: "grpc",
        title: "where callers connect",
        live: false,
        keys: &[
            key(
                "listen",
                Value("\"127.0.0.1:50051\""),
                "Address and port; port 0 picks one and logs it. Any other than a loopback address needs `[[keys]]`.",
            ),
            key("default_app", Absent("none", "\"ifriendspet\""), "The app of requests without `app_id`."),
            key("threads", Value("1"), "Runtimes that serve connections, 1–256."),
            key("max_connections", Value("1024"), "More wait to be accepted."),
            key("max_streams_per_connection", Value("1024"), "HTTP/2 streams at once on one connection."),
            key(
                "max_concurrent_requests",
                Value("4096"),
                "Requests worked on at once; more are answered RESOURCE_EXHAUSTED.",
            ),
            key(
                "max_watchers",
                Value("64"),
                "WatchDeliveries streams at once; more are answered RESOURCE_EXHAUSTED. 0 refuses all.",
            ),
            key(
                "request_timeout_secs",
                Value("30"),
                "The longest a unary call may take; a caller's shorter deadline holds as well.",
            ),
        ],
    },
    Section {
        path: "grpc.tls",
        title: "encryption",
        live: true,
        keys: &[
            key("cert_file", Absent("none", "\"tls.crt\""), "The server's certificate chain, PEM, leaf first."),
            secret("key", Absent("none", ""), "Its private key, PEM."),
            key("key_file", Absent("none", "\"tls.key\""), "… in a file."),
            key(
                "client_ca_file",
                Absent("none", "\"clients-ca.pem\""),
                "The authority of client certificates (PEM); one that a caller presents must come from it.",
            ),
        ],
    },
    Section {
        path: "admin",
        title: "metrics and health",
        live: false,
        keys: &[key("listen", Value("\"127.0.0.1:9464\""), "`/metrics`, `/livez` and `/readyz`, without a key.")],
    },
    Section {
        path: "database",
        title: "where everything is kept",
        live: false,
        keys: &[
            secret(
                "url",
                Value("\"sqlite://nudged.db\""),
                "`sqlite://PATH` (three slashes make an absolute path; made with mode 600), or `postgres://USER@HOST/DATABASE`.",
            ),
            key("url_file", Absent("none", "\"/run/secrets/database-url\""), "… in a file."),
            key(
                "password_file",
                Absent("none", "\"/run/secrets/database-password\""),
                "Postgres: the password, read anew for each connection.",
            ),
            key(
                "retention_days",
                Value("30"),
                "Notifications, results and failed attempts older than this are deleted, 1–3650. Open work and the history of consent stay.",
            ),
            key(
                "min_free_mib",
                Value("256"),
                "Of SQLite: while its file system has less free, events are answered RESOURCE_EXHAUSTED, so that the rest is left to consent and results. 0: no limit.",
            ),
            key(
                "max_mib",
                Value("0"),
                "While the database is larger, events are answered RESOURCE_EXHAUSTED. Of SQLite what is in use, of Postgres `pg_database_size`. 0: no limit.",
            ),
        ],
    },
    Section {
        path: "database.postgres",
        title: "replicas share it",
        live: false,
        keys: &[
            key(
                "pool",
                Value("16"),
                "Connections for statements, 2–1000; two more are kept for the heartbeat and the deny table.",
            ),
            key(
                "pack_format",
                Value("2"),
                "The newest format of packed work to read and write, 1–2. Give the one before while you may go back a version.",
            ),
            key("days_ahead", Value("3"), "Days after today for which partitions of the history are made ahead, 1–30."),
        ],
    },
    Section {
        path: "database.sqlite",
        title: "tuning",
        live: false,
        keys: &[
            key(
                "synchronous",
                Value("\"full\""),
                "`normal` is faster on slow disks, but a power cut can lose acknowledged events.",
            ),
            key("readers", Value("3"), "Reading connections, 1–16."),
            key("cache_mib", Value("4"), "The page cache of the writer, the scanner and each reader."),
            key("group_max", Value("256"), "The most requests in one transaction."),
            key(
                "queue_max_requests",
                Value("8192"),
                "Requests that may wait in one of the writer's queues; more are refused.",
            ),
            key("queue_max_mib", Value("32"), "The memory they may hold."),
        ],
    },
    Section {
        path: "delivery",
        title: "the engine's pace",
        live: false,
        keys: &[
            key("drain_secs", Value("20"), "How long a shutdown waits for the platforms' answers."),
            key(
                "max_in_flight_targets",
                Value("20000"),
                "Deliveries claimed and without a recorded outcome, over all routes; half of them are for the INTERACTIVE lane. In a lane one credential holds at most three quarters, and a ninth while its provider answers nothing; below 2000 a lane is not divided.",
            ),
            key(
                "max_open_targets",
                Value("20000000"),
                "While more deliveries of all apps are open, events are answered RESOURCE_EXHAUSTED; everything else is served, and what was accepted goes out. An app's own limit is `max_open_targets` in its section.",
            ),
            key(
                "max_open_rows",
                Value("10000000"),
                "The same of the rows that open work takes: jobs of up to 500 deliveries, and audiences that are still worked out. A row and its notification take about a kilobyte.",
            ),
            key("poll_ms", Value("1000"), "How often the queue is looked at when nothing wakes the engine."),
            key(
                "sender_threads",
                Absent("half of the cores", "2"),
                "Sending threads, each with its own connections, 1–256.",
            ),
            key(
                "max_connections",
                Value("4"),
                "Connections per credential and sending thread, 1–16; more than one are opened only under load.",
            ),
            key("max_streams", Value("400"), "Requests in flight on one connection, where the platform allows more."),
            key("claim_targets", Value("2000"), "Deliveries taken by one claim."),
            key("flush_interval_ms", Value("150"), "Outcomes are recorded at least this often while there are any."),
            key("send_timeout_secs", Value("15"), "How long a platform may take to answer a push."),
            key(
                "retirement_guard_min",
                Value("100"),
                "Devices of a route retired for one reason within ten minutes before the guard against mass retirement looks.",
            ),
            key(
                "retirement_guard_percent",
                Value("50"),
                "When so many percent of the route's answers in that time say the same, the route is paused instead, until a probe succeeds or an operator confirms (ConfirmRetirements). 0: never.",
            ),
        ],
    },
    Section {
        path: "delivery.apns",
        title: "when a push to Apple is tried again",
        live: false,
        keys: &[
            key("transport_floor_secs", Value("1"), "After a failed connection or a refused stream."),
            key("throttled_floor_secs", Value("60"), "After a 429 without a hint."),
            key("server_error_floor_secs", Value("900"), "After a 5xx without a hint; Apple asks for 15 minutes."),
            key("base_secs", Value("5"), "The spread of the first retry."),
            key("cap_secs", Value("1800"), "The widest spread."),
            key("give_up_after_secs", Value("86400"), "From the first attempt on, even if the TTL is longer."),
        ],
    },
    Section {
        path: "delivery.fcm",
        title: "when a push to Google is tried again",
        live: false,
        keys: &[
            key("transport_floor_secs", Value("10"), "After a failed connection or a refused stream."),
            key("throttled_floor_secs", Value("60"), "After a 429 without a hint."),
            key("server_error_floor_secs", Value("10"), "After a 5xx without a hint."),
            key("base_secs", Value("5"), "The spread of the first retry."),
            key("cap_secs", Value("600"), "The widest spread."),
            key("give_up_after_secs", Value("3600"), "From the first attempt on; Google asks for 60 minutes."),
        ],
    },
    Section {
        path: "log",
        title: "logs, on standard error",
        live: false,
        keys: &[
            key("format", Value("\"auto\""), "`text`, `json`, or `auto`: text on a terminal, JSON otherwise."),
            key(
                "level",
                Value("\"info\""),
                "`off`, `error`, `warn`, `info`, `debug`, `trace`, or per module: `info,nudged::delivery=debug`. `RUST_LOG` overrides it.",
            ),
        ],
    },
    Section {
        path: "traces",
        title: "spans for an OpenTelemetry collector",
        live: false,
        keys: &[
            key(
                "otlp_endpoint",
                Absent("none: nothing is recorded", "\"http://127.0.0.1:4317\""),
                "A collector's gRPC receiver (OTLP), `http://HOST:PORT`.",
            ),
            key(
                "sample_one_in",
                Value("1"),
                "Of the calls without a `traceparent`, one in so many is recorded; a caller's own decision is kept.",
            ),
            key("queue", Value("2048"), "Spans that wait to be exported, about a kilobyte each; more are dropped."),
        ],
    },
    Section {
        path: "keys",
        title: "who may call",
        live: true,
        keys: &[
            key("name", Absent("required", "\"backend\""), "What logs and the consent history call it: 1–64 bytes."),
            key(
                "sha256",
                Absent("required, or the next", "\"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\""),
                "Of the key, in hexadecimal. The key itself is nowhere.",
            ),
            key(
                "client_cert_sha256",
                Absent("none", "\"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\""),
                "Of a client certificate (DER): whoever presents it is this key. Needs `grpc.tls.client_ca_file`.",
            ),
            key("apps", Absent("required", "[\"ifriendspet\"]"), "The apps it is for."),
            key(
                "scopes",
                Absent("required", "[\"register\", \"notify\"]"),
                "`register`, `notify`, `broadcast` (everyone, and more than 500 people), `read` (masked), `read_content`, `operate`, `admin`. None implies another.",
            ),
            key(
                "expires_at",
                Absent("never", "\"2027-12-31\""),
                "A date (its beginning in UTC) or an RFC 3339 time, from which on it is refused.",
            ),
        ],
    },
    Section {
        path: "apps.<app_id>",
        title: "one mobile product",
        live: true,
        keys: &[
            key("push_id", Value("true"), "Whether `nudged_id` is put into payloads."),
            key(
                "allow_undeclared_types",
                Value("false"),
                "Whether undeclared event types are taken even when some are declared.",
            ),
            key(
                "default_locale",
                Absent("none", "\"ko\""),
                "Language tag such as `ko`, for devices for which an event type has no words and names no default language. Without it, the type's first entry.",
            ),
            key(
                "only_users",
                Absent("everybody", "[\"tester-1\", \"tester-2\"]"),
                "Staging allow-list: these people, and devices with one of `only_labels`; nobody else is ever sent to.",
            ),
            key(
                "only_labels",
                Absent("everybody", "[\"stage=qa\"]"),
                "Staging allow-list: devices with one of these labels, as `key` or `key=value`.",
            ),
            key(
                "max_events_per_second",
                Absent("no limit", "500"),
                "Events taken a second, over time; as many may come at once. More are answered RESOURCE_EXHAUSTED with the time to wait. On Postgres of each replica.",
            ),
            key(
                "max_open_targets",
                Absent("no limit", "1000000"),
                "While more deliveries than this are open, events are answered RESOURCE_EXHAUSTED. Counted once a second.",
            ),
        ],
    },
    Section {
        path: "apps.<app_id>.apns",
        title: "a credential at Apple",
        live: true,
        keys: &[
            secret("key", Absent("none", ""), "The .p8 signing key, PEM."),
            key("key_file", Absent("none", "\"AuthKey_ABCDE12345.p8\""), "… in a file."),
            key("key_id", Absent("none", "\"ABCDE12345\""), "Its 10 characters: a part of the file's name."),
            key("team_id", Absent("none", "\"FGHIJ67890\""), "The developer team's 10 characters."),
            key("cert_file", Absent("none", "\"apns.pem\""), "A client certificate, PEM, leaf first."),
            secret("cert_key", Absent("none", ""), "Its private key, PEM."),
            key("cert_key_file", Absent("none", "\"apns.pem\""), "… in a file; it may be the same file."),
            key("topic", Absent("required, or the next", "\"com.ifriendspet.app\""), "The bundle id."),
            key(
                "topics",
                Absent("none", "[\"com.ifriendspet.app.watch\"]"),
                "Further bundle ids that may be pushed to.",
            ),
            key("environment", Value("\"production\""), "Of devices that name none: `production` or `sandbox`."),
            key("endpoint", Value("\"https://api.push.apple.com\""), "Where production pushes go."),
            key("endpoint_sandbox", Value("\"https://api.sandbox.push.apple.com\""), "Where sandbox pushes go."),
            key("ca_file", Absent("none", "\"relay-ca.pem\""), "Authorities (PEM) trusted instead of the public ones."),
            key(
                "rate_per_minute",
                Value("0"),
                "Pushes a minute through this credential, all replicas together. 0: as fast as Apple takes them.",
            ),
            key("ramp_up_secs", Value("60"), "From a tenth of the rate to all of it, after a minute without a push."),
            key(
                "environment_probes_per_minute",
                Value("30"),
                "Tokens a minute, in each process, that Apple calls bad and that are tried in its other environment before they are retired; the others wait for their turn. 0: none.",
            ),
        ],
    },
    Section {
        path: "apps.<app_id>.fcm",
        title: "a credential at Google",
        live: true,
        keys: &[
            secret("service_account", Absent("required, or the next", ""), "The service account's JSON key."),
            key("service_account_file", Absent("none", "\"service-account.json\""), "… in a file."),
            key(
                "endpoint",
                Value("\"https://fcm.googleapis.com\""),
                "Where pushes go; the token endpoint is in the service account.",
            ),
            key(
                "ca_file",
                Absent("none", "\"relay-ca.pem\""),
                "Authorities (PEM) trusted instead of the public ones, at the token endpoint too.",
            ),
            key(
                "rate_per_minute",
                Value("600000"),
                "Pushes a minute through this credential, all replicas together: Google's default quota of a project. 0: as fast as Google takes them.",
            ),
            key("ramp_up_secs", Value("60"), "From a tenth of the rate to all of it, after a minute without a push."),
        ],
    },
];

/// The row of a key, given by its path with `<app_id>` for the app and without list positions and credential names.
#[must_use]
pub fn find(section: &str, key: &str) -> Option<(&'static Section, &'static Key)> {
    let section = SECTIONS.iter().find(|known| known.path == section)?;
    Some((section, section.keys.iter().find(|known| known.name == key)?))
}

/// Whether a reload applies a change of this key.
#[must_use]
pub fn is_live(section: &Section, key: &Key) -> bool {
    section.live || LIVE.contains(&format!("{}.{}", section.path, key.name).as_str())
}

/// The rows of a section for `docs/config.md`.
#[must_use]
pub fn markdown(section: &Section) -> String {
    let mut text = String::from("| Key | Default | Meaning |\n|---|---|---|\n");
    for Key { name, default, help, .. } in section.keys {
        let default = match default {
            Value(value) if value.starts_with('"') => format!("`{}`", value.trim_matches('"')),
            Value(value) => (*value).to_owned(),
            Absent(words, _) => (*words).to_owned(),
        };
        writeln!(text, "| `{name}` | {default} | {help} |").expect("a String takes all");
    }
    text
}

/// A file with every key, all of it commented out: as it is, it says what holds anyway.
#[must_use]
pub fn toml() -> String {
    let mut text = String::from(
        "# Every key of nudged.toml. Commented out, each shows its default, or an example where it has none.\n\
         # Written by `nudged config reference`; docs/config.md says more.\n\
         # Every key is also an environment variable, NUDGED_<SECTION>__<KEY>, which beats the file.\n\
         # Keys marked (restart) take effect at the next start; the others on SIGHUP, or when a file changes.\n",
    );
    for section in SECTIONS {
        let path = section.path.replace("<app_id>", APP);
        let header = if path == "keys" { format!("[[{path}]]") } else { format!("[{path}]") };
        write!(text, "\n# {header}: {}\n#{header}\n", section.title).expect("a String takes all");
        for key in section.keys {
            let (value, words) = match key.default {
                Value(value) => (value, String::new()),
                Absent(words, "") => ("\"…\"", format!(" Default: {words}.")),
                Absent(words, example) => (example, format!(" Default: {words}.")),
            };
            let restart = if is_live(section, key) { "" } else { " (restart)" };
            let help = wrap(&format!("{}{words}{restart}", key.help));
            writeln!(text, "{help}#{} = {value}", key.name).expect("a String takes all");
        }
    }
    text
}

/// Comment lines of at most 100 characters.
fn wrap(help: &str) -> String {
    let mut text = String::new();
    let mut line = String::from("#");
    for word in help.split(' ') {
        if line.chars().count() + word.chars().count() > 99 {
            text.push_str(&line);
            text.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    text + &line + "\n"
}
