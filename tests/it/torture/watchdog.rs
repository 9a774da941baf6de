//! A step that takes too long says what the system looks like before the test fails: a hang must explain itself.

use std::fmt::Write as _;
use std::time::Duration;

use super::super::cluster::Cluster;
use super::stream::Callers;

/// What is asked of a hanging system may hang as well.
const ASKING: Duration = Duration::from_secs(5);
const LOG_LINES: usize = 40;

/// Of `/metrics`.
const TELLING: [&str; 9] = [
    "nudged_accepted_total",
    "nudged_sent_total",
    "nudged_retried_total",
    "nudged_jobs_open",
    "nudged_targets_open",
    "nudged_oldest_ready_seconds",
    "nudged_permits_free",
    "nudged_routes_paused",
    "nudged_sender_",
];

const OPEN_JOBS: &str = "SELECT concat_ws(' ', count(*), 'jobs of owner', owner, 'route', route, 'lane', lane, 'claims', \
     min(claims), '-', max(claims), 'fences', min(fence), '-', max(fence), 'due in ms', min(due_at - n.now), '-', \
     max(due_at - n.now), 'targets', sum(target_count)) \
     FROM open_job, (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT AS now) AS n GROUP BY owner, route, lane";
const REPLICAS: &str = "SELECT concat_ws(' ', 'replica', slot, 'boot', boot_id, 'heartbeat ms ago', \
     (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT - heartbeat) FROM replica";
const SESSIONS: &str = "SELECT concat_ws(' ', pid, state, wait_event_type, wait_event, 'since', now() - state_change, \
     left(query, 120)) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";

pub struct Watchdog<'a> {
    cluster: &'a Cluster,
    callers: &'a Callers,
}

impl<'a> Watchdog<'a> {
    pub fn new(cluster: &'a Cluster, callers: &'a Callers) -> Self {
        Self { cluster, callers }
    }

    pub async fn within<T>(&self, limit: Duration, what: &str, step: impl Future<Output = T>) -> T {
        if let Ok(done) = tokio::time::timeout(limit, step).await {
            return done;
        }
        panic!("{what} takes longer than {limit:?}\n{}", self.state().await)
    }

    async fn state(&self) -> String {
        let mut text = String::new();
        {
            let ledger = self.callers.ledger.lock().unwrap();
            let (missing, verdict) = (ledger.missing(), ledger.verdict());
            writeln!(text, "ledger: {verdict}; {missing} deliveries of acknowledged events are missing").unwrap();
        }
        for (number, admin) in self.cluster.admins().into_iter().enumerate() {
            writeln!(text, "replica {number} is running: {}", self.cluster.is_running(number)).unwrap();
            let page = async { reqwest::get(format!("http://{admin}/metrics")).await?.text().await };
            match tokio::time::timeout(ASKING, page).await {
                Ok(Ok(page)) => {
                    for line in page.lines().filter(|line| TELLING.iter().any(|name| line.starts_with(name))) {
                        writeln!(text, "replica {number}: {line}").unwrap();
                    }
                }
                failed => writeln!(text, "replica {number}: no metrics: {failed:?}").unwrap(),
            }
        }
        if self.cluster.postgres.is_some() {
            for query in [OPEN_JOBS, REPLICAS, SESSIONS] {
                match tokio::time::timeout(ASKING, self.cluster.ask(query)).await {
                    Ok(Some(rows)) => rows.iter().for_each(|row| writeln!(text, "{row}").unwrap()),
                    failed => writeln!(text, "Postgres does not say: {failed:?}").unwrap(),
                }
            }
        } else {
            writeln!(text, "{:?} open jobs", self.cluster.open_jobs().await).unwrap();
        }
        let log = self.cluster.world.log();
        let lines: Vec<&str> = log.lines().collect();
        for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
            writeln!(text, "log: {line}").unwrap();
        }
        text
    }
}
