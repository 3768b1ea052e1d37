//! Who a request's session is, and how long it is kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use rudder_scheduler::{
    BLOCK_SIZE, LONGEST_KEPT, MAX_PINNED, MAX_PINNED_OF_OWNER, MAX_SESSIONS, Origin, PastSession, PinError,
    Policy, SHORTEST_KEPT, Scheduler, SchedulerConfig, SequenceId, SessionInfo, SessionState, SessionTable,
    StepPlan, Tick,
};

struct World {
    scheduler: Scheduler,
    table: SessionTable,
    plan: StepPlan,
    next_id: SequenceId,
    now: Tick,
    /// Tokens still to generate, for every live sequence.
    live: BTreeMap<SequenceId, usize>,
}

impl World {
    fn new(blocks: usize) -> Self {
        let config = SchedulerConfig {
            blocks,
            max_sequences: 6,
            max_batch_tokens: 96,
            max_drafted: 0,
            prefix_cache: true,
            policy: Policy::Fair,
        };
        Self {
            scheduler: Scheduler::new(config),
            table: SessionTable::default(),
            plan: StepPlan::default(),
            next_id: 0,
            now: 1,
            live: BTreeMap::new(),
        }
    }

    fn arrive(
        &mut self,
        prompt: &[u32],
        answer: usize,
        key: Option<&str>,
        owner: Option<&str>,
    ) -> SequenceId {
        self.next_id += 1;
        let (key, owner) = (key.map(Arc::from), owner.map(Arc::from));
        let origin = Origin { owner: owner.as_deref().map_or(0, number_of), ..Origin::default() };
        self.scheduler.add(self.next_id, prompt.to_vec(), false, origin);
        self.table.arrive(&mut self.scheduler, self.next_id, key.as_ref(), owner.as_ref(), self.now);
        self.live.insert(self.next_id, answer);
        self.next_id
    }

    fn end(&mut self, id: SequenceId) {
        self.table.end(&mut self.scheduler, id, self.now);
        self.scheduler.remove(id);
        self.live.remove(&id);
    }

    fn step(&mut self) {
        self.scheduler.advance(self.now);
        self.scheduler.plan(&mut self.plan);
        self.table.admit(&mut self.scheduler, &self.plan);
        self.scheduler.commit(&self.plan);
        for chunk in self.plan.chunks.clone().iter().filter(|chunk| chunk.outputs > 0) {
            let left = self.live.get_mut(&chunk.id).unwrap();
            *left -= 1;
            match *left {
                0 => self.end(chunk.id),
                _ => self.scheduler.append(chunk.id, (chunk.id % 7) as u32),
            }
        }
    }

    fn drain(&mut self) {
        for _ in 0..100_000 {
            if self.live.is_empty() {
                return;
            }
            self.step();
        }
        panic!("work does not end");
    }

    /// A turn from its arrival to its end.
    fn turn(&mut self, prompt: &[u32], key: Option<&str>) {
        self.turn_of(None, prompt, key);
    }

    fn turn_of(&mut self, owner: Option<&str>, prompt: &[u32], key: Option<&str>) {
        self.arrive(prompt, 1, key, owner);
        self.drain();
    }

    fn pin(&mut self, key: &str, pinned: bool) -> Result<(), PinError> {
        self.table.pin(&mut self.scheduler, key, pinned, self.now)
    }

    fn cached_blocks(&self, key: &str) -> usize {
        self.table.get(&self.scheduler, key, self.now).expect(key).cached_tokens / BLOCK_SIZE
    }

    /// Turns of one session with such pauses between them.
    fn turns_apart(&mut self, key: &str, pauses: &[Tick]) {
        self.turn(&prompt(1, 4), Some(key));
        for pause in pauses {
            self.now += pause;
            self.turn(&prompt(1, 4), Some(key));
        }
    }

    fn list(&self) -> Vec<SessionInfo> {
        self.table.list(&self.scheduler, None, self.now)
    }

    fn info(&self, key: &str) -> SessionInfo {
        self.list().into_iter().find(|session| &*session.key == key).expect(key)
    }

