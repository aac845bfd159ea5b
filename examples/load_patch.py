"""A bias patch in transformers: `load_patch(model, "patch.safetensors")` makes the base a model of the patch's task."""

from safetensors import safe_open
from transformers import AutoModelForSequenceClassification


def load_patch(base, path):
    with safe_open(path, framework="pt") as patch:
        tensors = {name: patch.get_tensor(name) for name in patch.keys()}
        n_outputs = len(tensors["classifier.bias"])
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=n_outputs, dtype="float32")
        state = model.state_dict()
        for name, value in tensors.items():
            if name.startswith("classifier."):  # the head, as it is
                state[name.replace("classifier.pooler", "bert.pooler")].copy_(value)
            elif name.endswith(".values"):  # differences at flat positions
                at = tensors[name.replace(".values", ".indices")]
                state["bert." + name.removesuffix(".values")].view(-1)[at] += value.float()
            elif not name.endswith(".indices"):  # differences to a whole tensor
                state["bert." + name] += value
        return model.eval(), patch.metadata()
