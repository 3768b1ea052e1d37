//! Ranks of a model that is cut: what they add up, and by which way.
//!
//! Where every device reaches the others' memory, on other nodes too, kernels add up ([`crate::peer_memory`]), but for the long sums of prompts.
//! These, and all sums elsewhere, are NCCL's ([`crate::nccl`]). Without that library, what ranks add up is copied to the host,
//! summed there in the order of the ranks and copied back: that works between any devices and is slow, two copies and a wait for each of a
//! layer's two sums. The kernels and the host give the same bits, NCCL others, and so do kernels that have a switch add up.
//!
//! A decode step of kernels alone flies: nobody waits for its end. What it draws tells that it has come ([`Peers::landed`]), and the step after it may
//! be queued before, on tokens that rank 0 shows, on other nodes too. Everything else is waited for.

use crate::device::Device;
use crate::nccl::Nccl;
use crate::peer_memory::{MOST_RANKS, PeerMemory, SIDE, late};
use crate::step::{bytes, bytes_mut};
use crate::tensor::{Format, Tensor};
use crate::waiting::wait_until;
use rudder_comm::Member;
use rudder_ops::{OpError, Rank, Result};

/// Whether ranks add up in each other's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PeerAccess {
    /// From the second step on, where every rank has a device of its own and all reach each other. The first step is the one in which
    /// buffers grow: memory that is allocated or given back while a kernel waits for another rank might wait for that kernel. For the same
    /// reason NCCL's ranks meet before each sum of their first step, and wait for it.
    #[default]
    Auto,
    /// Never: through the host, for tests.
    Never,
    /// The same where ranks share a device, and in the order of the ranks: for tests. Emulated, where memory waits for no kernel, from the first
    /// step on.
    Always,
    /// The same, and all sums through the switch between the devices, if there is one: for tests.
    Multicast,
}

/// By which way ranks add up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Kernels,
    Nccl,
    Host,
}

/// What a rank tells the others of NCCL when a step begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Library {
    /// It has not been tried.
    Untried,
    /// The ranks are connected, and the last step ended well.
    Ready,
    /// They are or were, and it did not.
    Broken,
    /// It is not there, or does not connect them.
    Absent,
}

/// What ranks do about NCCL that have told each other this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Connection {
    Keep,
    Make,
    None,
}

impl Connection {
    fn of(states: impl Iterator<Item = u64> + Clone) -> Self {
        if states.clone().any(|state| state == Library::Absent as u64) {
            Self::None
        } else if states.clone().all(|state| state == Library::Ready as u64) {
            Self::Keep
        } else {
            Self::Make
        }
    }
}

/// The way of a sum of so many bytes in a step in which ranks may use these: kernels as far as one launch takes it.
fn way(kernels: bool, nccl: bool, bytes: usize) -> Way {
    match (kernels, nccl) {
        (true, true) if bytes > SIDE => Way::Nccl,
        (true, _) => Way::Kernels,
        (false, true) => Way::Nccl,
        (false, false) => Way::Host,
    }
}

