"""Golden references for the encoder and its training: PyTorch + transformers in f64, eager attention, dropout off.

usage: golden_encoder.py [--only A|B|C|D] [--base DIR] [--glue DIR] [--out tests/golden]
Needs: pip install torch transformers safetensors

Every sequence runs alone, without padding, so no mask takes part. Parameters and heads are f32 numbers, computed with
in f64. Tensor names are canonical (no `bert.` prefix); the head is `classifier.weight` and `classifier.bias`. A loss is
the mean over the batch's sequences. Numbers in JSON read back to the same f64. Everything is seeded: one machine and
one version of PyTorch give the same bytes; another may differ in the last digits of an f64.

A. tiny/: a BERT of 2 layers that tests load as a base, and what it computes
   config.json, model.safetensors (F32, names with `bert.`), vocab.txt, tokenizer_config.json
   cases.json
     "sequences": [{"ids", "type_ids", "class", "value"}, ..]: the batch of everything but training
     "bounds": S + 1 token rows at which sequences begin and end in every (T, ..) tensor
     VARIANT: {"loss", "losses" (one a sequence)} of each variant: "classification" (3 classes, cross entropy),
       "regression" (squared error), "gelu_new" and "relu" (classification with that hidden_act)
     "training": {"batches": [[sequence, ..], ..], "runs": {RUN: record and "problem"}}; step i takes batch i modulo 4
     "texts": [{"text", "text_pair" or null, "max_length", "ids", "type_ids"}, ..] by transformers' tokenizer
   expected.safetensors (F64 unless said)
     head.classification.weight (3, 32) and .bias (3), head.regression.weight (1, 32) and .bias (1): F32
     hidden_states.L (T, 32): 0 after the embeddings, L after layer L - 1. pooled (S, 32). VARIANT.logits (S, outputs)
     classification.grad.NAME: every parameter and the head. For the other variants: every bias and the head
     train.RUN.final.NAME: whatever trained, as a value (not a difference) after the last step; F32 for `full`.
       For `random` the chosen entries alone, at the flat positions train.random.indices.NAME (I64)
B. minilm/: the default base on sentences
   cases.json
     "base_sha256": of the base's model.safetensors
     "sequences": [{"text", "text_pair", "ids", "type_ids", "class"}, ..], "bounds", "loss", "losses"
     "whole": the sequences whose hidden states are stored whole
     "hidden_norms": [[after the embeddings, after the last layer], ..] a sequence
     "query_bias_norms", "key_bias_norms": norms of the gradients, a layer (the key's is the noise of f64)
     "grad_norms": {NAME: norm} for every tensor and the head
     "training": {"runs": {RUN: record}}: each step is over all sequences
   expected.safetensors (F32 unless said)
     classifier.weight (2, 384), classifier.bias (2): the head. logits (S, 2): F64. pooled (S, 384)
     hidden_states.0.sequence.I, hidden_states.6.sequence.I (tokens, 384) of the whole ones
     hidden_states.6.first (S, 384): the first token's of every sequence
     grad.NAME: every bias and the head
     full.indices.NAME (I64), full.values.NAME (F64): gradients at 20 flat positions of every tensor
     random.indices.NAME, random.values.NAME: the same at 2000 positions, shared out over the tensors by size
     (in the tables a quarter of the positions lies in rows that the batch does not hold: zero)
C. minilm/mrpc.json: a record over the first 1600 rows of MRPC's train.tsv in file order, 16 a batch, with
     "tokens": tokens of each batch, "ids_sha256": over all ids of the run as little-endian u32 (the texts are not ours
     to republish), "head": where the head is from
D. philox.json
     "known_answers": [{"counter" (4), "key" (2), "output" (4), "published"}, ..]
     "masks": [{"seed", "step", "index", "layer", "site", "head", "position", "p", "n", "cut", "scale",
       "counters" (of each call), "draws" (n 16-bit numbers), "keep" (n times 0 or 1)}, ..]; see golden_philox.py

A record of a run: {"method", "learning_rate", "weight_decay", "warmup_steps", "steps", "max_grad_norm", "epsilon",
"learning_rates" (as applied, a step), "losses", "grad_norms" (before clipping)}. torch.optim.AdamW with the decay on
everything that trains, transformers' linear schedule, clip_grad_norm_ over all that trains, head included.
"""

import argparse
import copy
import hashlib
import json
import os
import struct
from pathlib import Path


