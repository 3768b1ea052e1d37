//! What a decode step queues, gathered so that a step that comes again runs as one CUDA graph.
//!
//! While the queue is open, launches are kept and not run; whatever needs their results, or the memory they use, closes it
//! first. A sequence of launches that is the same to the last argument as one before is captured the second time and from
//! then on runs as its graph. Nothing has to be declared fit for a graph: what differs just runs.

use crate::cublaslt::CublasLt;
use crate::device::{Arg, Grid};
use crate::gpu::{Gpu, Graph};
use rudder_ops::{OpError, Result};
use std::collections::{HashMap, HashSet};

/// Most arguments of a kernel.
pub(crate) const MOST_ARGS: usize = 16;
/// Graphs kept, and sequences remembered, before all are forgotten.
const MOST_GRAPHS: usize = 256;
const MOST_SEEN: usize = 4096;

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
    pub graphs: HashMap<u64, (Vec<Work>, Graph)>,
    pub seen: HashSet<u64>,
    /// Set when this GPU or driver would not capture.
    pub without_graphs: bool,
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

impl Queue {
    /// Sequences that run as graphs.
    pub fn graphs(&self) -> usize {
        self.graphs.len()
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
        if let Some((work, graph)) = self.graphs.get(&hash)
            && work == pending
        {
            return gpu.launch_graph(graph);
        }
        if self.seen.len() >= MOST_SEEN {
            self.seen.clear();
        }
        if self.without_graphs || self.seen.insert(hash) {
            return self.run_each(gpu, pending);
        }
        // A graph's first launch brings it to the GPU, which may have no room for it.
        let launched = gpu
            .capture(|| self.run_each(gpu, pending))
            .and_then(|graph| gpu.launch_graph(&graph).map(|()| graph));
        match launched {
            Ok(graph) => {
                if self.graphs.len() >= MOST_GRAPHS {
                    gpu.synchronize()?;
                    self.graphs.clear();
                }
                self.graphs.insert(hash, (pending.to_vec(), graph));
                Ok(())
            }
            Err(e) => {
                tracing::warn!("decode steps run without CUDA graphs: {e}");
                self.without_graphs = true;
                self.run_each(gpu, pending)
            }
        }
    }

    fn run_each(&mut self, gpu: &Gpu, work: &[Work]) -> Result<()> {
        work.iter().try_for_each(|work| self.run_one(gpu, work))
    }

    /// Runs one thing.
    pub fn run_one(&mut self, gpu: &Gpu, work: &Work) -> Result<()> {
        match work {
            Work::Kernel(launch) => gpu.launch(launch.kernel, launch.grid, launch.shared, launch.args()),
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

    #[test]
    fn launches_that_differ_in_one_argument_or_block_differ() {
        let launch = |blocks, arg: usize| {
            Work::Kernel(Launch::new("embed", Grid::new(blocks, 32), 0, &[arg.into(), 1usize.into()]))
        };
        let base = [launch(1, 5), launch(2, 6)];
        assert_eq!(hash(&base), hash(&[launch(1, 5), launch(2, 6)]));
        for other in
            [[launch(1, 5), launch(2, 7)], [launch(1, 5), launch(3, 6)], [launch(2, 6), launch(1, 5)]]
        {
            assert!(hash(&other) != hash(&base) && other != base);
        }
    }
}
