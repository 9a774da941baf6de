//! One suite for every store: what the two ports promise, in their own terms.
//!
//! A store's tests call [`conformance!`] with an expression that opens a fresh one as a [`Fixture`].

pub mod accepting;
pub mod catalogue;
pub mod choices;
pub mod devices;
pub mod explaining;
pub mod fanouts;
pub mod imports;
pub mod people;
pub mod providers;
pub mod queue;
pub mod restoring;
pub mod watching;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::{BootId, ClaimRequest, Claimed, DeliveryFilter, JobUpdate, NewOptIn, NotificationView, Store, StoreError};
use crate::domain::allow::AllowList;
use crate::domain::content::Content;
use crate::domain::deny::DenyFeed;
use crate::domain::device::{Device, DeviceDetails, Registered, Registration};
use crate::domain::ids::{AppId, AppKey, DeviceId, EventType, IdempotencyKey, NotificationId, RouteId, Topic, UserId};
use crate::domain::notification::{Accepted, Audience, Body, HandOff, HandedOver, NewEvent, NoHandOff, Permit};
use crate::domain::outcome::{Entry, ResultCode};
use crate::domain::platform::{DeviceKind, DeviceToken, Environment, Lane, Platform, RouteSpec};
use crate::domain::sending::Priority;
use crate::domain::targets::Target;
use crate::domain::time::UnixMs;

/// A fresh store and what belongs to it.
pub struct Fixture {
    pub store: Arc<dyn Store>,
    pub deny: Arc<DenyFeed>,
    /// What owns the leases that acceptance takes.
    pub boot: BootId,
    /// Lives as long as the store does: a directory, a server.
    pub kept: Box<dyn std::any::Any>,
}