    fn keys(&self, owner: Option<&str>) -> Vec<String> {
        let list = self.table.list(&self.scheduler, owner, self.now);
        list.iter().map(|session| session.key.to_string()).collect()
    }
}

/// An owner as the scheduler knows it.
fn number_of(owner: &str) -> u64 {
    u64::from(owner.as_bytes()[0])
}

/// `blocks` full blocks of tokens that nothing else begins with, and one token more.
fn prompt(seed: u32, blocks: usize) -> Vec<u32> {
    (0..(blocks * BLOCK_SIZE + 1) as u32).map(|position| seed * 100_000 + position).collect()
}

#[test]
fn a_session_is_kept_as_long_as_its_pauses_last() {
    let mut world = World::new(256);
    world.turns_apart("quick", &[1500; 20]);
    let quick = world.info("quick").kept_for.unwrap();
    assert!((SHORTEST_KEPT..20_000).contains(&quick), "{quick} ms");
    world.turns_apart("slow", &[100_000; 20]);
    let slow = world.info("slow").kept_for.unwrap();
    assert!((100_000..600_000).contains(&slow), "{slow} ms");
    world.now += slow - 1;
    world.step();
    assert_eq!(world.info("slow").state, SessionState::Kept);
    world.now += 1;
    assert_eq!((world.info("slow").state, world.info("slow").kept_for), (SessionState::Idle, None));
    world.turns_apart("rare", &[10 * LONGEST_KEPT; 20]);
    assert_eq!(world.info("rare").kept_for, Some(LONGEST_KEPT));
}

#[test]
fn a_new_session_is_kept_as_long_as_others_pauses_last() {
    let mut world = World::new(256);
    world.turn(&prompt(1, 4), Some("first"));
    let guess = world.info("first").kept_for.unwrap();
    assert!((60_000..150_000).contains(&guess), "{guess} ms before anything is known");
    (0..20).for_each(|index| world.turns_apart(&format!("quick-{index}"), &[1000; 20]));
    world.turn(&prompt(2, 4), Some("new"));
    assert_eq!(world.info("new").kept_for, Some(SHORTEST_KEPT));
}

#[test]
fn a_session_is_not_lost_while_its_turn_waits() {
    let mut world = World::new(64);
    let conversation = prompt(1, 20);
    world.turn(&conversation, Some("mine"));
    world.turn(&prompt(2, 20), None);
    for seed in 3..9 {
        world.arrive(&prompt(seed, 2), 70, None, None);
    }
    (0..3).for_each(|_| world.step()); // else a turn with so little to compute would come first
    world.arrive(&conversation, 1, Some("mine"), None);
    world.now += LONGEST_KEPT;
    (0..60).for_each(|_| world.step());
    assert_eq!(world.scheduler.waiting(), 1, "all places are taken");
    let stats = world.scheduler.retention_stats();
    assert!(stats.evicted_unprotected > 0 && stats.evicted_protected == 0, "{stats:?}");
    let mine = world.info("mine");
    assert_eq!((mine.state, mine.cached_tokens), (SessionState::Running, 20 * BLOCK_SIZE));
    world.drain();
}

#[test]
fn a_session_that_returned_outlasts_prompts_that_nobody_comes_back_to() {
    let mut world = World::new(128);
    world.turns_apart("mine", &[1000; 3]);
    world.turn(&prompt(2, 4), Some("once"));
    world.now += 2 * LONGEST_KEPT;
    for seed in 3..40 {
        world.turn(&prompt(seed, 20), None);
        world.now += 1000;
    }
    let [mine, once] = ["mine", "once"].map(|key| world.info(key));
    assert_eq!([mine.state, once.state], [SessionState::Idle; 2]);
    assert_eq!([mine.cached_tokens, once.cached_tokens], [4 * BLOCK_SIZE, 0]);
}

