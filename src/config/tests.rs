use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::reference::Preset;
use super::*;
use crate::domain::ids::Locale;

const APNS: &str = "[apps.pets.apns]\nkey_file = \"k.p8\"\nkey_id = \"ABC1234567\"\nteam_id = \"TEAM123456\"\n\
                    topic = \"com.pets\"\n";
const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn load(text: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    let environment = environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    Config::from_toml(Path::new("/etc/nudged/nudged.toml"), text, environment)
}

fn ok(text: &str, environment: &[(&str, &str)]) -> Config {
    load(text, environment).unwrap_or_else(|errors| panic!("{errors}"))
}

/// The only problem of a configuration.
fn only(text: &str, environment: &[(&str, &str)]) -> Problem {
    let mut problems = load(text, environment).expect_err(text).problems;
    assert_eq!(problems.len(), 1, "{text}\n{problems:#?}");
    problems.remove(0)
}

/// Apple: 5xx after 15 minutes. Google: never within 10 s, a minute after a 429, no more after 60 minutes. A hint is a floor.
#[test]
fn what_is_tried_again_waits_as_the_vendors_ask() {
    use crate::domain::sending::RetryCause::{DeviceThrottled, ProviderThrottled, ServerError, Throttled, Transport};
    let delivery = Config::from_layers(None, []).0.delivery;
    for attempt in [1, 2, 50] {
        for random in [0.0, 0.5, 0.999] {
            for (policy, floors) in [(delivery.apns, [1, 60, 900]), (delivery.fcm, [10, 60, 10])] {
                let wait = |cause, hint| policy.delay(cause, hint, attempt, random).as_secs();
                assert!(wait(Transport, None) >= floors[0]);
                for cause in [Throttled, DeviceThrottled, ProviderThrottled] {
                    assert!(wait(cause, None) >= floors[1]);
                }
                assert!(wait(ServerError, None) >= floors[2]);
                for cause in [Transport, Throttled, ServerError] {
                    assert!(wait(cause, Some(Duration::from_secs(7200))) >= 7200, "above the cap");
                    assert!(wait(cause, Some(Duration::ZERO)) >= floors[0]);
                }
            }
        }
    }
    assert_eq!(delivery.fcm.give_up_after, Duration::from_secs(3600));
}

#[test]
fn nothing_at_all_gives_the_documented_defaults() {
    let (config, problems) = Config::from_layers(None, []);
    assert!(problems.is_empty(), "{problems:?}");
    assert_eq!(config.grpc.listen.to_string(), "127.0.0.1:50051");
    assert_eq!(config.admin.listen.to_string(), "127.0.0.1:9464");
    assert_eq!(config.database.path, Path::new("nudged.db"));
    assert_eq!(config.database.synchronous, Synchronous::Full);
    assert_eq!(config.delivery.drain, Duration::from_secs(20));
    assert_eq!(config.delivery.apns.server_error_floor, Duration::from_secs(900));
    assert_eq!(config.delivery.fcm.server_error_floor, Duration::from_secs(10));
    assert_eq!(config.delivery.fcm.give_up_after, Duration::from_secs(3600));
    assert_eq!(config.log.level, "info");
    assert!(config.keys.is_empty() && config.apps.is_empty() && config.warnings.is_empty());
}

/// Google's quota of a project; Apple names none.
#[test]
fn fcm_is_paced_by_googles_quota_and_apns_by_nothing_unless_told_otherwise() {
    let fcm = "[apps.pets.fcm]\nservice_account_file = \"sa.json\"\n";
    let rates = |text: &str| {
        let config = ok(text, &[]);
        let app = &config.apps[&AppId::trusted("pets")];
        (app.apns["default"].rate.per_minute, app.fcm["default"].rate.per_minute)
    };
    assert_eq!(rates(&format!("{APNS}{fcm}")), (0, 600_000));
    let told = format!("{APNS}rate_per_minute = 300\n{fcm}rate_per_minute = 0\n");
    assert_eq!(rates(&told), (300, 0));
}

