//! The README's tour by hand works as printed: its grpcurl commands run against the real binary, through reflection as
//! grpcurl does it, and once more through grpcurl itself where it is installed.

use std::process::Command;

use super::generic::Generic;
use super::server::{PATIENCE, World};

/// Where the README's server listens, and what a reader replaces.
const PRINTED_ADDRESS: &str = "127.0.0.1:50051";
const PRINTED_NOTIFICATION: &str = "NOTIFICATION_ID";

/// A printed command: the words a shell would pass on.
type Words = Vec<String>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_readmes_tour_works_as_printed() {
    let commands: Vec<Words> = shell_blocks(include_str!("../../README.md"))
        .iter()
        .flat_map(|block| commands(block))
        .filter(|words| words[0] == "grpcurl")
        .collect();
    let methods: Vec<&str> = commands.iter().map(|words| words.last().unwrap().as_str()).collect();
    let tour = ["RegisterDevice", "SetOptIn", "NotifyEvent", "ListDeliveries", "ExplainDelivery"];
    let mut expected = tour.map(|method| format!("nudged.v1.PushService/{method}")).to_vec();
    // Among the guards.
    expected.push("nudged.v1.AdminService/PauseDelivery".to_owned());
    assert_eq!(methods, expected);

    let world = World::new().await;
    let _server = world.start();
    world.client().await;
    let generic = Generic::connect(&world.address).await;
    let mut notification = String::new();
    for words in &commands {
        let [_, plaintext, data, json, address, method] = words.as_slice() else { panic!("{words:?}") };
        assert_eq!((plaintext.as_str(), data.as_str(), address.as_str()), ("-plaintext", "-d", PRINTED_ADDRESS));
        let (service, method) = method.split_once('/').unwrap();
        let answer = generic.call_service(service, method, &json.replace(PRINTED_NOTIFICATION, &notification)).await;
        match method {
            "RegisterDevice" => assert_eq!(answer["created"], true, "{answer}"),
            "SetOptIn" => assert_eq!(answer["applied"], true, "{answer}"),
            "NotifyEvent" => {
                answer["notificationId"].as_str().unwrap().clone_into(&mut notification);
                assert!(world.sandbox.wait_for(1, PATIENCE).await, "the push arrives");
                let push = &world.sandbox.received()[0];
                assert!(push.accepted, "{:?}", push.reason);
                assert_eq!(push.json()["aps"]["alert"]["title"], "새 댓글");
                // What the reader does meanwhile takes longer than the outcome's write.
                settled(&generic, &notification).await;
            }
            "ListDeliveries" => assert_eq!(answer["deliveries"][0]["state"], "SENT", "{answer}"),
            "ExplainDelivery" => assert!(answer["summary"].as_str().unwrap().starts_with("Sent"), "{answer}"),
            "PauseDelivery" => assert_eq!(answer["changed"], true, "{answer}"),
            other => panic!("{other} is not known to this test"),
        }
    }

    let Ok(version) = Command::new("grpcurl").arg("--version").output() else {
        println!("grpcurl is not installed: the equivalent client ran alone");
        return;
    };
    assert!(version.status.success());
    let address = world.address.trim_start_matches("http://");
    for words in &commands {
        let words = words
            .iter()
            .map(|word| word.replace(PRINTED_ADDRESS, address).replace(PRINTED_NOTIFICATION, &notification));
        let output = Command::new("grpcurl").args(words.skip(1)).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        if let Some(duplicate) = answer.get("duplicate") {
            assert_eq!(duplicate, true, "the same idempotency key: {answer}");
            assert_eq!(answer["notificationId"].as_str(), Some(notification.as_str()));
        }
    }
    assert_eq!(world.sandbox.received().len(), 1, "a repeated event pushes nothing");
}

async fn settled(generic: &Generic, notification: &str) {
    let deadline = std::time::Instant::now() + PATIENCE;
    let request = format!(r#"{{"app_id":"ifriendspet","notification_id":"{notification}"}}"#);
    while generic.call("ListDeliveries", &request).await["deliveries"][0]["state"] != "SENT" {
        assert!(std::time::Instant::now() < deadline, "the delivery does not end");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// The ```sh blocks of a Markdown text.
fn shell_blocks(markdown: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut open: Option<String> = None;
    for line in markdown.lines() {
        match (&mut open, line.trim()) {
            (None, "```sh") => open = Some(String::new()),
            (Some(_), "```") => blocks.extend(open.take()),
            (Some(block), _) => {
                block.push_str(line);
                block.push('\n');
            }
            (None, _) => {}
        }
    }
    blocks
}

/// Commands split into words as a shell does it: single quotes, `\` before a line's end, blanks.
fn commands(block: &str) -> Vec<Words> {
    let joined = block.replace("\\\n", " ");
    joined.lines().map(words).filter(|words| !words.is_empty()).collect()
}

fn words(line: &str) -> Words {
    let mut words = Vec::new();
    for (at, part) in line.split('\'').enumerate() {
        // Every second part stands between quotes.
        if at % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words
}
