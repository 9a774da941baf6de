use std::fs;

use super::*;

fn options(dir: &Path) -> Options {
    Options { dir: Some(dir.to_owned()), extra_topics: vec!["com.example.\"quoted\"".to_owned()], ..Options::default() }
}

#[tokio::test]
async fn directory_holds_what_a_daemon_needs() {
    let dir = tempfile::tempdir().unwrap();
    let sandbox = start(options(dir.path())).await;
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(read("ca.pem"), sandbox.ca_pem());
    assert!(read("AuthKey_SANDBOX001.p8").starts_with("-----BEGIN PRIVATE KEY-----\n"));
    assert!(read("apns-client.pem").contains("BEGIN CERTIFICATE"));
    let account: Value = serde_json::from_str(&read("service-account.json")).unwrap();
    assert_eq!(account["type"], "service_account");
    assert_eq!(account["token_uri"], sandbox.token_endpoint());
    assert_eq!(account["project_id"], "ifriendspet");

    let config: toml::Table = read("nudged.toml").parse().unwrap();
    let url = config["database"]["url"].as_str().unwrap();
    assert!(url.starts_with("sqlite:///") && url.ends_with("/nudged.db"), "{url}");
    let app = &config["apps"]["ifriendspet"];
    assert_eq!(app["apns"]["endpoint"].as_str(), Some(sandbox.apns_endpoint()));
    assert_eq!(app["apns"]["endpoint_sandbox"].as_str(), Some(sandbox.apns_endpoint()));
    assert_eq!(app["apns"]["key_id"].as_str(), Some("SANDBOX001"));
    assert_eq!(app["apns"]["team_id"].as_str(), Some(TEAM_ID));
    assert_eq!(app["apns"]["topic"].as_str(), Some(TOPIC));
    assert_eq!(app["apns"]["topics"][0].as_str(), Some("com.example.\"quoted\""));
    assert_eq!(app["apns"]["environment"].as_str(), Some("sandbox"));
    assert_eq!(app["fcm"]["endpoint"].as_str(), Some(sandbox.fcm_endpoint()));
    for file in [&app["apns"]["key_file"], &app["apns"]["ca_file"], &app["fcm"]["service_account_file"]] {
        let path = Path::new(file.as_str().unwrap());
        assert!(path.is_absolute() && path.exists(), "{file}");
    }
    let endpoints: Value = serde_json::from_str(&read("sandbox.json")).unwrap();
    assert_eq!(endpoints["control"], format!("http://{}", sandbox.control_addr()));
    sandbox.shutdown().await;
}

#[cfg(unix)]
#[tokio::test]
async fn private_files_are_private_and_no_half_written_ones_remain() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    start(options(dir.path())).await.shutdown().await;
    let public = ["ca.pem", "apns-client.pem", "sandbox.json"];
    let mut names = Vec::new();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert!(public.contains(&name.as_str()) || mode == 0o600, "{name} {mode:o}");
        names.push(name);
    }
    names.sort();
    let expected = [
        "AuthKey_SANDBOX001.p8",
        "apns-client.key",
        "apns-client.pem",
        "ca.key",
        "ca.pem",
        "nudged.toml",
        "sandbox.json",
        "service-account.json",
    ];
    assert_eq!(names, expected);
}

#[tokio::test]
async fn keys_are_used_again_and_ports_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let first = start(options(dir.path())).await;
    let (ca, old) = (first.ca_pem().to_owned(), first.credentials().clone());
    let jwt = provider_token(first.credentials(), 0);
    first.shutdown().await;

    let second = start(options(dir.path())).await;
    assert_eq!(second.ca_pem(), ca);
    let new = second.credentials();
    assert_eq!(new.apns_key_pem, old.apns_key_pem);
    assert_eq!(new.client_key_pem, old.client_key_pem);
    assert_eq!(new.service_account_key_pem, old.service_account_key_pem);
    assert_eq!(new.private_key_id, old.private_key_id);
    let account = fs::read_to_string(dir.path().join("service-account.json")).unwrap();
    assert!(account.contains(second.token_endpoint()));
    // The new server certificate is good under the old CA, and the old provider token under the old key.
    let mut client = Client::apns(&second).await;
    assert_eq!(client.send(alert(&jwt)).await.unwrap().status, 200);
    let mut client = Client::open(&second, second.apns_endpoint(), true).await;
    assert_eq!(client.send(alert("")).await.unwrap().status, 200);
    access_token(&second).await;
    second.shutdown().await;
}

#[tokio::test]
async fn unreadable_key_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("AuthKey_SANDBOX001.p8"), "nonsense").unwrap();
    let Err(error) = Sandbox::start(&Runtime::production(), options(dir.path())).await else {
        panic!("a broken key was accepted");
    };
    assert!(error.to_string().contains("AuthKey_SANDBOX001.p8"), "{error}");
}
