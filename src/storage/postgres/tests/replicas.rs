//! Several stores on one database.

use super::*;

#[tokio::test]
async fn ten_replicas_start_at_once_on_an_empty_database() {
    let database = Database::new().await;
    let stores = futures_util::future::join_all((0..10).map(|_| database.open())).await;
    let mut conn = database.connect().await;
    let slots: Vec<i64> = constant!(diesel::sql_types::BigInt; "SELECT count(DISTINCT boot_id) FROM replica")
        .load(&mut conn)
        .await
        .unwrap();
    assert_eq!(slots, [10]);
    for (store, _) in stores {
        store.close().await;
    }
}
