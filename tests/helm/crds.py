"""Validates a custom resource with its CustomResourceDefinition, as the API server does.

Order matters: nulls are dropped where the schema gives a default, then defaults are filled in, then the document is
validated and unknown properties are refused (`kubectl --validate=strict`).
"""

import copy
import os
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
_KEPT = [
    "type",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "uniqueItems",
    "multipleOf",
    "required",
    "minProperties",
    "maxProperties",
]


@cache
def schema(kind_file: str, version: str) -> dict:
    """The OpenAPI schema in a definition file.

    They are not part of this repository: the test is skipped where none are at hand, and fails where KUBERAY_CRDS
    names their folder and they are not in it.
    """
    named = os.environ.get("KUBERAY_CRDS")
    folder = Path(named) if named else ROOT.parent / "shared" / "kubernetes" / "crds"
    path = folder / kind_file
    if not path.exists():
        if named:
            pytest.fail(f"KUBERAY_CRDS is {named}, and {kind_file} is not there")
        pytest.skip(f"KubeRay's definitions are not at {folder}; set KUBERAY_CRDS to their folder")
    definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (found,) = [item for item in definition["spec"]["versions"] if item["name"] == version]
    return found["schema"]["openAPIV3Schema"]


def errors(document: dict, openapi: dict) -> list[str]:
    """What the API server would say; empty if it accepts."""
    filled = fill_defaults(copy.deepcopy(document), openapi)
    validator = jsonschema.Draft202012Validator(translate(openapi))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(filled)]


def fill_defaults(value: object, node: dict) -> object:
    """Drops nulls that the schema does not allow and fills the schema's defaults in, in place."""
    if isinstance(value, dict):
        properties = node.get("properties", {})
        extra = node.get("additionalProperties")
        for key in list(value):
            child = properties.get(key, extra if isinstance(extra, dict) else {})
            if value[key] is None and not child.get("nullable"):
                del value[key]
        for key, child in properties.items():
            if key not in value and "default" in child:
                value[key] = copy.deepcopy(child["default"])
        for key, item in value.items():
            fill_defaults(item, properties.get(key, extra if isinstance(extra, dict) else {}))
    elif isinstance(value, list):
        for item in value:
            fill_defaults(item, node.get("items", {}))
    return value


def translate(node: dict, root: bool = True) -> dict:
    """The structural OpenAPI schema as JSON Schema 2020-12 that forbids unknown properties."""
    out: dict = {key: node[key] for key in _KEPT if key in node}
    for key in ("allOf", "anyOf", "oneOf"):
        if key in node and not node.get("x-kubernetes-int-or-string"):
            # Value validations only: they name fields without owning them, so nothing is forbidden inside.
            out[key] = [{k: v for k, v in item.items() if k in _KEPT} for item in node[key]]
    if node.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    if node.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    if "items" in node:
        out["items"] = translate(node["items"], False)
    if "properties" in node or node.get("type") == "object":
        out["properties"] = {key: translate(child, False) for key, child in node.get("properties", {}).items()}
        extra = node.get("additionalProperties")
        if isinstance(extra, dict):
            out["additionalProperties"] = translate(extra, False)
        else:
            # metadata is checked by the API server itself; its schema is only `type: object`.
            bare = root is False and not node.get("properties") and extra is None
            free = node.get("x-kubernetes-preserve-unknown-fields") or bare
            out["additionalProperties"] = bool(free)
    return out
