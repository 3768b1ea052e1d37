//! Ranks of a model that is cut: what they add up, and by which way.
//!
//! Where every device reaches the others' memory, kernels add up ([`crate::peer_memory`]). Elsewhere, and in the first step, what ranks add
//! up is copied to the host, summed there in the order of the ranks and copied back: that works between any devices of one host and is slow,
//! two copies and a wait for each of a layer's two sums. Both ways give the same bits.

use crate::device::Device;
use crate::peer_memory::{MOST_RANKS, PeerMemory, late};
use crate::step::{bytes, bytes_mut};
use crate::tensor::{Format, Tensor};
use rudder_comm::Member;
use rudder_ops::{Rank, Result};

/// Whether ranks add up in each other's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PeerAccess {
    /// From the second step on, where every rank has a device of its own and all reach each other. The first step is the one in which
    /// buffers grow: memory that is allocated or given back while a kernel waits for another rank might wait for that kernel.
    #[default]
    Auto,
    /// Never: through the host.
    Never,
    /// At once, and where ranks share a device too: for tests.
    Always,
}

/// What a rank tells the others when a step begins, so that all take the same way. The order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
enum State {
    /// No step has ended yet.
    New,
    /// The ranks can be connected.
    Settled,
    /// They are, and the last step ended well.
    Ready,
    /// They are, and it did not.
    Broken,
    /// They are not to be connected.
    Host,
}

/// A device's place among the ranks of a model that is cut.
pub(crate) struct Peers {
    member: Member,
    device: Device,
    access: PeerAccess,
    state: State,
    memory: Option<PeerMemory>,
    /// Whether the open step's sums are the kernels'.
    direct: bool,
    /// What this rank shows.
    part: Vec<f32>,
    /// What rank 0 gathers.
    whole: Vec<f32>,
}

impl Peers {
    pub fn new(member: Member, device: &Device, access: PeerAccess) -> Self {
        let state = match access {
            _ if !connects(&member) => State::Host,
            PeerAccess::Auto => State::New,
            PeerAccess::Never => State::Host,
            PeerAccess::Always => State::Settled,
        };
        let (part, whole) = (Vec::new(), Vec::new());
        Self { member, device: device.clone(), access, state, memory: None, direct: false, part, whole }
    }

    pub fn rank(&self) -> Rank {
        self.member.rank()
    }

    /// Begins a step: decides with the other ranks by which way its sums go.
    pub fn begin(&mut self) -> Result<()> {
        self.direct = false;
        let world = self.rank().world;
        if !connects(&self.member) {
            return Ok(());
        }
        let mut states = [0; MOST_RANKS];
        self.member.share(self.state as u64, &mut states[..world])?;
        let any = |state: State| states[..world].contains(&(state as u64));
        if any(State::Host) || any(State::New) {
            return Ok(());
        }
        match &mut self.memory {
            Some(memory) if !any(State::Settled) => {
                if any(State::Broken) {
                    memory.reset(&self.member)?;
                }
            }
            memory => {
                *memory = None; // first give back, then take
                let on_one = self.access == PeerAccess::Always;
                *memory = PeerMemory::connect(&self.device, &self.member, on_one)?;
            }
        }
        self.direct = self.memory.is_some();
        // Until the step has ended well.
        self.state = if self.direct { State::Broken } else { State::Host };
        Ok(())
    }

    /// Ends a step that this rank has run to its end.
    fn end(&mut self) -> Result<()> {
        match &mut self.memory {
            Some(memory) if self.direct => {
                if memory.is_broken()? {
                    return Err(late());
                }
                self.state = State::Ready;
            }
            _ if self.state == State::New => self.state = State::Settled,
            _ => {}
        }
        Ok(())
    }

    /// The kernels' way, if the open step takes it.
    pub fn memory(&self) -> Option<&PeerMemory> {
        self.memory.as_ref().filter(|_| self.direct)
    }

    /// Makes `x` the sum over the ranks, through the host.
    pub fn all_reduce_on_host(&mut self, x: &Tensor) -> Result<()> {
        let part = sized(&mut self.part, x.elements());
        x.buffer.read(0, bytes_mut(part))?;
        self.member.all_reduce(part)?;
        x.buffer.write(0, bytes(part))
    }