def bounds_of(sequences):
    bounds = [0]
    for sequence in sequences:
        bounds.append(bounds[-1] + len(sequence["ids"]))
    return bounds


# Random numbers and positions -----------------------------------------------------------------------------------------


class Draws:
    """Seeded f32 normals and positions."""

    def __init__(self, seed):
        import torch

        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape, std, mean=0.0):
        import torch

        return torch.randn(shape, generator=self.generator, dtype=torch.float32) * std + mean

    def below(self, bound, n):
        """n numbers below `bound`, repeats allowed."""
        import torch

        return torch.randint(0, bound, (n,), generator=self.generator).tolist()

    def positions(self, candidates, n):
        """n different candidates, sorted."""
        import torch

        order = torch.randperm(len(candidates), generator=self.generator)[:n]
        return sorted(candidates[i] for i in order.tolist())


def share_out(sizes, n):
    """n parts over tensors in proportion to size, by largest remainder."""
    total = sum(sizes.values())
    parts = {name: n * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(n * sizes[name] % total), name))
    for name in by_remainder[: n - sum(parts.values())]:
        parts[name] += 1
    return parts


def held_rows(sequences):
    """The rows of each embedding table that the batch reads."""
    return {
        "embeddings.word_embeddings.weight": sorted({i for s in sequences for i in s["ids"]}),
        "embeddings.position_embeddings.weight": list(range(max(len(s["ids"]) for s in sequences))),
        "embeddings.token_type_embeddings.weight": sorted({i for s in sequences for i in s["type_ids"]}),
    }


def sample(draws, name, shape, n, held):
    """n flat positions of a tensor; of a table three in four lie in rows that the batch holds."""
    rows, width = shape[0], shape[1] if len(shape) > 1 else 1
    if name not in held or len(held[name]) == rows:
        return draws.positions(range(rows * width), min(n, rows * width))
    inside = [row * width + i for row in held[name] for i in range(width)]
    missing = sorted(set(range(rows)) - set(held[name]))[:500]
    outside = [row * width + i for row in missing for i in range(width)]
    n_outside = n // 4
    return sorted(draws.positions(inside, n - n_outside) + draws.positions(outside, n_outside))


# Writing --------------------------------------------------------------------------------------------------------------


def written(path, note=""):
    print(f"{path}: {path.stat().st_size} bytes{note}", flush=True)


