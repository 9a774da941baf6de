//! What is packed of people says what their rows say, however it is read.

use diesel::Connection as _;
use diesel::sql_types::BigInt;

use super::*;
use crate::domain::ids::UserKey;
use crate::storage::conformance::{World, comment, people, user};
use crate::storage::sqlite::people::user_key;
use crate::storage::sqlite::reach;

#[tokio::test]
async fn a_page_and_a_look_up_say_what_the_rows_do() {
    const PEOPLE: usize = 60;
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    people::crowd(&world, PEOPLE).await;
    let app = world.app;
    let mut core = store.writer.inline_core();
    let conn = &mut core.conn;
    let mut keys: Vec<UserKey> =
        (0..PEOPLE).map(|number| user_key(conn, app, &user(&people::name(number))).ok().flatten().unwrap()).collect();
    keys.sort_unstable();
    assert_eq!(reach::differing(conn).unwrap(), [0_i64; 0]);
    let (mut ranges, mut crowded) = (0, 0);
    for step in [1, 2, 3, 7, 20] {
        for from in 0..PEOPLE {
            for count in [0, 1, 2, 9, PEOPLE] {
                let users: Vec<UserKey> = keys[from..].iter().step_by(step).take(count).copied().collect();
                let rows = reach::of_rows(conn, &comment(), &users).unwrap();
                let looked_up = reach::of_users(conn, &comment(), &users).unwrap();
                assert_eq!((&looked_up.people, &looked_up.facts), (&rows.people, &rows.facts));
                let page = reach::of_page(conn, &comment(), &users).unwrap();
                assert_eq!((&page.people, &page.facts), (&rows.people, &rows.facts));
                match reach::of_range(conn, &comment(), &users).unwrap() {
                    None => crowded += 1,
                    Some(range) => {
                        ranges += 1;
                        assert_eq!((&range.people, &range.facts), (&rows.people, &rows.facts));
                    }
                }
            }
        }
    }
    // Both ways were gone often.
    assert!(ranges > 200 && crowded > 200, "{ranges} ranges, {crowded} crowded");
}

/// Every way there is to change how somebody can be reached.
#[tokio::test]
async fn whatever_changes_a_person_packs_them_anew() {
    let (store, deny) = in_memory();
    let fixture = fixture(&store, &deny);
    let world = World::new(&fixture).await;
    let mut changes = 0;
    people::every_change(&world, async |what: &str| {
        let mut core = store.writer.inline_core();
        assert_eq!(reach::differing(&mut core.conn).unwrap(), [0_i64; 0], "{what}");
        let packed: i64 = constant!(BigInt; "SELECT total_changes()").get_result(&mut core.conn).unwrap();
        assert!(packed > std::mem::replace(&mut changes, packed), "{what} changes nothing");
    })
    .await;
}

/// A database from before people were packed.
#[tokio::test]
async fn a_start_packs_everybody_once() {
    let OnFile { store, deny, directory } = on_file();
    let path = directory.path().join("nudged.db");
    {
        let fixture = fixture(&store, &deny);
        let world = World::new(&fixture).await;
        people::crowd(&world, 20).await;
    }
    drop(store);
    let differing = || {
        let mut conn = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
        reach::differing(&mut conn).unwrap().len()
    };
    let mut conn = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    for sql in ["UPDATE app_user SET reach = NULL", "DELETE FROM watermark WHERE name = 'reach'"] {
        diesel::sql_query(sql).execute(&mut conn).unwrap();
    }
    drop(conn);
    assert_eq!(differing(), 20);
    let opened = open_in(directory);
    assert_eq!(differing(), 0);
    drop(opened);
}
