//! Who is served next: a weighted fair queue over owners and, within an owner, over its sessions.
//!
//! Service is counted in tokens computed, those found in the cache being free: one for a prompt token,
//! [`DECODE_COST`] for a generated one. Each account (an owner, or a session of one) adds up its service;
//! an owner's is divided by its `weight`, a session's by that of the sequence's `priority`. The *clock* of a
//! level is what an account would have that always had its share. A sequence's place in line is the service at which its account will
//! be with its prompt done; the least goes first. So a turn with little left to compute passes a
//! newcomer's long prompt, and a long prompt keeps its place while the clock, at which newcomers begin,
//! goes on.
//!
//! - An account begins at the clock, and one that has nothing to read keeps to it: idle time earns nothing. An
//!   owner may however run [`OWNER_CREDIT_STEPS`] ahead, so that a modest one is not slowed by one that floods:
//!   with a quarter of that left it still stands where newcomers do, and their prompts go by what is left of each.
//!   What it uses of that it earns back at half the rate of its share. So one that is alone uses it up, and
//!   of two that use less neither one's short turn stands behind the other's long prompt.
//! - An account that had more than its share still counts after its last sequence ended, until the
//!   clock has caught up: pausing does not clear the debt. A session's is cut to [`SESSION_DEBT_STEPS`].
//! - Owners share by their weights, however many there are. Among an owner's sessions, which cost nothing to
//!   open, the clock goes as if at most [`MOST_SHARING`] shared: so a prompt of `n` tokens lets those that
//!   come after it have at most about `MOST_SHARING * n` tokens first.
//! - An owner *floods* that has had more than its share and has more than [`FLOOD_STEPS`] to read behind its
//!   first prompt: it has a queue, so that it wants throughput and not one answer soon. What is then cut for
//!   it, see `scheduler`; it ends with the queue, or once the owner has no more than its share.
//! - Weights are finite, so no priority starves another. Urgency moves service among an owner's own
//!   sessions, never from another owner; a sequence that can wait lets other owners' go first too.
//!
//! After weighted fair queueing (Parekh and Gallager, 1993) and its counting of service in tokens for
//! language models (Sheng et al., "Fairness in Serving Large Language Models", arXiv:2401.00588).

use std::collections::HashMap;

use crate::SequenceId;

/// A generated token's cost in prompt tokens, as in arXiv:2401.00588.
pub(crate) const DECODE_COST: f64 = 2.0;
/// How far an owner may run ahead, in whole steps' tokens.
const OWNER_CREDIT_STEPS: f64 = 16.0;
/// Its credit counts as whole until less than one in so many is left.
const COUNTS_AS_WHOLE: f64 = 4.0;
/// Of its share, how much an owner earns back.
const EARNED_BACK: f64 = 0.5;
/// How far behind a session is put for what it had too much, in whole steps' tokens: little, lest
/// an agent's next short turn wait behind newcomers.
const SESSION_DEBT_STEPS: f64 = 4.0;
/// Prompts that make a flood, in whole steps' tokens.
const FLOOD_STEPS: f64 = 16.0;
/// See the module.
const MOST_SHARING: f64 = 4.0;
/// Priorities beyond are cut to this.
const MOST_PRIORITY: i32 = 3;
/// Within a session, each step of priority lets so many that came later go first.
const ARRIVALS_A_STEP: i32 = 64;

/// Whom a sequence works for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Who pays: stands for an API key.
    pub owner: u64,
    /// The owner's share of the machine relative to others'; 1 is usual, and 0 counts as that. It is the
    /// same in all that an owner has.
    pub weight: u32,
    /// Its conversation; an owner's conversations share what it gets. A sequence without one counts as
    /// a conversation of its own.
    pub session: Option<u64>,
    /// Urgency among the owner's own, lower is sooner: each step doubles or halves the share of service.
    /// From -3 to 3; beyond counts as these. Above 0 it lets other owners go first too.
    pub priority: i32,
}

impl Default for Origin {
    /// The owner 0, without a session, neither urgent nor privileged.
    fn default() -> Self {
        Self { owner: 0, weight: 1, session: None, priority: 0 }
    }
}

