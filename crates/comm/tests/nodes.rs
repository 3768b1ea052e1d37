//! Groups over several processes, here threads that talk over TCP: they add up to the bits that threads of one process do, a step that
//! fails on one node fails on all and no other does, and whoever does not belong is told why.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use rudder_comm::{Failed, Group, JoinError, Member, Terms};

const PATIENCE: Duration = Duration::from_secs(30);

fn terms(nodes: usize, world: usize) -> Terms {
    Terms { nodes, world, others: vec![("model", "qwen2, fingerprint 12ab".into())] }
}

/// A listener on a free port, and its address.
fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    (listener, address)
}

/// The same group in each of so many nodes.
fn join(nodes: usize, world: usize) -> Vec<Group> {
    let ((listener, address), terms) = (listener(), terms(nodes, world));
    std::thread::scope(|scope| {
        let (terms, address) = (&terms, &address);
        let others: Vec<_> = (1..nodes)
            .map(|node| scope.spawn(move || Group::follow(address, node, terms, PATIENCE)))
            .collect();
        let mut groups = vec![Group::lead(listener, terms, PATIENCE).expect("all join")];
        groups.extend(others.into_iter().map(|other| other.join().expect("no panic").expect("it joins")));
        groups
    })
}

/// Runs `work` on a thread for each rank of all nodes, and returns what they return, in order.
fn on_all<T: Send>(groups: &[Group], work: impl Fn(Member) -> T + Sync) -> Vec<T> {
    let (work, members) = (&work, groups.iter().flat_map(Group::members));
    std::thread::scope(|scope| {
        let threads: Vec<_> = members.map(|member| scope.spawn(move || work(member))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// Numbers whose sum depends on the order.
fn number(rank: usize, step: usize, i: usize) -> f32 {
    let hash = (rank * 7919 + step * 104_729 + i * 31 + 17) as u32 % 2003;
    (hash as f32 - 1000.0) * 10f32.powi((hash % 13) as i32 - 6)
}

/// All collectives in turn, over odd sizes; the bits of what comes out.
fn collectives(member: Member) -> Vec<u32> {
    let rank = member.rank();
    let mut bits = Vec::new();
    for step in 0..60 {
        let len = [1, 3, 50, 0, 257, 9001][step % 6];
        let mut x: Vec<f32> = (0..len).map(|i| number(rank.index, step, i)).collect();
        member.all_reduce(&mut x).expect("no rank fails");
        let mut words = vec![0; rank.world];
        member.share((rank.index as u64) << 60 | step as u64, &mut words).expect("no rank fails");
        // Widths differ by rank.
        let (rows, width) = (step % 3, 1 + rank.index);
        let total: usize = (1..=rank.world).sum();
        let mut whole = vec![0.0; if rank.index == 0 { rows * total } else { 0 }];
        let part: Vec<f32> = (0..rows * width).map(|i| number(rank.index, step + 1, i)).collect();
        member.gather(&part, rows, (rank.index == 0).then_some(&mut whole)).expect("no rank fails");
        bits.extend(x.iter().chain(&whole).map(|x| x.to_bits()));
        bits.extend(words.iter().flat_map(|&word| [word as u32, (word >> 32) as u32]));
    }
    bits
}

#[test]
fn nodes_add_up_to_the_bits_of_threads() {
    for (nodes, world) in [(2, 2), (3, 3), (2, 4), (4, 4)] {
        let expected = on_all(&[Group::new(world)], collectives);
        let groups = join(nodes, world);
        assert!(on_all(&groups, collectives) == expected, "{world} ranks on {nodes} nodes");
        let ranks: Vec<_> = groups.iter().flat_map(Group::local).collect();
        assert_eq!((ranks, groups[1].node(), groups[0].nodes()), ((0..world).collect(), 1, nodes));
    }
}

/// Runs steps of three collectives on all nodes; the rank and step of `faults` fail in the middle. Returns how each step ended on node 0.
fn steps(groups: &[Group], count: usize, faults: &[(usize, usize)]) -> Vec<Result<(), Failed>> {
    // What one process does in a step.
    let run = |group: &Group, step: usize| {
        std::thread::scope(|scope| {
            for member in group.members() {
                scope.spawn(move || {
                    let rank = member.rank().index;
                    for i in 0..3 {
                        if i == 1 && faults.contains(&(rank, step)) {
                            group.fail(rank, format!("no memory in step {step}"));
                        }
                        let mut x = vec![1.0; 1000];
                        if let Err(failed) = member.all_reduce(&mut x) {
                            return group.fail(failed.rank, failed.reason);
                        }
                        assert_eq!(x, vec![member.rank().world as f32; 1000]);
                    }
                });
            }
        });
    };
    std::thread::scope(|scope| {
        for group in &groups[1..] {
            scope.spawn(move || {
                let mut body = Vec::new();
                while group.next(&mut body).expect("node 0 stays") {
                    run(group, usize::from(body[0]));
                    group.done().expect("node 0 stays");
                }
            });
        }
        let ended = (0..count).map(|step| {
            groups[0].begin(&[step as u8]);
            run(&groups[0], step);
            groups[0].end();
            groups[0].mend().map_or(Ok(()), Err)
        });
        let ended = ended.collect();
        groups[0].bye();
        ended
    })
}

#[test]
fn a_step_that_fails_on_one_node_fails_on_all_and_no_other_does() {
    for (nodes, world) in [(2, 2), (3, 3), (2, 4)] {
        for faulty in 0..world {
            let ended = steps(&join(nodes, world), 6, &[(faulty, 1), (faulty, 4)]);
            for (step, ended) in ended.into_iter().enumerate() {
                let failed = Failed { rank: faulty, reason: format!("no memory in step {step}") };
                let expected = if step % 3 == 1 { Err(failed) } else { Ok(()) };
                assert_eq!(ended, expected, "rank {faulty} of {world} on {nodes} nodes, step {step}");
            }
        }
        // Several at once.
        let ended = steps(&join(nodes, world), 3, &[(0, 1), (world - 1, 1)]);
        assert!(ended[1].is_err() && ended[0].is_ok() && ended[2].is_ok());
    }
}

/// Waits as for work that only the other ranks could end.
fn wait(group: &Group) -> Failed {
    let members = group.members();
    loop {
        match members[0].check() {
            Ok(()) => std::thread::yield_now(),
            Err(failed) => return failed,
        }
    }
}

#[test]
fn who_waits_elsewhere_than_in_a_collective_hears_of_a_rank_that_failed_on_another_node() {
    let groups = join(3, 3);
    let failed = |rank| Failed { rank, reason: "no memory".into() };
    for faulty in [0, 1, 2] {
        groups[0].begin(&[]);
        std::thread::scope(|scope| {
            for node in [1, 2] {
                let group = &groups[node];
                scope.spawn(move || {
                    assert_eq!(group.next(&mut Vec::new()), Ok(true));
                    if node != faulty {
                        assert_eq!(wait(group), failed(faulty));
                    }
                    group.fail(faulty, "no memory".into());
                    group.done().expect("node 0 stays");
                });
            }
            if faulty != 0 {
                assert_eq!(wait(&groups[0]), failed(faulty));
            }
            groups[0].fail(faulty, "no memory".into());
            groups[0].end();
        });
        assert_eq!(groups[0].mend(), Some(failed(faulty)));
    }
    // What was heard and what was left over is of no other step.
    assert_eq!(steps(&groups, 2, &[]), [Ok(()), Ok(())]);
}

#[test]
fn nodes_agree_and_hear_of_one_that_withdraws() {
    let groups = join(3, 3);
    let agreed = |word: fn(usize) -> u64| -> Vec<Result<Vec<u64>, Failed>> {
        std::thread::scope(|scope| {
            let agree = groups.iter().map(|group| scope.spawn(move || group.agree(word(group.node()))));
            let agree: Vec<_> = agree.collect();
            agree.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    };
    assert_eq!(
        agreed(|node| u64::MAX - node as u64),
        vec![Ok(vec![u64::MAX, u64::MAX - 1, u64::MAX - 2]); 3]
    );
    assert_eq!(agreed(|_| 7), vec![Ok(vec![7; 3]); 3]);
    groups[2].withdraw("no memory for the weights".into());
    std::thread::scope(|scope| {
        let first = scope.spawn(|| groups[1].agree(1));
        let failed = groups[0].agree(1).expect_err("node 2 is out");
        assert_eq!(failed, Failed { rank: 2, reason: "node 2: no memory for the weights".into() });
        groups[0].withdraw(failed.reason);
        let failed = first.join().expect("no panic").expect_err("node 0 is out");
        assert_eq!(failed.reason, "node 0: node 2: no memory for the weights");
    });
    assert_eq!(Group::new(2).agree(5), Ok(vec![5]));
}

/// What a node sends first.
fn hello(text: &str) -> Vec<u8> {
    let words = [text.len() as u32, 0, 1, 0];
    words.into_iter().flat_map(u32::to_le_bytes).chain(text.bytes()).collect()
}

/// Connects as a node would, and says `text`.
fn say(address: &str, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("node 0 listens");
    stream.write_all(&hello(text)).expect("it takes a hello");
    stream.read_exact(&mut [0; 16]).expect("it answers");
    stream
}

#[test]
fn a_node_that_dies_ends_the_group_and_is_named() {
    let ((listener, address), terms) = (listener(), terms(2, 2));
    let text = |purpose| {
        format!(
            "rudder-node 2\n{purpose}\n1\nnnodes=2\ntensor_parallel_size=2\nmodel=qwen2, fingerprint 12ab\n"
        )
    };
    let (group, dies) = std::thread::scope(|scope| {
        let leader = scope.spawn(|| Group::lead(listener, &terms, PATIENCE));
        let node = [say(&address, &text("pulse")), say(&address, &text("data"))];
        (leader.join().expect("no panic").expect("the node joins"), node)
    });
    group.begin(&[]);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| group.members()[0].all_reduce(&mut [1.0]));
        drop(dies);
        let failed = waits.join().expect("no panic").expect_err("nobody is there");
        assert!(failed.rank == 1 && failed.reason.starts_with("node 1 at 127.0.0.1 is gone: "), "{failed}");
    });
    group.end();
    assert!(group.mend().is_some());
    assert!(group.lost().is_some_and(|failed| failed.rank == 1));
    // It does not come back.
    group.begin(&[]);
    assert!(group.mend().is_some_and(|failed| failed.reason.contains("node 1 at 127.0.0.1 is gone")));
}

#[test]
fn a_node_is_told_that_node_0_ends_in_good_order() {
    let mut groups = join(2, 2);
    let other = groups.pop().expect("node 1");
    drop(groups);
    assert_eq!((other.next(&mut Vec::new()), other.lost()), (Ok(false), None));
}

#[test]
fn a_node_that_ends_ends_the_group_for_all() {
    let mut groups = join(3, 3);
    drop(groups.pop());
    let failed = groups[0].lost().expect("node 2 is gone");
    assert_eq!((failed.rank, &*failed.reason), (2, "node 2 at 127.0.0.1 is gone: it has ended"));
    let failed = groups[1].next(&mut Vec::new()).expect_err("node 0 has given up");
    assert!(failed.reason.starts_with("node 0 at 127.0.0.1:"), "{failed}");
    assert_eq!(groups[1].lost(), Some(failed));
}

#[test]
fn who_does_not_belong_is_told_why_and_node_0_goes_on_waiting() {
    let ((listener, address), terms) = (listener(), terms(2, 4));
    std::thread::scope(|scope| {
        let leader = scope.spawn(|| Group::lead(listener, &terms, PATIENCE));
        let refusal = |node, terms: &Terms| {
            let refused: Result<Group, JoinError> = Group::follow(&address, node, terms, PATIENCE);
            refused.err().expect("a refusal").to_string()
        };
        let other = Terms { others: vec![("model", "llama".into())], ..terms.clone() };
        let alike = "start all nodes with the same version, settings and model files";
        let model = "model is llama on node 1 and qwen2, fingerprint 12ab on node 0";
        assert_eq!(refusal(1, &other), format!("{model}; {alike}"));
        let other = Terms { nodes: 4, ..terms.clone() };
        assert_eq!(refusal(1, &other), format!("nnodes is 4 on node 1 and 2 on node 0; {alike}"));
        assert!(refusal(2, &terms).contains("node_rank 2 is not from 1 to 1"));
        assert!(refusal(0, &terms).contains("node_rank 0"));
        let other = Terms { nodes: 3, ..terms.clone() };
        assert_eq!(refusal(1, &other), "3 nodes cannot have as many of 4 ranks each");
        // Strangers.
        for text in [
            "",
            "rudder-node 0\npulse\n1\n",
            "rudder-node 2\npulse\n",
            "rudder-node 2\ndata\n-1\n",
            "\n\n\n\0",
        ] {
            let mut stream = say(&address, text);
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("a text");
            assert!(answer.contains("it is no node, or another version"), "{text:?}: {answer}");
        }
        for bytes in [&b"GET / HTTP/1.1\r\nHost: node\r\n\r\n"[..], &[255; 40], b"", &hello("torn")[..18]] {
            let mut stream = TcpStream::connect(&address).expect("node 0 listens");
            stream.write_all(bytes).expect("it takes anything");
        }
        let node = Group::follow(&address, 1, &terms, PATIENCE).expect("it belongs");
        let group = leader.join().expect("no panic").expect("node 1 joins");
        assert_eq!((group.local(), node.local()), (0..2, 2..4));
    });
}

#[test]
fn two_nodes_of_one_number_are_told_apart_and_missing_ones_named() {
    let ((listener, address), terms) = (listener(), terms(3, 3));
    std::thread::scope(|scope| {
        let leader = scope.spawn(|| Group::lead(listener, &terms, Duration::from_secs(8)).err());
        let first = Group::follow(&address, 2, &terms, PATIENCE).expect("it belongs");
        let second = Group::follow(&address, 2, &terms, PATIENCE).err().expect("a refusal").to_string();
        assert!(second.contains("there is a node 2 already"), "{second}");
        let refusal = leader.join().expect("no panic").expect("node 1 is missing").to_string();
        assert_eq!(refusal, "node 1 has not come in 8 s");
        drop(first);
    });
}
