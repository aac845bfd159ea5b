"""Checks the manifests under deploy/ without a cluster; scripts/check_deploy.sh runs it.

Each document is held to a schema, strictly: a field that the schema does not know is an error. Kubernetes' schemas come
with the package kubernetes-validate. KServe publishes none on a registry, but its Python SDK's models name every field,
its type and which are required; they are read here as source, without importing them. Two kinds of file have no schema
on a registry, and a short one stands below. Then come the things that a schema cannot know: that selectors meet labels,
that probes ask routes the server has, that metrics and flags exist, that the grace period outlasts the drain.
"""

import argparse
import ast
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jsonschema
import yaml
from referencing import Registry, Resource

KUBERNETES = "1.37"
DEFINITIONS = "/api/_definitions.json"

# What a kustomization of ours may hold, from the kustomize documentation of `kustomize.config.k8s.io/v1beta1`.
KUSTOMIZATION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "resources"],
    "properties": {
        "apiVersion": {"const": "kustomize.config.k8s.io/v1beta1"},
        "kind": {"const": "Kustomization"},
        "resources": {"type": "array", "items": {"type": "string"}},
        "images": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name"],
                "properties": {key: {"type": "string"} for key in ["name", "newName", "newTag", "digest"]},
            },
        },
        "patches": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["patch"],
                "properties": {
                    "patch": {"type": "string"},
                    "target": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {key: {"type": "string"} for key in ["group", "version", "kind", "name"]},
                    },
                },
            },
        },
    },
}

# A rule of prometheus-adapter, from docs/config.md of its repository.
ADAPTER_VALUES = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rules"],
    "properties": {
        "rules": {
            "type": "object",
            "additionalProperties": False,
            "required": ["custom"],
            "properties": {
                "custom": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["seriesQuery", "resources", "metricsQuery"],
                        "properties": {
                            "seriesQuery": {"type": "string"},
                            "metricsQuery": {"type": "string", "pattern": "<<.Series>>.*<<.LabelMatchers>>"},
                            "name": {
                                "type": "object",
                                "additionalProperties": False,
                                "properties": {"matches": {"type": "string"}, "as": {"type": "string"}},
                            },
                            "resources": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["overrides"],
                                "properties": {
                                    "overrides": {
                                        "type": "object",
                                        "required": ["namespace", "pod"],
                                        "additionalProperties": {
                                            "type": "object",
                                            "additionalProperties": False,
                                            "required": ["resource"],
                                            "properties": {
                                                "group": {"type": "string"},
                                                "resource": {"type": "string"},
                                            },
                                        },
                                    }
                                },
                            },
                        },
                    },
                }
            },
        }
    },
}


