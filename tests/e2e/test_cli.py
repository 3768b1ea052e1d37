"""The command line: what a user sees who mistypes, looks around, or brings a damaged file."""

import os
import subprocess

import pytest
from conftest import BINARY, MODEL


def rudder(*arguments, stdin="", **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RUDDER_") or k == "RUDDER_CACHE"}
    return subprocess.run(
        [BINARY, *arguments], input=stdin, capture_output=True, text=True, timeout=120, env=environment | variables
    )


def refused(ended, *words):
    """Checks that a command failed with a message of these words, and not by a panic."""
    assert ended.returncode not in (0, 101), ended
    for word in words:
        assert word in ended.stderr, ended.stderr
    assert "panicked" not in ended.stderr


@pytest.fixture(scope="module")
def file():
    """The model as a file."""
    if os.path.exists(MODEL):
        return MODEL
    pulled = rudder("pull", MODEL)
    assert pulled.returncode == 0, pulled.stderr
    return pulled.stdout.strip()


def test_a_mistyped_model_name_gets_a_hint():
    refused(rudder("serve", "--model", "qwen2.5-codr-0.5b"), "qwen2.5-coder-0.5b")


def test_an_unknown_key_of_the_config_file_is_named(tmp_path):
    config = tmp_path / "rudder.toml"
    config.write_text("max_contxt = 100\n")
    refused(rudder("serve", "--config", str(config)), "max_contxt", "max_context")


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(tmp_path):
    """Seen in which of three bad values is complained of."""
    config = tmp_path / "rudder.toml"
    config.write_text('model = "no-such-model-in-the-file"\n')
    refused(rudder("serve", "--config", str(config)), "no-such-model-in-the-file")
    variable = {"RUDDER_MODEL": "no-such-model-in-the-variable"}
    refused(rudder("serve", "--config", str(config), **variable), "no-such-model-in-the-variable")
    flag = rudder("serve", "--config", str(config), "--model", "no-such-model-of-the-flag", **variable)
    refused(flag, "no-such-model-of-the-flag")


def test_models_lists_the_catalog():
    listed = rudder("models", "list")
    assert listed.returncode == 0
    for name in ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "smollm2-135m"):
        assert name in listed.stdout


def test_doctor_tells_of_cpu_and_memory():
    told = rudder("doctor")
    assert told.returncode == 0, told.stderr
    assert "cpu" in told.stdout and "threads" in told.stdout and "memory" in told.stdout


def test_chat_answers_in_the_terminal():
    ended = rudder(
        "chat", "--model", MODEL, "--temperature", "0", stdin="Name the capital of France in one word.\n/exit\n"
    )
    assert ended.returncode == 0, ended.stderr
    assert "Paris" in ended.stdout


@pytest.mark.parametrize("length", [0, 3, 100, 10_000, 6_000_000])
def test_a_truncated_model_is_an_error_and_no_panic(tmp_path, file, length):
    cut = tmp_path / "cut.gguf"
    with open(file, "rb") as whole:
        cut.write_bytes(whole.read(length))
    refused(rudder("serve", "--model", str(cut)), "cut.gguf")


def test_a_port_in_use_is_an_error_that_names_it(server):
    port = server.url.rsplit(":", 1)[1]
    refused(rudder("serve", "--model", MODEL, "--port", port), port)
