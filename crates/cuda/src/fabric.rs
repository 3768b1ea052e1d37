//! Memory of ranks of several nodes that all of them reach over the fabric between their GPUs (NVLink between the trays of a rack), and how ranks
//! agree on what each of them has to get done.
//!
//! Every rank allocates memory that has a fabric handle, and tells the others the handle over the nodes' connections; each maps all of it. The
//! ranks of one node map each other's as it is. Not yet run on several GPUs.

use crate::device::{Buffer, Device};
use crate::mapping::{FabricHandle, Handle, Mapping, Reach, granularity};
use rudder_comm::Member;
use rudder_ops::{OpError, Result};
use std::sync::Arc;

/// What ranks do without where a step towards it fails.
const WHAT: &str =
    "ranks of several nodes do not reach each other's memory, and add up by NCCL or through the hosts";

/// A rank's memory that all ranks reach, and theirs.
pub(crate) struct Regions {
    pub own: Buffer,
    /// Those of other nodes.
    pub others: Vec<Mapping>,
    /// Where each rank's begins, for this rank's kernels.
    pub addresses: Vec<u64>,
}

impl Regions {
    /// Shows the ranks each other's memory of so many bytes, of any content. All call it, and all get it or none: why, the first rank that could
    /// not says in the log. `fits` is whether this rank can have it at all.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn connect(device: &Device, member: &Member, bytes: usize, fits: Result<()>) -> Result<Option<Self>> {
        let (rank, local) = (member.rank(), member.local());
        let size = fits.and_then(|()| granularity(device, Reach::Fabric));
        let size = size.map(|granularity| bytes.next_multiple_of(granularity) as u64);
        let Some(sizes) = agree(member, WHAT, size.as_ref().copied())? else { return Ok(None) };
        let size = sizes.into_iter().max().unwrap_or(0) as usize;
        let mut words = vec![0; rank.world];
        member.share(device.ordinal() as u64, &mut words)?;
        let mut readers: Vec<_> = words[local.clone()].iter().map(|&ordinal| ordinal as i32).collect();
        readers.sort_unstable();
        readers.dedup();
        let own = Handle::memory(device, size, Reach::Fabric).and_then(|handle| {
            let (name, handle) = (handle.export()?, Arc::new(handle));
            Ok((name, Mapping::new(&handle, size, &readers, rank.index)?))
        });
        let Some((name, own)) = agree_on(member, WHAT, own)? else { return Ok(None) };
        let names = tell(member, name)?;
        let mut addresses = vec![0; rank.world];
        member.share(own.address(), &mut addresses)?;
        let import = |other: usize| {
            let handle = Arc::new(Handle::import(device, names[other])?);
            Mapping::new(&handle, size, &[device.ordinal()], rank.index)
        };
        let elsewhere = (0..rank.world).filter(|other| !local.contains(other));
        let others = elsewhere.clone().map(import).collect::<Result<Vec<_>>>();
        // Nobody leaves before all have what they were shown.
        let Some(others) = agree_on(member, WHAT, others)? else { return Ok(None) };
        elsewhere.zip(&others).for_each(|(other, mapping)| addresses[other] = mapping.address());
        Ok(Some(Self { own: device.mapped(own, bytes), others, addresses }))
    }
}

/// Tells all ranks each rank's handle.
pub(crate) fn tell(member: &Member, handle: FabricHandle) -> Result<Vec<FabricHandle>> {
    let world = member.rank().world;
    let (mut all, mut words) = (vec![FabricHandle::default(); world], vec![0; world]);
    for (i, word) in handle.into_iter().enumerate() {
        member.share(word, &mut words)?;
        all.iter_mut().zip(&words).for_each(|(handle, &word)| handle[i] = word);
    }
    Ok(all)
}

/// What all ranks got, which is not 0, in a step that every one of them got through; none, and in the log `what` follows and why, where one
/// did not.
pub(crate) fn agree(
    member: &Member,
    what: &str,
    step: std::result::Result<u64, &OpError>,
) -> Result<Option<Vec<u64>>> {
    let (rank, local) = (member.rank().index, member.local());
    let mut told = vec![0; member.rank().world];
    member.share(step.unwrap_or(0), &mut told)?;
    match (told.iter().position(|&got| got == 0), step) {
        (None, _) => return Ok(Some(told)),
        (Some(first), Err(reason)) if first == rank => tracing::info!("{what}: {reason}"),
        (Some(first), _) if !local.contains(&first) && rank == local.start => {
            tracing::info!("{what}: why, the log of rank {first}'s node says");
        }
        _ => {}
    }
    Ok(None)
}

