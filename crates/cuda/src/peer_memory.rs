//! Sums over ranks, and the gathering of their logits, by kernels that read each other's memory: nothing comes by the host, and a decode
//! step stays one graph.
//!
//! kernels/collectives.cu says how ranks meet. Not yet run on several GPUs.

use crate::device::{Arg, Buffer, Device, Grid, Staging};
use crate::matmul::Vector;
use crate::step::bytes;
use crate::tensor::{Tensor, check};
use rudder_comm::{Member, Rank};
use rudder_ops::{OpError, Result};
use std::time::Duration;

/// Most ranks that sum so; as in collectives.cu.
pub(crate) const MOST_RANKS: usize = 8;
/// Words of a block's flags and epoch; as in collectives.cu.
const FLAG_WORDS: usize = 32;
/// Blocks of every launch: few enough to run at the same time on any GPU, beside others of a device that several ranks share.
const BLOCKS: usize = 64;
/// Most threads of a block, and most vectors of four that each holds of a row; as in collectives.cu.
const THREADS: usize = 512;
const HELD_VECTORS: usize = 8;
/// Bytes of what a rank shows at a time. Longer messages take several launches.
pub(crate) const SIDE: usize = 8 << 20;
/// Where epochs begin: so that they soon wrap, and not after a day.
const START: u32 = 128u32.wrapping_neg();
/// How long a kernel waits for another rank's. Longer than any rank is late, for allocations and files too.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that a link brings while ranks meet once: 3 µs at 450 GB/s, both of data sheets and others' reports, not measured.
const MEETING_BYTES: usize = 1_350_000;
/// Most rows of a sum that is normed at once: a few for each block.
const NORM_ROWS: usize = 4 * BLOCKS;

/// A rank's way to the others' memory.
pub(crate) struct PeerMemory {
    device: Device,
    rank: Rank,
    /// What the other ranks reach: flags and epochs, then two sides.
    region: Buffer,
    /// The kernels' `Peers`.
    table: Buffer,
    /// A word that a kernel sets when it has waited for too long.
    broken: Staging,
    /// Widths of the parts that are gathered, once they were.
    widths: Option<[u64; MOST_RANKS]>,
}

impl PeerMemory {
    /// Shows the ranks each other's memory. All of them call it, and all get it or none: where there are too many, or a device does not
    /// reach another, or, unless `on_one` allows it, ranks share a device, where a kernel that waits for another could keep it from
    /// running.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn connect(device: &Device, member: &Member, on_one: bool) -> Result<Option<Self>> {
        Self::connect_for(device, member, on_one, PATIENCE)
    }

    fn connect_for(
        device: &Device,
        member: &Member,
        on_one: bool,
        patience: Duration,
    ) -> Result<Option<Self>> {
        let rank = member.rank();
        if rank.world > MOST_RANKS {
            return Ok(None);
        }
        let (mut ids, mut regions) = ([0; MOST_RANKS], [0; MOST_RANKS]);
        member.share(device.id(), &mut ids[..rank.world])?;
        let region = region(device, &ids[..rank.world], on_one);
        let region =
            region.inspect_err(|e| tracing::warn!("ranks add up through the host: {e}")).ok().flatten();
        member.share(region.as_ref().map_or(0, Buffer::address), &mut regions[..rank.world])?;
        let Some(region) = region.filter(|_| !regions[..rank.world].contains(&0)) else { return Ok(None) };
        let broken = Staging::new(device, 16)?;
        let (table, world) = (device.buffer(8 * (MOST_RANKS + 4) + 4 * MOST_RANKS)?, rank.world as u64);
        let last =
            [broken.address(), patience.as_nanos() as u64, SIDE as u64, rank.index as u64 | world << 32];
        table.write(0, bytes(&regions))?;
        table.write(8 * MOST_RANKS, bytes(&last))?;
        device.synchronize()?;
        // Nobody leaves before all have what their kernels need.
        member.share(0, &mut ids[..rank.world])?;
        Ok(Some(Self { device: device.clone(), rank, region, table, broken, widths: None }))
    }

    /// Sets everything back after a step that some ranks did not end. All call it; nobody waits for ever in what they left.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn reset(&mut self, member: &Member) -> Result<()> {
        let mut all = [0; MOST_RANKS];
        self.device.synchronize()?;
        member.share(0, &mut all[..self.rank.world])?; // no kernel of theirs writes to the region any more
        self.broken.memory()?[..4].fill(0);
        write_flags(&self.region)?;
        self.device.synchronize()?;
        member.share(0, &mut all[..self.rank.world])?;
        Ok(())
    }

    /// Whether a kernel waited in vain, of all that were waited for.
    pub fn is_broken(&mut self) -> Result<bool> {
        Ok(self.broken.memory()?[..4] != [0; 4])
    }

    /// Makes `x` the sum over the ranks.
    pub fn all_reduce(&self, x: &Tensor) -> Result<()> {
        let (n, most) = (x.elements(), SIDE / 4);
        for first in (0..n).step_by(most) {
            let count = most.min(n - first);
            let once = is_one_shot(self.rank.world, 4 * count);
            let kernel = if once { "all_reduce_once" } else { "all_reduce_twice" };
            self.sum(kernel, Arg::at(&x.buffer, 4 * first), count)?;
        }
        Ok(())
    }

    fn sum(&self, kernel: &'static str, x: Arg, count: usize) -> Result<()> {
        let threads = threads(count.div_ceil(4 * BLOCKS));
        self.device.launch(kernel, Grid::new(BLOCKS, threads), 0, &[(&self.table).into(), x, count.into()])
    }

    /// Whether [`PeerMemory::reduce_norm`] takes such rows.
    pub fn can_norm(&self, rows: usize, width: usize) -> bool {
        let bytes = rows.saturating_mul(4 * width);
        let held = width.is_multiple_of(4) && width <= 4 * HELD_VECTORS * THREADS;
        held && (1..=NORM_ROWS).contains(&rows) && bytes <= SIDE && is_one_shot(self.rank.world, bytes)
    }

    /// The sum of all ranks' `delta`, added to `x`, and `x` normed to `out`, of shapes that fit each other and [`PeerMemory::can_norm`].
    pub fn reduce_norm(
        &self,
        x: &Tensor,
        delta: &Tensor,
        weight: &Vector,
        eps: f32,
        out: &Tensor,
    ) -> Result<()> {
        let args = [
            (&self.table).into(),
            delta.into(),
            x.into(),
            (&weight.buffer).into(),
            eps.into(),
            out.into(),
            x.rows.into(),
            x.width.into(),
        ];
        let grid = Grid::new(BLOCKS, threads(x.width / 4));
        self.device.launch("all_reduce_norm", grid, 0, &args)
    }
}

