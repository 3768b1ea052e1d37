#!/usr/bin/env python3
"""Makes an agent trace (for `rudder bench agent-trace`) from a git repository's history.

    benches/traces/make.py --repo PATH --name NAME --suffix .rs --commits 5d05382 9ef7c34 --origin URL --license MIT \
        > benches/traces/NAME.json

Each commit becomes a session in which an agent does that commit's work anew: it is told the commit's message,
lists files, searches, reads the lines around each change, sends two subagents to look elsewhere, and has
every change applied by an edit: the lines once more with the change in them. What tools say is the
repository's real text at that commit. The recorded answers of edits are the lines as the commit left them; those of other
turns are made up. So are the pauses: each tool's own, with a median of about half a second.

The same repository and arguments always give the same trace. Needs git and Python 3.9, nothing else.
"""

import argparse
import json
import re
import subprocess

SYSTEM = """You are a coding agent. You work in a git repository through tools: the user shows you what they returned.
Answer in one or two short sentences what you learnt and what you will do next. When you are asked to write lines
again, answer with exactly these lines in one code block and nothing else."""

# Seconds that each tool takes.
PAUSES = {"list": 0.2, "search": 0.5, "read": 0.3, "log": 0.6, "edit": 0.4, "diff": 1.8, "ask": 1.0}
# Lines that are read around a change, and most that an edit writes again.
READ_AROUND = 48
EDIT_AROUND = 9
MAX_EDIT = 36
# Lines shown of an earlier change.
LOG_LINES = 110
# Characters of code in a token, a little high: an edit's answer is cut before its end, not followed by other words.
CHARS_PER_TOKEN = 4.2


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--repo", required=True, help="git repository, bare or not")
    p.add_argument("--name", required=True)
    p.add_argument("--suffix", required=True, help="of source files, as in .rs")
    p.add_argument("--commits", required=True, nargs="+", help="one session each")
    p.add_argument("--origin", required=True, help="where the repository comes from")
    p.add_argument("--license", required=True, help="of the repository's text, as an SPDX expression")
    p.add_argument("--spacing", type=float, default=12.0, help="seconds between the sessions' starts")
    args = p.parse_args()
    repository = Repository(args.repo, args.suffix)
    sessions = [session(repository, commit, number * args.spacing) for number, commit in enumerate(args.commits)]
    commits = [repository.git("rev-parse", commit).strip() for commit in args.commits]
    trace = {"format": 1, "name": args.name, "origin": args.origin, "license": args.license, "commits": commits,
             "system": SYSTEM, "sessions": sessions}
    print(json.dumps(trace, ensure_ascii=False, indent=1))


class Repository:
    def __init__(self, path, suffix):
        self.path, self.suffix = path, suffix

    def git(self, *command):
        done = subprocess.run(["git", "-C", self.path, *command], capture_output=True, text=True, check=True)
        return done.stdout

    def lines(self, commit, file):
        return self.git("show", f"{commit}:{file}").splitlines()

    def changes(self, commit):
        """The commit's changed stretches: file, first and last line before, replacing lines, diff."""
        found = []
        diff = self.git("diff", "-U0", f"{commit}~", commit, "--diff-filter=M", "--", f"*{self.suffix}")
        for part in re.split(r"^diff --git ", diff, flags=re.M)[1:]:
            file = re.search(r"^\+\+\+ b/(.*)$", part, re.M).group(1)
            for hunk in re.split(r"^(?=@@ )", part, flags=re.M)[1:]:
                head, *body = hunk.splitlines()
                start, count = re.match(r"@@ -(\d+)(?:,(\d+))?", head).groups()
                start, count = int(start), int(count if count is not None else 1)
                first = start if count else start + 1
                added = [line[1:] for line in body if line.startswith("+")]
                if count + len(added) <= 24:
                    found.append({"file": file, "first": first, "last": first + count - 1, "added": added,
                                  "diff": "\n".join(line for line in body if line[:1] in "+-")})
        return found


