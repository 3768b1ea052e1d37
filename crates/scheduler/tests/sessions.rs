//! What is kept of sessions when blocks run out, and who goes first.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rudder_scheduler::{
    BLOCK_SIZE, MAX_SESSIONS, Origin, PROTECTED_SHARE, Policy, RetentionStats, Scheduler, SchedulerConfig,
    SequenceId, SessionHandle, StepPlan, Tick,
};

const BLOCKS: usize = 64;
const LIMIT: usize = (BLOCKS as f64 * PROTECTED_SHARE) as usize;
const FOREVER: Tick = Tick::MAX;

struct World {
    scheduler: Scheduler,
    plan: StepPlan,
    next_id: SequenceId,
    /// Tokens still to generate, for every live sequence.
    live: BTreeMap<SequenceId, usize>,
}

impl World {
    fn new() -> Self {
        let config = SchedulerConfig {
            blocks: BLOCKS,
            max_sequences: 6,
            max_batch_tokens: 96,
            max_drafted: 0,
            prefix_cache: true,
            policy: Policy::Fair,
        };
        Self {
            scheduler: Scheduler::new(config),
            plan: StepPlan::default(),
            next_id: 0,
            live: BTreeMap::new(),
        }
    }

    fn open(&mut self, until: Tick, rank: u64) -> SessionHandle {
        let session = self.scheduler.open_session().unwrap();
        self.scheduler.protect(session, until, rank);
        session
    }

    fn arrive(&mut self, prompt: &[u32], answer: usize, session: Option<SessionHandle>) -> SequenceId {
        self.arrive_for(Origin::default(), prompt, answer, session)
    }

    fn arrive_for(
        &mut self,
        origin: Origin,
        prompt: &[u32],
        answer: usize,
        session: Option<SessionHandle>,
    ) -> SequenceId {
        let id = self.next_id;
        self.next_id += 1;
        self.scheduler.add(id, prompt.to_vec(), false, origin);
        if let Some(session) = session {
            self.scheduler.join_session(id, session);
        }
        self.live.insert(id, answer);
        id
    }

    fn end(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.live.remove(&id);
    }

    fn step(&mut self) {
        self.scheduler.plan(&mut self.plan);
        self.scheduler.commit(&self.plan);
        let drawn: Vec<_> = self.plan.chunks.iter().filter(|c| c.outputs > 0).map(|c| c.id).collect();
        for id in drawn {
            let left = self.live.get_mut(&id).unwrap();
            *left -= 1;
            if *left == 0 {
                self.end(id);
            } else {
                self.scheduler.append(id, (id % 7) as u32);
            }
        }
        let counts = self.scheduler.counts();
        assert_eq!(counts.used + counts.cached + counts.free, BLOCKS);
        assert!(self.stats().protected <= counts.cached);
    }

    fn drain(&mut self) {
        for _ in 0..100_000 {
            if self.live.is_empty() {
                assert_eq!(self.scheduler.counts().used, 0);
                return;
            }
            self.step();
        }
        panic!("work does not end");
    }

    /// A turn from its arrival to its end; returns how many blocks of its prompt were cached.
    fn turn(&mut self, prompt: &[u32], session: Option<SessionHandle>) -> usize {
        let id = self.arrive(prompt, 1, session);
        self.step();
        let cached = self.plan.admitted.iter().find(|(admitted, _)| *admitted == id).unwrap().1;
        self.drain();
        cached / BLOCK_SIZE
    }

    /// An owner's turn, in a session of its own.
    fn turn_of(&mut self, owner: u64, weight: u32, prompt: &[u32], until: Tick) -> SessionHandle {
        let session = self.open(until, 0);
        self.arrive_for(Origin { owner, weight, ..Origin::default() }, prompt, 1, Some(session));
        self.drain();
        session
    }

    /// Turns of no session, none like another.
    fn flood(&mut self, seeds: std::ops::Range<u32>) {
        for seed in seeds {
            self.turn(&prompt(seed, 15), None);
        }
    }

    fn stats(&self) -> RetentionStats {
        self.scheduler.retention_stats()
    }

