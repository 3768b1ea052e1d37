//! Sums over ranks, and the gathering of their logits, by kernels that read each other's memory: nothing comes by the host, and a decode
//! step stays one graph.
//!
//! Ranks of one process reach each other's memory as it is, those of several nodes over the fabric that their GPUs share ([`crate::fabric`]).
//! Where a switch between the GPUs adds up by itself ([`crate::multicast`]), long sums go through it, in an order of its own.
//!
//! kernels/collectives.cu says how ranks meet. Not yet run on several GPUs.

use crate::device::{Arg, Buffer, Device, Grid, Staging};
use crate::fabric::Regions;
use crate::mapping::Mapping;
use crate::matmul::{Rows, Vector};
use crate::multicast::Window;
use crate::peers::PeerAccess;
use crate::step::bytes;
use crate::tensor::{Tensor, check};
use rudder_comm::{Member, Rank};
use rudder_ops::{OpError, Result};
use std::time::Duration;

/// Most ranks that sum so; as in collectives.cu.
pub(crate) const MOST_RANKS: usize = 8;
/// Words of a block's flags and epoch; as in collectives.cu.
const FLAG_WORDS: usize = 32;
/// Blocks of every launch: few enough to run at the same time on any GPU. Emulated, where what they cost is their threads, a few show as much.
const BLOCKS: usize = if cfg!(feature = "emulate") { 8 } else { 64 };
/// The same where ranks share a device: a multiprocessor has room for one block of the widest kernels, and all ranks' must run at the same time.
const BLOCKS_SIDE_BY_SIDE: usize = 8;
/// Most threads of a block, and most vectors of four that each holds of a row; as in collectives.cu.
const THREADS: usize = 512;
const HELD_VECTORS: usize = 8;
/// Bytes of what a rank shows at a time. Longer messages take several launches.
pub(crate) const SIDE: usize = 8 << 20;
/// Bytes of a region: flags and epochs, then two sides.
const REGION: usize = 4 * BLOCKS * FLAG_WORDS + 2 * SIDE;
/// Where epochs begin: so that they soon wrap, and not after a day.
const START: u32 = 128u32.wrapping_neg();
/// How long a kernel waits for another rank's. Longer than any rank is late, for allocations and files too.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that a link brings while ranks meet once: 3 µs at 450 GB/s, both of data sheets and others' reports, not measured.
const MEETING_BYTES: usize = 1_350_000;
/// Where in the kernels' `Peers` the window's addresses lie.
const WINDOW: usize = 8 * (MOST_RANKS + 4) + 4 * MOST_RANKS;
/// Most rows of a sum that is normed at once: a few for each block.
const NORM_ROWS: usize = 256;

/// How ranks sum in each other's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shots {
    /// Each reads what all show.
    Once,
    /// Each adds up a slice, and then reads the others'.
    Twice,
    /// Each has the switch add up a slice and write it to all.
    Multicast,
}

/// A rank's way to the others' memory.
pub(crate) struct PeerMemory {
    device: Device,
    rank: Rank,
    /// What the other ranks reach: flags and epochs, then two sides.
    region: Buffer,
    /// The regions of ranks of other nodes, mapped. What other ranks here have is reached as it is.
    _others: Vec<Mapping>,
    /// Two more sides, which the switch reaches on all ranks at once, if it does.
    window: Option<Window>,
    /// Whether all sums go through the switch that can.
    always_multicast: bool,
    /// The kernels' `Peers`.
    table: Buffer,
    /// A word that a kernel sets when it has waited for too long.
    broken: Staging,
    /// Blocks of every launch, the same number on all ranks.
    blocks: usize,
    /// Widths of the parts that are gathered, once they were, and the stage that the kernels are told them by.
    widths: Option<[u64; MOST_RANKS]>,
    stage: Staging,
}

