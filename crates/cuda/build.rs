//! Compiles kernels/*.cu with nvcc, where there is one, into fat binaries that the crate embeds: machine code for
//! Hopper (sm_90a) and Blackwell (sm_100a, sm_103a), and PTX, which the driver compiles for what comes after them.
//!
//! nvcc is the one that RUDDER_NVCC names, else the one that scripts/get-nvcc put into the target folder. Without one, or
//! with RUDDER_NVCC=none, the crate is built without kernels, and says so when it is asked for a GPU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGETS: [&str; 4] = [
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100a,code=sm_100a",
    "arch=compute_103a,code=sm_103a",
    "arch=compute_90,code=compute_90",
];

fn main() {
    let kernels = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("../../kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    println!("cargo:rerun-if-changed={}", kernels.display());
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=RUDDER_NVCC");
    let mut sources: Vec<PathBuf> = fs::read_dir(&kernels)
        .unwrap_or_else(|e| panic!("cannot read {}: {e}", kernels.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    let found = nvcc(&out);
    let images: Vec<Image> =
        found.iter().flat_map(|nvcc| sources.iter().map(|source| compile(nvcc, source, &out))).collect();
    // The driver reads 64-bit fields of an image's header.
    let list: String = images
        .iter()
        .map(|Image { path, kernels }| {
            format!("    (&Aligned(*include_bytes!({path:?})).0, &{kernels:?}),\n")
        })
        .collect();
    let cuda = found.as_deref().map_or(0, cuda_version);
    let code = format!(
        "/// One fat binary a source file, and the kernels in it.\npub const IMAGES: &[(&[u8], &[&str])] = &[\n{list}];\n\
         /// The major number of the CUDA that made them, 0 if nvcc did not say or there are none.\npub const CUDA: i32 = {cuda};\n"
    );
    fs::write(out.join("images.rs"), code).unwrap();
    #[cfg(feature = "emulate")]
    emulate(&kernels);
}

/// The compiler to use.
fn nvcc(out: &Path) -> Option<PathBuf> {
    match env::var_os("RUDDER_NVCC") {
        Some(path) if path == "none" => None,
        Some(path) => Some(path.into()),
        None => out.ancestors().map(|a| a.join("nvcc/site/nvidia/cu13/bin/nvcc")).find(|p| p.exists()),
    }
}

/// The major number of an nvcc's CUDA: it says `release 13.0, V13.0.88`. 0 if it says something else.
fn cuda_version(nvcc: &Path) -> u32 {
    let said = Command::new(nvcc).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    let release = said.split_once("release ").and_then(|(_, release)| release.split_once('.'));
    release.and_then(|(major, _)| major.parse().ok()).unwrap_or(0)
}

/// A source's fat binary, and the names of its kernels.
struct Image {
    path: PathBuf,
    kernels: Vec<String>,
}

fn compile(nvcc: &Path, source: &Path, out: &Path) -> Image {
    let path = out.join(source.file_stem().unwrap()).with_extension("fatbin");
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17", "-lineinfo", "--threads", "2", "-compress-mode=size"]);
    command.args(TARGETS.map(|target| format!("-gencode={target}")));
    // What nvcc warns of is an error. ptxas names the kernels that it compiles.
    command.args(["-Werror", "all-warnings", "-Xptxas", "-v", "-o"]).arg(&path).arg(source);
    let output = command.output().unwrap_or_else(|e| panic!("cannot run {}: {e}", nvcc.display()));
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        panic!("nvcc ended with {} on {}:\n{said}", output.status, source.display());
    }
    // That products of wgmma wait for one another, ptxas mentions as if it were nothing.
    let mentions: Vec<&str> = said.lines().filter(|line| line.contains("(C7")).collect();
    if mentions.iter().any(|line| line.contains("serialized")) {
        panic!("{} loses its products' overlap:\n{}", source.display(), mentions.join("\n"));
    }
    for mention in mentions {
        println!("cargo::warning={}: {mention}", source.display());
    }
    let entry = |line: &str| Some(line.split_once("entry function '")?.1.split_once('\'')?.0.to_owned());
    let mut kernels: Vec<String> = said.lines().filter_map(entry).collect();
    kernels.sort();
    kernels.dedup();
    Image { path, kernels }
}

#[cfg(feature = "emulate")]
fn emulate(kernels: &Path) {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .define("RUDDER_EMULATE", None)
        // Fibers leave their stacks by longjmp, which fortified builds take for an attack.
        .flag("-U_FORTIFY_SOURCE")
        .flag("-Wno-unknown-pragmas")
        // One rounding an operation, where the kernels ask for it and everywhere else.
        .flag("-ffp-contract=off")
        .include(kernels)
        .file(kernels.join("emulate/emulate.cpp"))
        .compile("rudder_emulated_kernels");
}