/// Keeps what a step made, if all ranks got through it.
pub(crate) fn agree_on<T>(member: &Member, what: &str, step: Result<T>) -> Result<Option<T>> {
    let agreed = agree(member, what, step.as_ref().map(|_| 1))?;
    Ok(agreed.and(step.ok()))
}

#[cfg(all(test, feature = "emulate"))]
pub(crate) mod tests {
    use super::*;
    use crate::multicast::Window;
    use crate::peer_memory::PeerMemory;
    use crate::peers::PeerAccess;
    use rudder_comm::{Group, Terms};
    use std::net::TcpListener;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(60);

    pub fn terms(nodes: usize, world: usize) -> Terms {
        Terms { nodes, world, others: Vec::new() }
    }

    /// So many nodes' groups, which talk over TCP: that of one node alone over memory.
    pub fn groups(nodes: usize, world: usize) -> Vec<Group> {
        if nodes == 1 {
            return vec![Group::new(world)];
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = &listener.local_addr().expect("an address").to_string();
        let terms = &terms(nodes, world);
        std::thread::scope(|scope| {
            let follow = |node| scope.spawn(move || Group::follow(address, node, terms, PATIENCE));
            let others: Vec<_> = (1..nodes).map(follow).collect();
            let first = Group::lead(listener, terms, PATIENCE);
            let others = others.into_iter().map(|other| other.join().expect("no panic"));
            std::iter::once(first).chain(others).map(|group| group.expect("all join")).collect()
        })
    }

    /// Runs `work` on a thread for each rank of all nodes.
    pub fn on_all<T: Send>(groups: &[Group], work: impl Fn(Member) -> T + Sync) -> Vec<T> {
        let (work, members) = (&work, groups.iter().flat_map(Group::members));
        std::thread::scope(|scope| {
            let ranks: Vec<_> = members.map(|member| scope.spawn(move || work(member))).collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
        })
    }

    /// Whether each of four ranks, on two nodes, gets memory of the others and a window, in these IMEX channels.
    fn connected(channels: [u32; 4]) -> Vec<[bool; 2]> {
        on_all(&groups(2, 4), |member| {
            let device = Device::emulated_in(channels[member.rank().index]);
            let memory = PeerMemory::connect(&device, &member, PeerAccess::Auto).expect("no rank fails");
            let window = Window::connect(&device, &member, 100).expect("no rank fails");
            member.share(0, &mut [0; 4]).expect("no rank fails");
            [memory.is_some(), window.is_some()]
        })
    }

    #[test]
    fn where_one_rank_cannot_import_no_rank_reaches_another() {
        assert_eq!(connected([0; 4]), [[true; 2]; 4]);
        assert_eq!(connected([7, 7, 0, 0]), [[false; 2]; 4]);
        // Rank 2 has all that it needs.
        assert_eq!(connected([0, 0, 0, 1]), [[false; 2]; 4]);
    }

    #[test]
    fn ranks_that_share_a_device_are_left_to_the_hosts_on_whichever_nodes_they_are() {
        let shared = Device::emulated();
        let connect = |access, sharing: [usize; 2]| {
            on_all(&groups(2, 4), |member| {
                let own = Device::emulated();
                let device = if sharing.contains(&member.rank().index) { &shared } else { &own };
                let memory = PeerMemory::connect(device, &member, access).expect("no rank fails");
                member.share(0, &mut [0; 4]).expect("no rank fails");
                memory.is_some()
            })
        };
        for sharing in [[0, 1], [1, 2]] {
            assert_eq!(connect(PeerAccess::Auto, sharing), [false; 4]);
            assert_eq!(connect(PeerAccess::Always, sharing), [true; 4]);
        }
    }

    #[test]
    fn what_one_rank_did_not_get_no_rank_keeps() {
        for failing in 0..4 {
            let kept = on_all(&groups(2, 4), |member| {
                let fails = member.rank().index == failing;
                let step = if fails { Err(OpError::Backend("no".into())) } else { Ok(7) };
                agree_on(&member, "nothing is kept", step).expect("no rank fails")
            });
            assert_eq!(kept, [None; 4], "{failing}");
        }
    }

    #[test]
    fn handles_arrive_word_for_word_in_the_order_of_the_ranks() {
        let handle =
            |rank: usize| std::array::from_fn(|i| (u64::MAX - 3 * rank as u64).rotate_left(i as u32));
        let told = on_all(&groups(2, 4), |member| tell(&member, handle(member.rank().index)));
        let expected: Vec<FabricHandle> = (0..4).map(handle).collect();
        assert!(told.into_iter().all(|told| told.is_ok_and(|told| told == expected)));
    }
}
