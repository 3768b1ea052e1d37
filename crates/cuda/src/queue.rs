//! What a decode step queues, gathered so that a step that comes again runs as one CUDA graph.
//!
//! While the queue is open, launches are kept and not run; whatever needs their results, or the memory they use, closes it
//! first. A sequence of launches that is the same to the last argument as one before is captured behind its second run and from
//! then on runs as its graph. Nothing has to be declared fit for a graph: what differs just runs.
//!
//! Making a graph and bringing it to the GPU may wait for the GPU, whose kernels may wait for those of other ranks. So all of a
//! sequence is queued before its graph is made, and no rank begins the next step, whose kernels wait for this rank's, before it is there.

use crate::cublaslt::CublasLt;
use crate::dependent_launch::is_dependent;
use crate::device::{Arg, Grid};
use crate::gpu::{Gpu, Graph};
use rudder_ops::{OpError, Result};
use std::collections::{HashMap, HashSet};

/// Most arguments of a kernel.
pub(crate) const MOST_ARGS: usize = 17;
/// Sequences remembered before all are forgotten.
const MOST_SEEN: usize = 4096;
/// What graphs may take of the device's memory, in launches: each of theirs is one, and each graph some fifty by itself (guessed, not measured). That
/// is 250 kinds of steps of 80 layers where a step is one graph. Where ranks add up by NCCL, and each stretch between two sums is a graph, it is
/// 3,500 stretches, or 20 kinds.
const MOST_GRAPHED: usize = 200_000;
const GRAPH: usize = 50;

/// One thing to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Kernel(Launch),
    Product(Product),
}

/// A kernel's launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    pub kernel: &'static str,
    pub grid: Grid,
    pub shared: u32,
    args: [Arg; MOST_ARGS],
    count: usize,
}

/// What a product through cuBLASLt is of: `[rows, k]` times the transposed `[n, k]`, into rows that lie `stride` elements apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ProductShape {
    pub rows: usize,
    pub n: usize,
    pub k: usize,
    pub stride: usize,
}

/// A product through cuBLASLt: its shape; the addresses of x, w and out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub shape: ProductShape,
    pub x: u64,
    pub w: u64,
    pub out: u64,
}

/// The queue of a device.
#[derive(Default)]
pub(crate) struct Queue {
    /// Whether launches are kept rather than run.
    pub open: bool,
    pub pending: Vec<Work>,
    pub cublaslt: Option<CublasLt>,
    pub graphs: Graphs<Graph>,
    pub seen: HashSet<u64>,
    /// Set when this GPU or driver would not capture.
    pub without_graphs: bool,
    /// Whether every launch waits for the end of all before it. Set when this GPU or driver would not capture others.
    pub launches_plainly: bool,
}

impl Launch {
    pub fn new(kernel: &'static str, grid: Grid, shared: u32, args: &[Arg]) -> Self {
        let mut launch = Self { kernel, grid, shared, args: [Arg::NULL; MOST_ARGS], count: args.len() };
        launch.args[..args.len()].copy_from_slice(args);
        launch
    }

    pub fn args(&self) -> &[Arg] {
        &self.args[..self.count]
    }
}

/// Sequences that run as graphs, by their hashes: those that ran last, as far as there is room for them.
pub(crate) struct Graphs<G> {
    kept: HashMap<u64, Kept<G>>,
    /// What they take, in launches.
    size: usize,
    /// How often one was asked for or came.
    time: u64,
}

struct Kept<G> {
    work: Vec<Work>,
    graph: G,
    /// When it ran last.
    ran: u64,
}

impl<G> Default for Graphs<G> {
    fn default() -> Self {
        Self { kept: HashMap::new(), size: 0, time: 0 }
    }
}

impl<G> Graphs<G> {
    fn get(&mut self, hash: u64, work: &[Work]) -> Option<&G> {
        self.time += 1;
        let kept = self.kept.get_mut(&hash).filter(|kept| kept.work == work)?;
        kept.ran = self.time;
        Some(&kept.graph)
    }

    /// Keeps one whose work has just run, and gives up those that have not run for longest where there is no room for all.
    fn keep(&mut self, hash: u64, work: &[Work], graph: G) {
        self.time += 1;
        self.give_up(hash);
        self.size += GRAPH + work.len();
        while self.size > MOST_GRAPHED
            && let Some((&oldest, _)) = self.kept.iter().min_by_key(|(_, kept)| kept.ran)
        {
            self.give_up(oldest);
        }
        self.kept.insert(hash, Kept { work: work.to_vec(), graph, ran: self.time });
    }

    fn give_up(&mut self, hash: u64) {
        self.size -= self.kept.remove(&hash).map_or(0, |kept| GRAPH + kept.work.len());
    }
}

impl Queue {
    /// Sequences that run as graphs.
    pub fn graphs(&self) -> usize {
        self.graphs.kept.len()
    }