    /// Puts the ranks' parts side by side on rank 0, and ends the step.
    pub fn gather_columns(&mut self, x: &Tensor, mut whole: Option<&mut Tensor>) -> Result<()> {
        x.expect_f32("what ranks gather")?;
        if let Some(out) = &mut whole {
            out.set(x.rows, out.width, Format::F32)?;
        }
        if let Some(memory) = self.memory.as_mut().filter(|_| self.direct)
            && memory.can_gather(&self.member, x.width)?
        {
            memory.gather(x, whole.as_deref())?;
            self.device.synchronize()?;
            return self.end();
        }
        let part = sized(&mut self.part, x.elements());
        x.buffer.read(0, bytes_mut(part))?;
        self.end()?;
        let part = &self.part[..x.elements()];
        let Some(out) = whole else { return Ok(self.member.gather(part, x.rows, None)?) };
        let whole = sized(&mut self.whole, out.elements());
        self.member.gather(part, x.rows, Some(&mut *whole))?;
        out.buffer.write(0, bytes(whole))
    }
}

/// Whether there can be ranks whose memory is reached: of this process, where addresses mean the same to all.
fn connects(member: &Member) -> bool {
    (2..=MOST_RANKS).contains(&member.rank().world) && member.is_among_threads()
}

/// The first `len` elements, growing the buffer when it was never that long.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(buffer.len().max(len), 0.0);
    &mut buffer[..len]
}

#[cfg(all(test, feature = "emulate"))]
mod tests {
    use super::*;
    use rudder_comm::Group;
    use rudder_ops::OpError;

    /// Runs steps on two ranks. `work` is told the step, and says whether its rank ends it; returns by which way each step's sums went.
    fn steps(access: PeerAccess, count: usize, work: impl Fn(usize, Rank) -> bool + Sync) -> Vec<bool> {
        let (group, work) = (Group::new(2), &work);
        let run = |member: Member| {
            let device = Device::emulated();
            let mut x = Tensor::new(&device, 2, 3)?;
            x.set(2, 3, Format::F32)?;
            let mut whole = (member.rank().index == 0).then(|| Tensor::new(&device, 2, 6)).transpose()?;
            let mut peers = Peers::new(member, &device, access);
            let mut ways = Vec::new();
            for step in 0..count {
                peers.begin()?;
                ways.push(peers.memory().is_some());
                x.buffer.write(0, bytes(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]))?;
                match peers.memory() {
                    Some(memory) => memory.all_reduce(&x)?,
                    None => peers.all_reduce_on_host(&x)?,
                }
                let mut sums = [0f32; 6];
                x.buffer.read(0, bytes_mut(&mut sums))?;
                assert_eq!(sums, [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]);
                // Where one rank alone does not end a step, it was after the gathering.
                let state = peers.state;
                peers.gather_columns(&x, whole.as_mut())?;
                if let Some(whole) = &whole {
                    let mut columns = [0f32; 12];
                    whole.buffer.read(0, bytes_mut(&mut columns))?;
                    assert_eq!(columns, [2.0, 4.0, 6.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 8.0, 10.0, 12.0]);
                }
                if !work(step, peers.rank()) {
                    peers.state = state;
                }
            }
            peers.member.share(0, &mut [0; 2])?; // nobody reads the other's memory any more
            Ok::<_, OpError>(ways)
        };
        let found: Vec<_> = std::thread::scope(|scope| {
            let ranks: Vec<_> =
                group.members().into_iter().map(|member| scope.spawn(|| run(member))).collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic").expect("no rank fails")).collect()
        });
        assert_eq!(found[0], found[1]);
        found.into_iter().next().expect("two ranks")
    }

    #[test]
    fn sums_go_through_the_host_until_a_step_has_ended_on_all_ranks() {
        assert_eq!(steps(PeerAccess::Auto, 3, |_, _| true), [false, true, true]);
        assert_eq!(
            steps(PeerAccess::Auto, 4, |step, rank| step > 0 || rank.index > 0),
            [false, false, true, true]
        );
        assert_eq!(steps(PeerAccess::Never, 2, |_, _| true), [false; 2]);
        assert_eq!(steps(PeerAccess::Always, 2, |_, _| true), [true; 2]);
    }

    #[test]
    fn a_step_that_a_rank_did_not_end_is_followed_by_whole_ones() {
        for faulty in 0..2 {
            let ended = |step: usize, rank: Rank| step % 2 == 1 || rank.index != faulty;
            assert_eq!(steps(PeerAccess::Always, 5, ended), [true; 5]);
        }
    }
}
