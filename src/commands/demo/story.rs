//! The story, act by act. Every line of it is checked against what the server says and what the phones received.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;

use super::backend::{Backend, Words, all_ended};
use super::timeline::{Mark, Timeline};
use crate::api::proto::{Delivery, NotifyEventRequest, decision, delivery, device};
use crate::runtime::Runtime;
use crate::sandbox::{Action, Fault, Received, Sandbox, Target, TokenState};

const CHOCO_IPHONE: &str = "c0c0a1c0c0a1c0c0a1c0c0a1c0c0a1c0c0a1c0c0a1c0c0a1c0c0a1c0c0a10001";
const BORI_ANDROID: &str = "bori-android:APA91bDemoTokenOfBorisGalaxy";
const NABI_IPHONE: &str = "0ab10ab10ab10ab10ab10ab10ab10ab10ab10ab10ab10ab10ab10ab10ab10002";
const NABI_OLD_IPAD: &str = "0ab1dead0ab1dead0ab1dead0ab1dead0ab1dead0ab1dead0ab1dead0ab10003";
const EMMA_ANDROID: &str = "emma-android:APA91bDemoTokenOfEmmasPixel";
const HANA_IPHONE: &str = "4a0a4a0a4a0a4a0a4a0a4a0a4a0a4a0a4a0a4a0a4a0a4a0a4a0a4a0a4a0a0004";
const DUBU_ANDROID: &str = "dubu-android:APA91bDemoTokenOfDubusPhone";
const SHARED_TABLET: &str = "7ab1e77ab1e77ab1e77ab1e77ab1e77ab1e77ab1e77ab1e77ab1e77ab1e70005";

const COMMENT: Words = Words {
    english: ("New comment", "Bori: she is so cute!"),
    korean: ("새 댓글", "보리님이 댓글을 남겼어요: “너무 귀여워요!”"),
    japanese: ("新しいコメント", "ボリさん:「とてもかわいい!」"),
};
const REACTION: Words = Words {
    english: ("New reaction", "Bori likes a post you follow ❤️"),
    korean: ("새 반응", "보리님이 회원님이 보는 글을 좋아해요 ❤️"),
    japanese: ("新しいリアクション", "ボリさんがいいねしました ❤️"),
};
const NEW_POST: Words = Words {
    english: ("Choco posted", "Choco’s first snow ❄️"),
    korean: ("초코님의 새 글", "초코가 첫눈을 만났어요 ❄️"),
    japanese: ("ショコの新しい投稿", "ショコ、はじめての雪 ❄️"),
};
const SECRET: Words = Words {
    english: ("A message", "Only for Nabi"),
    korean: ("새 메시지", "나비님에게만 보내는 메시지예요"),
    japanese: ("メッセージ", "ナビさんだけに"),
};
const LATER: Words = Words {
    english: ("Walk reminder", "Time for a walk!"),
    korean: ("산책 알림", "산책할 시간이에요!"),
    japanese: ("散歩の時間", "散歩に行きましょう!"),
};
const EVERYONE: Words = Words {
    english: ("iFriendsPet", "We will be back at 3 a.m."),
    korean: ("아이프렌즈펫", "새벽 3시에 점검이 있어요"),
    japanese: ("iFriendsPet", "午前3時にメンテナンスがあります"),
};

struct Told<'a> {
    backend: &'a Backend,
    sandbox: &'a Sandbox,
    line: &'a mut Timeline,
    runtime: &'a Runtime,
    /// Device ids to the words a reader knows them by.
    names: Vec<(String, &'static str, device::Platform)>,
}

/// The people as the timeline calls them.
const PEOPLE: [(&str, &str); 6] =
    [("choco", "초코"), ("bori", "보리"), ("nabi", "나비"), ("emma", "Emma"), ("hana", "花"), ("dubu", "두부")];

pub async fn play(backend: &Backend, sandbox: &Sandbox, line: &mut Timeline, runtime: &Runtime) -> anyhow::Result<()> {
    let mut told = Told { backend, sandbox, line, runtime, names: Vec::new() };
    told.people().await?;
    told.comment().await?;
    told.reaction().await?;
    let new_post = told.new_post().await?;
    told.phone_changes_hands().await?;
    told.no_while_queued().await?;
    told.broadcast().await?;
    told.retry_succeeds(&new_post).await
}