/// Every case of the suite as a test of its own. `$open` is evaluated in an async block.
#[macro_export]
macro_rules! store_conformance {
    ($open:expr) => {
        $crate::store_conformance!(@ $open;
            devices: rows_of_apps_and_routes_are_made_once, a_repeated_registration_writes_nothing_for_an_hour,
            the_same_token_under_another_user_moves, a_token_that_went_through_many_hands_is_one_persons,
            a_dead_token_of_somebody_else_recalls_what_waits_for_it, a_dead_device_is_retired_for_whoever_asks,
            a_dead_device_comes_back_and_passes_on, dead_devices_take_no_room,
            a_token_rotates_on_its_row, an_install_that_changes_hands_moves,
            a_device_of_another_user_is_not_found, a_retired_token_comes_back_to_life, a_late_registration_loses,
            a_late_unregistration_loses, the_device_seen_longest_ago_makes_room, devices_are_listed_in_pages,
            unregistering_publishes_a_no_and_obeys_its_precondition;
            choices: the_latest_choice_stands_and_a_tie_is_no, every_choice_is_kept,
            a_choice_on_a_device_reaches_the_gate, a_no_is_published_before_it_is_answered,
            a_late_subscription_does_not_undo_a_later_one,
            a_no_said_now_holds_whatever_clock_the_yes_was_observed_by, subscriptions_are_listed_in_pages;
            accepting: a_repeat_gets_the_first_answer, a_repeat_after_the_ttl_gets_it_too, a_refused_event_leaves_nothing,
            a_person_named_in_many_ways_is_one_person, five_hundred_are_small_and_one_more_is_large,
            topics_of_every_size_at_once, max_audience_holds_at_its_boundary, a_permit_leases_the_job_and_hands_it_over,
            what_is_not_due_is_never_handed_over, whoever_is_left_out_is_recorded, an_unknown_route_is_suppressed, an_allow_list_bars_everybody_else;
            catalogue: the_newest_version_stands_and_old_ones_stay, a_definition_that_says_the_same_is_no_version,
            a_deleted_type_counts_as_never_declared, declared_types_are_listed_by_name, types_have_a_limit,
            a_notification_keeps_its_version;
            queue: claims_go_by_route_lane_and_due_time, a_claim_stays_within_its_room, a_lost_fence_writes_nothing,
            a_finished_job_leaves_only_history, a_checkpoint_survives_a_release, a_checkpoint_asked_again_is_written_once,
            claims_count_until_there_is_progress, only_being_alone_in_flight_counts_against_a_suspect,
            other_owners_jobs_are_released, a_dead_token_is_retired_unless_confirmed_since,
            a_cancel_reaches_the_gate, nothing_is_lost_while_the_clock_jumps, the_backlog_counts_what_waits, retention_keeps_open_work_and_consent,
            gate_facts_keep_the_order_asked, a_job_is_put_off_and_pulled_forward, names_and_labels_keep_the_order_asked,
            open_targets_are_counted_by_app, pauses_are_kept_until_they_are_resumed;
            restoring: a_restore_holds_everything_until_it_is_confirmed, a_restore_cancels_what_was_open_before_it;
            fanouts: merged_topics_meet_each_person_once, everyone_is_paged, a_page_is_written_under_its_fence,
            apps_take_turns, a_fanout_waits_for_its_time, the_actor_of_a_fanout_has_a_row;
            imports: an_import_keeps_its_times_and_its_position, an_import_repeated_changes_nothing,
            what_was_said_later_stands_against_an_import, a_refused_item_leaves_nothing_and_the_rest_goes_on,
            assessing_says_the_same_and_writes_nothing, too_many_imported_devices_make_room_by_age,
            an_audience_can_be_met_without_an_event;
            providers: permits_follow_the_arithmetic_of_the_rate, permits_asked_for_at_once_are_granted_once,
            a_trouble_is_known_until_it_ends_or_nobody_meets_it, a_confirmation_outlives_the_trouble,
            a_device_is_left_alone_and_doubted, a_device_moves_to_the_route_that_reached_it,
            the_dead_are_sent_again_once, a_redrive_takes_only_what_it_was_asked_for,
            a_redrive_leaves_what_was_cancelled_and_what_retired_is_suppressed;
            explaining: the_last_block_that_names_a_target_wins, deliveries_are_listed_in_pages,
            deliveries_are_filtered, a_person_is_explained, an_expansion_that_has_not_come_is_pending,
            another_apps_ids_are_not_found, notifications_are_listed_newest_first, counts_follow_a_delivery;
            watching: results_and_retirements_are_told_in_their_order, a_token_that_moves_to_another_user_is_told, a_watcher_is_told_what_it_asked_for,
            an_apps_results_are_its_own, a_large_result_is_told_in_pages, old_and_foreign_positions_are_refused,
            watchers_that_reconnect_miss_nothing;
        );
    };
    (@ $open:expr; $($module:ident: $($case:ident),+;)+) => {
        $(mod $module {
            use super::*;
            $(#[tokio::test]
            async fn $case() {
                let fixture = $open;
                $crate::storage::conformance::$module::$case(&fixture).await;
            })+
        })+
    };
}

/// The time at which cases begin.
pub const START: UnixMs = UnixMs(1_790_000_000_000);
const HOUR: i64 = 3_600_000;

/// An app with a route, in a store.
pub struct World<'a> {
    pub fixture: &'a Fixture,
    pub app: AppKey,
    pub apns: RouteId,
    pub fcm: RouteId,
    pub now: AtomicI64,
}

pub fn user(name: &str) -> UserId {
    UserId::parse("user_id", name).unwrap()
}

pub fn topic(name: &str) -> Topic {
    Topic::parse("topic", name).unwrap()
}

pub fn comment() -> EventType {
    EventType::trusted("comment.created")
}

impl<'a> World<'a> {
    pub async fn new(fixture: &'a Fixture) -> Self {
        Self::of_app(fixture, "pets").await
    }