impl PeerMemory {
    /// Shows the ranks each other's memory. All of them call it, with the same `access`, and all get it or none: where there are too many, or
    /// a device does not reach another, on another node too, or, unless tests ask for it, ranks share a device, where a kernel that waits for
    /// another could keep it from running.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn connect(device: &Device, member: &Member, access: PeerAccess) -> Result<Option<Self>> {
        let rank = member.rank();
        if rank.world > MOST_RANKS {
            return Ok(None);
        }
        let (mut ids, mut regions) = ([0; MOST_RANKS], [0; MOST_RANKS]);
        let over_nodes = member.local().len() < rank.world;
        member.share(if over_nodes { device.uuid() } else { device.id() }, &mut ids[..rank.world])?;
        let ids = &ids[..rank.world];
        let side_by_side = (1..ids.len()).any(|i| ids[..i].contains(&ids[i]));
        let apart = access != PeerAccess::Auto || !side_by_side;
        let shown = match over_nodes {
            true => Regions::connect(device, member, REGION, apart.then_some(()).ok_or_else(share_a_gpu))?,
            false => in_one_process(device, member, ids, apart)?,
        };
        let Some(Regions { own: region, others, addresses }) = shown else { return Ok(None) };
        regions[..rank.world].copy_from_slice(&addresses);
        write_flags(&region)?;
        let wanted = match access {
            PeerAccess::Auto => shots(rank.world, SIDE, true) == Shots::Multicast,
            access => access == PeerAccess::Multicast,
        };
        // A device has one place among those of a multicast object, and binding waits for as many as there are ranks.
        let wanted = wanted && !side_by_side;
        let window = if wanted { Window::connect(device, member, 2 * SIDE)? } else { None };
        let broken = Staging::new(device, 16)?;
        let (table, world) = (device.buffer(WINDOW + 16)?, rank.world as u64);
        let last =
            [broken.address(), PATIENCE.as_nanos() as u64, SIDE as u64, rank.index as u64 | world << 32];
        table.write(0, bytes(&regions))?;
        table.write(8 * MOST_RANKS, bytes(&last))?;
        table.write(WINDOW, bytes(&window.as_ref().map_or([0; 2], |window| [window.own(), window.all()])))?;
        let stage = Staging::new(device, 4 * MOST_RANKS)?;
        // Nobody leaves before all have what their kernels need.
        member.share(0, &mut regions[..rank.world])?;
        let (device, always_multicast) = (device.clone(), access == PeerAccess::Multicast);
        Ok(Some(Self {
            device,
            rank,
            region,
            _others: others,
            window,
            always_multicast,
            table,
            broken,
            blocks: if side_by_side { BLOCKS_SIDE_BY_SIDE } else { BLOCKS },
            widths: None,
            stage,
        }))
    }

    /// Has this rank's kernels wait so long from here on.
    #[cfg(all(test, feature = "emulate"))]
    pub fn wait_for(&self, patience: Duration) -> Result<()> {
        self.table.write(8 * (MOST_RANKS + 1), bytes(&[patience.as_nanos() as u64]))
    }

    /// Sets everything back after a step that some ranks did not end. All call it; nobody waits for ever in what they left.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn reset(&mut self, member: &Member) -> Result<()> {
        let mut all = [0; MOST_RANKS];
        self.give_up(); // what is still queued may wait for what others did not queue
        self.device.synchronize()?;
        member.share(0, &mut all[..self.rank.world])?; // no kernel of theirs writes to the region any more
        self.broken.memory()?[..4].fill(0);
        write_flags(&self.region)?;
        member.share(0, &mut all[..self.rank.world])?;
        Ok(())
    }

    /// Whether a kernel waited in vain, of all that were waited for.
    pub fn is_broken(&mut self) -> Result<bool> {
        Ok(self.broken.memory()?[..4] != [0; 4])
    }

    /// Has kernels that run wait for no other rank any more; what they put out means nothing until [`PeerMemory::reset`].
    pub fn give_up(&self) {
        self.broken.raise();
    }

    /// Makes `x` the sum over the ranks.
    pub fn all_reduce(&self, x: &Tensor) -> Result<()> {
        let (n, most) = (x.elements(), SIDE / 4);
        for first in (0..n).step_by(most) {
            let count = most.min(n - first);
            let kernel = match self.shots(4 * count) {
                Shots::Once => "all_reduce_once",
                Shots::Twice => "all_reduce_twice",
                Shots::Multicast => "all_reduce_multicast",
            };
            self.sum(kernel, Arg::at(&x.buffer, 4 * first), count)?;
        }
        Ok(())
    }

    /// How so many bytes are summed.
    fn shots(&self, bytes: usize) -> Shots {
        match &self.window {
            Some(_) if self.always_multicast => Shots::Multicast,
            window => shots(self.rank.world, bytes, window.is_some()),
        }
    }

    fn sum(&self, kernel: &'static str, x: Arg, count: usize) -> Result<()> {
        let threads = threads(count.div_ceil(4 * self.blocks));
        self.device.launch(
            kernel,
            Grid::new(self.blocks, threads),
            0,
            &[(&self.table).into(), x, count.into()],
        )
    }

    /// Whether [`PeerMemory::reduce_norm`] takes such rows.
    pub fn can_norm(&self, rows: usize, width: usize) -> bool {
        let bytes = rows.saturating_mul(4 * width);
        let held = width.is_multiple_of(4) && width <= 4 * HELD_VECTORS * THREADS;
        held && (1..=NORM_ROWS).contains(&rows) && bytes <= SIDE && self.shots(bytes) != Shots::Twice
    }

    /// The sum of all ranks' `delta`, added to `x`, and `x` normed to `out`, in FP8 too where that says so; of shapes that fit each
    /// other and [`PeerMemory::can_norm`].
    pub fn reduce_norm(
        &self,
        x: &Tensor,
        delta: &Tensor,
        weight: &Vector,
        eps: f32,
        out: &Tensor,
    ) -> Result<()> {
        let [to, codes, scales] = Rows::from(out).targets();
        let (table, weight) = ((&self.table).into(), (&weight.buffer).into());
        let (rows, width) = (x.rows.into(), x.width.into());
        let args = [table, delta.into(), x.into(), weight, eps.into(), to, codes, scales, rows, width];
        let kernel = match self.shots(4 * x.elements()) {
            Shots::Multicast => "all_reduce_norm_multicast",
            _ => "all_reduce_norm",
        };
        self.device.launch(kernel, Grid::new(self.blocks, threads(x.width / 4)), 0, &args)
    }
}

