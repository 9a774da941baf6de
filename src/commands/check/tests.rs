use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use super::*;

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>, mode: u32) {
        fs::write(self.path(name), content).expect("written");
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).expect("mode set");
    }

    fn check(&self, text: &str) -> String {
        let text = format!("[database]\nurl = \"sqlite://nudged.db\"\n{text}");
        fs::write(self.path("nudged.toml"), text).expect("written");
        let (config, problems) = Config::read(Some(&self.path("nudged.toml")));
        look(&config, problems, Runtime::production().now()).to_string()
    }
}

/// As Apple hands them out.
fn p8() -> String {
    rcgen::KeyPair::generate().expect("a key").serialize_pem()
}

fn certificate(from: i32, to: i32) -> (String, String) {
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    params.not_before = rcgen::date_time_ymd(from, 1, 1);
    params.not_after = rcgen::date_time_ymd(to, 1, 1);
    let key = rcgen::KeyPair::generate().expect("a key");
    (params.self_signed(&key).expect("a certificate").pem(), key.serialize_pem())
}

#[test]
fn all_problems_of_files_and_configuration_come_at_once() {
    let place = Place::new();
    place.write("open.p8", p8(), 0o644);
    place.write("empty.json", "", 0o600);
    place.write("nudged.db", "this is no database file", 0o600);
    place.write("other.p8", "-----BEGIN", 0o600);
    place.write("other.json", "{\"type\": \"authorized_user\"}", 0o600);
    place.write("old.pem", certificate(2001, 2002).0, 0o644);
    let found = place.check(
        "[grpc]\nlistn = \"x\"\n\
         [apps.pets.apns]\nkey_file = \"open.p8\"\nkey_id = \"ABC1234567\"\nteam_id = \"TEAM123456\"\ntopic = \"a.b\"\n\
         ca_file = \"old.pem\"\n\
         [apps.pets.apns.watch]\nkey_file = \"none.p8\"\nkey_id = \"ABC1234567\"\nteam_id = \"TEAM123456\"\n\
         topic = \"a.b\"\n\
         [apps.pets.apns.other]\nkey_file = \"other.p8\"\nkey_id = \"ABC1234567\"\nteam_id = \"TEAM123456\"\n\
         topic = \"a.b\"\n\
         [apps.pets.fcm]\nservice_account_file = \"empty.json\"\n\
         [apps.pets.fcm.other]\nservice_account_file = \"other.json\"\n",
    );
    for part in [
        "error: grpc.listn (",
        "did you mean `listen`",
        "database.url (",
        "is not a SQLite database",
        "warning: apps.pets.apns.key_file (",
        "mode 644",
        "error: apps.pets.apns.watch.key_file (",
        "none.p8): does not exist",
        "error: apps.pets.fcm.service_account_file (",
        "is not the JSON key file",
        "error: apps.pets.apns.ca_file (",
        "expired at 2002-01-01T00:00:00Z",
        "other.p8): is no APNs signing key",
        "other.json): `type` is not",
        "7 errors, 1 warning",
    ] {
        assert!(found.contains(part), "{part} is not in\n{found}");
    }
}

#[test]
fn a_server_key_must_be_the_certificates() {
    let place = Place::new();
    let ((cert, key), (_, other)) = (certificate(2020, 2999), certificate(2020, 2999));
    place.write("cert.pem", cert, 0o644);
    place.write("key.pem", key, 0o600);
    place.write("other.pem", other, 0o600);
    let tls = |key: &str| format!("[grpc.tls]\ncert_file = \"cert.pem\"\nkey_file = \"{key}\"\n");
    assert_eq!(place.check(&tls("key.pem")), "0 errors, 0 warnings");
    let found = place.check(&tls("other.pem"));
    assert!(found.contains("grpc.tls.key_file") && found.contains("is not the key of the certificate"), "{found}");
    let found = place.check(&tls("cert.pem"));
    assert!(found.contains("no private key"), "{found}");
}

#[test]
fn a_certificate_near_its_end_is_a_warning() {
    let place = Place::new();
    let now = Runtime::production().now();
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    let date = |at: UnixMs| {
        let text = at.to_string();
        let part = |range: std::ops::Range<usize>| text[range].parse::<u16>().expect("digits");
        let month = u8::try_from(part(5..7)).expect("a month");
        rcgen::date_time_ymd(i32::from(part(0..4)), month, u8::try_from(part(8..10)).expect("a day"))
    };
    params.not_before = date(now.minus(std::time::Duration::from_secs(5 * 86_400)));
    params.not_after = date(now.plus(std::time::Duration::from_secs(5 * 86_400)));
    place.write("cert.pem", params.self_signed(&key).expect("a certificate").pem(), 0o644);
    place.write("key.pem", key.serialize_pem(), 0o600);
    let found = place.check("[grpc.tls]\ncert_file = \"cert.pem\"\nkey_file = \"key.pem\"\n");
    assert!(found.contains("expires soon") && found.contains("0 errors, 1 warning"), "{found}");
}

#[test]
fn inline_secrets_in_an_open_file_and_expired_keys_are_warned_of() {
    let place = Place::new();
    let found = place.check(
        "[apps.pets.apns]\nkey_id = \"ABC1234567\"\nteam_id = \"TEAM123456\"\ntopic = \"a.b\"\nkey = \"x\"\n\
         [[keys]]\nname = \"old\"\napps = [\"pets\"]\nscopes = [\"notify\"]\nexpires_at = \"2020-01-01\"\n\
         sha256 = \"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"\n",
    );
    assert!(found.contains("nudged.toml: is open to every user"), "{found}");
    assert!(found.contains("keys (`old`): expired at 2020-01-01T00:00:00Z"), "{found}");
    assert!(found.contains("1 error, 2 warnings"), "{found}");
}

#[test]
fn a_database_in_a_directory_that_does_not_exist_is_an_error() {
    let place = Place::new();
    fs::write(place.path("nudged.toml"), "[database]\nurl = \"sqlite://none/nudged.db\"\n").expect("written");
    let (config, problems) = Config::read(Some(&place.path("nudged.toml")));
    let found = look(&config, problems, UnixMs(0)).to_string();
    assert!(found.contains("database.url") && found.contains("none does not exist"), "{found}");
}

#[test]
fn a_database_is_checked_by_its_owner_and_one_in_use_is_left_alone() {
    use std::sync::Arc;

    use crate::domain::deny::DenyFeed;
    use crate::storage::sqlite::{Settings, SqliteStore};

    let place = Place::new();
    let open = || {
        let settings = Settings::file(place.path("nudged.db"));
        SqliteStore::open(Runtime::production(), &settings, Arc::new(DenyFeed::default())).expect("a store")
    };
    let store = open();
    assert_eq!(place.check(""), "0 errors, 0 warnings", "in use");
    store.close();
    drop(store);
    assert_eq!(place.check(""), "0 errors, 0 warnings", "free");
    drop(open());
}

#[tokio::test]
async fn what_the_sandbox_writes_passes() {
    let place = Place::new();
    let options = crate::sandbox::Options { dir: Some(place.path("sandbox")), ..crate::sandbox::Options::default() };
    let runtime = Runtime::production();
    let sandbox = crate::sandbox::Sandbox::start(&runtime, options).await.expect("a sandbox");
    let (config, problems) = Config::read(Some(&place.path("sandbox/nudged.toml")));
    assert_eq!(look(&config, problems, runtime.now()).to_string(), "0 errors, 0 warnings");
    assert_eq!(config.apps.len(), 1);
    sandbox.shutdown().await;
}