    pub async fn of_app(fixture: &'a Fixture, name: &str) -> Self {
        let app = fixture.store.ensure_app(&AppId::trusted(name), START).await.unwrap();
        let spec = |platform, environment, bundle: &str| RouteSpec {
            app,
            platform,
            credential: Arc::from("default"),
            environment,
            bundle: Arc::from(bundle),
        };
        let specs = [
            spec(Platform::Apns, Environment::Production, "com.example.pets"),
            spec(Platform::Fcm, Environment::None, ""),
        ];
        let routes = fixture.store.ensure_routes(&specs, START).await.unwrap();
        Self { fixture, app, apns: routes[0].id, fcm: routes[1].id, now: AtomicI64::new(START.0) }
    }

    pub fn store(&self) -> &dyn Store {
        &*self.fixture.store
    }

    pub fn now(&self) -> UnixMs {
        UnixMs(self.now.load(Ordering::Relaxed))
    }

    pub fn pass(&self, millis: i64) {
        self.now.fetch_add(millis, Ordering::Relaxed);
    }

    pub fn registration(&self, name: &str, token: &str) -> Registration {
        Registration {
            app: self.app,
            user: user(name),
            platform: Platform::Apns,
            kind: DeviceKind::Alert,
            token: DeviceToken::trusted(token),
            route: self.apns,
            device: None,
            installation_id: None,
            details: DeviceDetails::default(),
            observed_at: self.now(),
        }
    }

    pub async fn try_register(&self, registration: Registration) -> Result<Registered, StoreError> {
        self.store().register_device(registration, self.now()).await
    }

    pub async fn register(&self, name: &str, token: &str) -> Device {
        self.try_register(self.registration(name, token)).await.unwrap().device
    }

    pub async fn register_fcm(&self, name: &str, token: &str) -> Device {
        let registration = Registration { platform: Platform::Fcm, route: self.fcm, ..self.registration(name, token) };
        self.try_register(registration).await.unwrap().device
    }

    pub fn choice(&self, name: &str, opted_in: bool) -> NewOptIn {
        NewOptIn {
            app: self.app,
            user: user(name),
            event_type: None,
            device: None,
            opted_in,
            observed_at: self.now(),
            caller: Some("backend".to_owned()),
            source: None,
            policy_version: None,
            evidence: None,
        }
    }

    pub async fn opt_in(&self, name: &str) {
        self.store().set_opt_in(self.choice(name, true), self.now()).await.unwrap();
    }

    /// A person with one device, opted in.
    pub async fn reachable(&self, name: &str) -> Device {
        self.opt_in(name).await;
        self.register(name, &format!("{:x}", md(name))).await
    }

    pub async fn subscribe(&self, name: &str, to: &str) {
        let now = self.now();
        self.store().set_subscription(self.app, user(name), topic(to), true, now, now).await.unwrap();
    }

    pub fn event(&self, audience: Audience) -> NewEvent {
        let content = Content { title: Some("초코님이 댓글을 남겼어요".to_owned()), ..Content::default() };
        NewEvent {
            app: self.app,
            event_type: comment(),
            type_version: None,
            default_opt_in: true,
            lane: None,
            on_maybe: crate::domain::event_type::OnMaybe::Retry,
            idempotency: None,
            audience,
            actor: None,
            body: Arc::new(Body { content, ..Body::default() }),
            priority: Priority::High,
            collapse_key: None,
            event_at: self.now(),
            not_before: None,
            expires_at: UnixMs(self.now().0 + 24 * HOUR),
            max_audience: None,
            may_broadcast: false,
        }
    }

    pub fn to_users(&self, names: &[&str]) -> NewEvent {
        self.event(Audience { user_ids: names.iter().map(|name| user(name)).collect(), ..Audience::default() })
    }

    pub fn to_topics(&self, names: &[&str]) -> NewEvent {
        let topics = names.iter().map(|name| topic(name)).collect();
        NewEvent { may_broadcast: true, ..self.event(Audience { topics, ..Audience::default() }) }
    }

    pub async fn try_accept(&self, event: NewEvent) -> Result<Accepted, StoreError> {
        self.store().accept(event, Arc::new(NoHandOff), self.now()).await
    }

    pub async fn accept(&self, event: NewEvent) -> NotificationId {
        self.try_accept(event).await.unwrap().notification
    }