impl Origin {
    /// The owner's weight.
    pub(crate) fn owner_weight(&self) -> f64 {
        f64::from(self.weight.max(1))
    }

    /// The share of the owner's service relative to priority 0.
    fn urgency(&self) -> f64 {
        f64::from(-self.clamped()).exp2()
    }

    fn clamped(&self) -> i32 {
        self.priority.clamp(-MOST_PRIORITY, MOST_PRIORITY)
    }

    fn session_key(&self, id: SequenceId) -> u64 {
        self.session.unwrap_or(!id)
    }
}

/// A sequence that wants prompt tokens computed, and its place in line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub id: SequenceId,
    pub owner: u64,
    session: u64,
    /// Cost of what is left of its prompt, by urgency among its owner's, by weight among all.
    cost: [f64; 2],
    /// The place in line: its owner's service with this done.
    pub place: f64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct FairQueue {
    owners: Level,
    sessions: HashMap<u64, Level>,
    /// Tokens of a whole step.
    step: f64,
    /// Owners that flood, as of the last sort.
    floods: Vec<u64>,
}

impl FairQueue {
    pub fn new(step_tokens: usize) -> Self {
        let step = step_tokens as f64;
        let owners = Level::new(OWNER_CREDIT_STEPS * step, f64::INFINITY, f64::INFINITY);
        Self { owners, sessions: HashMap::new(), step, floods: Vec::new() }
    }

    /// A sequence came.
    pub fn join(&mut self, id: SequenceId, origin: &Origin) {
        self.owners.join(origin.owner, origin.owner_weight());
        let debt = SESSION_DEBT_STEPS * self.step;
        let sessions =
            self.sessions.entry(origin.owner).or_insert_with(|| Level::new(0.0, debt, MOST_SHARING));
        sessions.join(origin.session_key(id), 1.0);
    }

    /// A sequence ended.
    pub fn leave(&mut self, id: SequenceId, origin: &Origin) {
        self.owners.leave(origin.owner);
        if let Some(sessions) = self.sessions.get_mut(&origin.owner) {
            sessions.leave(origin.session_key(id));
        }
    }

    /// A live sequence was served `cost` prompt tokens' worth.
    pub fn charge(&mut self, id: SequenceId, origin: &Origin, cost: f64) {
        self.owners.charge(origin.owner, cost);
        if let Some(sessions) = self.sessions.get_mut(&origin.owner) {
            sessions.charge(origin.session_key(id), cost / origin.urgency());
        }
    }

    /// Once a step: forgets who is idle and owes nothing.
    pub fn settle(&mut self) {
        self.sessions.values_mut().for_each(Level::settle);
        self.owners.settle();
        if self.sessions.len() > self.owners.accounts.len() {
            self.sessions.retain(|owner, _| self.owners.accounts.contains_key(owner));
        }
    }

    /// A live sequence with `cost` prompt tokens' worth to do; [`Self::sort`] finds its place.
    pub fn candidate(&self, id: SequenceId, origin: &Origin, cost: f64) -> Candidate {
        Candidate {
            id,
            owner: origin.owner,
            session: origin.session_key(id),
            cost: [cost / origin.urgency(), cost / origin.urgency().min(1.0) / origin.owner_weight()],
            place: id as f64 + f64::from(ARRIVALS_A_STEP * origin.clamped()),
        }
    }

    /// Puts candidates in line: within a session by arrival and priority, within an owner by the
    /// session's service, over all by the owner's. Finds who floods.
    pub fn sort(&mut self, candidates: &mut [Candidate]) {
        let session_start = |c: &Candidate| self.sessions.get(&c.owner).map_or(0.0, |s| s.start(c.session));
        rank(candidates, |c| (c.owner, c.session), session_start, |c| c.cost[0]);
        self.owners.keep_to_clock(|owner| candidates.binary_search_by_key(&owner, |c| c.owner).is_err());
        rank(candidates, |c| (c.owner, 0), |c| self.owners.start(c.owner), |c| c.cost[1]);
        self.find_floods(candidates);
        candidates.sort_unstable_by(|a, b| a.place.total_cmp(&b.place).then(a.id.cmp(&b.id)));
    }

    /// Whether an owner floods, as of the last sort.
    pub fn floods(&self, owner: u64) -> bool {
        self.floods.contains(&owner)
    }