    fn cached(&self, session: SessionHandle) -> usize {
        self.scheduler.session(session).unwrap().cached
    }
}

/// `blocks` full blocks of tokens that nothing else begins with, and one token more.
fn prompt(seed: u32, blocks: usize) -> Vec<u32> {
    (0..(blocks * BLOCK_SIZE + 1) as u32).map(|position| seed * 100_000 + position).collect()
}

#[test]
fn a_protected_session_outlasts_a_flood_that_another_does_not() {
    let mut world = World::new();
    let session = world.open(FOREVER, 0);
    world.turn(&prompt(1, 20), Some(session));
    world.turn(&prompt(2, 20), None);
    world.flood(3..20);
    assert_eq!(world.turn(&prompt(1, 20), Some(session)), 20);
    assert_eq!(world.turn(&prompt(2, 20), None), 0);
    assert_eq!(world.stats().evicted_protected, 0);
}

#[test]
fn protection_ends_at_its_tick() {
    let mut world = World::new();
    let session = world.open(100, 0);
    world.turn(&prompt(1, 20), Some(session));
    world.scheduler.advance(99);
    assert_eq!(world.stats().protected, 20);
    world.scheduler.advance(100);
    assert_eq!((world.stats().protected, world.cached(session)), (0, 20));
    world.flood(2..20);
    assert_eq!(world.cached(session), 0);
}

#[test]
fn among_the_protected_the_least_rank_goes_first() {
    let mut world = World::new();
    let sessions = [5, 3, 4].map(|rank| world.open(FOREVER, rank));
    for (seed, &session) in sessions.iter().enumerate() {
        world.turn(&prompt(seed as u32, 15), Some(session));
    }
    world.turn(&prompt(9, 30), None);
    assert_eq!(sessions.map(|session| world.cached(session)), [15, 3, 15], "31 blocks, 19 of them free");
    world.scheduler.protect(sessions[2], FOREVER, 2);
    world.turn(&prompt(8, 33), None);
    assert_eq!(sessions.map(|session| world.cached(session)), [15, 3, 12], "30 more were nobody's");
}

#[test]
fn over_their_share_the_protected_give_way_to_what_nobody_protects() {
    let mut world = World::new();
    world.turn(&prompt(0, 8), None);
    let session = world.open(FOREVER, 0);
    world.turn(&prompt(1, 55), Some(session));
    assert_eq!(world.stats().protected, 55);
    world.turn(&prompt(2, 8), None);
    assert_eq!(world.stats().protected, LIMIT, "one block was free and eight had to go");
    assert_eq!(world.turn(&prompt(0, 8), None), 7);
}

#[test]
fn what_has_returned_outlasts_a_flood_even_when_its_time_is_over() {
    let mut world = World::new();
    let [slow, once] = [world.open(100, 0), world.open(100, 0)];
    world.turn(&prompt(1, 20), Some(slow));
    world.turn(&prompt(2, 10), Some(once));
    world.scheduler.note_return(slow);
    world.scheduler.advance(100);
    world.flood(3..30);
    assert_eq!([slow, once].map(|session| world.cached(session)), [20, 0]);
    assert_eq!(world.stats().evicted_protected, 0);
}

#[test]
fn what_has_returned_leaves_newcomers_their_part() {
    let mut world = World::new();
    world.turn(&prompt(0, 8), None);
    let session = world.open(0, 0);
    world.turn(&prompt(1, 55), Some(session));
    world.scheduler.note_return(session);
    world.turn(&prompt(2, 8), None);
    assert_eq!(world.cached(session), LIMIT, "one block was free and eight had to go");
    assert_eq!(world.turn(&prompt(0, 8), None), 7);
}

#[test]
fn one_owners_flood_takes_nothing_from_another_that_holds_less() {
    for until in [0, FOREVER] {
        let mut world = World::new();
        let mine = world.turn_of(1, 1, &prompt(1, 12), until);
        for seed in 2..30 {
            world.turn_of(2, 1, &prompt(seed, 14), until);
        }
        assert_eq!(world.cached(mine), 12, "until {until}");
        assert!(world.scheduler.counts().cached > 45, "what one does not hold the other has");
    }
}