impl PeerMemory {
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
                self.table.write(8 * (MOST_RANKS + 4), bytes(&widths.map(|width| width as u32)))?;
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
            let grid = Grid::new(BLOCKS, threads((rows * widest).div_ceil(BLOCKS)));
            self.device.launch("gather_parts", grid, 0, &args)?;
        }
        Ok(())
    }
}

/// What the other ranks are to reach, if all devices reach each other.
fn region(device: &Device, ids: &[u64], on_one: bool) -> Result<Option<Buffer>> {
    let shared = (1..ids.len()).any(|i| ids[..i].contains(&ids[i]));
    if shared && !on_one {
        return Ok(None);
    }
    for &id in ids {
        if id != device.id() && !device.reach(id)? {
            return Ok(None);
        }
    }
    let region = device.buffer(4 * BLOCKS * FLAG_WORDS + 2 * SIDE)?;
    write_flags(&region)?;
    device.synchronize()?;
    Ok(Some(region))
}

/// Sets flags and epochs to where they begin.
fn write_flags(region: &Buffer) -> Result<()> {
    region.write(0, bytes(&[START; BLOCKS * FLAG_WORDS]))
}

/// Whether one shot is quicker than two: of `world - 1` messages it reads all, two shots `2 / world`, and meet once more.
fn is_one_shot(world: usize, bytes: usize) -> bool {
    bytes.saturating_mul(world.saturating_sub(1) * world.saturating_sub(2)) <= MEETING_BYTES * world
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
    fn one_shot_is_for_short_messages_and_for_two_ranks() {
        assert!(is_one_shot(2, 1 << 30));
        assert_eq!([3, 4, 8].map(|world| is_one_shot(world, 200_000)), [true; 3]);
        assert_eq!([3, 4, 8].map(|world| is_one_shot(world, 1_000_000)), [true, false, false]);
        assert!(!is_one_shot(3, 2_100_000) && !is_one_shot(8, 300_000));
    }

    #[cfg(feature = "emulate")]
    mod emulated {
        use super::*;
        use crate::step::bytes_mut;
        use rudder_comm::Group;

        /// Runs `work` on a thread for each rank, each with a device of its own.
        fn on_ranks<T: Send>(
            world: usize,
            patience: Duration,
            work: impl Fn(PeerMemory, Member) -> Result<T> + Sync,
        ) -> Vec<T> {
            let (group, work) = (Group::new(world), &work);
            std::thread::scope(|scope| {
                let ranks = group.members().into_iter().map(|member| {
                    scope.spawn(move || {
                        let memory = PeerMemory::connect_for(&Device::emulated(), &member, false, patience)?;
                        work(memory.expect("emulated devices reach each other"), member)
                    })
                });
                let ranks = ranks.collect::<Vec<_>>().into_iter();
                ranks.map(|rank| rank.join().expect("no panic").expect("no rank fails")).collect()
            })
        }

        fn number(rank: usize, launch: usize, i: usize) -> f32 {
            let hash = (rank * 7919 + launch * 104_729 + i * 31 + 17) as u32 % 2003;
            (hash as f32 - 1000.0) * 10f32.powi((hash % 61) as i32 - 30)
        }

        #[test]
        fn both_kernels_add_any_number_of_elements_in_the_order_of_the_ranks_launch_after_launch() {
            let kernels = ["all_reduce_once", "all_reduce_twice"];
            // Less than a vector a rank, blocks without work, several vectors a thread.
            let sizes = [1, 3, 4, 5, 7, 63, 257, 1000, 8193, 140_001];
            for world in [2, 3, 4, 8] {
                let found = on_ranks(world, PATIENCE, |memory, member| {
                    let (rank, device) = (member.rank().index, memory.device.clone());
                    let mut bits = Vec::new();
                    // Both in turn, from one size to another.
                    for launch in 0..2 * sizes.len() {
                        let n = sizes[(launch * 3) % sizes.len()];
                        let x: Vec<f32> = (0..n).map(|i| number(rank, launch, i)).collect();
                        let buffer = device.buffer(4 * n)?;
                        buffer.write(0, bytes(&x))?;
                        memory.sum(kernels[launch % 2], (&buffer).into(), n)?;
                        let mut sums = vec![0u32; n];
                        buffer.read(0, bytes_mut(&mut sums))?;
                        bits.push(sums);
                    }
                    member.share(0, &mut vec![0; world])?;
                    Ok(bits)
                });
                for launch in 0..2 * sizes.len() {
                    let n = sizes[(launch * 3) % sizes.len()];
                    let sum =
                        |i| (1..world).fold(number(0, launch, i), |sum, rank| sum + number(rank, launch, i));
                    let expected: Vec<u32> = (0..n).map(|i| sum(i).to_bits()).collect();
                    for (rank, found) in found.iter().enumerate() {
                        assert!(found[launch] == expected, "{world} ranks, launch {launch}, rank {rank}");
                    }
                }
            }
        }

        #[test]
        fn epochs_wrap() {
            let launches = START.wrapping_neg() / 2 + 20;
            let found = on_ranks(2, PATIENCE, |memory, member| {
                let buffer = memory.device.buffer(16)?;
                buffer.write(0, bytes(&[1.0f32, 0.0, 0.5, 3.0]))?;
                for launch in 0..launches {
                    // Twice as much each time would be too much.
                    if launch % 64 == 0 {
                        buffer.write(0, bytes(&[1.0f32, 0.0, 0.5, 3.0]))?;
                    }
                    memory.sum(
                        ["all_reduce_once", "all_reduce_twice"][launch as usize % 2],
                        (&buffer).into(),
                        4,
                    )?;
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
            on_ranks(3, Duration::from_millis(20), |mut memory, member| {
                let buffer = memory.device.buffer(4 * 100)?;
                for round in 0..3 {
                    assert!(!memory.is_broken()?);
                    let absent = member.rank().index == round;
                    if !absent {
                        memory.sum("all_reduce_once", (&buffer).into(), 100)?;
                        memory.sum("all_reduce_twice", (&buffer).into(), 100)?;
                    }
                    assert_eq!(memory.is_broken()?, !absent);
                    memory.reset(&member)?;
                }
                // Emulated ranks take turns on few processors, so that from here on nobody is given up.
                memory.table.write(8 * (MOST_RANKS + 1), bytes(&[PATIENCE.as_nanos() as u64]))?;
                buffer.write(0, bytes(&[1.5f32; 100]))?;
                memory.sum("all_reduce_twice", (&buffer).into(), 100)?;
                let mut sums = [0f32; 100];
                buffer.read(0, bytes_mut(&mut sums))?;
                member.share(0, &mut [0; 3])?;
                assert_eq!((memory.is_broken()?, sums), (false, [4.5; 100]));
                Ok(())
            });
        }

        #[test]
        fn ranks_that_share_a_device_are_left_to_the_host_unless_told_otherwise() {
            let group = Group::new(2);
            let device = Device::emulated();
            let both = |on_one| {
                std::thread::scope(|scope| {
                    let ranks: Vec<_> = group
                        .members()
                        .into_iter()
                        .map(|member| {
                            let device = &device;
                            scope.spawn(move || {
                                PeerMemory::connect(device, &member, on_one).map(|m| m.is_some())
                            })
                        })
                        .collect();
                    ranks.into_iter().map(|rank| rank.join().expect("no panic").ok()).collect::<Vec<_>>()
                })
            };
            assert_eq!((both(false), both(true)), (vec![Some(false); 2], vec![Some(true); 2]));
        }
    }
}
