//! The subscribers of small topics, for events that are accepted in a group.
//!
//! A comment goes to the few who follow one post: such an event may share its group's statements as one for named people
//! does. How many follow a topic only the database knows, so all events to topics come to the group, and one that is for
//! more people than [`MOST`] leaves it, to be accepted alone, where a fixed cost of some round trips is small for each.

use std::collections::HashMap;

use diesel::sql_types::{Array, BigInt, Binary, Integer, Nullable, Text};
use diesel_async::AsyncPgConnection;

use super::batch::rows_of;
use super::fail::Attempt;
use super::query::RunQuery;
use super::reach::Packed;
use super::statement::constant;
use crate::domain::ids::{AppKey, Topic, UserKey};

/// Subscribers of one event in a group, over all its topics. What is read of them for a group is bounded by this, by
/// [`MOST_TOPICS`] and by the group.
pub(super) const MOST: usize = 64;
/// Topics of one event in a group.
pub(super) const MOST_TOPICS: usize = 4;

/// Topics of events, by the events' places in a group.
#[derive(Default)]
pub(super) struct Asked<'a> {
    places: Vec<i32>,
    apps: Vec<i64>,
    names: Vec<&'a str>,
}

impl<'a> Asked<'a> {
    pub fn push(&mut self, place: usize, app: AppKey, topics: &'a [Topic]) {
        for topic in topics {
            self.places.push(i32::try_from(place).unwrap_or(i32::MAX));
            self.apps.push(app.0);
            self.names.push(topic.as_str());
        }
    }
}

/// Whom each place's topics reach, with what is packed of them: ascending, distinct, and cut somewhere beyond [`MOST`].
pub(super) async fn of_events(conn: &mut AsyncPgConnection, asked: Asked<'_>) -> Attempt<HashMap<usize, Vec<Packed>>> {
    let mut found: HashMap<usize, Vec<Packed>> = HashMap::new();
    if asked.places.is_empty() {
        return Ok(found);
    }
    // topic_by_name, subscription's primary key (not the index by user, which the sum keeps from being used) and app_user's.
    let rows: Vec<(i32, i64, Option<Vec<u8>>)> = constant!(
        (Integer, BigInt, Nullable<Binary>);
        concat!(
            "SELECT e.place, u.id, u.reach ",
            rows_of!("$1" "place", "$2" "app", "$3" "name"),
            " AS e CROSS JOIN LATERAL (SELECT id FROM topic WHERE app = e.app AND name = e.name OFFSET 0) AS t \
             CROSS JOIN LATERAL (SELECT user_key FROM subscription WHERE topic = t.id AND active + 0 = 1 LIMIT $4 + 0) AS s \
             CROSS JOIN LATERAL (SELECT id, reach FROM app_user WHERE id = s.user_key OFFSET 0) AS u"
        ),
        Array<Integer> => asked.places, Array<BigInt> => asked.apps, Array<Text> => asked.names,
        BigInt => i64::try_from(MOST).unwrap_or(i64::MAX - 1) + 1,
    )
    .load(conn)
    .await?;
    for (place, user, packed) in rows {
        found.entry(usize::try_from(place).unwrap_or(usize::MAX)).or_default().push((UserKey(user), packed));
    }
    found.values_mut().for_each(merge);
    Ok(found)
}

/// Each person once, ascending.
pub(super) fn merge(people: &mut Vec<Packed>) {
    people.sort_unstable_by_key(|(user, _)| *user);
    people.dedup_by_key(|(user, _)| *user);
}