    /// Runs what is pending, on a GPU.
    pub fn run(&mut self, gpu: &Gpu) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let ran = self.run_all(gpu, &pending);
        self.pending = pending;
        self.pending.clear();
        ran
    }

    fn run_all(&mut self, gpu: &Gpu, pending: &[Work]) -> Result<()> {
        let hash = hash(pending);
        if let Some(graph) = self.graphs.get(hash, pending) {
            return gpu.launch_graph(graph);
        }
        if self.seen.len() >= MOST_SEEN {
            self.seen.clear();
        }
        self.run_each(gpu, pending)?;
        if self.without_graphs || self.seen.insert(hash) {
            return Ok(());
        }
        match self.capture(gpu, pending) {
            Ok(graph) => self.graphs.keep(hash, pending, graph),
            Err(e) => {
                tracing::warn!("decode steps run without CUDA graphs: {e}");
                self.without_graphs = true;
            }
        }
        Ok(())
    }

    fn capture(&mut self, gpu: &Gpu, pending: &[Work]) -> Result<Graph> {
        gpu.capture(|| self.run_each(gpu, pending)).or_else(|e| {
            if self.launches_plainly {
                return Err(e);
            }
            tracing::warn!("decode steps run without programmatic dependent launches: {e}");
            self.launches_plainly = true;
            // If it fails all the same, something else is the cause.
            gpu.capture(|| self.run_each(gpu, pending)).inspect_err(|_| self.launches_plainly = false)
        })
    }

    fn run_each(&mut self, gpu: &Gpu, all: &[Work]) -> Result<()> {
        let before = std::iter::once(None).chain(all.iter().map(Some));
        before.zip(all).try_for_each(|(before, work)| {
            let dependent = !self.launches_plainly && is_dependent(before, work);
            self.run_behind(gpu, work, dependent)
        })
    }

    /// Runs one thing, behind all that was run before.
    pub fn run_one(&mut self, gpu: &Gpu, work: &Work) -> Result<()> {
        self.run_behind(gpu, work, false)
    }

    /// The same, of what may be brought up early if it is `dependent`.
    fn run_behind(&mut self, gpu: &Gpu, work: &Work, dependent: bool) -> Result<()> {
        match work {
            Work::Kernel(launch) => gpu.launch(launch, dependent),
            Work::Product(product) => match &mut self.cublaslt {
                Some(cublaslt) => cublaslt.multiply(gpu, product),
                None => Err(OpError::Backend("a product for cuBLASLt without it".to_owned())),
            },
        }
    }
}

/// A hash over every argument; equality is checked beside it.
fn hash(work: &[Work]) -> u64 {
    let mut hash = 0u64;
    let mut add = |x: u64| hash = (hash ^ x).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    for work in work {
        match work {
            Work::Kernel(launch) => {
                add(launch.kernel.as_ptr().addr() as u64);
                launch.grid.blocks.iter().for_each(|&n| add(u64::from(n)));
                launch.args().iter().for_each(|arg| add(arg.value()));
            }
            Work::Product(Product { shape, x, w, out }) => {
                let ProductShape { rows, n, k, stride } = *shape;
                [rows, n, k, stride].into_iter().for_each(|n| add(n as u64));
                [*x, *w, *out].into_iter().for_each(&mut add);
            }
        }
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(blocks: usize, arg: usize) -> Work {
        Work::Kernel(Launch::new("embed", Grid::new(blocks, 32), 0, &[arg.into(), 1usize.into()]))
    }

    #[test]
    fn graphs_that_ran_last_are_kept_as_far_as_there_is_room() {
        let mut graphs = Graphs::default();
        let long = vec![launch(1, 5); MOST_GRAPHED / 4];
        for hash in 0..3 {
            graphs.keep(hash, &long, hash);
        }
        assert_eq!(graphs.get(0, &long), Some(&0));
        assert_eq!(graphs.get(0, &long[1..]), None, "other work of the same hash");
        graphs.keep(3, &long, 3);
        let kept = |graphs: &mut Graphs<u64>, work: &[Work]| {
            [0, 1, 2, 3].map(|hash| graphs.get(hash, work).copied())
        };
        assert_eq!(kept(&mut graphs, &long), [Some(0), None, Some(2), Some(3)]);
        // One in another's place, and one that leaves room for no other.
        graphs.keep(2, &long[..1], 4);
        assert_eq!(graphs.get(2, &long), None);
        assert_eq!(graphs.get(2, &long[..1]), Some(&4));
        graphs.keep(5, &vec![launch(1, 5); MOST_GRAPHED], 5);
        assert_eq!(kept(&mut graphs, &long), [None; 4]);
        assert_eq!((graphs.kept.len(), graphs.size), (1, GRAPH + MOST_GRAPHED));
    }

    #[test]
    fn two_steps_of_many_stretches_do_not_take_each_others_graphs() {
        let mut graphs = Graphs::default();
        for hash in 0..2 * 161 {
            graphs.keep(hash, &[launch(1, 5); 9], hash);
        }
        assert_eq!(graphs.kept.len(), 322);
    }

    #[test]
    fn launches_that_differ_in_one_argument_or_block_differ() {
        let base = [launch(1, 5), launch(2, 6)];
        assert_eq!(hash(&base), hash(&[launch(1, 5), launch(2, 6)]));
        for other in
            [[launch(1, 5), launch(2, 7)], [launch(1, 5), launch(3, 6)], [launch(2, 6), launch(1, 5)]]
        {
            assert!(hash(&other) != hash(&base) && other != base);
        }
    }
}
