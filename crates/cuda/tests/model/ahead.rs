//! Steps that are queued while the one before them runs: they draw what steps draw that land one by one, on one device and over ranks.

use super::common::{OPTIONS, cuda, model, on_gpu};
use super::flights::{
    Grounded, Happening, Watched, When, ask, drawn, engine, expect_answers, expect_preempted, faults, greedy,
    in_turn, limits_and_stops,
};
use super::{BLOCKS, in_ranks};
use rudder_comm::Group;
use rudder_cuda::PeerAccess;
use rudder_model::{KvSize, Model};
use rudder_ops::reference::Reference;
use rudder_ops::{Batch, SampleRow, Sampled, SamplingParams};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How ranks reach each other's memory: from the second step on, and, emulated, at once, a switch adding up.
const RANKS: [(usize, PeerAccess); 2] = [(2, PeerAccess::Auto), (4, PeerAccess::Multicast)];

/// Whether ranks are all on one GPU, which land every step unless they are told to reach each other's memory.
fn lands(access: PeerAccess) -> bool {
    access == PeerAccess::Auto && cuda().is_none_or(|cuda| on_gpu(&cuda))
}

/// How the drawn tokens of a sequence come about, from its two prompts on: each is known before the step that reads it is queued, or is not.
fn continued(model: &mut dyn Model, ahead: bool) -> [Vec<u32>; 2] {
    const STEPS: usize = 20;
    let prompts: [Vec<u32>; 2] = [(3..12).collect(), (40..57).collect()];
    // The first ends before the second does.
    let last = [STEPS / 2, STEPS];
    let params = |s| SamplingParams { temperature: 0.8, seed: 5 + s as u64, ..Default::default() };
    let params = [params(0), params(1)];
    let row = |s: usize, step: usize| SampleRow {
        params: &params[s],
        counts: None,
        drafted: &[],
        position: (prompts[s].len() + step) as u64,
        mask: None,
        forced: None,
    };
    let live = |step: usize| (0..2).filter(move |&s| step < last[s]);
    let (mut found, mut drawn) = ([Vec::new(), Vec::new()], Vec::new());
    let mut batch = Batch::default();
    for step in 0..STEPS {
        batch.clear();
        for s in live(step) {
            let computed = prompts[s].len() + step - 1;
            match (step, ahead) {
                (0, _) => batch.push(&prompts[s], 0, &BLOCKS[s], 1),
                (_, false) => batch.push(&[found[s][step - 1]], computed, &BLOCKS[s], 1),
                (_, true) => {
                    let output = live(step - 1).position(|other| other == s).expect("it lived before");
                    batch.push_drawn(output as u32, computed, &BLOCKS[s]);
                }
            }
        }
        model.forward(&batch).expect("a step");
        let rows: Vec<_> = live(step).map(|s| row(s, step)).collect();
        let mut keep = |step: usize, drawn: &[Sampled]| {
            assert_eq!(drawn.len(), live(step).count());
            for (s, sampled) in live(step).zip(drawn) {
                assert_eq!(sampled.fault, None);
                found[s].push(sampled.token);
            }
        };
        if !ahead {
            model.sample(&rows, &mut drawn).expect("a draw");
            keep(step, &drawn);
            continue;
        }
        // The last step's forward pass is queued; what it goes on from arrives only now.
        if step > 0 {
            model.drawn(&mut drawn).expect("what was drawn");
            keep(step - 1, &drawn);
        }
        model.draw(&rows).expect("a draw");
        if step + 1 == STEPS {
            model.drawn(&mut drawn).expect("what was drawn last");
            keep(step, &drawn);
        }
    }
    found
}

#[test]
fn steps_that_go_on_from_tokens_nobody_has_seen_draw_the_same() {
    for name in ["qwen2", "gptoss"] {
        let (Some(one), Some(other)) = (cuda(), cuda()) else { return };
        let expected = continued(&mut *model(name, one, OPTIONS.kv), false);
        assert_eq!(continued(&mut *model(name, other, OPTIONS.kv), true), expected, "{name}");
    }
    for (name, (world, access)) in ["qwen2", "qwen3moe"].into_iter().zip(RANKS) {
        let Some(mut ranks) = in_ranks(name, Group::new(world), OPTIONS.kv, access) else { return };
        let expected = continued(&mut *ranks.model, false);
        assert!(ranks.model.draws_ahead() || lands(access));
        if ranks.model.draws_ahead() {
            assert_eq!(continued(&mut *ranks.model, true), expected, "{name}, {world} ranks");
        }
    }
}

