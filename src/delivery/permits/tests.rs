use super::super::share::SILENT_AFTER;
use super::*;
use crate::domain::time::UnixMs;

/// A lane of 10 000 targets, as by default.
const IN_FLIGHT: usize = 20_000;
const LANE: Lane = Lane::Interactive;

struct Bench {
    runtime: Runtime,
    permits: Permits,
}

impl Bench {
    fn new(max_in_flight_targets: usize) -> Self {
        Self { runtime: Runtime::simulated(1, UnixMs(0)), permits: Permits::new(max_in_flight_targets) }
    }

    fn share(&self) -> Arc<Share> {
        Share::new(self.runtime.instant())
    }

    /// One that was asked and has answered nothing since.
    async fn silent(&self) -> Arc<Share> {
        let share = self.share();
        share.asks(self.runtime.instant());
        self.runtime.sleep(SILENT_AFTER).await;
        share
    }

    fn try_take(&self, share: &Arc<Share>, targets: usize) -> Option<Permit> {
        self.permits.try_take(share, LANE, targets, self.runtime.instant())
    }

    /// Whatever it is given, one by one.
    fn fill(&self, share: &Arc<Share>) -> Vec<Permit> {
        std::iter::from_fn(|| self.try_take(share, 1)).collect()
    }

    async fn claim(&self, share: &Arc<Share>, most: usize) -> Option<Claim> {
        let claim = self.permits.claim(&self.runtime, share, LANE, most);
        self.runtime.timeout(Duration::from_secs(1), claim).await
    }
}

#[tokio::test(start_paused = true)]
async fn bulk_never_takes_the_interactive_half() {
    let bench = Bench::new(4_000);
    let (all, other) = (bench.share(), bench.share());
    let bulk = bench.permits.claim(&bench.runtime, &all, Lane::Bulk, 10_000).await;
    assert_eq!(bulk.targets(), 1_500, "three quarters of the half");
    let rest = bench.permits.claim(&bench.runtime, &other, Lane::Bulk, 10_000).await;
    assert_eq!(rest.targets(), 500);
    assert!(bench.permits.try_take(&bench.share(), Lane::Bulk, 1, bench.runtime.instant()).is_none());
    assert!(bench.try_take(&all, 1_500).is_some());
}

#[tokio::test(start_paused = true)]
async fn parts_of_a_claim_come_back_one_by_one() {
    let bench = Bench::new(4_000);
    let share = bench.share();
    let mut claim = bench.claim(&share, 2_000).await.unwrap();
    let part = claim.split(400);
    drop(claim);
    assert_eq!((bench.permits.free(LANE), share.held(LANE)), (1_600, 400));
    drop(part);
    assert_eq!((bench.permits.free(LANE), share.held(LANE)), (2_000, 0));
}

#[tokio::test(start_paused = true)]
async fn one_that_stalls_leaves_a_quarter_and_two_leave_room_for_a_job() {
    let bench = Bench::new(IN_FLIGHT);
    let (first, second, third) = (bench.share(), bench.share(), bench.share());
    let mut held = bench.fill(&first);
    assert_eq!(held.len(), 7_500);
    held.extend(bench.fill(&second));
    assert_eq!(bench.permits.free(LANE), 625);
    assert_eq!(bench.claim(&third, 500).await.map(|claim| claim.targets()), Some(500));
    assert!(bench.try_take(&third, 100).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_silent_one_gets_a_ninth_of_what_is_free_and_any_number_leave_a_full_job() {
    let bench = Bench::new(IN_FLIGHT);
    let mut held = Vec::new();
    for _ in 0..4 {
        let (share, free) = (bench.silent().await, bench.permits.free(LANE));
        held.extend(bench.fill(&share));
        assert_eq!(free - bench.permits.free(LANE), free / 9);
    }
    assert!(bench.permits.free(LANE) > 6_200, "four leave more than half");
    // One that holds nothing gets a full job all the same, as long as one is left after it.
    let mut claims = Vec::new();
    for _ in 0..40 {
        claims.extend(bench.claim(&bench.silent().await, 2_000).await);
        held.extend(bench.fill(&bench.silent().await));
    }
    assert!(claims.len() < 40 && claims.iter().all(|claim| claim.targets() >= 500));
    assert_eq!(bench.permits.free(LANE), 500);
    assert!(bench.claim(&bench.share(), 500).await.is_some(), "one that answers finds room for a job");
}

#[tokio::test(start_paused = true)]
async fn silence_ends_with_an_answer_and_who_waited_goes_on() {
    let bench = Bench::new(IN_FLIGHT);
    let share = bench.silent().await;
    let mut held = bench.fill(&share);
    assert!(held.len() < 1_200);
    let claim = bench.permits.claim(&bench.runtime, &share, LANE, 2_000);
    let answers = async {
        bench.runtime.sleep(Duration::from_millis(30)).await;
        assert!(share.is_awaited(LANE));
        share.answered(bench.runtime.instant());
        bench.runtime.instant()
    };
    let (claim, answered_at) = tokio::join!(claim, answers);
    assert_eq!(bench.runtime.instant(), answered_at, "at once");
    assert_eq!(claim.targets(), 2_000);
    held.extend(bench.fill(&share));
    assert_eq!(bench.permits.free(LANE), 2_500);
}

#[tokio::test(start_paused = true)]
async fn what_comes_back_goes_to_the_claim_that_waits_and_is_not_overtaken() {
    let bench = Bench::new(IN_FLIGHT);
    let share = bench.share();
    let mut held = bench.fill(&share);
    let claim = bench.permits.claim(&bench.runtime, &share, LANE, 500);
    let comes_back = async {
        tokio::task::yield_now().await;
        for _ in 0..500 {
            held.pop();
            assert!(bench.try_take(&share, 1).is_none(), "a hand-off does not overtake");
        }
        held
    };
    let (claim, held) = tokio::join!(claim, comes_back);
    assert_eq!((claim.targets(), held.len()), (500, 7_000));
    drop(claim);
    assert!(bench.try_take(&share, 1).is_some());
}

#[tokio::test(start_paused = true)]
async fn others_room_that_comes_back_is_found_too() {
    let bench = Bench::new(IN_FLIGHT);
    let (waiting, other) = (bench.share(), bench.share());
    let others = bench.fill(&other);
    let _held = bench.fill(&waiting);
    let claim = bench.permits.claim(&bench.runtime, &waiting, LANE, 500);
    let gives_back = async {
        bench.runtime.sleep(Duration::from_millis(10)).await;
        drop(others);
    };
    let (claim, ()) = tokio::join!(claim, gives_back);
    assert_eq!(claim.targets(), 500);
}

#[tokio::test(start_paused = true)]
async fn a_small_room_is_given_to_one_job_as_a_whole() {
    let bench = Bench::new(16);
    let share = bench.silent().await;
    let claim = bench.claim(&share, 2_000).await.expect("it holds nothing");
    assert_eq!((claim.targets(), bench.permits.free(LANE)), (500, 0));
    assert!(bench.claim(&share, 500).await.is_none());
    drop(claim);
    assert!(bench.claim(&share, 500).await.is_some());
}
