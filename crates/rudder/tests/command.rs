//! The command as a user meets it: help, the catalog and cache, settings that are wrong.

use std::path::Path;
use std::process::{Command, Output};

fn rudder(cache: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rudder"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("RUDDER_") {
            command.env_remove(name);
        }
    }
    command.env("RUDDER_CACHE", cache).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The standard output of a command that must succeed.
fn succeed(cache: &Path, args: &[&str]) -> String {
    let output = rudder(cache, args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The standard error of a command that must fail.
fn fail(cache: &Path, args: &[&str]) -> String {
    let output = rudder(cache, args);
    assert!(!output.status.success(), "{args:?}: {}", text(&output.stdout));
    text(&output.stderr)
}

#[test]
fn help_names_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let help = succeed(dir.path(), &["--help"]);
    for command in ["serve", "chat", "pull", "models", "bench", "doctor", "--config"] {
        assert!(help.contains(command), "{command} is missing:\n{help}");
    }
    let help = succeed(dir.path(), &["serve", "--help"]);
    for flag in ["--model", "--kv-memory", "RUDDER_KV_MEMORY", "--port", "[default: 8000]", "--prefix-cache"]
    {
        assert!(help.contains(flag), "{flag} is missing:\n{help}");
    }
}

#[test]
fn an_api_key_in_the_environment_is_not_shown_in_help() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rudder"));
    let output = command.env("RUDDER_API_KEY", "hunter2").args(["serve", "--help"]).output().unwrap();
    assert!(text(&output.stdout).contains("RUDDER_API_KEY"));
    assert!(!text(&output.stdout).contains("hunter2"));
}

#[test]
fn models_are_listed_shown_and_removed() {
    let cache = tempfile::tempdir().unwrap();
    let row = |name: &str| {
        let list = succeed(cache.path(), &["models", "list"]);
        list.lines().find(|l| l.starts_with(name)).map(str::to_owned)
    };
    assert!(row("smollm2-135m").unwrap().ends_with("no"));
    let show = succeed(cache.path(), &["models", "show", "smollm2-135m"]);
    assert!(show.contains("Apache-2.0") && show.contains("b179c9523d0e6a0f"), "{show}");

    let folder = cache.path().join("smollm2-135m");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("smollm2-135m-instruct-q4_1.gguf"), "12345").unwrap();
    let repo = cache.path().join("org--tiny");
    std::fs::create_dir_all(&repo).unwrap();
    std::fs::write(repo.join("tiny.gguf"), "123").unwrap();
    assert!(row("smollm2-135m").unwrap().ends_with("yes"));
    assert!(row("org/tiny:tiny.gguf").unwrap().ends_with("yes"));

    assert!(succeed(cache.path(), &["models", "remove", "smollm2-135m"]).contains("5 B"));
    assert!(row("smollm2-135m").unwrap().ends_with("no"));
    assert!(fail(cache.path(), &["models", "remove", "smollm2-135m"]).contains("not in the cache"));
}

#[test]
fn models_are_looked_for_in_the_cache_that_the_file_names() {
    let folder = tempfile::tempdir().unwrap();
    let (named, file) = (folder.path().join("named"), folder.path().join("c.toml"));
    let list = |settings: &str, cache: Option<&Path>| {
        std::fs::write(&file, settings).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rudder"));
        command.args(["models", "list", "--config"]).arg(&file).env_remove("RUDDER_CACHE");
        command.envs(cache.map(|cache| ("RUDDER_CACHE", cache))).output().unwrap()
    };
    let settings = format!("cache = {named:?}");
    assert!(text(&list(&settings, None).stdout).ends_with(&format!("cache: {}\n", named.display())));
    let other = folder.path().join("other");
    assert!(text(&list(&settings, Some(&other)).stdout).contains(&format!("cache: {}", other.display())));
    assert!(text(&list("cach = \"x\"", None).stderr).contains("cach"));
}

#[test]
fn an_unknown_model_is_answered_with_the_nearest() {
    let cache = tempfile::tempdir().unwrap();
    for args in [
        ["pull", "qwen2.5-codr-0.5b"],
        ["chat", "--model=qwen2.5-codr-0.5b"],
        ["serve", "-mqwen2.5-codr-0.5b"],
    ] {
        let error = fail(cache.path(), &args);
        assert!(error.contains("did you mean `qwen2.5-coder-0.5b`?"), "{error}");
    }
}

#[test]
fn a_flag_wins_over_a_variable_and_a_variable_over_the_file() {
    let cache = tempfile::tempdir().unwrap();
    let file = cache.path().join("c.toml");
    std::fs::write(&file, "model = \"of-the-file\"").unwrap();
    let complaint = |flag: &[&str], variable: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rudder"));
        command.args(["serve", "--port=0", "--config"]).arg(&file).args(flag).env_remove("RUDDER_MODEL");
        command.envs(variable.map(|v| ("RUDDER_MODEL", v)));
        text(&command.output().unwrap().stderr)
    };
    assert!(complaint(&[], None).contains("`of-the-file`"));
    assert!(complaint(&[], Some("of-the-variable")).contains("`of-the-variable`"));
    assert!(complaint(&["--model=of-the-flag"], Some("of-the-variable")).contains("`of-the-flag`"));
}

