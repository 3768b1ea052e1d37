"""Greedy tokens against llama.cpp's on the same Q4_K_M file, every one equal or explained.

Both sides round the activations of every quantised product to int8, each in groups and an order of
its own, so their logits differ. Where the oracle's two candidates lie closer than ROUNDING, that alone
may decide; a difference at a wider margin is a fault. After a difference the oracle's tokens go on as
the prompt, so that one difference hides nothing behind it.
"""

import json
import pathlib

import pytest

# Widest margin, in nats, between the oracle's token and ours that rounding may turn over. With the same
# weights and F32 activations (the reference backend), the margins at the differences seen lie 0.02 to 0.12
# from ours and 0.02 to 0.16 from llama.cpp's, on either side: each side's own rounding, which may add up.
ROUNDING = 0.25

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "greedy-qwen2.5-coder-0.5b.json"


def margin(texts, step, ours):
    """How much likelier the oracle holds its own token than `ours`; infinite if not among its five."""
    _, ids, logprobs = step
    margins = {texts[i]: logprobs[0] - logprob for i, logprob in zip(ids, logprobs)}
    return margins.get(ours, float("inf"))


def compare(server, texts, case):
    """The number of equal tokens, the explained and the unexplained differences as (step, the oracle's
    token, ours, margin), and the largest gap between the two sides' log-probabilities of one token."""
    oracle = [step[0] for step in case["steps"]]
    equal, explained, unexplained, gap = 0, [], [], 0.0
    done = 0
    while done < len(oracle):
        choice = server.complete(
            case["prompt"] + oracle[:done],
            max_tokens=len(oracle) - done,
            logprobs=1,
            extra_body={"ignore_eos": True},
        ).choices[0]
        ours = choice.logprobs
        assert len(ours.tokens) == len(oracle) - done
        for token, logprob in zip(ours.tokens, ours.token_logprobs):
            step = case["steps"][done]
            done += 1
            if token == texts[step[0]]:
                equal += 1
                gap = max(gap, abs(logprob - step[2][0]))
                continue
            by = margin(texts, step, token)
            (explained if by < ROUNDING else unexplained).append((done - 1, texts[step[0]], token, by))
            break
    return equal, explained, unexplained, gap


def texts_of(server, golden):
    """The text of every token that the goldens name."""
    ids = {i for case in golden["cases"] for step in case["steps"] for i in step[1]}
    return {i: server.detokenize([i]) for i in ids}


def test_every_greedy_token_is_llama_cpps_or_explained(server):
    golden = json.loads(GOLDEN.read_text())
    if "qwen2.5-coder-0.5b" not in server.model:
        pytest.skip(f"the goldens are qwen2.5-coder-0.5b's, the server runs {server.model}")
    texts = texts_of(server, golden)
    totals = [0, 0, 0]
    explanations, faults = [], []
    print(f"\n{'prompt':<20}{'equal':>8}{'explained':>11}{'unexplained':>13}{'largest gap, nats':>20}")
    for case in golden["cases"]:
        equal, explained, unexplained, gap = compare(server, texts, case)
        name = f"{case['name']} ({case['kind']})"
        counts = (equal, len(explained), len(unexplained))
        print(f"{name:<20}{counts[0]:>8}{counts[1]:>11}{counts[2]:>13}{gap:>20.3f}")
        totals = [a + b for a, b in zip(totals, counts)]
        explanations += [(name, *difference) for difference in explained]
        faults += [(name, *difference) for difference in unexplained]
    print(f"{'all':<20}{totals[0]:>8}{totals[1]:>11}{totals[2]:>13}")
    for name, step, theirs, ours, by in explanations:
        print(f"{name}, token {step}: {theirs!r} is only {by:.3f} nats likelier than {ours!r}")
    assert sum(totals) == sum(len(case["steps"]) for case in golden["cases"]) >= 1280
    assert not faults, faults