def lines(value, indent=0):
    """JSON with a line for each number, string or list of numbers, so that a difference can be read."""
    items = list(value.values()) if isinstance(value, dict) else value
    if (
        not isinstance(value, (dict, list))
        or not items
        or (isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in items))
    ):
        return json.dumps(value, ensure_ascii=False)
    inner, pad = [lines(item, indent + 1) for item in items], "\n" + " " * indent
    if isinstance(value, dict):
        inner = [f"{json.dumps(key)}: {item}" for key, item in zip(value, inner, strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}{pad} " + f",{pad} ".join(inner) + f"{pad}{closing}"


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    written(path)


def write_json(path, value):
    write_text(path, lines(value) + "\n")


def write_tensors(path, tensors, metadata=None):
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    written(path, f", {len(tensors)} tensors")


# A. The tiny BERT -----------------------------------------------------------------------------------------------------

TINY = {
    "_name_or_path": "bitfit/tiny-bert-for-tests",
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TINY_WORDS = (
    "the it is was not we they good bad very great movie film plot cat dog play un ##ing ##ed ##er ##ly ##able".split()
)
TINY_VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *LETTERS,
    *("##" + c for c in LETTERS),
    *"0123456789.,!?'\"-",
    *TINY_WORDS,
]
TINY_TOKENIZER = {
    "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 40, "pad_token": "[PAD]",
    "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
TINY_TEXTS = [
    ("The movie was not good.", None, 40),
    ("Playing, UNPLAYABLE 2 cats!", "they played", 40),
    ("it is very great, it is very great, it is very great", "the dogs' plot was bad", 12),
    ("Caf\u00e9 na\u00efve", "the film", 40),
    ("\u65e5 movie", None, 40),
]


def tiny_sequence(draws, length, first_length):
    """Ids 1..96 (0 is padding_idx, whose gradient PyTorch leaves out), [CLS] first; type 1 from `first_length` on."""
    ids = [2] + [1 + i for i in draws.below(96, length - 1)]
    types = [0 if i < first_length else 1 for i in range(length)]
    return {"ids": ids, "type_ids": types, "class": draws.below(3, 1)[0], "value": draws.below(41, 1)[0] / 8}


def tiny_tensors(config, draws):
    from transformers import BertModel

    tensors = {}
    for name, parameter in BertModel(config).named_parameters():
        gamma = name.endswith("LayerNorm.weight")
        tensors[name] = draws.normal(parameter.shape, 0.15, 1.0 if gamma else 0.0)
    return tensors


def tiny(out):
    import torch
    from transformers import BertConfig, BertTokenizerFast

    from golden_model import bert, gradients, is_bias, is_head, linear, train

    assert len(TINY_VOCAB) == len(set(TINY_VOCAB)) == TINY["vocab_size"]
    folder, draws = out / "tiny", Draws(20)
    config = BertConfig(**TINY)
    tensors = tiny_tensors(config, draws)
    write_json(folder / "config.json", TINY)
    write_text(folder / "vocab.txt", "\n".join(TINY_VOCAB) + "\n")
    write_json(folder / "tokenizer_config.json", TINY_TOKENIZER)
    write_tensors(folder / "model.safetensors", {f"bert.{n}": t for n, t in tensors.items()}, {"format": "pt"})

    heads = {
        "classification": (draws.normal((3, 32), 0.3), draws.normal((3,), 0.1)),
        "regression": (draws.normal((1, 32), 0.3), draws.normal((1,), 0.1)),
    }
    lengths = [(1, 1), (2, 2), (5, 5), (9, 4), (17, 17), (23, 12), (40, 21)]
    sequences = [tiny_sequence(draws, *length) for length in lengths]
    batches = [
        [tiny_sequence(draws, length, 1 + length // 2) for length in (3 + i for i in draws.below(20, 6))]
        for _ in range(4)
    ]
    # Every class occurs, whatever the seed drew.
    for i, sequence in enumerate([*sequences, *(s for batch in batches for s in batch)]):
        sequence["class"] = i % 3 if i < 7 else sequence["class"]

    expected, cases = {}, {"sequences": sequences, "bounds": bounds_of(sequences)}
    for problem, (weight, bias) in heads.items():
        expected[f"head.{problem}.weight"], expected[f"head.{problem}.bias"] = weight, bias
    for variant in ("classification", "regression", "gelu_new", "relu"):
        problem = "regression" if variant == "regression" else "classification"
        changed = copy.deepcopy(config)
        changed.hidden_act = variant if variant in ("gelu_new", "relu") else "gelu"
        model, head = bert(changed, tensors), linear(*heads[problem])
        outputs, grads = gradients(model, head, sequences, problem)
        if variant == "classification":
            for layer in range(3):
                expected[f"hidden_states.{layer}"] = torch.cat([o[0][layer] for o in outputs])
            expected["pooled"] = torch.stack([o[1] for o in outputs])
        expected[f"{variant}.logits"] = torch.stack([o[2] for o in outputs])
        for name, grad in grads.items():
            if variant == "classification" or is_bias(name) or is_head(name):
                expected[f"{variant}.grad.{name}"] = grad
        losses = [o[3] for o in outputs]
        cases[variant] = {"loss": sum(losses) / len(losses), "losses": losses}

    # 160 of the tiny model's entries, the tables' among them.
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    held = held_rows([s for batch in batches for s in batch])
    entries = {
        name: sample(draws, name, tensors[name].shape, n, held) for name, n in share_out(sizes, 160).items() if n
    }
    runs = {
        "bitfit": dict(problem="classification", method="bitfit", learning_rate=1e-2),
        "bitfit_decay": dict(problem="classification", method="bitfit", learning_rate=1e-2, decay=0.1),
        "bitfit_regression": dict(problem="regression", method="bitfit", learning_rate=1e-2),
        "frozen": dict(problem="classification", method="frozen", learning_rate=1e-2),
        "random": dict(problem="classification", method="random", learning_rate=1e-2, entries=entries),
        "full": dict(problem="classification", method="full", learning_rate=1e-3),
    }
    cases["training"] = {"batches": batches, "runs": {}}
    model = bert(config, tensors)
    for run, settings in runs.items():
        record, final = train(model, linear(*heads[settings["problem"]]), batches, **settings)
        cases["training"]["runs"][run] = {"problem": settings["problem"], **record}
        for name, value in final.items():
            if name in settings.get("entries", {}):
                indices = torch.tensor(entries[name])
                expected[f"train.{run}.indices.{name}"] = indices
                value = value.view(-1)[indices]
            expected[f"train.{run}.final.{name}"] = value.float() if run == "full" else value

    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    cases["texts"] = [encoded(tokenizer, *text) for text in TINY_TEXTS]
    write_json(folder / "cases.json", cases)
    write_tensors(folder / "expected.safetensors", expected)


def encoded(tokenizer, text, text_pair, max_length):
    encoding = tokenizer(text, text_pair, truncation="longest_first", max_length=max_length, padding=False)
    return {
        "text": text, "text_pair": text_pair, "max_length": max_length,
        "ids": encoding["input_ids"], "type_ids": encoding["token_type_ids"],
    }  # fmt: skip


# B. MiniLM on sentences -----------------------------------------------------------------------------------------------

LONG = (
    "When the power failed on Tuesday evening, the librarian lit a row of candles along the counter, told the handful "
    "of readers who were left that they were welcome to stay, and went on stamping books by hand as her grandmother "
    "had done; by the time the lamps came back, at a quarter past nine, the children had built a fort out of "
    "encyclopaedias, an old man had fallen asleep over a map of the Arctic, and nobody seemed to be in any hurry to go "
    "home."
)
COMMITTEE = (
    "After three hours the committee still could not agree on a date for the next meeting, let alone on a budget."
)
BOILING = "Water boils at a lower temperature in the mountains because the air pressure is lower there."
SENTENCES = [  # text, second text, class
    ("Rain again.", None, 0),
    ("The bakery on our corner opens before dawn.", "By sunrise the corner bakery is already selling bread.", 1),
    ("Nobody had expected the bridge to be finished so early.", None, 1),
    ("She plays the cello in two orchestras.", "He repairs bicycles for a living.", 0),
    (COMMITTEE, None, 0),
    (LONG, None, 1),
    ("Is the museum's café open on holidays?", "What time does the last tram to the harbour leave on Sundays?", 0),
    (BOILING, "At altitude, water boils below 100 degrees.", 1),
]
WHOLE = [0, 2, 3]  # short ones, a pair among them


def minilm_base(base):
    """Config, f32 tensors by canonical name, tokenizer."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertTokenizerFast

    tensors = {name.removeprefix("bert."): t.float() for name, t in load_file(base / "model.safetensors").items()}
    config = BertConfig(**json.loads((base / "config.json").read_text(encoding="utf-8")))
    return config, tensors, BertTokenizerFast.from_pretrained(base)


def minilm_head():
    """The classifier of B and C: as a new one, but with a bias that is not zero."""
    draws = Draws(21)
    return draws.normal((2, 384), 0.02), draws.normal((2,), 0.02)


def minilm(out, base):
    import torch

    from golden_model import bert, gradients, is_bias, is_head, linear, train

    config, tensors, tokenizer = minilm_base(base)
    folder, draws = out / "minilm", Draws(22)
    weight, bias = minilm_head()
    model, head = bert(config, tensors), linear(weight, bias)
    sequences = []
    for text, text_pair, label in SENTENCES:
        sequence = encoded(tokenizer, text, text_pair, 128)
        del sequence["max_length"]
        sequences.append({**sequence, "class": label})
    outputs, grads = gradients(model, head, sequences, "classification")
    losses, last = [o[3] for o in outputs], config.num_hidden_layers

    expected = {
        "classifier.weight": weight,
        "classifier.bias": bias,
        "logits": torch.stack([o[2] for o in outputs]),
        "pooled": torch.stack([o[1] for o in outputs]).float(),
        f"hidden_states.{last}.first": torch.stack([o[0][last][0] for o in outputs]).float(),
    }
    for i in WHOLE:
        for layer in (0, last):
            expected[f"hidden_states.{layer}.sequence.{i}"] = outputs[i][0][layer].float()
    for name, grad in grads.items():
        if is_bias(name) or is_head(name):
            expected[f"grad.{name}"] = grad.float()
    base_grads = {name: grad for name, grad in grads.items() if not is_head(name)}
    held = held_rows(sequences)
    parts = share_out({name: grad.numel() for name, grad in base_grads.items()}, 2000)
    for name, grad in base_grads.items():
        for kind, n in (("full", 20), ("random", parts[name])):
            if n:
                indices = torch.tensor(sample(draws, name, grad.shape, n, held))
                expected[f"{kind}.indices.{name}"] = indices
                expected[f"{kind}.values.{name}"] = grad.reshape(-1)[indices]

    def norms(term):
        return [grads[f"encoder.layer.{layer}.attention.self.{term}.bias"].norm().item() for layer in range(last)]

    runs = {
        "bitfit": dict(method="bitfit", learning_rate=3e-3),
        "full": dict(method="full", learning_rate=5e-5),
    }
    cases = {
        "base_sha256": hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest(),
        "sequences": sequences,
        "bounds": bounds_of(sequences),
        "whole": WHOLE,
        "loss": sum(losses) / len(losses),
        "losses": losses,
        "hidden_norms": [[o[0][0].norm().item(), o[0][last].norm().item()] for o in outputs],
        "query_bias_norms": norms("query"),
        "key_bias_norms": norms("key"),
        "grad_norms": {name: grad.norm().item() for name, grad in grads.items()},
        "training": {
            "runs": {run: train(model, head, [sequences], "classification", **s)[0] for run, s in runs.items()}
        },
    }
    write_json(folder / "cases.json", cases)
    write_tensors(folder / "expected.safetensors", expected)


# C. A hundred steps of MRPC -------------------------------------------------------------------------------------------


def mrpc(out, base, glue):
    from golden_model import bert, linear, train

    config, tensors, tokenizer = minilm_base(base)
    text = (glue / "MRPC" / "train.tsv").read_bytes().decode("utf-8-sig")
    rows = [line.rstrip("\r").split("\t") for line in text.split("\n")[1:1601]]
    sequences = []
    for row in rows:
        assert len(row) == 5 and row[0] in ("0", "1"), row
        sequence = encoded(tokenizer, row[3], row[4], 128)
        sequences.append({"ids": sequence["ids"], "type_ids": sequence["type_ids"], "class": int(row[0])})
    batches = [sequences[i : i + 16] for i in range(0, 1600, 16)]
    model, head = bert(config, tensors), linear(*minilm_head())
    record, _ = train(model, head, batches, "classification", "bitfit", 3e-3, steps=100, warmup=6)
    ids = [i for sequence in sequences for i in sequence["ids"]]
    record = {
        "head": "classifier.weight and classifier.bias of expected.safetensors beside this file",
        "rows": 1600, "batch_size": 16, "max_length": 128, **record,
        "tokens": [sum(len(s["ids"]) for s in batch) for batch in batches],
        "ids_sha256": hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest(),
    }  # fmt: skip
    write_json(out / "minilm" / "mrpc.json", record)


# ----------------------------------------------------------------------------------------------------------------------


def main():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(__file__).resolve().parent.parent
    arguments = argparse.ArgumentParser(description="Writes the encoder's golden references.")
    arguments.add_argument("--only", choices="ABCD", help="one part of the four (default: all)")
    arguments.add_argument(
        "--base", type=Path, default=cache / "bitfit" / "all-MiniLM-L6-v2", help="folder of the default base"
    )
    arguments.add_argument(
        "--glue", type=Path, default=os.environ.get("BITFIT_GLUE_DIR"), help="folder that holds MRPC/ (C alone)"
    )
    arguments.add_argument("--out", type=Path, default=root / "tests" / "golden", help="where the files go")
    arguments.add_argument("--threads", type=int, default=1)
    a = arguments.parse_args()
    wanted = a.only or "ABCD"
    if wanted != "D":
        import torch

        torch.set_num_threads(a.threads)
    if set(wanted) & set("BC") and not (a.base / "model.safetensors").exists():
        arguments.error(f"no model.safetensors in {a.base}: run scripts/fetch-base.sh, or name its folder by --base")
    if "A" in wanted:
        tiny(a.out)
    if "B" in wanted:
        minilm(a.out, a.base)
    if "C" in wanted and a.glue:
        mrpc(a.out, a.base, Path(a.glue))
    elif wanted == "C":
        arguments.error("C needs --glue (or BITFIT_GLUE_DIR): the folder that holds MRPC/train.tsv")
    elif "C" in wanted:
        print("C skipped: it needs --glue (or BITFIT_GLUE_DIR), the folder that holds MRPC/train.tsv")
    if "D" in wanted:
        from golden_philox import answers_and_masks

        write_json(a.out / "philox.json", answers_and_masks())


if __name__ == "__main__":
    main()