#[test]
fn a_service_of_kubernetes_called_rudder_is_not_taken_for_settings() {
    let complaint = |port: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rudder"));
        command.args(["serve", "--model=no-such-model", "--host=127.0.0.1"]).env("RUDDER_PORT", port);
        // From a service called rudder-master.
        command.env("RUDDER_MASTER_PORT", "tcp://10.96.0.2:29501");
        text(&command.output().unwrap().stderr)
    };
    let of_kubernetes = complaint("tcp://10.96.0.1:8000");
    assert!(!of_kubernetes.contains("invalid value"), "{of_kubernetes}");
    assert!(complaint("eight").contains("invalid value"));
}

#[test]
fn an_unknown_key_of_the_config_file_is_an_error_that_names_it() {
    let cache = tempfile::tempdir().unwrap();
    let file = cache.path().join("c.toml");
    std::fs::write(&file, "prot = 9000").unwrap();
    let error = fail(cache.path(), &["serve", "--port=0", "--config", file.to_str().unwrap()]);
    assert!(error.contains("unknown key `prot` (did you mean `port`?)"), "{error}");
    let error = fail(cache.path(), &["serve", "--prot", "1"]);
    assert!(error.contains("--port"), "{error}");
    let output = Command::new(env!("CARGO_BIN_EXE_rudder"))
        .args(["models", "list", "--cache", cache.path().to_str().unwrap()])
        .envs([("RUDDER_PROT", "1"), ("RUDDER_NVCC", "none")])
        .output()
        .unwrap();
    let warning = text(&output.stderr);
    assert!(warning.contains("RUDDER_PROT") && warning.contains("RUDDER_PORT"), "{warning}");
    assert!(!warning.contains("RUDDER_NVCC"), "builds read it: {warning}");
}

#[test]
fn a_cache_that_cannot_be_written_is_an_error_that_names_it_once() {
    let cache = tempfile::tempdir().unwrap();
    let file = cache.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = fail(&file, &["pull", "smollm2-135m"]);
    assert!(error.contains(file.to_str().unwrap()), "{error}");
    assert_eq!(error.matches("os error").count(), 1, "{error}");
}

#[test]
fn the_example_configs_are_sound() {
    let cache = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")).unwrap() {
        let file = file.unwrap().path();
        if file.extension().is_some_and(|e| e == "toml") {
            succeed(cache.path(), &["doctor", "--config", file.to_str().unwrap()]);
        }
    }
}

#[test]
fn a_model_is_cut_into_ranks_or_refused_with_what_would_do() {
    let cache = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/qwen2");
    let model = model.to_str().unwrap();
    let throughput = |ranks| {
        let load =
            ["bench", "throughput", "--load-format=dummy", "--requests=2", "--prompt=40", "--output=20"];
        [&load[..], &["--device=cpu", "--model", model, "--tensor-parallel-size", ranks]].concat()
    };
    let error = fail(cache.path(), &throughput("3"));
    assert!(error.contains("a tensor_parallel_size of 1, 2, 4 will do"), "{error}");
    let report = succeed(cache.path(), &throughput("2"));
    assert!(report.contains("2 requests"), "{report}");
}

#[test]
fn what_only_gpus_do_is_refused_on_the_cpu() {
    let cache = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/qwen2");
    let load =
        ["bench", "throughput", "--load-format=dummy", "--device=cpu", "--model", model.to_str().unwrap()];
    for setting in ["kv_cache_dtype", "quantization"] {
        let flag = format!("--{}=fp8", setting.replace('_', "-"));
        let error = fail(cache.path(), &[&load[..], &[flag.as_str()]].concat());
        assert!(error.contains(&format!("{setting} = fp8 is for GPUs")), "{error}");
    }
    let error = fail(cache.path(), &[&load[..], &["--fp8-activations=on"]].concat());
    assert!(error.contains("fp8_activations is for Hopper and Blackwell GPUs"), "{error}");
}

#[test]
fn doctor_says_what_will_be_used() {
    let cache = tempfile::tempdir().unwrap();
    let report = succeed(cache.path(), &["doctor"]);
    for part in ["cpu", "kernels", "threads", "memory", "gpu", "cache", "not in the cache", "device    cpu"] {
        assert!(report.contains(part), "{part} is missing:\n{report}");
    }
}

#[test]
fn a_gpu_that_is_not_there_does_not_pass_its_check() {
    let cache = tempfile::tempdir().unwrap();
    assert!(fail(cache.path(), &["check-gpu", "99"]).starts_with("error: "));
}