/// What a rank tells the others when a step begins, so that all take the same way. The order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
enum State {
    /// No step has ended yet.
    New,
    /// The ranks can be connected.
    Settled,
    /// They are, and the last step ended well, or is in flight.
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
    /// Whether nobody waits for the open step at its end.
    flies: bool,
    library: Library,
    /// The communicator, if the ranks have one.
    nccl: Option<Nccl>,
    /// What each rank tells when a step begins.
    told: Vec<u64>,
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
            PeerAccess::Always | PeerAccess::Multicast if device.on_gpu().is_some() => State::New,
            PeerAccess::Always | PeerAccess::Multicast => State::Settled,
        };
        let library = if access == PeerAccess::Never { Library::Absent } else { Library::Untried };
        Self {
            told: vec![0; member.rank().world],
            member,
            device: device.clone(),
            access,
            state,
            memory: None,
            direct: false,
            flies: false,
            library,
            nccl: None,
            part: Vec::new(),
            whole: Vec::new(),
        }
    }

    pub fn rank(&self) -> Rank {
        self.member.rank()
    }

    /// Ends what waits for other ranks of a step that this rank has not run to its end: before anybody waits for the stream.
    pub fn give_up_unfinished(&mut self) {
        if self.library == Library::Broken {
            self.nccl = None;
        }
        if let Some(memory) = self.memory.as_ref().filter(|_| self.state == State::Broken) {
            memory.give_up();
        }
    }

    /// Begins a step, which only decodes or does not: decides with the other ranks by which ways its sums go.
    pub fn begin(&mut self, decodes: bool) -> Result<()> {
        (self.direct, self.flies) = (false, false);
        self.member.share(self.state as u64 | (self.library as u64) << 32, &mut self.told)?;
        match Connection::of(self.told.iter().map(|told| told >> 32)) {
            Connection::Keep => self.library = Library::Broken, // until the step has ended well
            Connection::Make => {
                self.nccl = None; // first give back, then take
                self.nccl = Nccl::connect(&self.device, &self.member)?;
                self.library = if self.nccl.is_some() { Library::Broken } else { Library::Absent };
            }
            Connection::None => (self.nccl, self.library) = (None, Library::Absent),
        }
        if !connects(&self.member) {
            return Ok(());
        }
        let any = |state: State| self.told.iter().any(|&told| told as u32 == state as u32);
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
                *memory = PeerMemory::connect(&self.device, &self.member, self.access)?;
            }
        }
        self.direct = self.memory.is_some();
        self.flies = self.direct && decodes;
        // Until the step has ended well.
        self.state = if self.direct { State::Broken } else { State::Host };
        Ok(())
    }

    /// The way of a sum of so many bytes in the open step. NCCL's have to be waited for.
    pub fn way(&self, bytes: usize) -> Way {
        way(self.direct, self.nccl.is_some() && !self.flies, bytes)
    }

    /// Whether steps may go on from tokens that nobody has seen.
    pub fn draws_ahead(&self) -> bool {
        self.state == State::Ready
    }

    /// Waits until something of a step that may fly has `come`. Where a rank is known to have failed before, or a node to be gone, kernels wait for nobody
    /// any more.
    pub fn wait_in_flight(&mut self, come: impl Fn() -> Result<bool>) -> Result<()> {
        let waited = wait_until(&self.member, |_| come());
        if let (Err(_), Some(memory)) = (&waited, &self.memory) {
            memory.give_up();
            self.state = State::Broken;
        }
        waited
    }

    /// Whether what was queued up to the draw that has come was right, of the kernels' ways. What it says of a later step counts for nothing.
    pub fn landed(&mut self) -> Result<()> {
        let Some(memory) = &mut self.memory else { return Ok(()) };
        if memory.is_broken()? {
            self.state = State::Broken;
            return Err(late());
        }
        Ok(())
    }

    /// Ends the step, all of which this rank has queued: waits until it is done, unless it flies.
    pub fn end(&mut self) -> Result<()> {
        if self.flies {
            self.device.flush()?;
            self.state = State::Ready;
            if self.nccl.is_some() {
                self.library = Library::Ready;
            }
            return Ok(());
        }
        let waited = match (&mut self.nccl, self.direct) {
            (Some(nccl), _) => nccl.end(&self.member),
            (None, true) => wait_until(&self.member, |_| self.device.is_idle()),
            (None, false) => self.device.synchronize(),
        };
        if let Err(error) = waited {
            self.memory().into_iter().for_each(PeerMemory::give_up);
            self.nccl = None;
            return Err(error);
        }
        if self.nccl.is_some() {
            self.library = Library::Ready;
        }
        match &mut self.memory {
            Some(memory) if self.direct => {
                if memory.is_broken()? {
                    self.member.check()?; // a node that is gone has a name
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

    /// The same, if nobody waits for the open step at its end.
    pub fn in_flight(&self) -> Option<&PeerMemory> {
        self.memory.as_ref().filter(|_| self.flies)
    }

    /// Makes `x` the sum over the ranks, through NCCL.
    pub fn all_reduce_by_nccl(&mut self, x: &Tensor) -> Result<()> {
        let Some(nccl) = &mut self.nccl else { return Err(OpError::Backend("ranks without NCCL".into())) };
        nccl.all_reduce(&self.member, x)
    }

    /// Makes `x` the sum over the ranks, through the host.
    pub fn all_reduce_on_host(&mut self, x: &Tensor) -> Result<()> {
        let part = sized(&mut self.part, x.elements());
        x.buffer.read(0, bytes_mut(part))?;
        self.member.all_reduce(part)?;
        x.buffer.write(0, bytes(part))
    }

    /// Puts the ranks' parts side by side on rank 0.
    pub fn gather_columns(&mut self, x: &Tensor, mut whole: Option<&mut Tensor>) -> Result<()> {
        x.expect_f32("what ranks gather")?;
        if let Some(out) = &mut whole {
            out.set(x.rows, out.width, Format::F32)?;
        }
        if let Some(memory) = self.memory.as_mut().filter(|_| self.direct)
            && memory.can_gather(&self.member, x.width)?
        {
            return memory.gather(x, whole.as_deref());
        }
        self.flies = false; // what else gathers is waited for
        if let Some(nccl) = &mut self.nccl {
            return nccl.gather(&self.member, x, whole.as_deref());
        }
        let part = sized(&mut self.part, x.elements());
        x.buffer.read(0, bytes_mut(part))?;
        let part = &self.part[..x.elements()];
        let Some(out) = whole else { return Ok(self.member.gather(part, x.rows, None)?) };
        let whole = sized(&mut self.whole, out.elements());
        self.member.gather(part, x.rows, Some(&mut *whole))?;
        out.buffer.write(0, bytes(whole))
    }
}

/// Whether there can be ranks whose memory is reached.
fn connects(member: &Member) -> bool {
    (2..=MOST_RANKS).contains(&member.rank().world)
}

/// The first `len` elements, growing the buffer when it was never that long.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(buffer.len().max(len), 0.0);
    &mut buffer[..len]
}

#[cfg(test)]
mod choices {
    use super::*;

    #[test]
    fn long_sums_and_ranks_that_reach_no_memory_are_nccls_where_it_is_there() {
        assert_eq!([1, SIDE].map(|bytes| way(true, true, bytes)), [Way::Kernels; 2]);
        assert_eq!((way(true, true, SIDE + 1), way(true, false, SIDE + 1)), (Way::Nccl, Way::Kernels));
        assert_eq!((way(false, true, 1), way(false, false, 1)), (Way::Nccl, Way::Host));
    }

    #[test]
    fn ranks_connect_unless_one_cannot_and_again_after_a_step_that_one_did_not_end() {
        let of = |states: &[Library]| Connection::of(states.iter().map(|&state| state as u64));
        assert_eq!(of(&[Library::Untried; 3]), Connection::Make);
        assert_eq!(of(&[Library::Ready; 3]), Connection::Keep);
        assert_eq!(of(&[Library::Ready, Library::Broken]), Connection::Make);
        assert_eq!(of(&[Library::Ready, Library::Untried]), Connection::Make);
        assert_eq!(of(&[Library::Broken, Library::Absent]), Connection::None);
    }
}

#[cfg(all(test, feature = "emulate"))]
mod tests {
    use super::*;
    use crate::fabric::tests::{groups, on_all, terms};
    use rudder_comm::Group;
    use std::net::TcpListener;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    /// Nodes, and whether steps only decode.
    const KINDS: [(usize, bool); 4] = [(1, false), (1, true), (2, false), (2, true)];

    /// Runs steps on two ranks, of one node or two, which only decode or do not. `work` is told the step, and says whether its rank ends it; returns
    /// by which way each step's sums went.
    fn steps(
        (nodes, decodes): (usize, bool),
        access: PeerAccess,
        count: usize,
        work: impl Fn(usize, Rank) -> bool + Sync,
    ) -> Vec<bool> {
        let run = |member: Member| {
            let device = Device::emulated();
            let mut x = Tensor::new(&device, 2, 3)?;
            x.set(2, 3, Format::F32)?;
            let mut whole = (member.rank().index == 0).then(|| Tensor::new(&device, 2, 6)).transpose()?;
            let mut peers = Peers::new(member, &device, access);
            let mut ways = Vec::new();
            for step in 0..count {
                peers.begin(decodes)?;
                ways.push(peers.memory().is_some());
                let connected = peers.memory().is_some();
                assert_eq!(peers.in_flight().is_some(), connected && decodes);
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
                peers.end()?;
                assert_eq!(peers.draws_ahead(), connected);
                peers.landed()?;
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
        let found = on_all(&groups(nodes, 2), run).into_iter().collect::<Result<Vec<_>>>();
        let found = found.expect("no rank fails");
        assert_eq!(found[0], found[1]);
        found.into_iter().next().expect("two ranks")
    }

    #[test]
    fn sums_go_through_the_host_until_a_step_has_ended_on_all_ranks() {
        for kind in KINDS {
            let steps = |access, count| steps(kind, access, count, |_, _| true);
            assert_eq!(steps(PeerAccess::Auto, 3), [false, true, true]);
            assert_eq!(steps(PeerAccess::Never, 2), [false; 2]);
            assert_eq!(steps(PeerAccess::Always, 2), [true; 2]);
            assert_eq!(steps(PeerAccess::Multicast, 2), [true; 2]);
        }
        for nodes in [1, 2] {
            let ended = |step: usize, rank: Rank| step > 0 || rank.index > 0;
            assert_eq!(steps((nodes, false), PeerAccess::Auto, 4, ended), [false, false, true, true]);
        }
    }

    #[test]
    fn a_step_that_a_rank_did_not_end_is_followed_by_whole_ones() {
        for (kind, faulty) in KINDS.into_iter().flat_map(|kind| [(kind, 0), (kind, 1)]) {
            let ended = |step: usize, rank: Rank| step % 2 == 1 || rank.index != faulty;
            assert_eq!(steps(kind, PeerAccess::Always, 5, ended), [true; 5]);
            assert_eq!(steps(kind, PeerAccess::Multicast, 5, ended), [true; 5]);
        }
    }

    #[test]
    fn a_rank_that_waited_in_vain_says_so_when_the_draw_has_come_and_all_go_on() {
        let run = |member: Member| {
            let device = Device::emulated();
            let (mut x, rank) = (Tensor::new(&device, 1, 4)?, member.rank().index);
            x.set(1, 4, Format::F32)?;
            let mut whole = (rank == 0).then(|| Tensor::new(&device, 1, 8)).transpose()?;
            let mut peers = Peers::new(member, &device, PeerAccess::Always);
            for faulty in [None, Some(0), None, None, Some(1), None] {
                peers.begin(true)?;
                let memory = peers.in_flight().expect("they reach each other");
                memory.all_reduce(&x)?;
                peers.gather_columns(&x, whole.as_mut())?;
                peers.end()?;
                if faulty == Some(rank) {
                    peers.memory().expect("as above").give_up();
                }
                assert_eq!(
                    (peers.landed().is_ok(), peers.draws_ahead()),
                    (faulty != Some(rank), faulty != Some(rank))
                );
            }
            peers.member.share(0, &mut [0; 2])?; // nobody reads the other's memory any more
            Ok::<_, OpError>(())
        };
        for nodes in [1, 2] {
            let ended = on_all(&groups(nodes, 2), run).into_iter().collect::<Result<Vec<_>>>();
            ended.expect("no rank fails");
        }
    }

    #[test]
    fn who_waits_for_a_draw_hears_of_a_node_that_is_gone_and_waits_for_nobody_after() {
        let run = |member: Member| {
            let device = Device::emulated();
            let mut peers = Peers::new(member, &device, PeerAccess::Always);
            peers.begin(true)?;
            peers.end()?;
            peers.wait_in_flight(|| Ok(true))?;
            Ok::<_, OpError>(peers)
        };
        let mut groups = groups(2, 2);
        let peers = on_all(&groups, run).into_iter().collect::<Result<Vec<_>>>().expect("no rank fails");
        let [mut first, other]: [Peers; 2] = peers.try_into().ok().expect("two ranks");
        assert!(first.draws_ahead());
        drop((other, groups.pop()));
        let error = first.wait_in_flight(|| Ok(false)).expect_err("a node is gone").to_string();
        assert!(error.contains("node 1 at 127.0.0.1 is gone"), "{error}");
        assert!(!first.draws_ahead() && first.landed().is_err());
    }

    /// Begins a step and sums in it.
    fn sum(peers: &mut Peers, x: &mut Tensor) -> Result<()> {
        peers.begin(false)?;
        peers.memory().expect("the nodes reach each other").all_reduce(x)
    }

    /// Ends it.
    fn gather(peers: &mut Peers, x: &Tensor, whole: Option<&mut Tensor>) -> Result<()> {
        peers.gather_columns(x, whole)?;
        peers.end()
    }

    /// Tells the other process of the test where node 0 is.
    const VARIABLE: &str = "RUDDER_TEST_PEERS_NODE_0";

    #[test]
    fn a_node_that_dies_while_a_kernel_waits_for_it_fails_the_step_and_is_named() {
        let patience = Duration::from_secs(60);
        let device = Device::emulated();
        let mut x = Tensor::new(&device, 1, 4).expect("memory");
        x.set(1, 4, Format::F32).expect("it fits");
        let mut whole = Tensor::new(&device, 1, 8).expect("memory");
        let peers = |group: &Group| {
            let member = group.members().pop().expect("one rank a node");
            Peers::new(member, &device, PeerAccess::Always)
        };
        if let Ok(address) = std::env::var(VARIABLE) {
            let group = Group::follow(&address, 1, &terms(2, 2), patience).expect("it joins");
            let mut peers = peers(&group);
            sum(&mut peers, &mut x).and_then(|()| gather(&mut peers, &x, None)).expect("a whole step");
            peers.begin(false).expect("node 0 is there");
            std::process::abort();
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let name = "peers::tests::a_node_that_dies_while_a_kernel_waits_for_it_fails_the_step_and_is_named";
        let mut other = Command::new(std::env::current_exe().expect("this test's program"));
        other.args(["--exact", name]).env(VARIABLE, listener.local_addr().expect("an address").to_string());
        let mut other = other.stdout(Stdio::null()).spawn().expect("another process");
        let group = Group::lead(listener, &terms(2, 2), patience).expect("it joins");
        let mut peers = peers(&group);
        sum(&mut peers, &mut x)
            .and_then(|()| gather(&mut peers, &x, Some(&mut whole)))
            .expect("a whole step");
        // Here the kernel waits until it gives up.
        peers.memory().expect("as above").wait_for(Duration::from_millis(100)).expect("it is told");
        sum(&mut peers, &mut x).expect("it is launched");
        let error = gather(&mut peers, &x, Some(&mut whole)).expect_err("a rank is gone").to_string();
        assert!(error.contains("node 1 at 127.0.0.1 is gone"), "{error}");
        assert!(group.lost().is_some_and(|failed| failed.rank == 1));
        assert!(!other.wait().expect("it has ended").success());
    }
}
