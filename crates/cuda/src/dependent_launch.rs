//! Which kernels may begin while the one before them still runs (programmatic dependent launch).
//!
//! A decode step's kernels last some microseconds each, about what it takes to bring one up. So within what is queued together a kernel that
//! [`waits`] on the device is brought up early (`grid_dependency_wait` in kernels/common.cuh says for what, and what it may do before). All
//! else is launched plainly, and begins when all before it has ended:
//! - what does not wait there;
//! - kernels that wait for other ranks: they would hold multiprocessors that what they wait for may need;
//! - what comes behind a product of cuBLASLt, a copy or an event, whose ends the device tells in ways of its own.
//!
//! A kernel may be brought up behind one of ours that does not wait, too: that one has been launched plainly, and all before it has ended.

use crate::queue::Work;

/// Those of which every kernel waits, whatever its format or head size.
const WAITING_KINDS: [&str; 4] = ["matmul_few_", "rope_and_cache", "attention_decode_", "attention_shared_"];

/// The others that wait.
const WAITING: &[&str] = &[
    "attention_combine",
    "rms_norm",
    "silu_mul",
    "gather",
    "pack_rows",
    "add_bias",
    "add_parts",
    "quantise_rows",
    "quantise_rows_mx",
    "moe_route",
    "moe_count",
    "moe_offsets",
    "moe_sort",
    "moe_combine",
];

/// Whether a kernel waits on the device for the one before.
pub(crate) fn waits(kernel: &str) -> bool {
    WAITING_KINDS.iter().any(|kind| kernel.starts_with(kind)) || WAITING.contains(&kernel)
}

/// Whether `work` may be brought up before `before`, which is queued right before it, has ended.
pub(crate) fn is_dependent(before: Option<&Work>, work: &Work) -> bool {
    match (before, work) {
        (Some(Work::Kernel(_)), Work::Kernel(launch)) => waits(launch.kernel),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Grid, KERNELS};
    use crate::queue::{Launch, Product, ProductShape};

    const WAIT: &str = "grid_dependency_wait();";

    /// The kernels' sources, macros' lines joined and filled in for each format and head size.
    fn sources() -> String {
        let matmul = include_str!("../../../kernels/matmul.cu").replace("\\\n", "\n");
        let formats = ["mxfp4", "fp8", "int4", "nvfp4"].map(|format| matmul.replace("##NAME", format));
        let attention = include_str!("../../../kernels/attention.cu").replace("\\\n", "\n");
        let caches = ["", "_fp8"].map(|cache| attention.replace("##NAME", cache));
        let heads = ["64", "96", "128", "256"].map(|dim| caches.concat().replace("_##D", &format!("_{dim}")));
        let others = [include_str!("../../../kernels/rows.cu"), include_str!("../../../kernels/moe.cu")];
        [formats.concat(), heads.concat(), others.concat()].concat()
    }

    /// What stands in the function of this name: behind its first brace.
    fn body<'a>(sources: &'a str, function: &str) -> &'a str {
        let at = sources.find(&format!(" {function}(")).expect(function);
        sources[at..].split_once('{').expect(function).1.trim_start()
    }

    #[test]
    fn kernels_that_are_brought_up_early_wait_before_all_else() {
        let sources = sources();
        let waiting: Vec<_> = KERNELS.iter().map(|(name, _)| *name).filter(|name| waits(name)).collect();
        assert!(WAITING.iter().all(|name| waiting.contains(name)) && waiting.len() > WAITING.len());
        for kernel in waiting {
            let body = body(&sources, kernel);
            // Of few rows the first weights are read before, and nothing else.
            let (first, _) = body.split_once(';').expect(kernel);
            let of_few_rows = first.starts_with("matmul_few") && !first.contains('[');
            assert!(of_few_rows || body.starts_with(WAIT), "{kernel}: {first}");
        }
        for reader in ["matmul_few", "matmul_few_packed"] {
            let (before, _) = body(&sources, reader).split_once(WAIT).expect("it waits");
            for of_others in ["xs[t][", "*xs", "xs[t] +", "out.put", "bias", "return", "experts"] {
                assert!(!before.contains(of_others), "{reader}: {of_others} before it waits");
            }
        }
    }

    #[test]
    fn kernels_alone_are_brought_up_early_and_behind_kernels_alone() {
        let kernel = |name| Work::Kernel(Launch::new(name, Grid::new(1, 32), 0, &[]));
        let shape = ProductShape { rows: 1, n: 1, k: 1, stride: 1 };
        let product = Work::Product(Product { shape, x: 0, w: 0, out: 0 });
        let (norm, sum) = (kernel("rms_norm"), kernel("all_reduce_once"));
        assert!(is_dependent(Some(&norm), &norm) && is_dependent(Some(&sum), &norm));
        assert!(!is_dependent(None, &norm) && !is_dependent(Some(&product), &norm));
        assert!(!is_dependent(Some(&norm), &sum) && !is_dependent(Some(&norm), &product));
    }

    #[test]
    fn kernels_that_wait_for_other_ranks_are_launched_plainly() {
        let collectives = include_str!("../../../kernels/collectives.cu");
        let names = collectives.split("\nKERNEL(").skip(1).filter_map(|rest| rest.split(')').next());
        let names: Vec<_> = names.collect();
        assert!(names.len() > 3 && !names.into_iter().any(waits));
    }
}
