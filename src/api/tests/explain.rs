use super::harness::*;
use crate::api::proto::decision::Verdict;
use crate::api::proto::*;

async fn explain(client: &mut Client, id: &str, user: &str) -> ExplainDeliveryResponse {
    let request = ExplainDeliveryRequest {
        app_id: "pets".into(),
        notification_id: id.into(),
        user_id: user.into(),
        ..Default::default()
    };
    client.explain_delivery(request).await.expect("explained").into_inner()
}

fn blocked(explained: &ExplainDeliveryResponse) -> Vec<(&str, &str)> {
    let lines = explained.decisions.iter().filter(|line| line.verdict() == Verdict::Blocked);
    lines.map(|line| (line.step.as_str(), line.reason.as_str())).collect()
}

#[tokio::test]
async fn every_reason_is_told_in_words() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let people = ["asked-yes", "never-asked", "said-no", "no-type", "no-device-type", "actor"];
    let mut devices = Vec::new();
    for user in people {
        let registered = client.register_device(phone(user, &format!("t-{user}"))).await.expect("registered");
        devices.push(registered.into_inner().device.expect("a device").device_id);
        if user != "never-asked" {
            client.set_opt_in(choice(user, true)).await.expect("yes");
        }
    }
    let no = SetOptInRequest { source: "settings-screen".into(), ..choice("said-no", false) };
    client.set_opt_in(no).await.expect("no");
    let no_type = SetOptInRequest { event_type: Some("comment.created".into()), ..choice("no-type", false) };
    client.set_opt_in(no_type).await.expect("no");
    let on_device = SetOptInRequest {
        event_type: Some("comment.created".into()),
        device_id: devices[4].clone(),
        ..choice("no-device-type", false)
    };
    client.set_opt_in(on_device).await.expect("no");
    client.set_opt_in(choice("no-phone", true)).await.expect("yes");

    let mut all: Vec<&str> = people.to_vec();
    all.push("no-phone");
    let event = NotifyEventRequest { actor_id: "actor".into(), ..comment(&all) };
    let id = client.notify_event(event).await.expect("accepted").into_inner().notification_id;

    let waits = explain(&mut client, &id, "asked-yes").await;
    assert!(waits.summary.starts_with("Waiting: queued for asked-yes's device dev_"), "{}", waits.summary);
    assert!(blocked(&waits).is_empty());
    assert_eq!(waits.decisions.last().expect("lines").verdict(), Verdict::Pending);
    assert_eq!(waits.deliveries[0].device_id, devices[0]);

    let expected = [
        ("never-asked", "MASTER_SWITCH", "NEVER_OPTED_IN", "Not sent: never-asked had never opted in."),
        ("said-no", "MASTER_SWITCH", "OPTED_OUT", "Not sent: said-no had opted out of everything on 2"),
        ("no-type", "EVENT_TYPE", "TYPE_OPTED_OUT", "Not sent: no-type had opted out of comment.created on 2"),
        (
            "no-device-type",
            "DEVICE_CHOICE",
            "DEVICE_TYPE_OPTED_OUT",
            "Not sent: no-device-type had opted out of comment.created on this device on 2",
        ),
        ("actor", "ACTOR", "ACTOR", "Not sent: actor caused it."),
        ("no-phone", "DEVICE", "NO_DEVICE", "Not sent: no-phone had no active device."),
    ];
    for (user, step, reason, summary) in expected {
        let explained = explain(&mut client, &id, user).await;
        assert_eq!(blocked(&explained), [(step, reason), ("RESULT", reason)], "{user}");
        assert!(explained.summary.starts_with(summary), "{}", explained.summary);
        assert_eq!(explained.deliveries.len(), 1);
        assert_eq!(explained.deliveries[0].state(), delivery::State::Suppressed);
    }
    let said_no = explain(&mut client, &id, "said-no").await;
    assert!(said_no.summary.ends_with("via settings-screen."), "{}", said_no.summary);

    client.set_opt_in(choice("bystander", true)).await.expect("yes");
    let outside = explain(&mut client, &id, "bystander").await;
    assert_eq!(outside.summary, "Not sent: bystander is not among the people of this notification.");
    let unknown = explain(&mut client, &id, "nobody").await;
    assert_eq!(unknown.summary, "Not sent: nobody called nobody was ever seen in this app.");
}

#[tokio::test]
async fn an_audience_still_being_worked_out_is_pending() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    enrol(&mut client, "choco").await;
    let event = NotifyEventRequest { user_ids: Vec::new(), everyone: true, ..comment(&[]) };
    let id = client.notify_event(event).await.expect("accepted").into_inner().notification_id;
    let explained = explain(&mut client, &id, "choco").await;
    assert_eq!(explained.decisions[0].verdict(), Verdict::Pending);
    assert_eq!(explained.decisions[0].reason, "EXPANDING");
    assert!(explained.summary.starts_with("Not decided yet"), "{}", explained.summary);
}