class Schemas:
    """The schemas of Kubernetes and KServe, out of the installed packages' files."""

    def __init__(self, packages: pathlib.Path):
        root = packages / "kubernetes_validate" / "kubernetes-json-schema"
        (self.kubernetes,) = root.glob(f"v{KUBERNETES}.*-local-strict")
        self.definitions = json.loads((self.kubernetes / "_definitions.json").read_text())
        self.registry = Registry().with_resource(DEFINITIONS, Resource.from_contents(self.definitions))
        self.kserve = packages / "kserve" / "models"

    def of(self, document: dict) -> tuple[str, dict | None]:
        """The name of a document's schema, and the schema; none where there is none to be had."""
        group, _, version = document["apiVersion"].rpartition("/")
        kind = document["kind"]
        if group == "kustomize.config.k8s.io":
            return "kustomize's documentation", KUSTOMIZATION
        if group == "serving.kserve.io":
            return "KServe's SDK", self.kserve_model(f"{version.capitalize()}{kind}")
        stem = "-".join([kind.lower(), *([group.split(".")[0]] if group else []), version])
        path = self.kubernetes / f"{stem}.json"
        return f"Kubernetes {KUBERNETES}", json.loads(path.read_text()) if path.is_file() else None

    @functools.cache
    def kserve_model(self, name: str) -> dict | None:
        """A JSON schema from the source of a model class: its `openapi_types`, `attribute_map` and setters."""
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
        path = self.kserve / f"{snake}.py"
        if not path.is_file():
            return None
        source = path.read_text()
        (model,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        tables = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in model.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        }
        required = re.findall(r"client_side_validation and (\w+) is None", source)
        keys = tables["attribute_map"]
        return {
            "type": "object",
            "additionalProperties": False,
            "required": [keys[name] for name in required],
            "properties": {keys[name]: self.kserve_type(of) for name, of in tables["openapi_types"].items()},
        }

    def kserve_type(self, name: str) -> dict:
        plain = {"str": "string", "bool": "boolean", "int": "integer", "float": "number", "object": "object"}
        if name in plain:
            return {"type": plain[name]}
        if match := re.fullmatch(r"list\[(.+)\]", name):
            return {"type": "array", "items": self.kserve_type(match[1])}
        if match := re.fullmatch(r"dict\(str, (.+)\)", name):
            return {"type": "object", "additionalProperties": self.kserve_type(match[1])}
        if name in ["ResourceQuantity", "V1beta1MetricQuantity"]:
            return self.definition("io.k8s.apimachinery.pkg.api.resource.Quantity")
        if model := self.kserve_model(name):
            return model
        # Kubernetes' own: V1Container, K8sIoApiAutoscalingV2HorizontalPodAutoscalerBehavior.
        parts = re.fullmatch(r"(?:K8sIoApi([A-Z][a-z]+))?(V\d[a-z0-9]*)([A-Z]\w*)", name)
        group = "" if parts is None or parts[1] is None else f".{parts[1].lower()}"
        ending = "" if parts is None else f"{group}.{parts[2].lower()}.{parts[3]}"
        names = [n for n in self.definitions["$defs"] if ending and n.endswith(ending)]
        # core before others that have a type of the same name.
        names.sort(key=lambda n: not n.startswith("io.k8s.api.core."))
        if not names:
            return {"not": {}, "description": f"no schema is known for {name}"}
        return self.definition(names[0])

    def definition(self, name: str) -> dict:
        return {"$ref": f"{DEFINITIONS}#/$defs/{name}"}


class Report:
    def __init__(self):
        self.wrong = 0
        self.unchecked = []

    def fault(self, where, what):
        self.wrong += 1
        print(f"WRONG   {where}: {what}")

    def held(self, where, to):
        print(f"ok      {where}: {to}")


def validate(document, schema, schemas: Schemas, where: str, report: Report, to: str):
    validator = jsonschema.Draft202012Validator(schema, registry=schemas.registry)
    faults = sorted(validator.iter_errors(document), key=lambda fault: list(map(str, fault.path)))
    for fault in faults:
        report.fault(where, f"{'.'.join(map(str, fault.path)) or 'the document'}: {fault.message[:300]}")
    if not faults:
        report.held(where, to)


