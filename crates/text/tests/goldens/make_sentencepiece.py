"""Writes sentencepiece.json: a small SentencePiece BPE vocabulary and what the library encodes with it.

    python make_sentencepiece.py     # needs sentencepiece 0.2
"""

import io
import json
import random
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
LINES = (HERE / "make.py").read_text().splitlines() + ["the cat sat on the mat and then the hat"] * 5

model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES),
    model_writer=model,
    vocab_size=520,
    model_type="bpe",
    byte_fallback=True,
    character_coverage=1.0,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    minloglevel=2,
)
spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kind(i):
    return 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1


draw = random.Random(3)
atoms = list("abcdefgeettthhe019 .()'\"_\n\t") + ["the ", " cat", "  ", "def ", "é", "中", "😀", "▁", "<s>", "return"]
texts = ["", " ", "the cat sat", " the cat", "a  b   c", "def f(x):\n    return x\n", "日本語 😀", "</s><s>", "▁a"]
texts += ["".join(draw.choices(atoms, k=draw.randint(1, 40))) for _ in range(60)]
ids = range(spm.vocab_size())
with open(HERE / "sentencepiece.json", "w") as out:
    json.dump({
        "tokens": [spm.id_to_piece(i) for i in ids],
        "scores": [spm.get_score(i) for i in ids],
        "kinds": [kind(i) for i in ids],
        "encodings": [[text, spm.encode(text)] for text in texts],
    }, out)  # fmt: skip
    out.write("\n")