#[test]
fn environment_wins_over_the_file_and_the_file_over_defaults() {
    let text = "[grpc]\nlisten = \"127.0.0.1:1\"\nthreads = 3\n[database]\nurl = \"sqlite://a.db\"\n";
    let config = ok(text, &[("NUDGED_GRPC__LISTEN", "127.0.0.1:2"), ("NUDGED_DELIVERY__DRAIN_SECS", "7")]);
    assert_eq!(config.grpc.listen.port(), 2);
    assert_eq!(config.grpc.threads, 3);
    assert_eq!(config.delivery.drain, Duration::from_secs(7));
    assert_eq!(config.database.path, Path::new("/etc/nudged/a.db"), "relative to the file");
    let config = ok(text, &[("NUDGED_DATABASE__URL", "sqlite://b.db")]);
    assert_eq!(config.database.path, Path::new("b.db"), "relative to the working directory");
    assert_eq!(ok("[database]\nurl = \"sqlite:///var/x.db\"", &[]).database.path, Path::new("/var/x.db"));
}

#[test]
fn apps_and_keys_can_come_from_the_environment_alone() {
    let keys = format!("[{{name = \"b\", sha256 = \"{HASH}\", apps = [\"my-app\"], scopes = [\"notify\"]}}]");
    let config = ok(
        "[apps.my-app]\npush_id = false\ndefault_locale = \"ko-KR\"",
        &[
            ("NUDGED_APPS__MY_APP__APNS__KEY_FILE", "k.p8"),
            // figment's own reading makes an infinite float of this.
            ("NUDGED_APPS__MY_APP__APNS__KEY_ID", "12E4567890"),
            ("NUDGED_APPS__MY_APP__APNS__TEAM_ID", "0123456789"),
            ("NUDGED_APPS__MY_APP__APNS__TOPICS", "com.a, com.b"),
            ("NUDGED_APPS__MY_APP__ALLOW_UNDECLARED_TYPES", "true"),
            ("NUDGED_KEYS", &keys),
        ],
    );
    let app = &config.apps[&AppId::trusted("my-app")];
    assert!(!app.push_id && app.allow_undeclared_types);
    assert_eq!(app.default_locale.as_ref().map(Locale::as_str), Some("ko-KR"));
    let apns = &app.apns["default"];
    assert_eq!(apns.topics, ["com.a", "com.b"]);
    let ApnsAuth::Token { key, key_id, team_id } = &apns.auth else { panic!("not a token") };
    assert_eq!((key_id.as_str(), team_id.as_str()), ("12E4567890", "0123456789"));
    assert_eq!(*key, SecretSource::File(PathBuf::from("k.p8")));
    assert_eq!(config.keys[0].scopes.iter().next(), Some(&Scope::Notify));
}

