//! Subscribe, Unsubscribe, ListSubscriptions.

use crate::domain::ids::Topic;
use crate::domain::time::UnixMs;
use crate::storage::{NewSubscription, Subscription};

use super::page_token::PageScope;
use super::{Call, Result, Service, fields};

pub const DEFAULT_PAGE: usize = 100;
pub const MAX_PAGE: usize = 1_000;

pub struct SetSubscription {
    pub user_id: String,
    pub topic: String,
    /// Subscribe or unsubscribe.
    pub active: bool,
    pub observed_at: Option<UnixMs>,
}

pub struct ListSubscriptions {
    pub user_id: String,
    pub page_size: i32,
    pub page_token: String,
}

impl Service {
    /// Whether anything changed.
    pub async fn set_subscription(&self, call: Call<'_>, input: SetSubscription) -> Result<bool> {
        let now = self.runtime.now();
        let NewSubscription { app, user, topic, active, observed_at } = subscription(call, &input, now)?;
        self.store
            .set_subscription(app, user, topic, active, observed_at, now)
            .await
            .map_err(|error| self.refused(error))
    }

    /// A page of a user's topics and the token of the next.
    pub async fn list_subscriptions(
        &self,
        mut call: Call<'_>,
        input: ListSubscriptions,
    ) -> Result<(Vec<Subscription>, String)> {
        let violations = &mut call.violations;
        let user = fields::user_id(violations, &input.user_id);
        let limit = fields::page_size(violations, input.page_size, DEFAULT_PAGE, MAX_PAGE);
        let scope = call.app.as_ref().map(|app| {
            PageScope::new(self.store.identity(), "ListSubscriptions", app.key).with(input.user_id.as_bytes())
        });
        let after = scope.as_ref().and_then(|scope| scope.read(violations, &input.page_token)).map(|[topic]| topic);
        let app = call.checked()?;
        let (user, scope) = (user.expect("a missing user is a violation"), scope.expect("there is an app"));
        let page =
            self.store.list_subscriptions(app.key, &user, after, limit).await.map_err(|error| self.refused(error))?;
        Ok((page.items, page.next.map_or_else(String::new, |next| scope.issue([next]))))
    }
}

/// Everything that can be said of a subscription without the store.
pub(super) fn subscription(mut call: Call<'_>, input: &SetSubscription, now: UnixMs) -> Result<NewSubscription> {
    let violations = &mut call.violations;
    let user = fields::user_id(violations, &input.user_id);
    let topic = violations.take(Topic::parse("topic", &input.topic));
    let observed_at = fields::observed_at(violations, input.observed_at, now);
    let app = call.checked()?;
    Ok(NewSubscription {
        app: app.key,
        user: user.expect("a missing user is a violation"),
        topic: topic.expect("a missing topic is a violation"),
        active: input.active,
        observed_at,
    })
}