    /// `candidates` are ranked, owner by owner.
    fn find_floods(&mut self, candidates: &[Candidate]) {
        self.floods.clear();
        for own in candidates.chunk_by(|a, b| a.owner == b.owner) {
            let (first, last) = (&own[0], &own[own.len() - 1]);
            let is_ahead = self.owners.start(first.owner) > self.owners.clock;
            if is_ahead && last.place - first.place > FLOOD_STEPS * self.step {
                self.floods.push(first.owner);
            }
        }
    }
}

/// Orders each group by place and has its members begin one after the other's end.
fn rank(
    candidates: &mut [Candidate],
    group: impl Fn(&Candidate) -> (u64, u64),
    start: impl Fn(&Candidate) -> f64,
    cost: impl Fn(&Candidate) -> f64,
) {
    candidates.sort_unstable_by(|a, b| {
        group(a).cmp(&group(b)).then(a.place.total_cmp(&b.place)).then(a.id.cmp(&b.id))
    });
    let mut before = None;
    for candidate in candidates {
        let group = group(candidate);
        let begin = match before {
            Some((same, end)) if same == group => end,
            _ => start(candidate),
        };
        candidate.place = begin + cost(candidate);
        before = Some((group, candidate.place));
    }
}

/// Accounts that share by weight.
#[derive(Debug)]
struct Level {
    accounts: HashMap<u64, Account>,
    /// Sum of their weights.
    weights: f64,
    clock: f64,
    /// Accounts without a live sequence, kept for what they owe.
    idle: usize,
    credit: f64,
    debt: f64,
    most_sharing: f64,
}

/// Service is by weight here.
#[derive(Debug)]
struct Account {
    weight: f64,
    served: f64,
    /// What it might still run ahead when the clock was at `noted`.
    credit: f64,
    noted: f64,
    live: usize,
}

impl Level {
    fn new(credit: f64, debt: f64, most_sharing: f64) -> Self {
        Self { accounts: HashMap::new(), weights: 0.0, clock: 0.0, idle: 0, credit, debt, most_sharing }
    }

    fn join(&mut self, key: u64, weight: f64) {
        let fresh = Account { weight, served: self.clock, credit: self.credit, noted: self.clock, live: 0 };
        let accounts = self.accounts.len();
        let account = self.accounts.entry(key).or_insert(fresh);
        account.live += 1;
        if account.live == 1 {
            account.keep_to(self.clock, self.credit);
            self.idle -= usize::from(self.accounts.len() == accounts);
            self.weigh();
        }
    }

    /// Those that count: who is live, and who has had more than its share.
    fn weigh(&mut self) {
        let counts = |account: &&Account| account.live > 0 || account.served > self.clock;
        self.weights = self.accounts.values().filter(counts).map(|account| account.weight).sum();
    }

    fn leave(&mut self, key: u64) {
        let Some(account) = self.accounts.get_mut(&key) else { return };
        account.live -= 1;
        if account.live == 0 {
            self.idle += 1;
            account.served = account.served.min(self.clock + self.debt);
        }
    }

    fn charge(&mut self, key: u64, cost: f64) {
        if let Some(account) = self.accounts.get_mut(&key) {
            account.credit = (account.credit_at(self.clock, self.credit) - cost / account.weight).max(0.0);
            account.noted = self.clock;
            account.served += cost / account.weight;
            self.clock += cost / self.most_sharing.min(self.weights);
        }
    }

    fn settle(&mut self) {
        if self.idle > 0 {
            let alone = self.idle == self.accounts.len(); // then nobody is owed anything
            let (clock, most) = (self.clock, self.credit);
            let owes = |account: &Account| account.served > clock || account.credit_at(clock, most) < most;
            self.accounts.retain(|_, account| account.live > 0 || (owes(account) && !alone));
            self.idle = self.accounts.values().filter(|account| account.live == 0).count();
            self.weigh();
        }
    }

    /// Those that want nothing earn nothing but their credit.
    fn keep_to_clock(&mut self, wants_nothing: impl Fn(u64) -> bool) {
        for (&key, account) in &mut self.accounts {
            if account.served < self.clock && wants_nothing(key) {
                account.keep_to(self.clock, self.credit);
            }
        }
    }