impl Drop for PeerMemory {
    /// What still runs here is of use to nobody, and memory is given back only when it has ended.
    fn drop(&mut self) {
        self.give_up();
    }
}

impl PeerMemory {
    /// `embed`, with that kernel's arguments, of the tokens that rank 0 knows or drew, into so many rows from a table of `vocab`.
    pub fn embed(&self, args: [Arg; 7], rows: usize, vocab: usize) -> Result<()> {
        let [tokens, drawn, results, table, is_f32, out, width] = args;
        let (peers, rows, vocab) = ((&self.table).into(), rows.into(), vocab.into());
        let args = [peers, tokens, drawn, results, table, is_f32, out, rows, width, vocab];
        self.device.launch("embed_from_first", Grid::new(self.blocks, 256), 0, &args)
    }

    /// Whether parts of such a width on this rank can be gathered. Ranks that gather for the first time tell each other their widths: all call
    /// it, and all are told the same.
    ///
    /// # Errors
    /// If a rank failed, or this rank's width is another than it was.
    pub fn can_gather(&mut self, member: &Member, width: usize) -> Result<bool> {
        let widths = match self.widths {
            Some(widths) => widths,
            None => {
                let mut widths = [0; MOST_RANKS];
                member.share(width as u64, &mut widths[..self.rank.world])?;
                self.stage.memory()?.copy_from_slice(bytes(&widths.map(|width| width as u32)));
                self.stage.send(4 * MOST_RANKS, &self.table, 8 * (MOST_RANKS + 4))?;
                self.widths.insert(widths).to_owned()
            }
        };
        let before = widths[self.rank.index];
        check(before == width as u64, || {
            format!("parts of {width} columns are gathered, and were of {before}")
        })?;
        Ok(widths.iter().all(|&width| width <= SIDE as u64 / 4))
    }