#[test]
fn requests_without_a_key_take_no_place_of_a_session_that_is_expected() {
    let mut world = World::new(64);
    for index in 0..MAX_SESSIONS {
        (0..2).for_each(|_| world.turn(&prompt(1, 1), Some(&index.to_string())));
    }
    world.turn(&prompt(2, 1), None);
    assert!((0..MAX_SESSIONS).all(|index| world.table.contains(&index.to_string())));
    world.now += 1;
    world.turn(&prompt(3, 1), Some("new"));
    assert!(world.table.contains("new") && !world.table.contains("0"));
    world.now += 2 * LONGEST_KEPT;
    world.step();
    world.turn(&prompt(4, 1), None);
    assert!(!world.table.contains("1"), "nobody is expected any more");
}

#[test]
fn a_turn_without_a_key_goes_on_from_the_last_prompt_of_its_owner() {
    let mut world = World::new(256);
    let first = prompt(1, 10);
    world.arrive(&first, 20, None, Some("a"));
    world.drain();
    assert_eq!(world.keys(Some("a")), [""; 0], "most never return");
    let second = [first.clone(), prompt(2, 3)].concat();
    world.arrive(&second, 20, None, Some("b"));
    world.drain();
    assert_eq!((world.keys(Some("a")).len(), world.keys(Some("b")).len()), (0, 0), "it is another's");
    world.arrive(&[first.clone(), prompt(3, 3)].concat(), 1, None, Some("a"));
    world.drain();
    let [session] = &world.table.list(&world.scheduler, Some("a"), world.now)[..] else {
        panic!("one is back")
    };
    assert_eq!((session.turns, session.state), (2, SessionState::Kept));
    world.arrive(&first[..5 * BLOCK_SIZE], 1, None, Some("a"));
    world.drain();
    assert_eq!(world.keys(Some("a")).len(), 1, "what only begins alike is not a turn");
    assert_eq!(world.table.list(&world.scheduler, Some("a"), world.now)[0].turns, 2);
}

#[test]
fn a_session_is_what_it_goes_on_from_although_something_longer_is_cached() {
    let mut world = World::new(256);
    let known_by = |world: &World| (world.info("a").tokens / BLOCK_SIZE, world.cached_blocks("a"));
    let (long, summary, title) = (prompt(1, 20), prompt(2, 5), prompt(3, 2));
    world.turn(&long, Some("a"));
    for beside in [&summary, &title, &title, &summary, &summary] {
        world.turn(beside, Some("a"));
        assert_eq!(known_by(&world), (20, 20), "nothing has gone on from it");
    }
    let compacted = [summary, prompt(4, 2)].concat();
    world.turn(&compacted, Some("a"));
    assert_eq!(known_by(&world), (7, 7));
    world.turn(&title, Some("a"));
    assert_eq!(known_by(&world), (7, 7));
    world.turn(&[compacted, prompt(5, 1)].concat(), Some("a"));
    assert_eq!(known_by(&world), (8, 8));
    world.turn(&[long, prompt(6, 1)].concat(), Some("a"));
    assert_eq!(known_by(&world), (21, 21), "the longer one is taken up again");
}

#[test]
fn the_longest_unused_session_makes_room_for_a_new_one_and_those_that_return_go_last() {
    let mut world = World::new(64);
    world.turn(&prompt(1, 1), Some("oldest"));
    world.now += 1;
    world.turn(&prompt(2, 1), Some("older"));
    for seed in 0..2 * MAX_SESSIONS as u32 {
        world.now += 1;
        world.turn(&prompt(3 + seed, 1), None);
    }
    assert_eq!(world.keys(None), ["older", "oldest"], "one-shot requests leave them alone");
    for index in 0..MAX_SESSIONS - 1 {
        world.now += 1;
        world.turn(&prompt(1, 1), Some(&index.to_string()));
    }
    assert!(world.table.contains("older") && !world.table.contains("oldest"));
    assert_eq!(world.list().len(), MAX_SESSIONS);
}