    /// Where the next of an account's sequences begins.
    fn start(&self, key: u64) -> f64 {
        let start = |account: &Account| {
            let (credit, lead) = (account.credit_at(self.clock, self.credit), account.served - self.clock);
            let left = credit - lead;
            let counts = if left > 0.0 { lead + (COUNTS_AS_WHOLE * left).min(self.credit) } else { credit };
            account.served - counts.max(credit)
        };
        self.accounts.get(&key).map_or(0.0, start)
    }
}

impl Account {
    /// What it may run ahead, of at most `most`, when the clock is at `clock`. While it has had more than its
    /// share it earns none.
    fn credit_at(&self, clock: f64, most: f64) -> f64 {
        (self.credit + EARNED_BACK * (clock - self.noted.max(self.served)).max(0.0)).min(most)
    }

    /// What it did not use of its share is gone, but for its credit.
    fn keep_to(&mut self, clock: f64, most: f64) {
        if self.served < clock {
            self.credit = self.credit_at(clock, most);
            (self.served, self.noted) = (clock, clock);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: usize = 100;

    fn origin(owner: u64, session: u64) -> Origin {
        Origin { owner, session: Some(session), ..Origin::default() }
    }

    /// The ids in line, each with its origin and what it has left.
    fn line(queue: &mut FairQueue, wants: &[(SequenceId, Origin, f64)]) -> Vec<SequenceId> {
        let mut line: Vec<_> =
            wants.iter().map(|(id, origin, cost)| queue.candidate(*id, origin, *cost)).collect();
        queue.sort(&mut line);
        line.iter().map(|candidate| candidate.id).collect()
    }

    fn joined(wants: &[(SequenceId, Origin, f64)]) -> FairQueue {
        let mut queue = FairQueue::new(STEP);
        wants.iter().for_each(|(id, origin, _)| queue.join(*id, origin));
        queue
    }

    #[test]
    fn a_short_turn_passes_a_long_prompt_and_equals_go_by_arrival() {
        let wants = [(1, origin(7, 1), 9000.0), (2, origin(7, 2), 40.0), (3, origin(7, 3), 40.0)];
        assert_eq!(line(&mut joined(&wants), &wants), [2, 3, 1]);
    }

    #[test]
    fn a_long_prompt_keeps_its_place_while_short_ones_come_and_go() {
        let long = (1, origin(7, 1), 1000.0);
        let mut queue = joined(&[long]);
        let passed = (2..).take_while(|&id| {
            let short = (id, origin(7, id), 40.0);
            queue.join(id, &short.1);
            let first = line(&mut queue, &[long, short])[0] == id;
            queue.charge(id, &short.1, 40.0);
            queue.leave(id, &short.1);
            queue.settle();
            first
        });
        let passed = passed.count() as f64;
        assert!(passed * 40.0 > 1000.0 && passed * 40.0 <= MOST_SHARING * 1000.0, "{passed}");
    }

    #[test]
    fn one_owners_flood_stays_behind_anothers_single_turn() {
        let mut wants: Vec<_> = (0..50).map(|id| (id, origin(1, id), 100.0)).collect();
        let mut queue = joined(&wants);
        queue.charge(0, &wants[0].1, 5000.0);
        let single = (99, origin(2, 0), 800.0);
        queue.join(single.0, &single.1);
        wants.push(single);
        assert_eq!(line(&mut queue, &wants)[0], 99);
    }

    #[test]
    fn a_flood_is_a_queue_of_an_owner_that_had_more_than_its_share() {
        let step = STEP as f64;
        let flood: Vec<_> = (0..4).map(|id| (id, origin(1, id), 8.0 * step)).collect();
        let mut queue = joined(&flood);
        queue.join(9, &origin(2, 0));
        line(&mut queue, &flood);
        assert!(!queue.floods(1), "it has had nothing yet");
        queue.charge(0, &flood[0].1, 40.0 * step);
        line(&mut queue, &flood);
        assert!(queue.floods(1));
        line(&mut queue, &[(0, flood[0].1, 1000.0 * step)]);
        assert!(!queue.floods(1), "one prompt is no flood, however long");
        line(&mut queue, &flood[..2]);
        assert!(!queue.floods(1), "nor are two short ones");
        queue.charge(9, &origin(2, 0), 80.0 * step);
        line(&mut queue, &flood);
        assert!(!queue.floods(1), "the other has had more since");
    }

    #[test]
    fn pausing_neither_clears_a_debt_nor_earns_anything() {
        let (busy, other) = (origin(1, 0), origin(2, 0));
        let mut queue = joined(&[(1, busy, 0.0), (2, other, 0.0)]);
        queue.charge(1, &busy, 4000.0);
        queue.charge(2, &other, 3000.0);
        queue.leave(1, &busy);
        queue.settle();
        queue.join(3, &busy);
        assert_eq!(line(&mut queue, &[(2, other, 500.0), (3, busy, 10.0)]), [2, 3], "still 1000 ahead");
        queue.leave(3, &busy);
        let credit = OWNER_CREDIT_STEPS * STEP as f64;
        queue.charge(2, &other, 1000.0 + 8.0 * credit);
        queue.settle();
        assert_eq!(queue.owners.accounts.len(), 1, "what owes nothing is forgotten");
        queue.charge(2, &other, 1_000_000.0);
        queue.join(4, &busy);
        assert_eq!(queue.owners.start(1), queue.owners.clock - credit);
    }

    #[test]
    fn credit_that_was_used_is_earned_back_by_half_the_share_and_never_more() {
        let credit = OWNER_CREDIT_STEPS * STEP as f64;
        let (mine, other) = (origin(1, 0), origin(2, 0));
        let mut queue = joined(&[(1, mine, 0.0), (2, other, 0.0)]);
        let left = |queue: &FairQueue| {
            let account = &queue.owners.accounts[&1];
            let ahead = (account.served - queue.owners.clock).max(0.0);
            (account.credit_at(queue.owners.clock, credit) - ahead) / credit
        };
        assert_eq!(left(&queue), 1.0);
        queue.charge(1, &mine, 0.5 * credit);
        queue.leave(1, &mine);
        queue.settle();
        queue.join(3, &mine);
        assert_eq!(left(&queue), 0.25, "it used half, and is ahead by as much less its share");
        queue.charge(2, &other, credit);
        line(&mut queue, &[(2, other, 10.0)]);
        assert_eq!(left(&queue), 0.625, "since it is no more ahead, half of its share");
        queue.charge(2, &other, 100.0 * credit);
        line(&mut queue, &[(3, mine, 10.0)]);
        assert!(queue.owners.start(1) < queue.owners.clock - credit, "who waits keeps its place");
        line(&mut queue, &[(2, other, 10.0)]);
        assert_eq!(left(&queue), 1.0);
    }

    #[test]
    fn a_short_turn_of_an_active_owner_does_not_stand_behind_a_long_prompt_of_one_that_was_idle() {
        let (active, idle) = (origin(1, 0), origin(2, 0));
        let step = STEP as f64;
        let mut queue = joined(&[(1, active, 0.0)]);
        queue.join(9, &origin(3, 0)); // keeps the clock apart from what one has alone
        queue.charge(1, &active, 8.0 * step);
        queue.join(2, &idle);
        assert_eq!(line(&mut queue, &[(1, active, 0.1 * step), (2, idle, 15.0 * step)]), [1, 2]);
    }

    #[test]
    fn a_short_turn_does_not_stand_behind_anothers_long_prompt_for_having_used_some_credit() {
        let (busy, idle) = (origin(1, 0), origin(2, 0));
        let step = STEP as f64;
        let mut queue = joined(&[(1, busy, 0.0), (2, idle, 0.0)]);
        let wants = [(1, busy, 0.1 * step), (2, idle, 5.0 * step)];
        queue.charge(1, &busy, 6.0 * step); // three steps more than its share
        assert_eq!(line(&mut queue, &wants), [1, 2]);
        queue.charge(1, &busy, 20.0 * step);
        assert_eq!(line(&mut queue, &wants), [2, 1], "its credit is used up");
    }

    #[test]
    fn a_long_prompt_is_not_passed_for_ever_by_others_that_have_credit() {
        let (long, step) = (origin(1, 0), STEP as f64);
        let others = [origin(2, 0), origin(3, 0), origin(4, 0)];
        let mut queue = joined(&[(1, long, 0.0)]);
        let mut passed = 0.0;
        for turn in 0..1000 {
            let (id, other) = (2 + turn, others[turn as usize % 3]);
            queue.join(id, &other);
            if line(&mut queue, &[(1, long, 10.0 * step), (id, other, 0.5 * step)])[0] == 1 {
                break;
            }
            queue.charge(id, &other, 0.5 * step);
            queue.leave(id, &other);
            queue.settle();
            passed += 0.5;
        }
        assert!((20.0..=40.0).contains(&passed), "{passed} steps"); // ten for each that shares, at most
    }

    /// What each of several sequences gets that always want more, in steps that serve the first in line.
    fn shares<const N: usize>(origins: [Origin; N]) -> [f64; N] {
        let wants: Vec<_> =
            origins.iter().enumerate().map(|(id, &origin)| (id as SequenceId, origin, 10.0)).collect();
        let mut queue = joined(&wants);
        let mut served = [0.0; N];
        for _ in 0..4000 {
            let first = line(&mut queue, &wants)[0];
            queue.charge(first, &origins[first as usize], 10.0);
            served[first as usize] += 10.0;
        }
        served
    }

    #[test]
    fn each_priority_doubles_the_share() {
        let served = shares([Origin { priority: -2, ..origin(1, 1) }, origin(1, 2)]);
        assert!((served[0] / served[1] - 4.0).abs() < 0.2, "{served:?}");
    }

    #[test]
    fn owners_share_by_weight() {
        let served = shares([Origin { weight: 5, ..origin(1, 1) }, origin(2, 1), origin(3, 1)]);
        for light in &served[1..] {
            assert!((served[0] / light - 5.0).abs() < 0.2, "{served:?}");
        }
        let even = shares([Origin { weight: 0, ..origin(1, 1) }, origin(2, 1)]);
        assert_eq!(even[0], even[1]);
    }

    #[test]
    fn a_weight_gives_its_owners_sessions_no_other_shares_among_them() {
        let heavy = |session| Origin { weight: 7, ..origin(1, session) };
        let served = shares([heavy(1), heavy(2), Origin { priority: 1, ..heavy(3) }]);
        assert!((served[0] / served[1] - 1.0).abs() < 0.05, "{served:?}");
        assert!((served[0] / served[2] - 2.0).abs() < 0.2, "{served:?}");
    }

    #[test]
    fn urgency_takes_nothing_from_other_owners_and_patience_lets_them_go_first() {
        let (urgent, patient) =
            (Origin { priority: -3, ..origin(1, 1) }, Origin { priority: 3, ..origin(2, 1) });
        let wants = [(1, patient, 30.0), (2, urgent, 50.0), (3, origin(3, 1), 40.0)];
        let mut queue = joined(&wants);
        assert_eq!(line(&mut queue, &wants), [3, 2, 1]);
        wants.iter().for_each(|(id, origin, _)| queue.charge(*id, origin, 100.0));
        assert_eq!([1, 2, 3].map(|owner| queue.owners.accounts[&owner].served), [100.0; 3]);
    }

    #[test]
    fn within_a_session_urgency_goes_first_and_patience_ends() {
        let of = |id, priority| (id, Origin { priority, ..origin(1, 1) }, 10.0);
        let wants = [of(1, 3), of(2, 0), of(3, i32::MIN), of(1000, -3)];
        assert_eq!(line(&mut joined(&wants), &wants), [3, 2, 1, 1000]);
    }

    #[test]
    fn nothing_is_kept_once_all_have_left() {
        let mut queue = FairQueue::new(STEP);
        for id in 0..100 {
            let origin = Origin {
                owner: id % 7,
                weight: id as u32 % 7,
                session: (id % 2 == 0).then_some(id % 3),
                priority: id as i32 % 9 - 4,
            };
            queue.join(id, &origin);
            queue.charge(id, &origin, id as f64);
            queue.leave(id, &origin);
        }
        (0..100).for_each(|_| queue.settle());
        assert!(queue.owners.accounts.is_empty() && queue.sessions.is_empty());
        assert_eq!(queue.owners.weights, 0.0);
    }
}