    /// Puts the ranks' parts, which [`PeerMemory::can_gather`], side by side into `whole` on the rank that gives it.
    ///
    /// # Errors
    /// If `whole` is of another width.
    pub fn gather(&self, part: &Tensor, whole: Option<&Tensor>) -> Result<()> {
        let widths = self.widths.unwrap_or_default().map(|width| width as usize);
        let (total, widest) = (widths.iter().sum::<usize>(), widths.into_iter().max().unwrap_or(0).max(1));
        check(whole.is_none_or(|whole| whole.width == total), || {
            format!("the ranks' parts are {total} columns")
        })?;
        let most = (SIDE / 4 / widest).max(1);
        for first in (0..part.rows).step_by(most) {
            let rows = most.min(part.rows - first);
            let whole = whole.map_or(Arg::NULL, |whole| Arg::at(&whole.buffer, 4 * first * total));
            let part = Arg::at(&part.buffer, 4 * first * part.width);
            let args = [(&self.table).into(), part, whole, rows.into()];
            let grid = Grid::new(self.blocks, threads((rows * widest).div_ceil(self.blocks)));
            self.device.launch("gather_parts", grid, 0, &args)?;
        }
        Ok(())
    }
}

/// Shows ranks of one process each other's memory. All get it or none.
fn in_one_process(device: &Device, member: &Member, ids: &[u64], apart: bool) -> Result<Option<Regions>> {
    let own = if apart { region(device, ids) } else { Ok(None) };
    let own = own.inspect_err(|e| tracing::warn!("ranks add up through the host: {e}")).ok().flatten();
    let mut addresses = vec![0; ids.len()];
    member.share(own.as_ref().map_or(0, Buffer::address), &mut addresses)?;
    let own = own.filter(|_| !addresses.contains(&0));
    Ok(own.map(|own| Regions { own, others: Vec::new(), addresses }))
}

fn share_a_gpu() -> OpError {
    OpError::Backend("ranks share a GPU".into())
}

/// What the other ranks are to reach, if all devices reach each other.
fn region(device: &Device, ids: &[u64]) -> Result<Option<Buffer>> {
    for &id in ids {
        if id != device.id() && !device.reach(id)? {
            return Ok(None);
        }
    }
    device.buffer(REGION).map(Some)
}

/// Sets flags and epochs to where they begin.
fn write_flags(region: &Buffer) -> Result<()> {
    region.write(0, bytes(&[START; BLOCKS * FLAG_WORDS]))
}

/// The quickest way of so many bytes, by what comes over a rank's link and how often ranks meet: in one shot `world - 1` messages, in two
/// `2 (world - 1) / world`, through the switch `(world + 1) / world`: a slice that it has added up, and all slices that it writes.
fn shots(world: usize, bytes: usize, multicast: bool) -> Shots {
    let cost = |slices: usize, meetings: usize| {
        bytes.saturating_mul(slices).saturating_add(meetings * MEETING_BYTES * world)
    };
    let others = world.saturating_sub(1);
    let ways = [(Shots::Once, cost(world * others, 1)), (Shots::Twice, cost(2 * others, 2))];
    let switch = multicast.then(|| (Shots::Multicast, cost(world + 1, 2)));
    // Of equals the first: the ranks' order.
    ways.into_iter().chain(switch).min_by_key(|&(_, cost)| cost).map_or(Shots::Once, |(shots, _)| shots)
}

/// Threads for so many vectors or elements a block.
fn threads(vectors: usize) -> u32 {
    vectors.next_multiple_of(32).clamp(32, THREADS) as u32
}