#[test]
fn a_step_goes_on_from_outputs_that_were_drawn_and_a_backend_that_can() {
    let Some(cuda) = cuda() else { return };
    let mut ahead = model("qwen2", cuda, OPTIONS.kv);
    let params = SamplingParams::default();
    let row =
        SampleRow { params: &params, counts: None, drafted: &[], position: 9, mask: None, forced: None };
    let [prompt, next] = two_steps();
    assert!(ahead.draws_ahead() && ahead.drawn(&mut Vec::new()).is_err(), "nothing was drawn");
    ahead.forward(&prompt).expect("a step");
    ahead.sample(&[row], &mut Vec::new()).expect("a draw");
    assert!(ahead.forward(&next).is_err(), "the step before has told what it drew");
    ahead.forward(&prompt).expect("a step");
    ahead.draw(&[row]).expect("a draw");
    let mut beyond = Batch::default();
    beyond.push_drawn(1, 9, &BLOCKS[0]);
    assert!(ahead.forward(&beyond).is_err(), "of one output, the second");
    ahead.forward(&next).expect("the model stays usable");
    assert!(ahead.draw(&[row]).is_err(), "two on their way");
    assert!(ahead.drawn(&mut Vec::new()).is_ok() && ahead.drawn(&mut Vec::new()).is_err());
    let many = SamplingParams { logprobs: Some(33), ..params.clone() };
    assert!(ahead.draw(&[SampleRow { params: &many, ..row }]).is_err());
    assert!(ahead.draw(&[row]).is_ok() && ahead.drawn(&mut Vec::new()).is_ok());

    let mut behind = model("qwen2", Reference::new(), OPTIONS.kv);
    behind.forward(&prompt).expect("a step");
    assert!(!behind.draws_ahead() && behind.draw(&[row]).is_err() && behind.forward(&next).is_err());
}

/// A prompt, and the step that goes on from what is drawn for it.
fn two_steps() -> [Batch; 2] {
    let (mut prompt, mut next) = (Batch::default(), Batch::default());
    prompt.push(&[3; 9], 0, &BLOCKS[0], 1);
    next.push_drawn(0, 9, &BLOCKS[0]);
    [prompt, next]
}

#[test]
fn blocks_are_read_beside_a_step_in_flight_as_they_are_once_it_has_landed() {
    let Some(cuda) = cuda() else { return };
    let mut model = model("qwen2", cuda, OPTIONS.kv);
    let bytes = model.kv_block().expect("blocks move").bytes;
    let read = |model: &mut dyn Model, block: usize| {
        let mut found = vec![0; bytes];
        model.export_block(BLOCKS[0][block], &mut found).expect("a block");
        found
    };
    let params = SamplingParams::default();
    let row = |position: u64| SampleRow {
        params: &params,
        counts: None,
        drafted: &[],
        position,
        mask: None,
        forced: None,
    };
    // The prompt fills a block, and the step that flies begins another.
    let (mut prompt, mut next, mut last) = (Batch::default(), Batch::default(), Batch::default());
    prompt.push(&[3; 16], 0, &BLOCKS[0], 1);
    next.push_drawn(0, 16, &BLOCKS[0]);
    last.push(&[3], 17, &BLOCKS[0], 1);
    model.forward(&prompt).and_then(|()| model.draw(&[row(16)])).expect("a step");
    model.forward(&next).and_then(|()| model.drawn(&mut Vec::new())).expect("a step behind it");
    let beside = read(&mut *model, 0);
    model.draw(&[row(17)]).and_then(|()| model.drawn(&mut Vec::new())).expect("it lands");
    let begun = read(&mut *model, 1);
    assert!(beside.iter().any(|&byte| byte != 0) && begun.iter().any(|&byte| byte != 0));
    assert!(read(&mut *model, 0) == beside);
    model.forward(&last).and_then(|()| model.sample(&[row(18)], &mut Vec::new())).expect("a step that lands");
    assert!(read(&mut *model, 0) == beside && read(&mut *model, 1) != begun);
}