#[test]
fn pinned_sessions_are_kept_for_ever_and_are_few() {
    let mut world = World::new(64);
    for index in 0..=MAX_PINNED {
        world.turn(&prompt(1, 1), Some(&index.to_string()));
    }
    for index in 0..MAX_PINNED {
        assert_eq!(world.pin(&index.to_string(), true), Ok(()));
        assert_eq!(world.pin(&index.to_string(), true), Ok(()), "again");
    }
    let one_more = MAX_PINNED.to_string();
    assert_eq!(world.pin(&one_more, true), Err(PinError::TooManyInAll));
    assert_eq!(world.pin("none", true), Err(PinError::Unknown));
    world.now += 2 * LONGEST_KEPT;
    world.step();
    assert_eq!((world.info("0").state, world.info("0").kept_for), (SessionState::Kept, None));
    assert_eq!(world.pin("0", false), Ok(()));
    assert_eq!(world.info("0").state, SessionState::Idle, "its time was over");
    assert_eq!(world.pin(&one_more, true), Ok(()));
}

#[test]
fn one_owners_pins_are_not_anothers_until_all_are_given() {
    let mut world = World::new(64);
    for owner in ["a", "b", "c", "d"] {
        for index in 0..MAX_PINNED_OF_OWNER {
            let key = format!("{owner}{index}");
            world.turn_of(Some(owner), &prompt(1, 1), Some(&key));
            assert_eq!(world.pin(&key, true), Ok(()));
        }
        let one_more = format!("{owner} one more");
        world.turn_of(Some(owner), &prompt(1, 1), Some(&one_more));
        assert_eq!(world.pin(&one_more, true), Err(PinError::TooMany));
    }
    world.turn_of(Some("e"), &prompt(1, 1), Some("e"));
    assert_eq!(world.pin("e", true), Err(PinError::TooManyInAll), "{MAX_PINNED} are");
}

#[test]
fn pinned_sessions_go_last_of_their_owners_and_take_nothing_from_others() {
    let mut world = World::new(64);
    world.turn_of(Some("b"), &prompt(9, 8), Some("others"));
    world.turn_of(Some("a"), &prompt(1, 32), Some("pinned"));
    world.turn_of(Some("a"), &prompt(2, 16), Some("pausing"));
    world.pin("pinned", true).unwrap();
    let cached = |world: &World| ["others", "pinned", "pausing"].map(|key| world.cached_blocks(key));
    world.turn_of(Some("a"), &prompt(7, 20), None);
    assert_eq!(cached(&world), [8, 32, 3]);
    world.turn_of(Some("a"), &prompt(8, 30), None);
    assert_eq!(cached(&world), [8, 25, 0], "20 were nobody's, one was free");
}

#[test]
fn a_session_of_an_earlier_process_goes_on() {
    let mut world = World::new(64);
    world.now = 1_000_000;
    let past = PastSession {
        key: "past".into(),
        owner: None,
        pinned: false,
        turns: 7,
        tokens: 900,
        age: 500_000,
        idle: 400_000,
    };
    world.table.restore(&mut world.scheduler, past.clone(), world.now);
    world.table.restore(&mut world.scheduler, PastSession { turns: 3, ..past.clone() }, world.now);
    let pinned = PastSession { key: "pinned".into(), pinned: true, idle: 500_000, ..past };
    world.table.restore(&mut world.scheduler, pinned, world.now);
    let info = world.info("past");
    assert_eq!((info.state, info.turns, info.tokens, info.cached_tokens), (SessionState::Idle, 7, 900, 0));
    assert_eq!(
        (info.age, info.idle, world.keys(None)),
        (500_000, 400_000, vec!["past".into(), "pinned".into()])
    );
    assert_eq!((world.info("pinned").state, world.info("pinned").pinned), (SessionState::Kept, true));
    world.turn(&prompt(1, 4), Some("past"));
    let info = world.info("past");
    assert_eq!((info.turns, info.age, info.state), (8, 500_000, SessionState::Kept));
    assert!(info.kept_for.unwrap() < 150_000, "while it was not there, it did not pause");
    assert_eq!(world.table.get(&world.scheduler, "past", world.now), Some(info));
    assert_eq!(world.table.get(&world.scheduler, "none", world.now), None);
}