    pub async fn claim(&self, route: RouteId, lane: Lane) -> Vec<Claimed> {
        let request = ClaimRequest { route, lane, max_targets: 10_000, max_jobs: 1_000 };
        self.store().claim(request, self.fixture.boot, self.now()).await.unwrap()
    }

    /// The only job due on the APNs route.
    pub async fn claim_one(&self) -> Claimed {
        let mut claimed = self.claim(self.apns, Lane::Interactive).await;
        assert_eq!(claimed.len(), 1);
        claimed.remove(0)
    }

    pub fn update(&self, claimed: &Claimed, entries: Vec<Entry>) -> JobUpdate {
        JobUpdate {
            job: claimed.job.id,
            fence: claimed.job.fence,
            app: self.app,
            notification: claimed.notification.id,
            route: claimed.job.route,
            progress: None,
            entries,
            details: Vec::new(),
            followers: Vec::new(),
            retirements: Vec::new(),
            device_changes: Vec::new(),
        }
    }

    pub async fn record(&self, update: JobUpdate) -> bool {
        self.store().record(vec![update], self.now()).await.unwrap()[0]
    }

    pub async fn view(&self, id: NotificationId) -> NotificationView {
        self.store().get_notification(self.app, id).await.unwrap()
    }

    /// Every delivery's reason by device (0: the person as a whole), over pages of seven.
    pub async fn reasons(&self, id: NotificationId, filter: DeliveryFilter) -> Vec<(DeviceId, &'static str)> {
        let (mut reasons, mut after) = (Vec::new(), None);
        loop {
            let page = self.store().list_deliveries(self.app, id, filter.clone(), after, 7).await.unwrap();
            assert!(page.items.len() <= 7);
            reasons.extend(page.items.iter().map(|delivery| (delivery.entry.device, delivery.reason)));
            match page.next {
                Some(next) => {
                    assert!(after.is_none_or(|after| after < next), "pages go on");
                    after = Some(next);
                }
                None => return reasons,
            }
        }
    }
}

/// A stable number for a name: a token made of it.
fn md(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

pub fn entries(targets: &[Target], code: ResultCode) -> Vec<Entry> {
    targets.iter().map(|target| Entry { user: target.user, device: target.device, code }).collect()
}

pub fn key(name: &str, hash: u8) -> (IdempotencyKey, [u8; 32]) {
    (IdempotencyKey::trusted(name), [hash; 32])
}

/// An engine with room for a number of targets, which keeps what it is given.
#[derive(Default)]
pub struct Engine {
    pub room: AtomicUsize,
    pub handed_over: Mutex<Vec<HandedOver>>,
    pub woken: Mutex<BTreeMap<(RouteId, Lane), usize>>,
    pub fanouts_woken: AtomicUsize,
    pub unknown_routes: Vec<RouteId>,
    pub allow_list: Option<Arc<AllowList>>,
}

impl Engine {
    pub fn with_room(room: usize) -> Arc<Self> {
        Arc::new(Self { room: AtomicUsize::new(room), ..Self::default() })
    }
}

impl HandOff for Engine {
    fn try_permit(&self, _: RouteId, _: Lane, targets: usize) -> Option<Permit> {
        let taken =
            self.room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |room| room.checked_sub(targets)).is_ok();
        taken.then(|| Permit::new(Box::new(())))
    }

    fn knows_route(&self, route: RouteId) -> bool {
        !self.unknown_routes.contains(&route)
    }

    fn allow_list(&self, _: AppKey) -> Option<Arc<AllowList>> {
        self.allow_list.clone()
    }

    fn deliver(&self, job: HandedOver) {
        self.handed_over.lock().unwrap().push(job);
    }

    fn wake_jobs(&self, route: RouteId, lane: Lane) {
        *self.woken.lock().unwrap().entry((route, lane)).or_default() += 1;
    }

    fn wake_fanout(&self) {
        self.fanouts_woken.fetch_add(1, Ordering::SeqCst);
    }
}