#[test]
fn what_a_turn_waits_for_goes_after_what_pauses_whosever_it_is() {
    let mut world = World::new();
    let busy = world.turn_of(1, 1, &prompt(1, 30), FOREVER);
    world.scheduler.protect(busy, FOREVER, Tick::MAX);
    let resting = world.turn_of(2, 1, &prompt(2, 12), FOREVER);
    world.turn(&prompt(3, 30), None);
    assert_eq!([busy, resting].map(|session| world.cached(session)), [30, 3]);
}

#[test]
fn a_turn_that_needs_the_whole_pool_gets_it() {
    let mut world = World::new();
    let session = world.open(FOREVER, 0);
    world.turn(&prompt(1, 40), Some(session));
    world.turn(&prompt(2, 62), None);
    assert_eq!(world.cached(session), 1);
}

#[test]
fn a_shared_prefix_stays_as_long_as_anything_protected_needs_it() {
    let mut world = World::new();
    let [parent, child] = [world.open(100, 1), world.open(FOREVER, 2)];
    let common = prompt(1, 10);
    world.turn(&common, Some(parent));
    let fork = [&common[..160], &prompt(2, 5)].concat();
    world.turn(&fork, Some(child));
    world.scheduler.advance(100);
    world.flood(3..20);
    assert_eq!(world.turn(&fork, Some(child)), 15);
}

#[test]
fn a_fork_that_ends_does_not_take_along_what_the_session_it_came_from_still_needs() {
    let mut world = World::new();
    let [parent, fork] = [world.open(FOREVER, 1), world.open(100, 2)];
    let conversation = prompt(1, 10);
    world.turn(&conversation, Some(parent));
    let longer = [&conversation[..160], &prompt(2, 5)].concat();
    world.turn(&longer, Some(fork));
    world.scheduler.advance(100);
    world.scheduler.close_session(fork);
    world.flood(3..20);
    assert_eq!((world.cached(parent), world.stats().evicted_protected), (10, 0));
}

#[test]
fn forks_hold_one_copy_of_what_they_share_and_write_to_blocks_of_their_own() {
    let mut world = World::new();
    let session = world.open(FOREVER, 0);
    world.turn(&prompt(1, 10), Some(session));
    let cached = world.scheduler.counts().cached;
    let forks: Vec<_> = (2..5).map(|seed| [prompt(1, 10), prompt(seed, 1)].concat()).collect();
    let ids: Vec<_> = forks.iter().map(|fork| world.arrive(fork, 20, Some(session))).collect();
    world.step();
    let paths =
        ids.iter().map(|&id| world.scheduler.sequence(id).unwrap().blocks.clone()).collect::<Vec<_>>();
    assert!(paths.iter().all(|path| path[..10] == paths[0][..10]), "one copy of what they share");
    let mut own: Vec<_> = paths.iter().flat_map(|path| &path[10..]).collect();
    own.sort();
    own.dedup();
    assert_eq!(
        own.len(),
        paths.iter().map(|path| path.len() - 10).sum::<usize>(),
        "no block has two writers"
    );
    assert_eq!(world.scheduler.counts().used, cached + own.len());
    world.drain();
}

#[test]
fn dropping_a_session_frees_what_it_alone_used() {
    let mut world = World::new();
    let [parent, child] = [world.open(FOREVER, 1), world.open(FOREVER, 2)];
    let common = prompt(1, 10);
    world.turn(&common, Some(parent));
    let fork = [&common[..160], &prompt(2, 5)].concat();
    world.turn(&fork, Some(child));
    assert_eq!(world.scheduler.drop_session(child), 5);
    assert_eq!(world.cached(parent), 10);
    assert!(world.scheduler.session(child).is_none());
    assert_eq!(world.turn(&fork, None), 10);
}

#[test]
fn dropping_a_session_that_runs_leaves_it_running() {
    let mut world = World::new();
    let session = world.open(FOREVER, 0);
    world.arrive(&prompt(1, 10), 50, Some(session));
    world.step();
    assert_eq!(world.scheduler.drop_session(session), 0);
    world.drain();
    assert_eq!(world.stats().protected, 0);
    assert_eq!(world.turn(&prompt(1, 10), None), 10);
}

