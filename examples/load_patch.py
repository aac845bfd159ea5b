"""A patch in transformers: `load_patch(BASE, "patch.safetensors")` gives the task's model and the patch's metadata."""

from safetensors import safe_open
from transformers import AutoModelForSequenceClassification


def load_patch(base, path):
    with safe_open(path, framework="pt") as patch:
        tensors, metadata = {name: patch.get_tensor(name) for name in patch.keys()}, patch.metadata()
    n_outputs = len(tensors["classifier.bias"])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=n_outputs, dtype="float32").eval()
    state = model.state_dict()
    for name, value in tensors.items():
        if name.startswith("classifier."):  # the head, as it is
            state[name.replace("classifier.pooler", "bert.pooler")].copy_(value)
        elif name.endswith(".values"):  # a difference at flat positions
            at = tensors[name.replace(".values", ".indices")]
            state["bert." + name.removesuffix(".values")].view(-1)[at] += value
        elif not name.endswith(".indices"):  # a difference to a whole tensor
            state["bert." + name] += value
    return model, metadata
