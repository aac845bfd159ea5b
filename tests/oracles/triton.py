"""Asks a server by Triton's own client, binary tensors and JSON, and holds its answers against what stdin says.

usage: triton.py HOST:PORT < EXPECTED

EXPECTED is JSON: {"texts": [..], "tasks": {TASK: {"patch": .., "rows": [..]}}}, the rows as `/v1` gave them; a task whose
name begins with `pair` takes every text with itself as its second.
"""

import json
import sys

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def tensor(name, texts, binary):
    values = np.array([text.encode() for text in texts], dtype=np.object_)
    given = triton.InferInput(name, [len(texts)], "BYTES")
    given.set_data_from_numpy(values, binary_data=binary)
    return given


def check(client, task, expected, texts, binary):
    rows = expected["rows"]
    inputs = [tensor("text", texts, binary)]
    if task.startswith("pair"):
        inputs.append(tensor("text_pair", texts, binary))
    is_value = "value" in rows[0]
    names = ["score", "logits"] if is_value else ["label", "score", "logits"]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    found = client.infer(task, inputs, outputs=outputs, request_id="of mine")
    response = found.get_response()
    assert (response["model_name"], response["id"]) == (task, "of mine"), response
    assert response["model_version"] == expected["patch"], response
    score = found.as_numpy("score")
    assert score.dtype == np.float32
    if is_value:
        assert found.as_numpy("label") is None
        assert score.shape == (len(texts), 1), score.shape
        wanted = [[row["value"]] for row in rows]
    else:
        labels = [label.decode() if isinstance(label, bytes) else label for label in found.as_numpy("label")]
        assert labels == [row["label"] for row in rows], labels
        wanted = [list(row["scores"].values()) for row in rows]
    assert np.array_equal(score, np.array(wanted, dtype=np.float32)), (score, wanted)
    assert found.as_numpy("logits").shape == score.shape
    # What nobody asked for in particular: all but the logits, in the client's own default, binary.
    default = client.infer(task, inputs)
    assert np.array_equal(default.as_numpy("score"), score)
    assert default.as_numpy("logits") is None


def refused(status, call):
    try:
        call()
    except InferenceServerException as error:
        assert str(status) in (error.status() or ""), error
        assert error.message(), error
        return
    raise AssertionError(f"expected {status}")


def main():
    expected = json.load(sys.stdin)
    texts = expected["texts"]
    client = triton.InferenceServerClient(sys.argv[1], network_timeout=60)
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata()["name"] == "bitfit"
    checked = 0
    for task, of_task in expected["tasks"].items():
        assert client.is_model_ready(task)
        about = client.get_model_metadata(task)
        assert about["versions"] == [of_task["patch"]], about
        assert all(entry["datatype"] == "BYTES" for entry in about["inputs"]), about
        for binary in (True, False):
            check(client, task, of_task, texts, binary)
            checked += 1
    task = next(iter(expected["tasks"]))
    assert not client.is_model_ready("nobody")
    refused(404, lambda: client.get_model_metadata("nobody"))
    refused(404, lambda: client.infer("nobody", [tensor("text", texts, True)]))
    refused(422, lambda: client.infer(task, [tensor("words", texts, True)]))
    refused(404, lambda: client.infer(task, [tensor("text", texts, True)], model_version="0" * 64))
    several = [client.async_infer(task, [tensor("text", texts, True)]) for _ in range(8)]
    for request in several:
        labels = [label.decode() for label in request.get_result().as_numpy("label")]
        assert labels == [row["label"] for row in expected["tasks"][task]["rows"]]
    print(f"{checked} ways of asking agree")


main()