#[test]
fn a_closed_sessions_slot_is_used_again_and_its_old_handle_names_nothing() {
    let mut world = World::new();
    let sessions: Vec<_> = (0..MAX_SESSIONS).map(|_| world.open(FOREVER, 0)).collect();
    assert_eq!(world.scheduler.open_session(), None);
    world.turn(&prompt(1, 10), Some(sessions[7]));
    world.scheduler.close_session(sessions[7]);
    let again = world.open(FOREVER, 0);
    assert!(world.scheduler.session(sessions[7]).is_none());
    world.scheduler.protect(sessions[7], FOREVER, 0);
    world.scheduler.close_session(sessions[7]);
    assert_eq!((world.cached(again), world.stats().protected), (0, 0));
}

#[derive(Debug, Clone)]
enum Act {
    /// A session's next turn: the conversation so far, cut back to a share of it, and so much more.
    Turn {
        session: usize,
        keep: usize,
        more: usize,
        answer: usize,
    },
    OneShot {
        begins_with: usize,
        share: usize,
        own: usize,
        answer: usize,
    },
    Steps(usize),
    Cancel(usize),
    Protect {
        session: usize,
        time: Tick,
        rank: u64,
    },
    Return(usize),
    Pass(Tick),
    Close {
        session: usize,
        drops: bool,
    },
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0usize..5, 0usize..120, 1usize..200, 1usize..40)
            .prop_map(|(session, keep, more, answer)| Act::Turn { session, keep: keep.min(100), more, answer }),
        4 => (0usize..5, 0usize..100, 1usize..200, 1usize..40)
            .prop_map(|(begins_with, share, own, answer)| Act::OneShot { begins_with, share, own, answer }),
        6 => (1usize..30).prop_map(Act::Steps),
        1 => any::<usize>().prop_map(Act::Cancel),
        3 => (0usize..5, 0u64..60, 0usize..3).prop_map(|(session, time, rank)| Act::Protect { session, time, rank: [0, 1, Tick::MAX][rank] }),
        1 => (0usize..5).prop_map(Act::Return),
        2 => (1u64..40).prop_map(Act::Pass),
        1 => (0usize..5, any::<bool>()).prop_map(|(session, drops)| Act::Close { session, drops }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn blocks_add_up_and_everything_ends_whatever_is_protected(acts in prop::collection::vec(act(), 1..80)) {
        let mut world = World::new();
        let mut now = 1;
        let mut sessions: Vec<(SessionHandle, Vec<u32>)> = (0..5).map(|_| (world.open(50, 0), vec![7; 40])).collect();
        for act in acts {
            match act {
                Act::Turn { session, keep, more, answer } => {
                    let (handle, conversation) = &mut sessions[session];
                    conversation.truncate(conversation.len() * keep / 100);
                    let new = (0..more as u32).map(|at| (at + session as u32) % 3);
                    conversation.extend(new);
                    conversation.truncate(BLOCKS * BLOCK_SIZE - 50);
                    let (handle, conversation) = (*handle, conversation.clone());
                    let origin = Origin { owner: session as u64 % 3, weight: 1 + session as u32, ..Origin::default() };
                    world.arrive_for(origin, &conversation, answer, Some(handle));
                }
                Act::OneShot { begins_with, share, own, answer } => {
                    let conversation = &sessions[begins_with].1;
                    let begin = &conversation[..conversation.len() * share / 100];
                    let prompt = [begin, &vec![5; own]].concat();
                    world.arrive(&prompt[..prompt.len().min(BLOCKS * BLOCK_SIZE - 50)], answer, None);
                }
                Act::Steps(steps) => (0..steps).for_each(|_| world.step()),
                Act::Cancel(index) => {
                    if let Some(&id) = world.live.keys().nth(index % world.live.len().max(1)) {
                        world.end(id);
                    }
                }
                Act::Protect { session, time, rank } => {
                    let until = if time == 0 { 0 } else { now + time };
                    world.scheduler.protect(sessions[session].0, until, rank);
                }
                Act::Return(session) => world.scheduler.note_return(sessions[session].0),
                Act::Pass(time) => {
                    now += time;
                    world.scheduler.advance(now);
                }
                Act::Close { session, drops } => {
                    let handle = sessions[session].0;
                    match drops {
                        true => drop(world.scheduler.drop_session(handle)),
                        false => world.scheduler.close_session(handle),
                    }
                    sessions[session].0 = world.open(now + 20, 1);
                }
            }
        }
        world.drain();
        world.scheduler.advance(FOREVER);
        prop_assert_eq!(world.stats().protected, 0);
        // Everything that is cached can be had.
        world.turn(&prompt(99, BLOCKS - 1), None);
        prop_assert_eq!(world.scheduler.counts().cached, BLOCKS - 1);
    }

    #[test]
    fn whoever_loses_a_block_held_most_for_its_weight(
        turns in prop::collection::vec((0usize..4, 1usize..20), 1..60),
        until in prop_oneof![Just(0), Just(FOREVER)],
    ) {
        const WEIGHTS: [u32; 4] = [1, 1, 2, 3];
        let mut world = World::new();
        let mut sessions: Vec<(usize, SessionHandle)> = Vec::new();
        for (seed, (owner, blocks)) in (0..).zip(turns) {
            let held = |world: &World| {
                let mut held = [0; 4];
                for (owner, session) in &sessions {
                    held[*owner] += world.scheduler.session(*session).unwrap().own;
                }
                held
            };
            let before = held(&world);
            let session = world.turn_of(owner as u64, WEIGHTS[owner], &prompt(seed, blocks), until);
            let after = held(&world);
            for loser in (0..4).filter(|&owner| after[owner] < before[owner]) {
                let last = f64::from(after[loser] as u32 + 1) / f64::from(WEIGHTS[loser]);
                let most = (0..4).map(|owner| f64::from(after[owner] as u32) / f64::from(WEIGHTS[owner]));
                prop_assert!(most.fold(0.0, f64::max) <= last + 1e-3, "{loser} of {before:?}, {after:?}");
            }
            sessions.push((owner, session));
        }
    }

    /// Turns one after the other, each of its own tokens, so that what may go is known exactly.
    #[test]
    fn the_protected_go_after_the_rest_and_a_session_knows_what_is_left(
        turns in prop::collection::vec((0usize..8, 1usize..40, 0u64..30), 1..60),
    ) {
        let mut world = World::new();
        let mut sessions: Vec<(SessionHandle, Vec<u32>)> = Vec::new();
        for (now, (session, blocks, time)) in (1u64..).zip(turns) {
            world.scheduler.advance(now);
            let (before, cached) = (world.stats(), world.scheduler.counts());
            if session < 4 && session < sessions.len() && sessions[session].1.len() + 17 < BLOCKS * BLOCK_SIZE / 2 {
                let (handle, conversation) = sessions[session].clone();
                let known = world.cached(handle);
                prop_assert_eq!(world.turn(&conversation, Some(handle)), known, "what it knows of is found");
                sessions[session].1.extend([session as u32; 17]);
                world.scheduler.protect(handle, now + time, time);
                continue;
            }
            let own = prompt(now as u32, blocks);
            let begins = (session < 4 && sessions.len() <= session).then(|| world.open(0, 0));
            world.turn(&own, begins);
            sessions.extend(begins.map(|handle| (handle, own)));
            let needed = blocks + 1;
            let after = world.stats();
            let protected = (after.evicted_protected - before.evicted_protected) as usize;
            let rest = (after.evicted_unprotected - before.evicted_unprotected) as usize;
            prop_assert_eq!(protected + rest, needed.saturating_sub(cached.free), "no more than it takes");
            let over = before.protected.saturating_sub(LIMIT);
            prop_assert!(protected >= over.min(protected + rest));
            if protected > over {
                prop_assert_eq!(rest, cached.cached - before.protected, "all others went before");
            }
        }
    }
}