impl Told<'_> {
    async fn people(&mut self) -> anyhow::Result<()> {
        use device::Platform::{Apns, Fcm};
        self.line.act("Phones register, people choose");
        let phones = [
            ("choco", Apns, CHOCO_IPHONE, "ko-KR", "초코's iPhone"),
            ("bori", Fcm, BORI_ANDROID, "ko-KR", "보리's Galaxy"),
            ("nabi", Apns, NABI_IPHONE, "ko-KR", "나비's iPhone"),
            ("nabi", Apns, NABI_OLD_IPAD, "ko-KR", "나비's old iPad"),
            ("emma", Fcm, EMMA_ANDROID, "en-US", "Emma's Pixel"),
            ("hana", Apns, HANA_IPHONE, "ja-JP", "花's iPhone"),
            ("dubu", Fcm, DUBU_ANDROID, "ko-KR", "두부's phone"),
        ];
        for (user, platform, token, locale, name) in phones {
            let answer = self.backend.register(user, platform, token, locale).await?;
            self.line.expect(answer.created == Some(true), &format!("{name} is new"));
            let device = answer.device.context("RegisterDevice answers with the device")?;
            self.names.push((device.device_id, name, platform));
        }
        for user in ["choco", "bori", "nabi", "emma", "hana"] {
            self.backend.opt_in(user, true).await?;
        }
        self.line.note("초코, 보리, 나비, Emma and 花 tick “notify me”; 두부 was never asked");
        for user in ["choco", "bori", "emma"] {
            self.backend.subscribe(user, "post:42").await?;
        }
        for user in ["bori", "nabi", "emma", "hana", "dubu"] {
            self.backend.subscribe(user, "author:choco").await?;
        }
        self.line.note("five people favourite 초코; three follow the thread of post 42");
        Ok(())
    }

    async fn comment(&mut self) -> anyhow::Result<()> {
        self.line.act("보리 comments on 초코's post");
        let event = NotifyEventRequest {
            event_type: "comment.created".to_owned(),
            idempotency_key: "comment-1001".to_owned(),
            user_ids: vec!["choco".to_owned()],
            actor_id: "bori".to_owned(),
            content: Some(COMMENT.content()),
            ..NotifyEventRequest::default()
        };
        let first = self.backend.notify(event.clone()).await?;
        let deliveries = self.backend.deliveries_when(&first.notification_id, all_ended(1)).await?;
        self.show(&deliveries);
        let body = self.words_of(&deliveries, "초코's iPhone");
        self.line.expect(body.as_deref() == Some(COMMENT.korean.1), "초코 reads the comment in Korean");
        let again = self.backend.notify(event).await?;
        let same = again.duplicate == Some(true) && again.notification_id == first.notification_id;
        self.line.expect(same, "the same idempotency key gives the first answer again");
        self.line.note("the backend repeats its call (same idempotency key): the first answer again, no second push");
        Ok(())
    }

    async fn reaction(&mut self) -> anyhow::Result<()> {
        self.line.act("보리 reacts in the thread of post 42, which 보리 follows too");
        let event = NotifyEventRequest {
            event_type: "reaction.created".to_owned(),
            topics: vec!["post:42".to_owned()],
            actor_id: "bori".to_owned(),
            content: Some(REACTION.content()),
            collapse_key: "post:42:reactions".to_owned(),
            ..NotifyEventRequest::default()
        };
        let answer = self.backend.notify(event).await?;
        let deliveries = self.backend.deliveries_when(&answer.notification_id, all_ended(3)).await?;
        self.show(&deliveries);
        self.line.expect(reason_of(&deliveries, "bori") == "ACTOR", "보리 does not hear of the own act");
        let english = self.words_of(&deliveries, "Emma's Pixel");
        self.line.expect(english.as_deref() == Some(REACTION.english.1), "Emma reads it in English");
        Ok(())
    }

    /// Gives the notification whose delivery to 보리 waits for FCM.
    async fn new_post(&mut self) -> anyhow::Result<String> {
        self.line.act("초코, a favourite of five people, publishes something new");
        // Asked about in both of Apple's environments before it is retired.
        let gone = TokenState::Bad {};
        self.sandbox.set_token_state(NABI_OLD_IPAD, gone)?;
        let mut busy = Fault::status(503, "UNAVAILABLE").on(Target::Fcm).token(BORI_ANDROID);
        if let Action::Status { retry_after, .. } = &mut busy.action {
            *retry_after = Some("10".to_owned());
        }
        self.sandbox.add_fault(busy)?;
        let event = NotifyEventRequest {
            event_type: "post.published".to_owned(),
            topics: vec!["author:choco".to_owned()],
            actor_id: "choco".to_owned(),
            content: Some(NEW_POST.content()),
            ..NotifyEventRequest::default()
        };
        let answer = self.backend.notify(event).await?;
        let id = answer.notification_id;
        let settled = |deliveries: &[Delivery]| {
            deliveries.len() == 6
                && deliveries.iter().all(|one| one.state() != delivery::State::Open || one.reason == "MOVED_TO_RETRY")
        };
        let deliveries = self.backend.deliveries_when(&id, settled).await?;
        self.show(&deliveries);
        self.line.expect(reason_of(&deliveries, "bori") == "MOVED_TO_RETRY", "보리's push waits for its retry");
        self.line.expect(reason_of(&deliveries, "dubu") == "NEVER_OPTED_IN", "두부 was never asked and gets nothing");
        let retired = deliveries.iter().any(|one| one.user_id == "nabi" && one.reason == "TOKEN_GONE");
        self.line.expect(retired, "나비's old iPad is retired");
        let japanese = self.words_of(&deliveries, "花's iPhone");
        self.line.expect(japanese.as_deref() == Some(NEW_POST.japanese.1), "花 reads it in Japanese");
        let why = self.backend.explain(&id, "dubu").await?;
        self.line.note(&format!("why not 두부? ExplainDelivery: {}", why.summary));
        let blocked = why.decisions.iter().any(|one| one.verdict() == decision::Verdict::Blocked);
        self.line.expect(blocked, "ExplainDelivery names the rule that kept it back");
        Ok(id)
    }

    async fn phone_changes_hands(&mut self) -> anyhow::Result<()> {
        self.line.act("나비 gives a tablet to Emma, who signs in on it");
        self.backend.register("nabi", device::Platform::Apns, SHARED_TABLET, "ko-KR").await?;
        let mine = self.backend.register("emma", device::Platform::Apns, SHARED_TABLET, "en-US").await?;
        self.line.expect(mine.created == Some(true), "Emma's tablet is a new row");
        if let Some(device) = mine.device {
            self.names.push((device.device_id, "the tablet", device::Platform::Apns));
        }
        let event = NotifyEventRequest {
            event_type: "message.received".to_owned(),
            user_ids: vec!["nabi".to_owned()],
            content: Some(SECRET.content()),
            ..NotifyEventRequest::default()
        };
        let answer = self.backend.notify(event).await?;
        let deliveries = self.backend.deliveries_when(&answer.notification_id, all_ended(1)).await?;
        self.show(&deliveries);
        let leaked =
            self.sandbox.received().iter().any(|push| {
                push.token == SHARED_TABLET && String::from_utf8_lossy(&push.body).contains(SECRET.korean.1)
            });
        self.line.expect(!leaked, "나비's message never reaches the tablet that is Emma's now");
        self.line.note("the message for 나비 goes to the iPhone only; the tablet is Emma's now");
        Ok(())
    }

    async fn no_while_queued(&mut self) -> anyhow::Result<()> {
        self.line.act("A reminder for Emma waits in the queue; she opts out before it is due");
        let due = self.runtime.now().plus(Duration::from_secs(2));
        let event = NotifyEventRequest {
            event_type: "walk.reminder".to_owned(),
            user_ids: vec!["emma".to_owned()],
            content: Some(LATER.content()),
            not_before: Some(prost_types::Timestamp {
                seconds: due.secs(),
                nanos: i32::try_from(due.0.rem_euclid(1000)).context("below a thousand")? * 1_000_000,
            }),
            ..NotifyEventRequest::default()
        };
        let answer = self.backend.notify(event).await?;
        self.backend.opt_in("emma", false).await?;
        self.line.note("SetOptIn(emma, false)");
        let deliveries = self.backend.deliveries_when(&answer.notification_id, all_ended(2)).await?;
        self.show(&deliveries);
        let kept_back = deliveries.iter().all(|one| one.reason == "OPTED_OUT");
        self.line.expect(kept_back, "nothing is sent after the no");
        let why = self.backend.explain(&answer.notification_id, "emma").await?;
        self.line.note(&format!("ExplainDelivery: {}", why.summary));
        Ok(())
    }

    async fn broadcast(&mut self) -> anyhow::Result<()> {
        self.line.act("The team tells everyone about tonight's maintenance");
        let event = NotifyEventRequest {
            event_type: "service.notice".to_owned(),
            everyone: true,
            content: Some(EVERYONE.content()),
            ..NotifyEventRequest::default()
        };
        let answer = self.backend.notify(event).await?;
        let deliveries = self.backend.deliveries_when(&answer.notification_id, all_ended(6)).await?;
        self.show(&deliveries);
        let sent = deliveries.iter().filter(|one| one.state() == delivery::State::Sent).count();
        self.line.expect(sent == 4, "four people's phones show it");
        let asked = ["emma", "dubu"].iter().all(|user| {
            let reason = reason_of(&deliveries, user);
            reason == "OPTED_OUT" || reason == "NEVER_OPTED_IN"
        });
        self.line.expect(asked, "everyone means everyone who wants it");
        Ok(())
    }

    async fn retry_succeeds(&mut self, notification: &str) -> anyhow::Result<()> {
        self.line.act("FCM asked us to come back in 10 seconds for 보리's push");
        let deliveries = self.backend.deliveries_when(notification, all_ended(6)).await?;
        let boris: Vec<Delivery> = deliveries.into_iter().filter(|one| one.user_id == "bori").collect();
        self.show(&boris);
        self.line.expect(reason_of(&boris, "bori") == "SENT", "the retry succeeds");
        let identities: Vec<_> = self
            .sandbox
            .received()
            .iter()
            .filter(|push| push.nudged_id == id_of(&boris))
            .map(|push| push.accepted)
            .collect();
        self.line.expect(identities == [false, true], "both attempts carried the same identity");
        let why = self.backend.explain(notification, "bori").await?;
        for one in why.decisions.iter().filter(|one| one.step == "ATTEMPT" || one.step == "RESULT") {
            self.line.note(&format!("ExplainDelivery: {} {}", one.step, one.detail));
        }
        Ok(())
    }

    /// One line a delivery: who, through which platform, what they read, or why nothing.
    fn show(&self, deliveries: &[Delivery]) {
        for one in deliveries {
            let who = self.who(one);
            let push = self.push_of(one);
            match one.state() {
                delivery::State::Sent => {
                    let (title, body) = push.as_deref().map(words).unwrap_or_default();
                    self.line.delivery(Mark::Shown, &who, &format!("{title} — {body}"));
                }
                delivery::State::Open => {
                    let why = one.last_attempt.as_ref().map_or_else(String::new, |attempt| {
                        format!(" ({} {})", attempt.status, attempt.platform_reason)
                    });
                    self.line.delivery(Mark::Again, &who, &format!("waits for its next attempt{why}"));
                }
                delivery::State::Dead => {
                    self.line.delivery(Mark::Gone, &who, &format!("{}: the device is retired", one.reason));
                }
                delivery::State::Suppressed
                | delivery::State::Expired
                | delivery::State::Cancelled
                | delivery::State::Unspecified => {
                    self.line.delivery(Mark::KeptBack, &who, &format!("not sent: {}", in_words(&one.reason)));
                }
            }
        }
    }

    fn who(&self, delivery: &Delivery) -> String {
        match self.names.iter().find(|(id, ..)| *id == delivery.device_id) {
            Some((_, name, device::Platform::Fcm)) => format!("{name} (FCM)"),
            Some((_, name, _)) => format!("{name} (APNs)"),
            None => {
                let person = PEOPLE.iter().find(|(user, _)| *user == delivery.user_id);
                person.map_or_else(|| delivery.user_id.clone(), |(_, name)| (*name).to_owned())
            }
        }
    }

    fn name_of(&self, device: &str) -> Option<&'static str> {
        self.names.iter().find(|(id, ..)| id == device).map(|(_, name, _)| *name)
    }

    fn push_of(&self, delivery: &Delivery) -> Option<Arc<Received>> {
        let received = self.sandbox.received();
        received.into_iter().find(|push| push.accepted && push.nudged_id.as_ref() == Some(&delivery.nudged_id))
    }

    /// The body that the named phone showed.
    fn words_of(&self, deliveries: &[Delivery], phone: &str) -> Option<String> {
        let delivery = deliveries.iter().find(|one| self.name_of(&one.device_id) == Some(phone))?;
        self.push_of(delivery).map(|push| words(&push).1)
    }
}

/// A gate's stable word with what it means.
fn in_words(reason: &str) -> String {
    match reason {
        "ACTOR" => "ACTOR, it is their own act".to_owned(),
        "NEVER_OPTED_IN" => "NEVER_OPTED_IN, they were never asked".to_owned(),
        "OPTED_OUT" => "OPTED_OUT, they said no".to_owned(),
        other => other.to_owned(),
    }
}

fn reason_of<'a>(deliveries: &'a [Delivery], user: &str) -> &'a str {
    deliveries.iter().find(|one| one.user_id == user).map_or("", |one| &one.reason)
}

fn id_of(deliveries: &[Delivery]) -> Option<String> {
    deliveries.first().map(|one| one.nudged_id.clone())
}

/// Title and body as the phone would show them.
fn words(push: &Received) -> (String, String) {
    let json = push.json();
    let shown = match push.platform {
        crate::sandbox::Platform::Apns => &json["aps"]["alert"],
        crate::sandbox::Platform::Fcm => &json["message"]["notification"],
    };
    let text = |key: &str| shown[key].as_str().unwrap_or_default().to_owned();
    (text("title"), text("body"))
}