#[test]
fn a_removed_session_leaves_its_turns_running() {
    let mut world = World::new(64);
    let id = world.arrive(&prompt(1, 4), 20, Some("s"), None);
    world.step();
    assert_eq!(world.table.remove(&mut world.scheduler, "s"), Some(0));
    assert_eq!((world.table.running(), world.table.remove(&mut world.scheduler, "s")), (0, None));
    world.turn(&prompt(1, 4), Some("s"));
    assert_eq!(world.info("s").turns, 1, "another session of the same name");
    world.drain();
    assert!(!world.live.contains_key(&id));
    assert_eq!(world.scheduler.counts().used, 0);
}

#[derive(Debug, Clone)]
enum Act {
    /// A turn of this session, or of none, that begins with so much of its conversation.
    Turn {
        conversation: usize,
        keep: usize,
        more: usize,
        has_key: bool,
        owner: bool,
    },
    Steps(usize),
    Cancel(usize),
    Pass(Tick),
    Pin {
        conversation: usize,
        pinned: bool,
    },
    Remove(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (0usize..5, 0usize..120, 1usize..120, any::<bool>(), any::<bool>()).prop_map(
            |(conversation, keep, more, has_key, owner)| Act::Turn {
                conversation, keep: keep.min(100), more, has_key, owner,
            }
        ),
        6 => (1usize..30).prop_map(Act::Steps),
        1 => any::<usize>().prop_map(Act::Cancel),
        2 => (1u64..100_000).prop_map(Act::Pass),
        1 => (0usize..5, any::<bool>()).prop_map(|(conversation, pinned)| Act::Pin { conversation, pinned }),
        1 => (0usize..5).prop_map(Act::Remove),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_turn_ends_and_no_session_stays_running(acts in prop::collection::vec(act(), 1..60)) {
        const BLOCKS: usize = 48;
        let mut world = World::new(BLOCKS);
        let mut conversations = vec![vec![7; 40]; 5];
        for act in acts {
            match act {
                Act::Turn { conversation, keep, more, has_key, owner } => {
                    let tokens = &mut conversations[conversation];
                    tokens.truncate(tokens.len() * keep / 100);
                    tokens.extend((0..more as u32).map(|at| (at + conversation as u32) % 3));
                    tokens.truncate(BLOCKS * BLOCK_SIZE - 50);
                    let (prompt, key) = (tokens.clone(), format!("{owner}-{conversation}"));
                    world.arrive(&prompt, 1 + more % 20, has_key.then_some(&*key), owner.then_some("owner"));
                }
                Act::Steps(steps) => (0..steps).for_each(|_| world.step()),
                Act::Cancel(index) => {
                    if let Some(&id) = world.live.keys().nth(index % world.live.len().max(1)) {
                        world.end(id);
                    }
                }
                Act::Pass(time) => world.now += time,
                Act::Pin { conversation, pinned } => {
                    let key = format!("false-{conversation}");
                    let known = world.table.contains(&key);
                    let outcome = world.table.pin(&mut world.scheduler, &key, pinned, world.now);
                    prop_assert_eq!(outcome.is_ok(), known);
                }
                Act::Remove(conversation) => {
                    world.table.remove(&mut world.scheduler, &format!("true-{conversation}"));
                }
            }
            let running = [None, Some("owner")].map(|owner| {
                let list = world.table.list(&world.scheduler, owner, world.now);
                list.iter().filter(|session| session.state == SessionState::Running).count()
            });
            prop_assert!(running.iter().sum::<usize>() <= world.table.running());
            prop_assert!(world.table.running() <= world.live.len());
        }
        world.drain();
        prop_assert_eq!((world.table.running(), world.scheduler.counts().used), (0, 0));
        world.now += 2 * LONGEST_KEPT;
        world.step();
        let kept = [None, Some("owner")].map(|owner| world.table.list(&world.scheduler, owner, world.now));
        for session in kept.iter().flatten() {
            prop_assert_eq!(session.state == SessionState::Kept, session.pinned);
            prop_assert!(session.cached_tokens <= BLOCKS * BLOCK_SIZE);
        }
    }
}