def find(document, key: str):
    """Every value under a key, at any depth."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name == key:
                yield value
            yield from find(value, key)
    elif isinstance(document, list):
        for value in document:
            yield from find(value, key)


def flag(arguments: list[str], name: str, default: float) -> float:
    given = [a.split("=", 1)[1] for a in arguments if a.startswith(f"{name}=")]
    return float(given[-1]) if given else default


def cross_checks(documents: list[tuple[str, dict]], sources: dict[str, str], report: Report):
    """What schemas cannot know."""
    pods = [doc["spec"]["template"]["metadata"]["labels"] for _, doc in documents if doc.get("kind") == "Deployment"]
    names = {(doc.get("kind"), doc.get("metadata", {}).get("name")) for _, doc in documents}
    for where, doc in documents:
        wrong = report.wrong
        for selector in find(doc, "matchLabels") if doc.get("kind") != "Service" else [doc["spec"]["selector"]]:
            if not any(selector.items() <= labels.items() for labels in pods):
                report.fault(where, f"the selector {selector} meets no pod's labels")
        for target in find(doc, "scaleTargetRef"):
            if (target["kind"], target["name"]) not in names:
                report.fault(where, f"there is no {target['kind']} {target['name']} to scale")
        whole = [doc]
        if doc.get("kind") == "InferenceService":
            runtime = doc["spec"]["predictor"]["model"]["runtime"]
            runtimes = [d for _, d in documents if d["kind"] == "ServingRuntime" and d["metadata"]["name"] == runtime]
            whole = runtimes + whole
            if not runtimes:
                report.fault(where, f"there is no ServingRuntime {runtime}")
        for request in find(doc, "httpGet"):
            if f'.route("{request["path"]}"' not in sources["routes"]:
                report.fault(where, f"the server has no route {request['path']}")
        for grace in find(doc, "terminationGracePeriodSeconds"):
            arguments = [a for found in find(whole, "args") for a in found]
            needed = sum(found["seconds"] for found in find(whole, "sleep")) + flag(arguments, "--drain", 60)
            if grace <= needed:
                report.fault(where, f"{grace} s of grace do not outlast {needed:g} s of sleep and drain")
        if report.wrong == wrong:
            report.held(where, "selectors, targets, routes and times fit")


def check_flags(documents, binary: pathlib.Path, report: Report):
    """Every flag of a command in a manifest is one that the binary knows."""
    known = {}
    for where, doc in documents:
        for arguments in find(doc, "args"):
            # An InferenceService's stand behind its runtime's, which begin with the command.
            command = arguments[0] if not arguments[0].startswith("-") else "serve"
            if command not in known:
                text = subprocess.run([binary, command, "--help"], capture_output=True, text=True, check=True).stdout
                known[command] = set(re.findall(r"--[a-z][a-z-]*", text))
            unknown = [a for a in arguments if a.startswith("-") and a.split("=")[0] not in known[command]]
            if unknown:
                report.fault(where, f"`bitfit {command}` does not know {', '.join(unknown)}")
            else:
                report.held(where, f"flags of `bitfit {command}`")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=pathlib.Path, required=True, help="where the packages are installed")
    parser.add_argument("--binary", type=pathlib.Path, help="a built bitfit, to check flags against")
    parser.add_argument("folder", nargs="?", default="deploy", type=pathlib.Path)
    arguments = parser.parse_args()
    schemas, report = Schemas(arguments.schemas), Report()
    routes = "".join(path.read_text() for path in sorted(pathlib.Path("src/serve").glob("*.rs")))
    metrics = set(re.findall(r'"(bitfit_\w+)"', routes))

    documents = []
    for path in sorted(arguments.folder.rglob("*.yaml")):
        where, text = str(path), path.read_text()
        if not text.startswith("# ") or "not been" not in text:
            report.fault(where, "does not open with a comment that says what it is for and what has not been run")
        for metric in sorted(set(re.findall(r"\bbitfit_\w+", text)) - metrics):
            report.fault(where, f"the server has no metric {metric}")
        try:
            found = [doc for doc in yaml.safe_load_all(text) if doc is not None]
        except yaml.YAMLError as error:
            report.fault(where, f"not YAML: {error}")
            continue
        for document in found:
            if path.name == "prometheus-adapter-values.yaml":
                validate(document, ADAPTER_VALUES, schemas, where, report, "a rule, by the adapter's documentation")
                continue
            if not isinstance(document, dict) or not {"apiVersion", "kind"} <= document.keys():
                report.fault(where, "a document without apiVersion and kind")
                continue
            name, schema = schemas.of(document)
            if schema is None:
                report.fault(where, f"no schema for {document['apiVersion']} {document['kind']}")
                continue
            validate(document, schema, schemas, where, report, f"{document['kind']}, by {name}")
            documents.append((where, document))
        if path.name == "kustomization.yaml":
            for resource in found[0].get("resources", []):
                if not (path.parent / resource).exists():
                    report.fault(where, f"there is no {resource}")
    if not documents:
        report.fault(arguments.folder, "no manifest found")
    if not report.wrong:
        # On documents of the right form only: these look things up without asking first.
        cross_checks(documents, {"routes": routes}, report)
        if arguments.binary:
            check_flags(documents, arguments.binary, report)

    if not arguments.binary:
        print("skipped flags in the manifests: no built binary was given (--binary)")
    if kubectl := shutil.which("kubectl"):
        for path in sorted(arguments.folder.rglob("kustomization.yaml")):
            built = subprocess.run([kubectl, "kustomize", path.parent], capture_output=True, text=True)
            if built.returncode != 0:
                report.fault(path, built.stderr.strip())
                continue
            for document in yaml.safe_load_all(built.stdout):
                where = f"{path}, built: {document['kind']}"
                name, schema = schemas.of(document)
                validate(document, schema, schemas, where, report, f"by {name}")
    else:
        print("skipped building the kustomizations: there is no kubectl here")
    print(
        "not checked: what only a cluster knows (admission, quotas, images, KServe's defaults and webhooks), "
        "expressions for Prometheus, the ranges of values where schemas give none"
    )
    print(f"check_deploy: {report.wrong} wrong")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