#[test]
fn ranks_draw_ahead_once_they_have_met_in_each_others_memory_and_only_there() {
    let [prompt, next] = two_steps();
    let params = SamplingParams::default();
    let row =
        SampleRow { params: &params, counts: None, drafted: &[], position: 9, mask: None, forced: None };
    for (access, flies) in [
        (PeerAccess::Never, [false; 3]),
        (PeerAccess::Auto, [false, false, true]),
        (PeerAccess::Always, [false, true, true]),
    ] {
        let Some(mut ranks) = in_ranks("qwen2", Group::new(2), OPTIONS.kv, access) else { return };
        for flies in flies.map(|flies| flies && !lands(access)) {
            assert_eq!(ranks.model.draws_ahead(), flies, "{access:?}");
            ranks.model.forward(&prompt).expect("a step");
            ranks.model.draw(&[row]).expect("rank 0 draws");
            assert_eq!(ranks.model.forward(&next).is_ok(), ranks.model.draws_ahead(), "{access:?}");
            ranks.model.drawn(&mut Vec::new()).expect("what was drawn");
        }
    }
}

/// A model of ranks that is watched, and its count.
fn watched(
    (world, access): (usize, PeerAccess),
    kv_blocks: usize,
    happening: impl FnOnce(&Group) -> Option<(When, Happening)>,
) -> Option<(Watched, Arc<AtomicUsize>)> {
    let group = Group::new(world);
    let inner = in_ranks("qwen2", group.clone(), KvSize::Blocks(kv_blocks), access)?.model;
    Some(Watched::new(inner, happening(&group)))
}

#[test]
fn an_engine_answers_the_same_with_steps_in_flight() {
    let kv = KvSize::Blocks(16);
    let (Some(one), Some(other)) = (cuda(), cuda()) else { return };
    let (grounded, flying) = (model("qwen2", one, kv), model("qwen2", other, kv));
    assert!(flying.draws_ahead());
    let requests = [(0, 40), (1, 9), (2, 40)].map(|(i, max_tokens)| drawn(i, max_tokens));
    let expected = in_turn(Box::new(Grounded(grounded)), &requests);
    assert_eq!(expected.iter().map(Vec::len).collect::<Vec<_>>(), [40, 9, 40]);
    assert_eq!(in_turn(flying, &requests), expected);
}

#[test]
fn an_engine_over_ranks_answers_the_same_with_steps_in_flight_to_every_limit_and_stop() {
    for ranks in RANKS {
        let grounded = || Some(Box::new(Grounded(Box::new(watched(ranks, 16, |_| None)?.0))));
        let Some(model) = grounded() else { return };
        let full = in_turn(model, &[drawn(2, 24)]).remove(0);
        assert_eq!(full.len(), 24);
        let requests = limits_and_stops(&full);
        let (Some(grounded), Some((flying, flights))) = (grounded(), watched(ranks, 16, |_| None)) else {
            return;
        };
        let expected = in_turn(grounded, &requests);
        assert_eq!(in_turn(Box::new(flying), &requests), expected, "{ranks:?}");
        assert!(flights.load(Ordering::SeqCst) > 40 || lands(ranks.1));
    }
}

#[test]
fn an_engine_over_ranks_answers_each_its_own_side_by_side_and_preempted() {
    for ranks in RANKS {
        let Some((flying, flights)) = watched(ranks, 8, |_| None) else { return };
        expect_preempted(&engine(Box::new(flying), 8));
        let flights = flights.load(Ordering::SeqCst);
        assert!(flights > 10 || lands(ranks.1), "{flights}");
    }
}

#[test]
fn a_rank_that_fails_in_flight_ends_its_requests_and_the_engine_goes_on() {
    for (ranks, faulty) in RANKS.into_iter().zip([1, 3]) {
        for fault in 0..3 {
            let mut said = "";
            let happening = |group: &Group| {
                let (when, what, message) = faults(group, faulty).into_iter().nth(fault)?;
                said = message;
                Some((when, what))
            };
            let Some((flying, flights)) = watched(ranks, 16, happening) else { return };
            let engine = engine(Box::new(flying), 16);
            let requests = [greedy(1, 12), greedy(4, 12)];
            let failed = ask(&engine, &requests);
            if lands(ranks.1) {
                continue;
            }
            assert!(
                failed.iter().any(|answer| answer.as_ref().is_err_and(|m| m.contains(said))),
                "{failed:?}"
            );
            let before = flights.load(Ordering::SeqCst);
            expect_answers(&engine, &requests);
            assert!(flights.load(Ordering::SeqCst) > before + 4);
        }
    }
}