def session(repository, commit, start):
    parent = repository.git("rev-parse", f"{commit}~").strip()
    subject, _, body = repository.git("log", "-1", "--format=%s%n%b", commit).strip().partition("\n")
    changes = spread_out(repository.changes(commit))
    files = list(dict.fromkeys(change["file"] for change in changes))
    first = changes[0]
    listing = "\n".join(repository.git("ls-tree", "-r", "--name-only", parent).splitlines()[:60])
    turns = [
        turn(f"Task: {subject}\n{body.strip()}\n\nResult of `git ls-files`:\n{listing}",
             f"I will begin with `{first['file']}`, where this is done.", "list"),
        turn(tool(f"git log --oneline -12 -- {first['file']}",
                  repository.git("log", "--format=%h %s", "-12", parent, "--", first["file"])),
             "The last changes to it are of another kind. I will look for the names that are used.", "log"),
        last_change(repository, parent, first["file"]),
        search(repository, parent, first),
    ]
    forks_after = None
    for number, change in enumerate(changes):
        lines = repository.lines(parent, change["file"])
        turns.append(read(change["file"], lines, change["first"] - READ_AROUND, change["last"] + READ_AROUND))
        turns.append(edit(change, lines))
        if number == 0:
            turns.append(turn(tool("git diff", f"--- a/{change['file']}\n+++ b/{change['file']}\n{change['diff']}"),
                              "The change is in. I will have others look at the rest.", "diff"))
            forks_after = len(turns)
    turns.append(turn("All tests pass. Sum up what you did, as a commit message.", subject, "ask", 60))
    forks = [fork(repository, parent, file, forks_after) for file in elsewhere(repository, parent, files)]
    return {"start": start, "turns": turns, "forks": forks}


def spread_out(changes):
    """At most three changes that do not overlap what is read for the others."""
    chosen = []
    for change in changes:
        near = (other for other in chosen if other["file"] == change["file"])
        if all(abs(other["first"] - change["first"]) > READ_AROUND for other in near):
            chosen.append(change)
    return chosen[:3]


def turn(say, answer, tool, output=None, kind="work"):
    return {"say": say, "answer": answer, "output": output or 56, "pause": PAUSES[tool], "kind": kind}


def tool(command, result):
    return f"Result of `{command}`:\n```\n{result.rstrip()}\n```"


def read(file, lines, first, last):
    first, last = max(first, 1), min(last, len(lines))
    shown = "\n".join(lines[first - 1:last])
    return turn(tool(f"sed -n {first},{last}p {file}", shown), f"Lines {first} to {last} of `{file}` are what I need.",
                "read")


def edit(change, lines):
    """The lines around a change once more, with the change."""
    room = max(MAX_EDIT - (change["last"] - change["first"] + 1), 2 * EDIT_AROUND) // 2
    first, last = max(change["first"] - room, 1), min(change["last"] + room, len(lines))
    after = lines[first - 1:change["first"] - 1] + change["added"] + lines[change["last"]:last]
    text = "\n".join(after)
    say = (f"Write lines {first} to {last} of `{change['file']}` again with this change and no other:\n"
           f"```diff\n{change['diff']}\n```")
    return turn(say, f"```\n{text}\n```", "edit", max(int(len(text) / CHARS_PER_TOKEN), 16), "edit")


def last_change(repository, parent, file):
    shown = repository.git("log", "-1", "-p", "--no-merges", "--format=commit %h%n%n    %s%n", parent, "--", file)
    text = "\n".join(line[:160] for line in shown.splitlines()[:LOG_LINES])
    return turn(tool(f"git log -1 -p -- {file}", text), "That is how such a change is made here.", "log")


def search(repository, parent, change):
    """Where a name of the change is used."""
    names = re.findall(r"[A-Za-z_]\w{5,}", change["diff"]) or ["return"]
    name = max(dict.fromkeys(names), key=names.count)
    done = subprocess.run(["git", "-C", repository.path, "grep", "-n", "-w", name, parent], capture_output=True, text=True)
    hits = [line.split(":", 1)[1][:160] for line in done.stdout.splitlines()][:24]
    return turn(tool(f"git grep -n -w {name}", "\n".join(hits)), f"`{name}` is used where I thought. I will read that.",
                "search")


def elsewhere(repository, parent, files):
    """Two source files for subagents: the changed ones' neighbours, the largest that are not too large."""
    sizes = []
    for line in repository.git("ls-tree", "-r", "-l", parent).splitlines():
        meta, file = line.split("\t", 1)
        if file.endswith(repository.suffix) and file not in files:
            sizes.append((int(meta.split()[3]), file))
    return [file for size, file in sorted(sizes, reverse=True) if size > 400][:2]


def fork(repository, parent, file, after):
    lines = repository.lines(parent, file)
    half = min(len(lines) // 2, 70)
    asked = turn(f"You are a subagent. Find out whether `{file}` needs the same change, and say so.\n"
                 + read(file, lines, 1, half)["say"], f"So far nothing in `{file}` needs it.", "read")
    last = turn(read(file, lines, half + 1, 2 * half)["say"] + "\nIs there anything to change?",
                f"No, `{file}` can stay as it is.", "read")
    return {"after": after, "turns": [asked, last]}


if __name__ == "__main__":
    main()