/// What a step whose sums mean nothing ends with.
pub(crate) fn late() -> OpError {
    let seconds = PATIENCE.as_secs();
    OpError::Backend(format!("a rank's GPU waited for another rank for more than {seconds} s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_shot_is_for_short_messages_and_for_two_ranks_and_long_ones_of_four_ranks_are_the_switchs() {
        let of = |bytes: usize, multicast| [2, 3, 4, 8].map(|world| shots(world, bytes, multicast));
        use Shots::{Multicast, Once, Twice};
        for multicast in [false, true] {
            assert_eq!(of(200_000, multicast), [Once; 4]);
        }
        assert_eq!(of(1_000_000, false), [Once, Once, Twice, Twice]);
        assert_eq!(of(1_000_000, true), [Once, Once, Multicast, Multicast]);
        assert_eq!(of(SIDE, false), [Once, Twice, Twice, Twice]);
        assert_eq!(of(SIDE, true), [Once, Twice, Multicast, Multicast]);
        // Where one shot ends: without a switch, and with one.
        assert_eq!([890_000, 910_000].map(|bytes| shots(4, bytes, false)), [Once, Twice]);
        assert_eq!([760_000, 780_000].map(|bytes| shots(4, bytes, true)), [Once, Multicast]);
        assert_eq!([228_000, 231_000].map(|bytes| shots(8, bytes, true)), [Once, Multicast]);
    }

    #[cfg(feature = "emulate")]
    mod emulated {
        use super::*;
        use crate::fabric::tests::{groups, on_all};
        use crate::step::bytes_mut;
        use crate::tensor::Format;
        use rudder_comm::Group;

        const KERNELS: [&str; 3] = ["all_reduce_once", "all_reduce_twice", "all_reduce_multicast"];

        /// Runs `work` on a thread for each rank, which so many nodes share, each with a device of its own.
        fn on_ranks<T: Send>(
            (nodes, world): (usize, usize),
            access: PeerAccess,
            patience: Duration,
            work: impl Fn(PeerMemory, Member) -> Result<T> + Sync,
        ) -> Vec<T> {
            let ran = on_all(&groups(nodes, world), |member| {
                let memory = PeerMemory::connect(&Device::emulated(), &member, access)?;
                let memory = memory.expect("emulated devices reach each other");
                memory.wait_for(patience)?;
                work(memory, member)
            });
            ran.into_iter().collect::<Result<_>>().expect("no rank fails")
        }

        fn number(rank: usize, launch: usize, i: usize) -> f32 {
            let hash = (rank * 7919 + launch * 104_729 + i * 31 + 17) as u32 % 2003;
            (hash as f32 - 1000.0) * 10f32.powi((hash % 61) as i32 - 30)
        }

        /// What a rank shows in a launch, n numbers.
        fn part(rank: usize, launch: usize, n: usize) -> Vec<f32> {
            (0..n).map(|i| number(rank, launch, i)).collect()
        }

        /// The bits of the sum: in the order of the ranks, or, by the switch's emulation, from the rank on that asks for it.
        fn sum(world: usize, launch: usize, n: usize, multicast: bool) -> Vec<u32> {
            let slice = n.div_ceil(4).div_ceil(world);
            let sum = |i: usize| {
                let first = if multicast { i / 4 / slice } else { 0 };
                let part = |turn: usize| number((first + turn) % world, launch, i);
                (1..world).fold(part(0), |sum, turn| sum + part(turn))
            };
            (0..n).map(|i| sum(i).to_bits()).collect()
        }

        #[test]
        fn all_kernels_add_any_number_of_elements_launch_after_launch_to_the_same_bits_on_every_rank() {
            // Less than a vector a rank, blocks without work, several vectors a thread.
            let sizes = [1, 3, 4, 5, 7, 63, 257, 1000, 8193, 140_001];
            // All in turn, from one size to another: each kernel meets each size.
            let launches = || (0..3 * sizes.len()).map(|launch| (launch, launch % 3, sizes[launch * 3 % 10]));
            for (nodes, world) in [(1, 2), (1, 3), (1, 4), (1, 8), (2, 2), (3, 3), (2, 8)] {
                let found = on_ranks((nodes, world), PeerAccess::Multicast, PATIENCE, |memory, member| {
                    let (rank, device) = (member.rank().index, memory.device.clone());
                    let mut bits = Vec::new();
                    for (launch, kernel, n) in launches() {
                        let buffer = device.buffer(4 * n)?;
                        buffer.write(0, bytes(&part(rank, launch, n)))?;
                        memory.sum(KERNELS[kernel], (&buffer).into(), n)?;
                        let mut sums = vec![0u32; n];
                        buffer.read(0, bytes_mut(&mut sums))?;
                        bits.push(sums);
                    }
                    member.share(0, &mut vec![0; world])?;
                    Ok(bits)
                });
                for (launch, kernel, n) in launches() {
                    let expected = sum(world, launch, n, kernel == 2);
                    for (rank, found) in found.iter().enumerate() {
                        let what =
                            format!("{} of {n}, {nodes} nodes, {world} ranks, rank {rank}", KERNELS[kernel]);
                        assert!(found[launch] == expected, "{what}");
                    }
                }
            }
        }

        #[test]
        fn the_switch_adds_what_is_long_and_only_where_all_ranks_reach_it() {
            use PeerAccess::{Always, Auto, Multicast};
            // Too short, long enough, and in pieces.
            let sizes = [57_000, 57_800, SIDE / 4 + 57_001];
            for (nodes, world, access, by_switch) in [
                (1, 8, Auto, [false, true, true]),
                (2, 8, Auto, [false, true, true]),
                (1, 8, Always, [false; 3]),
                (1, 3, Auto, [false; 3]),
                (1, 2, Multicast, [true; 3]),
            ] {
                let found = on_ranks((nodes, world), access, PATIENCE, |memory, member| {
                    let rank = member.rank().index;
                    let mut right = Vec::new();
                    for (launch, n) in sizes.into_iter().enumerate() {
                        let mut x = Tensor::new(&memory.device, 1, n)?;
                        x.set(1, n, Format::F32)?;
                        x.buffer.write(0, bytes(&part(rank, launch, n)))?;
                        memory.all_reduce(&x)?;
                        let mut found = vec![0u32; n];
                        x.buffer.read(0, bytes_mut(&mut found))?;
                        // The first piece says by which way.
                        let first = n.min(SIDE / 4);
                        let piece = sum(world, launch, first, by_switch[launch]);
                        right.push(found[..first] == piece);
                    }
                    member.share(0, &mut vec![0; world])?;
                    Ok(right)
                });
                assert_eq!(found, vec![vec![true; 3]; world], "{nodes} nodes, {world} ranks, {access:?}");
            }
        }

        #[test]
        fn epochs_wrap() {
            let launches = START.wrapping_neg() / 2 + 20;
            let found = on_ranks((1, 2), PeerAccess::Multicast, PATIENCE, |memory, member| {
                let buffer = memory.device.buffer(16)?;
                buffer.write(0, bytes(&[1.0f32, 0.0, 0.5, 3.0]))?;
                for launch in 0..launches {
                    // Twice as much each time would be too much.
                    if launch % 64 == 0 {
                        buffer.write(0, bytes(&[1.0f32, 0.0, 0.5, 3.0]))?;
                    }
                    memory.sum(KERNELS[launch as usize % 3], (&buffer).into(), 4)?;
                }
                let (mut sums, mut epoch) = ([0f32; 4], [0u32]);
                buffer.read(0, bytes_mut(&mut sums))?;
                memory.region.read(4 * 16, bytes_mut(&mut epoch))?;
                member.share(0, &mut [0; 2])?;
                Ok((sums, epoch))
            });
            let doubled = 2f32.powi(((launches - 1) % 64 + 1) as i32);
            for (sums, epoch) in found {
                assert_eq!(sums, [1.0, 0.0, 0.5, 3.0].map(|x: f32| x * doubled));
                assert_eq!(epoch, [40]);
            }
        }

        #[test]
        fn a_rank_that_does_not_come_is_given_up_and_all_go_on_after_a_reset() {
            for nodes in [1, 3] {
                on_ranks(
                    (nodes, 3),
                    PeerAccess::Multicast,
                    Duration::from_millis(20),
                    |mut memory, member| {
                        let buffer = memory.device.buffer(4 * 100)?;
                        for round in 0..3 {
                            assert!(!memory.is_broken()?);
                            let absent = member.rank().index == round;
                            if !absent {
                                // Whichever comes first finds the rank gone.
                                for kernel in 0..KERNELS.len() {
                                    memory.sum(KERNELS[(round + kernel) % 3], (&buffer).into(), 100)?;
                                }
                            }
                            assert_eq!(memory.is_broken()?, !absent);
                            memory.reset(&member)?;
                        }
                        // Emulated ranks take turns on few processors, so that from here on nobody is given up.
                        memory.wait_for(PATIENCE)?;
                        buffer.write(0, bytes(&[1.5f32; 100]))?;
                        for (kernel, sum) in KERNELS.into_iter().zip([4.5, 13.5, 40.5]) {
                            memory.sum(kernel, (&buffer).into(), 100)?;
                            let mut sums = [0f32; 100];
                            buffer.read(0, bytes_mut(&mut sums))?;
                            assert_eq!((memory.is_broken()?, sums), (false, [sum; 100]), "{kernel}");
                        }
                        member.share(0, &mut [0; 3])?;
                        Ok(())
                    },
                );
            }
        }

        #[test]
        fn tokens_that_rank_0_did_not_show_in_time_are_none_beyond_the_table() {
            let found =
                on_ranks((1, 2), PeerAccess::Always, Duration::from_millis(20), |mut memory, member| {
                    let first = member.rank().index == 0;
                    let [table, out, tokens] = [32, 16, 4].map(|bytes| memory.device.buffer(bytes));
                    let (table, out, tokens) = (table?, out?, tokens?);
                    memory.wait_for(PATIENCE)?;
                    // Both sides hold what is no token.
                    for _ in 0..2 {
                        table.write(0, bytes(&[-1e30f32; 8]))?;
                        memory.sum("all_reduce_once", (&table).into(), 8)?;
                    }
                    table.write(0, bytes(&[1f32, 1., 1., 1., 2., 2., 2., 2.]))?;
                    memory.wait_for(Duration::from_millis(20))?;
                    if !first {
                        let none = Arg::from(0);
                        let (tokens, is_f32) = ((&tokens).into(), true.into());
                        let args = [tokens, none, none, (&table).into(), is_f32, (&out).into(), 4.into()];
                        memory.embed(args, 1, 2)?;
                        assert!(memory.is_broken()?);
                    }
                    memory.reset(&member)?;
                    let mut row = [0f32; 4];
                    out.read(0, bytes_mut(&mut row))?;
                    Ok(row)
                });
            assert_eq!(found, [[0.0; 4], [2.0; 4]]);
        }

        #[test]
        fn kernels_that_were_given_up_wait_for_nobody() {
            let hour = Duration::from_secs(3600);
            on_ranks((1, 2), PeerAccess::Multicast, hour, |mut memory, member| {
                let buffer = memory.device.buffer(16)?;
                if member.rank().index == 0 {
                    memory.give_up();
                    KERNELS.iter().try_for_each(|kernel| memory.sum(kernel, (&buffer).into(), 4))?;
                    assert!(memory.is_broken()?);
                }
                memory.reset(&member)?;
                assert!(!memory.is_broken()?);
                Ok(())
            });
        }

        #[test]
        fn ranks_that_share_a_device_are_left_to_the_host_unless_told_otherwise() {
            let group = Group::new(2);
            let device = Device::emulated();
            let both = |access| {
                std::thread::scope(|scope| {
                    let ranks: Vec<_> = group
                        .members()
                        .into_iter()
                        .map(|member| {
                            let device = &device;
                            scope.spawn(move || {
                                PeerMemory::connect(device, &member, access).map(|m| m.is_some())
                            })
                        })
                        .collect();
                    ranks.into_iter().map(|rank| rank.join().expect("no panic").ok()).collect::<Vec<_>>()
                })
            };
            let found = [PeerAccess::Auto, PeerAccess::Always, PeerAccess::Multicast].map(both);
            assert_eq!(found, [false, true, true].map(|connected| vec![Some(connected); 2]));
        }
    }
}
