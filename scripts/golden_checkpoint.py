"""The same very small BERT as PyTorch and as safetensors store it: writes tests/golden/checkpoint/.

    pip install torch transformers safetensors
    python3 scripts/golden_checkpoint.py [--out tests/golden/checkpoint]

    config.json         hidden 8, 1 layer, 2 heads, intermediate 12, 19 words, 9 positions
    vocab.txt           its words
    model.safetensors   a BertModel as transformers writes it today: no prefix, LayerNorm.weight and .bias
    pytorch_model.bin   the same tensors as old releases wrote them: prefix `bert.`, LayerNorm.gamma and .beta,
                        `embeddings.position_ids`, a masked-language head; a zip archive, as since PyTorch 1.6
    legacy.bin          the first lines of that, as PyTorch before 1.6 wrote it: not a zip archive
"""

import argparse
import collections
import os

import safetensors.torch
import torch
import transformers

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat ##s dog ran . , ? big old".split()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="tests/golden/checkpoint")
    out = parser.parse_args().out
    os.makedirs(out, exist_ok=True)
    torch.manual_seed(7)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=9, type_vocab_size=2, initializer_range=0.2,
    )
    config.architectures = ["BertModel"]
    model = transformers.BertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "position_ids" not in name}

    config.to_json_file(os.path.join(out, "config.json"))
    with open(os.path.join(out, "vocab.txt"), "w") as file:
        file.write("".join(word + "\n" for word in WORDS))
    safetensors.torch.save_file(tensors, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})

    # A state dict as modules give it: an OrderedDict with an attribute beside its items.
    old = collections.OrderedDict()
    old._metadata = collections.OrderedDict({"": {"version": 1}, "bert": {"version": 1}})
    old["bert.embeddings.position_ids"] = torch.arange(9).unsqueeze(0)
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old["bert." + name] = tensor.clone()
    old["cls.predictions.bias"] = torch.zeros(len(WORDS))
    # The decoder is tied to the word embeddings, so the file holds one storage under two names.
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
    torch.save(old, os.path.join(out, "pytorch_model.bin"))
    torch.save({"cls.predictions.bias": torch.zeros(3)}, os.path.join(out, "legacy.bin"),
               _use_new_zipfile_serialization=False)
    for name in sorted(os.listdir(out)):
        print(f"{os.path.join(out, name)}: {os.path.getsize(os.path.join(out, name))} bytes")


if __name__ == "__main__":
    main()