#[test]
fn a_platform_section_holds_the_default_credential_and_named_ones() {
    let text = format!(
        "{APNS}topics = [\"com.pets.watch\", \"com.pets\"]\n\
         [apps.pets.apns.old]\ncert_file = \"c.pem\"\ncert_key_file = \"c.pem\"\ntopic = \"com.old\"\n\
         environment = \"sandbox\"\nendpoint_sandbox = \"https://localhost:8443\"\n\
         [apps.pets.fcm.second]\nservice_account_file = \"sa.json\"\nca_file = \"ca.pem\"\n"
    );
    let config = ok(&text, &[]);
    let app = &config.apps[&AppId::trusted("pets")];
    assert_eq!(app.apns["default"].topics, ["com.pets", "com.pets.watch"]);
    assert_eq!(app.apns["default"].endpoint.to_string(), "https://api.push.apple.com:443");
    assert_eq!(app.apns["old"].environment, ApnsEnvironment::Sandbox);
    assert_eq!(app.apns["old"].endpoint_sandbox.port(), 8443);
    let ApnsAuth::Certificate { cert_file, .. } = &app.apns["old"].auth else { panic!("not a certificate") };
    assert_eq!(cert_file, Path::new("/etc/nudged/c.pem"));
    assert!(app.fcm.contains_key("second") && !app.fcm.contains_key("default"));
    assert_eq!(app.fcm["second"].ca_file.as_deref(), Some(Path::new("/etc/nudged/ca.pem")));
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_known_one() {
    let problem = only("[log]\n\n[grpc]\nlisten = \"127.0.0.1:1\"\nmax_conections = 5\n", &[]);
    assert_eq!(problem.key, "grpc.max_conections");
    assert_eq!(problem.origin, Origin::File { path: "/etc/nudged/nudged.toml".into(), line: Some(5) });
    assert!(problem.remedy.contains("`max_connections`"), "{problem}");
    let problem = only("[databse]\nurl = \"sqlite://a.db\"", &[]);
    assert!(problem.wrong.contains("section") && problem.remedy.contains("`database`"), "{problem}");
    let problem = only("", &[("NUDGED_GRPC__LISTN", "x")]);
    assert_eq!(problem.origin, Origin::Environment("NUDGED_GRPC__LISTN".to_owned()));
    assert!(problem.remedy.contains("`listen`"), "{problem}");
    let problem = only(&format!("{APNS}topicz = []\n"), &[]);
    assert_eq!(problem.key, "apps.pets.apns.topicz");
    assert!(problem.remedy.contains("`topics`") || problem.remedy.contains("`topic`"), "{problem}");
    let problem = only("[apps.pets.fmc]\nx = 1", &[]);
    assert!(problem.remedy.contains("`fcm`"), "{problem}");
}

#[test]
fn a_single_underscore_is_noticed_and_other_programs_variables_are_not() {
    let problem = only("", &[("NUDGED_DATABASE_URL", "sqlite://a.db")]);
    assert!(problem.remedy.contains("NUDGED_DATABASE__URL"), "{problem}");
    // What an orchestrator sets for services called nudged and nudged-grpc.
    ok("", &[("NUDGED_PORT", "tcp://10.0.0.1:1"), ("NUDGED_GRPC_SERVICE_HOST", "10.0.0.1"), ("NUDGED_CONFIG", "x")]);
}

#[test]
fn every_problem_is_reported_at_once() {
    let text = "[grpc]\nlisten = \"nonsense\"\nthreads = \"two\"\n[log]\nformat = \"xml\"\nlevel = \"infoo\"\n\
                [apps.Pets]\n[apps.cats.apns]\nkey_id = \"short\"\n[apps.cats.fcm]\nendpoint = \"http://fcm.example\"\n\
                [[keys]]\nname = \"a\"\nsha256 = \"zz\"\napps = [\"dogs\"]\nscopes = [\"notfy\"]\n";
    let errors = load(text, &[("NUDGED_DATABASE__URL", "")]).expect_err("bad");
    let keys: Vec<&str> = errors.problems.iter().map(|problem| problem.key.as_str()).collect();
    for key in [
        "",
        "grpc.listen",
        "grpc.threads",
        "log.format",
        "log.level",
        "apps.Pets",
        "apps.cats.apns.key_file",
        "apps.cats.apns.key_id",
        "apps.cats.apns.team_id",
        "apps.cats.apns.topic",
        "apps.cats.fcm.service_account_file",
        "apps.cats.fcm.endpoint",
        "keys[0].sha256",
        "keys[0].scopes",
    ] {
        assert!(keys.contains(&key), "{key} is not in\n{errors}");
    }
    let text = errors.to_string();
    assert!(text.contains("grpc.listen (/etc/nudged/nudged.toml:2)"), "{text}");
    assert!(text.contains("did you mean `notify`"), "{text}");
    assert!(text.contains("NUDGED_DATABASE__URL: is set but empty"), "{text}");
}

/// One wrong value per kind of key: (configuration, key, words of the complaint).
#[test]
fn each_kind_of_key_refuses_what_it_cannot_hold() {
    let key = |rest: &str| format!("{APNS}[[keys]]\nname = \"k\"\n{rest}");
    let apns = |rest: &str| format!("{APNS}{rest}");
    let full = |replace: &str, with: &str| {
        key(&format!("sha256 = \"{HASH}\"\napps = [\"pets\"]\nscopes = [\"notify\"]\n")).replace(replace, with)
    };
    let cases: Vec<(String, &str, &str)> = vec![
        ("grpc = 5".into(), "grpc", "table"),
        ("[grpc]\nlisten = 50051".into(), "grpc.listen", "text"),
        ("[grpc]\nlisten = \"\"".into(), "grpc.listen", "empty"),
        ("[grpc]\nlisten = \"example.com:1\"".into(), "grpc.listen", "not an IP address"),
        ("[grpc]\nthreads = 0".into(), "grpc.threads", "out of range"),
        ("[grpc]\nthreads = 1.5".into(), "grpc.threads", "whole number"),
        ("[grpc]\nthreads = \"2\"".into(), "grpc.threads", "whole number"),
        ("[grpc]\nthreads = -1".into(), "grpc.threads", "out of range"),
        ("[grpc]\ndefault_app = \"pets\"".into(), "grpc.default_app", "no app"),
        ("[grpc.tls]\ncert_file = \"c.pem\"".into(), "grpc.tls.key_file", "missing"),
        ("[grpc.tls]\nkey_file = \"c.pem\"".into(), "grpc.tls.cert_file", "missing"),
        ("[admin]\nlisten = \"9464\"".into(), "admin.listen", "not an IP address"),
        ("[database]\nurl = \"mysql://x\"".into(), "database.url", "sqlite://PATH"),
        ("[database]\nurl = \"sqlite://:memory:\"".into(), "database.url", "sqlite://PATH"),
        ("[database]\nurl = \"sqlite://x?mode=ro\"".into(), "database.url", "sqlite://PATH"),
        ("[database]\npassword_file = \"pw\"".into(), "database.password_file", "SQLite has no password"),
        ("[database]\nurl_file = \"/nonexistent/url\"".into(), "database.url_file", "cannot read"),
        ("[database]\nurl = \"sqlite://a\"\nurl_file = \"/nonexistent/url\"".into(), "database.url", "twice"),
        ("[database.sqlite]\nsynchronous = \"off\"".into(), "database.sqlite.synchronous", "not known"),
        ("[delivery.fcm]\ncap_secs = 1".into(), "delivery.fcm.cap_secs", "shorter"),
        ("[delivery.fcm]\nbase_secs = 0".into(), "delivery.fcm.base_secs", "out of range"),
        ("[log]\nlevel = \"nudged=loud\"".into(), "log.level", "not a level"),
        ("[traces]\notlp_endpoint = \"https://collector:4317\"".into(), "traces.otlp_endpoint", "http://HOST:PORT"),
        ("[traces]\notlp_endpoint = \"collector\"".into(), "traces.otlp_endpoint", "http://HOST:PORT"),
        ("[traces]\nsample_one_in = 0".into(), "traces.sample_one_in", "out of range"),
        ("[traces]\nqueue = 1".into(), "traces.queue", "out of range"),
        ("[apps.pets]\npush_id = \"yes\"".into(), "apps.pets.push_id", "true or false"),
        (apns("topics = \"com.a\""), "apps.pets.apns.topics", "list"),
        (apns("topics = [\"\"]"), "apps.pets.apns.topics", "empty"),
        (apns("topics = [\"com/a\"]"), "apps.pets.apns.topics", "bundle id"),
        (APNS.replace("topic = \"com.pets\"", ""), "apps.pets.apns.topic", "missing"),
        (apns("endpoint = \"api.push.apple.com\""), "apps.pets.apns.endpoint", "https://"),
        (apns("endpoint = \"https://h/3/device\""), "apps.pets.apns.endpoint", "path"),
        (apns("endpoint = \"https://h:99999\""), "apps.pets.apns.endpoint", "port"),
        (apns("environment = \"staging\""), "apps.pets.apns.environment", "not known"),
        (apns("cert_file = \"c.pem\""), "apps.pets.apns.cert_file", "both"),
        (apns("[apps.pets.apns.Watch]\n"), "apps.pets.apns.Watch", "credential name"),
        ("keys = 5".into(), "keys", "list of tables"),
        (full("name = \"k\"", "name = \"\""), "keys[0].name", "empty"),
        (full("name = \"k\"", ""), "keys[0].name", "missing"),
        (full(HASH, &HASH[1..]), "keys[0].sha256", "63 characters"),
        (full(HASH, &HASH.replace('e', "g")), "keys[0].sha256", "hexadecimal"),
        (full("[\"pets\"]", "[\"dogs\"]"), "keys[0].apps", "no app `dogs`"),
        (full("[\"pets\"]", "[]"), "keys[0].apps", "names nothing"),
        (full("apps = [\"pets\"]\n", ""), "keys[0].apps", "missing"),
        (full("[\"notify\"]", "[\"everything\"]"), "keys[0].scopes", "no scope"),
        (full("apps =", "expires_at = \"soon\"\napps ="), "keys[0].expires_at", "RFC 3339"),
        (full("sha256 =", "client_cert_sha256 ="), "keys[0].client_cert_sha256", "not asked for"),
    ];
    for (text, key, words) in cases {
        let Err(errors) = load(&text, &[]) else { panic!("accepted: {text}") };
        let found = errors.problems.iter().any(|problem| problem.key == key && problem.wrong.contains(words));
        assert!(found, "{text}\nexpected {key}: {words}, got\n{errors}");
        assert!(errors.problems.iter().all(|problem| !problem.remedy.is_empty()), "no remedy in\n{errors}");
    }
    let twice =
        format!("{}[[keys]]\nname = \"k\"\nsha256 = \"{HASH}\"\napps = [\"pets\"]\nscopes = [\"read\"]", full("", ""));
    let errors = load(&twice, &[]).expect_err("twice").to_string();
    assert!(errors.contains("keys[1].name") && errors.contains("keys[1].sha256"), "{errors}");
}

#[test]
fn another_address_than_loopback_needs_keys_and_wants_tls() {
    let open = "[grpc]\nlisten = \"0.0.0.0:50051\"\n";
    let problem = only(open, &[]);
    assert_eq!(problem.key, "grpc.listen");
    assert!(problem.wrong.contains("no API keys") && problem.remedy.contains("nudged key new"), "{problem}");
    assert_eq!(only(&format!("keys = []\n{open}"), &[]).key, "grpc.listen", "an empty list is no key");
    let keyed = format!("{open}{APNS}[[keys]]\nname=\"k\"\nsha256=\"{HASH}\"\napps=[\"pets\"]\nscopes=[\"notify\"]\n");
    let config = ok(&keyed, &[]);
    assert!(config.warnings[0].wrong.contains("without TLS"), "{:?}", config.warnings);
    let tls = format!("{keyed}[grpc.tls]\ncert_file = \"c\"\nkey_file = \"k\"\n");
    assert!(ok(&tls, &[]).warnings.is_empty());
    for loopback in ["localhost:1", "[::1]:1", "127.8.8.8:1", "[::ffff:127.0.0.1]:1"] {
        ok(&format!("[grpc]\nlisten = \"{loopback}\""), &[]);
    }
}

#[test]
fn a_key_expires_at_a_time_or_at_the_start_of_a_day_in_utc() {
    let text = |expires: &str| {
        let key = format!("name=\"k\"\nsha256=\"{HASH}\"\napps=[\"pets\"]\nscopes=[\"notify\"]");
        format!("{APNS}[[keys]]\n{key}\nexpires_at = {expires}")
    };
    let at = |expires: &str| ok(&text(expires), &[]).keys[0].expires_at.map(|at| at.to_string());
    assert_eq!(at("\"2027-01-01\"").as_deref(), Some("2027-01-01T00:00:00Z"));
    assert_eq!(at("2027-01-01").as_deref(), Some("2027-01-01T00:00:00Z"), "TOML's own date");
    assert_eq!(at("\"2027-01-01T09:00:00+09:00\"").as_deref(), Some("2027-01-01T00:00:00Z"));
}

#[test]
fn a_key_that_cannot_be_read_whole_is_left_out() {
    let text =
        format!("[apps.pets]\n[[keys]]\nname=\"k\"\nsha256=\"{HASH}\"\napps=[\"pets\"]\nscopes=[\"notify\",\"x\"]");
    let file = File { path: "nudged.toml".into(), text };
    let (config, problems) = Config::from_layers(Some(file), []);
    assert_eq!(problems.len(), 1);
    assert!(config.keys.is_empty());
}

#[test]
fn a_file_in_the_environment_beats_an_inline_secret_in_the_file() {
    let text = APNS.replace("key_file = \"k.p8\"", "key = \"-----BEGIN\"");
    let config = ok(&text, &[("NUDGED_APPS__PETS__APNS__KEY_FILE", "env.p8")]);
    let ApnsAuth::Token { key, .. } = &config.apps[&AppId::trusted("pets")].apns["default"].auth else {
        panic!("not a token")
    };
    assert_eq!(*key, SecretSource::File(PathBuf::from("env.p8")));
}

#[test]
fn no_secret_shows_in_debug_or_in_a_problem() {
    let secret = "hunter2hunter2";
    let text = APNS.replace("key_file = \"k.p8\"", &format!("key = \"{secret}\""));
    let sa = format!("[apps.pets.fcm]\nservice_account = '{{\"private_key\": \"{secret}\"}}'\n");
    let config = ok(&format!("{text}{sa}"), &[("NUDGED_GRPC__TLS__KEY", secret), ("NUDGED_GRPC__TLS__CERT_FILE", "c")]);
    assert!(!format!("{config:?}").contains(secret));
    assert!(format!("{config:?}").contains("[redacted]"));
    let config = ok(&format!("[database]\nurl = \"postgres://u:{secret}@h/d\""), &[]);
    assert!(config.database.postgres.is_some() && !format!("{config:?}").contains(secret));
    for url in [format!("postgre://u:{secret}@h/d"), format!("sqlit://{secret}")] {
        let errors = load(&format!("[database]\nurl = \"{url}\""), &[]).expect_err("bad url");
        assert!(!format!("{errors} {errors:?}").contains(secret), "{errors}");
    }
}

#[test]
fn broken_toml_names_its_line_and_a_missing_explicit_file_is_an_error() {
    let problem = only("[grpc]\nlisten = \n", &[]);
    assert!(matches!(problem.origin, Origin::File { line: Some(2 | 3), .. }), "{problem:?}");
    let missing = tempfile::tempdir().expect("a directory").path().join("none.toml");
    let errors = Config::load(Some(&missing)).expect_err("missing");
    assert!(errors.to_string().contains("none.toml"), "{errors}");
}

#[test]
fn contradicting_variables_are_reported() {
    let errors = load("", &[("NUDGED_GRPC__TLS", "x"), ("NUDGED_GRPC__TLS__CERT_FILE", "c")]).expect_err("both");
    assert!(errors.to_string().contains("NUDGED_GRPC__TLS__CERT_FILE: contradicts"), "{errors}");
}

#[test]
fn what_the_sandbox_writes_is_understood() {
    let text = "[database]\nurl = \"sqlite:///tmp/x/nudged.db\"\n\n[grpc]\ndefault_app = \"ifriendspet\"\n\n\
        [apps.\"ifriendspet\".apns]\nkey_file = \"/tmp/x/AuthKey_SANDBOX123.p8\"\nkey_id = \"SANDBOX123\"\n\
        team_id = \"TEAM000001\"\ntopic = \"com.ifriendspet.app\"\nenvironment = \"sandbox\"\n\
        endpoint = \"https://127.0.0.1:1234\"\nendpoint_sandbox = \"https://127.0.0.1:1234\"\nca_file = \"/tmp/x/ca.pem\"\n\n\
        [apps.\"ifriendspet\".fcm]\nservice_account_file = \"/tmp/x/service-account.json\"\n\
        endpoint = \"https://127.0.0.1:1235\"\nca_file = \"/tmp/x/ca.pem\"\n";
    assert_eq!(ok(text, &[]).apps.len(), 1);
}

#[test]
fn an_endpoint_prints_as_it_is_dialled() {
    let text = |url: &str| Endpoint::parse(url).map(|endpoint| endpoint.to_string());
    assert_eq!(text("https://API.push.apple.com").as_deref(), Ok("https://api.push.apple.com:443"));
    assert_eq!(text("https://[::1]:2197/").as_deref(), Ok("https://[::1]:2197"));
    assert_eq!(text("http://127.0.0.1:80").as_deref(), Ok("http://127.0.0.1:80"));
    for bad in ["", "https://", "ftp://h", "https://u:p@h", "https://h:0", "https://h?x=1", "http://10.0.0.1"] {
        assert!(text(bad).is_err(), "{bad}");
    }
}

/// A configuration in which every section has what it needs, and the one key at hand is not said yet.
fn base(section: &str, without: &str) -> String {
    let keys: &[(&str, &str)] = match section {
        "apps.<app_id>.apns" => {
            &[("key_file", "k.p8"), ("key_id", "ABCDE12345"), ("team_id", "FGHIJ67890"), ("topic", "com.pets")]
        }
        "apps.<app_id>.fcm" => &[("service_account_file", "sa.json")],
        "grpc.tls" => &[("cert_file", "c.pem"), ("key_file", "k.pem")],
        "keys" => &[("name", "k"), ("sha256", HASH)],
        "database" if without == "password_file" => &[("url", "postgres://nudged@db/nudged")],
        _ => &[],
    };
    let mut text = String::from("[apps.pets]\n");
    let header = section.replace("<app_id>", "pets");
    match section {
        "apps.<app_id>" => {}
        "keys" => text.push_str("[[keys]]\n"),
        _ => writeln!(text, "[{header}]").expect("a String takes all"),
    }
    for (key, value) in keys.iter().filter(|(key, _)| *key != without) {
        writeln!(text, "{key} = \"{value}\"").expect("a String takes all");
    }
    if section == "keys" {
        for (key, value) in [("apps", "pets"), ("scopes", "notify")].iter().filter(|(key, _)| *key != without) {
            writeln!(text, "{key} = [\"{value}\"]").expect("a String takes all");
        }
    }
    text
}

/// How a key of a section is called where the app is `pets`.
fn name(section: &str, key: &str) -> String {
    format!("{}.{key}", section.replace("<app_id>", "pets").replace("keys", "keys[0]"))
}

/// One bad value per key there is: each is refused by name, with something to do about it.
#[test]
fn every_key_refuses_what_it_cannot_hold() {
    for section in reference::SECTIONS {
        for key in section.keys {
            let mut bad = vec!["{ x = 1 }", "[[1]]"];
            match key.default {
                Preset::Value(value) | Preset::Absent(_, value) if value.parse::<u64>().is_ok() => {
                    bad.extend(["-1", "1.5", "\"7\"", "true", "99999999999999"]);
                }
                Preset::Value("true" | "false") => bad.extend(["1", "\"yes\""]),
                _ => bad.extend(["7", "\"\"", "[\"\"]"]),
            }
            for value in bad {
                let text = format!("{}{} = {value}\n", base(section.path, key.name), key.name);
                let Err(errors) = load(&text, &[]) else { panic!("accepted: {text}") };
                let wanted = name(section.path, key.name);
                let found = errors.problems.iter().find(|problem| problem.key == wanted);
                let problem = found.unwrap_or_else(|| panic!("{wanted} is not named for\n{text}\n{errors}"));
                assert!(!problem.remedy.is_empty(), "{problem}");
            }
        }
    }
}

/// What the reference calls a default is what holds without the key; its examples are allowed.
#[test]
fn the_reference_tells_the_truth_about_defaults() {
    let about = |config: &Config| {
        let Config { grpc, admin, database, delivery, log, keys, apps, .. } = config;
        format!("{grpc:?} {admin:?} {database:?} {delivery:?} {log:?} {keys:?} {apps:?}")
    };
    for section in reference::SECTIONS {
        for key in section.keys {
            let base = base(section.path, key.name);
            match key.default {
                Preset::Value(value) => {
                    let said = ok(&format!("{base}{} = {value}\n", key.name), &[]);
                    // The file's directory instead of the working directory.
                    let path = |text: String| text.replace("/etc/nudged/nudged.db", "nudged.db");
                    assert_eq!(path(about(&said)), about(&ok(&base, &[])), "{}.{}", section.path, key.name);
                }
                Preset::Absent(_, "") => {}
                Preset::Absent(_, example) => {
                    let text = format!("{base}{} = {example}\n", key.name);
                    let wanted = name(section.path, key.name);
                    if let Err(errors) = load(&text.replace("ifriendspet", "pets"), &[]) {
                        let about_it = |problem: &&Problem| problem.key == wanted && !problem.wrong.contains("both");
                        let problem = errors.problems.iter().find(about_it);
                        let excused = key.name == "url_file" || key.name == "client_cert_sha256";
                        assert!(problem.is_none() || excused, "{text}\n{errors}");
                    }
                }
            }
        }
    }
}

/// The reference has every key that is read, and none that is not.
#[test]
fn the_reference_names_exactly_the_keys_there_are() {
    let text = "[apps.x.apns]\nca_file = \"x\"\n[apps.x.fcm]\nca_file = \"x\"\n[[keys]]\nname = \"x\"\n";
    let file = File { path: "nudged.toml".into(), text: text.to_owned() };
    let (_, found) = Config::understand(Some(file), []);
    let known: std::collections::BTreeSet<String> = found
        .settings
        .0
        .iter()
        .map(|setting| setting.key.replace("apps.x", "apps.<app_id>").replace("keys[0]", "keys"))
        .collect();
    let documented: std::collections::BTreeSet<String> = reference::SECTIONS
        .iter()
        .flat_map(|section| section.keys.iter().map(|key| format!("{}.{}", section.path, key.name)))
        .collect();
    let missing: Vec<_> = known.difference(&documented).collect();
    let invented: Vec<_> = documented.difference(&known).collect();
    assert!(missing.is_empty() && invented.is_empty(), "not in the reference: {missing:?}\nnot a key: {invented:?}");
}

/// `NUDGED_WRITE_DOCS=1 cargo test --lib config::` writes what it compares with.
#[test]
fn the_documentation_is_what_the_reference_says() {
    let write = std::env::var_os("NUDGED_WRITE_DOCS").is_some();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    if write {
        std::fs::write(docs.join("nudged.toml"), reference::toml()).expect("docs are writable");
    }
    let example = std::fs::read_to_string(docs.join("nudged.toml")).unwrap_or_default();
    assert_eq!(example, reference::toml(), "docs/nudged.toml: write it with NUDGED_WRITE_DOCS=1");
    ok(&example, &[]);
    let mut prose = std::fs::read_to_string(docs.join("config.md")).expect("docs/config.md");
    for section in reference::SECTIONS {
        let header = if section.path == "keys" { "[[keys]]".to_owned() } else { format!("[{}]", section.path) };
        let start = prose.find(&format!("## `{header}`")).unwrap_or_else(|| panic!("docs/config.md lacks {header}"));
        let begin = start + prose[start..].find("| Key |").expect("a table");
        let length =
            prose[begin..].split_inclusive('\n').take_while(|line| line.starts_with('|')).map(str::len).sum::<usize>();
        let table = reference::markdown(section);
        if write {
            prose.replace_range(begin..begin + length, &table);
        } else {
            assert_eq!(&prose[begin..begin + length], table, "docs/config.md, {header}");
        }
    }
    if write {
        std::fs::write(docs.join("config.md"), prose).expect("docs are writable");
    }
}

#[test]
fn what_holds_is_printed_with_its_origin_and_without_secrets() {
    let secret = "hunter2hunter2";
    let text = format!("[grpc]\nthreads = 2\n{}", APNS.replace("key_file = \"k.p8\"", &format!("key = \"{secret}\"")));
    let printed = ok(&text, &[("NUDGED_DELIVERY__POLL_MS", "250")]).settings.print();
    assert!(!printed.contains(secret), "{printed}");
    let line =
        |start: &str| printed.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{printed}"));
    assert!(line("threads").ends_with("nudged.toml:2") && line("threads").starts_with("threads = 2 "), "{printed}");
    assert!(line("poll_ms = \"250\"").ends_with("# NUDGED_DELIVERY__POLL_MS"), "{printed}");
    assert!(line("drain_secs = 20").ends_with("# default"), "{printed}");
    assert!(line("key = \"[redacted]\"").contains("nudged.toml:"), "{printed}");
    assert!(printed.contains("[apps.pets.apns]\n"), "{printed}");
    let again = ok(&printed.replace("poll_ms = \"250\"", "poll_ms = 250"), &[]);
    assert_eq!(again.delivery.poll, std::time::Duration::from_millis(250), "it is a file itself");
}

#[test]
fn a_change_is_told_by_whether_it_needs_a_restart() {
    let old = ok(&format!("[grpc]\nthreads = 2\n{APNS}"), &[]);
    let new = ok(&format!("[admin]\nlisten = \"127.0.0.1:1\"\n{}", APNS.replace("k.p8", "new.p8")), &[]);
    let changed = new.settings.changed(&old.settings);
    assert_eq!(changed.live, ["apps.pets.apns.key_file"]);
    assert_eq!(changed.restart, ["grpc.threads", "admin.listen"]);
    assert_eq!(old.settings.changed(&old.settings), settings::Changed::default());
    let files = new.files();
    assert!(
        files.iter().any(|file| file.ends_with("new.p8")) && files.iter().any(|file| file.ends_with("nudged.toml"))
    );
}
