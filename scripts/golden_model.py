"""The reference of golden_encoder.py: BERT, its gradients and its training by PyTorch + transformers, in f64.

A sequence is {"ids", "type_ids", "class" and, for regression, "value"}. Parameters go by canonical name (no `bert.`
prefix); the head is `classifier.weight` and `classifier.bias`.
"""

import copy

import torch
from transformers import BertModel, get_linear_schedule_with_warmup

EPSILON = 1e-6
MAX_GRAD_NORM = 1.0


# The model -----------------------------------------------------------------------------------------------------------


def bert(config, tensors):
    """A BertModel in f64 with these f32 tensors; every parameter must be given."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    model = BertModel(config).double().eval()
    wanted = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return model


def linear(weight, bias):
    """The classifier, in f64."""
    head = torch.nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


def forward(model, head, sequence):
    """Hidden states [(tokens, H), ..], pooled (H) and logits (outputs) of one sequence alone."""
    out = model(
        input_ids=torch.tensor([sequence["ids"]]),
        token_type_ids=torch.tensor([sequence["type_ids"]]),
        output_hidden_states=True,
    )
    return [h[0] for h in out.hidden_states], out.pooler_output[0], head(out.pooler_output)[0]


def loss_of(logits, sequence, problem):
    """One sequence's loss."""
    if problem == "regression":
        return (logits[0] - sequence["value"]) ** 2
    return torch.nn.functional.cross_entropy(logits[None], torch.tensor([sequence["class"]]))


def parameters_of(model, head):
    """Every parameter by canonical name, the head's last."""
    named = dict(model.named_parameters())
    named["classifier.weight"], named["classifier.bias"] = head.weight, head.bias
    return named


def gradients(model, head, sequences, problem):
    """Per sequence (hidden states, pooled, logits, loss), and the gradient of the mean loss by canonical name."""
    named = parameters_of(model, head)
    for parameter in named.values():
        parameter.grad = None
    outputs = []
    for sequence in sequences:
        hidden, pooled, logits = forward(model, head, sequence)
        loss = loss_of(logits, sequence, problem)
        (loss / len(sequences)).backward()
        outputs.append(([h.detach() for h in hidden], pooled.detach(), logits.detach(), loss.item()))
    return outputs, {name: parameter.grad.clone() for name, parameter in named.items()}


def is_bias(name):
    return name.endswith(".bias")


def is_head(name):
    return name.startswith("classifier.")


def train(model, head, batches, problem, method, learning_rate, steps=20, warmup=2, decay=0.0, entries=None):
    """Trains copies of model and head; the record of the run and the final parameters."""
    model, head = copy.deepcopy(model), copy.deepcopy(head)
    entries = entries or {}
    selected = {
        "bitfit": is_bias,
        "frozen": lambda name: False,
        "random": lambda name: name in entries,
        "full": lambda name: True,
    }[method]
    trained = {}
    for name, parameter in parameters_of(model, head).items():
        parameter.requires_grad = selected(name) or is_head(name)
        if parameter.requires_grad:
            trained[name] = parameter
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, eps=EPSILON, weight_decay=decay)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    record = {
        "method": method, "learning_rate": learning_rate, "weight_decay": decay, "warmup_steps": warmup, "steps": steps,
        "max_grad_norm": MAX_GRAD_NORM, "epsilon": EPSILON, "learning_rates": [], "losses": [], "grad_norms": [],
    }  # fmt: skip
    for step in range(steps):
        batch, total = batches[step % len(batches)], 0.0
        for sequence in batch:
            loss = loss_of(forward(model, head, sequence)[2], sequence, problem) / len(batch)
            loss.backward()
            total += loss.item()
        for name, indices in entries.items():
            chosen = torch.zeros_like(trained[name].grad).view(-1)
            chosen[indices] = 1.0
            trained[name].grad *= chosen.view_as(trained[name].grad)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
        record["learning_rates"].append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        record["losses"].append(total)
        record["grad_norms"].append(norm.item())
    return record, {name: parameter.detach() for name, parameter in trained.items()}
