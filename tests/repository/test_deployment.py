"""What is shipped for operators: the unit and the manifest are valid and call a command that exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from cache.daemon_config import DaemonConfig
from dataflow.cli.cache import serve

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "dataflow-cache.service"
MANIFEST = DEPLOY / "kubernetes" / "daemonset.yaml"

# The parts of Kubernetes' own schema (apps/v1 DaemonSet) that the manifest uses; unknown names are errors, as for the
# server with strict validation. The whole of it is in the package `kubernetes-validate`, whose 17,000 files are too
# many to install for one test; `kubernetes-validate --strict deploy/kubernetes/daemonset.yaml` says the same.
STRING = {"type": "string"}
LABELS = {"type": "object", "additionalProperties": STRING}


def closed(required: list[str] = [], **properties: object) -> dict[str, object]:  # noqa: B006
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def listed(item: object) -> dict[str, object]:
    return {"type": "array", "items": item, "minItems": 1}


METADATA = closed(name={"type": "string", "pattern": "^[a-z0-9-]+$"}, labels=LABELS, annotations=LABELS)
PROBE = closed(
    ["httpGet"],
    httpGet=closed(["port"], path=STRING, port={"type": ["string", "integer"]}),
    **{
        name: {"type": "integer", "minimum": 0}
        for name in ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold")
    },
)
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": "^[0-9.]+(m|[KMGT]i)?$"}}
CONTAINER = closed(
    ["name", "image"],
    name=STRING,
    image=STRING,
    args=listed(STRING),
    envFrom=listed(closed(secretRef=closed(["name"], name=STRING, optional={"type": "boolean"}))),
    ports=listed(closed(["containerPort"], name=STRING, containerPort={"type": "integer", "maximum": 65535})),
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    resources=closed(requests=QUANTITIES, limits=QUANTITIES),
    securityContext=closed(
        runAsUser={"type": "integer"},
        allowPrivilegeEscalation={"type": "boolean"},
        readOnlyRootFilesystem={"type": "boolean"},
        capabilities=closed(drop=listed(STRING)),
        seccompProfile=closed(["type"], type={"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}),
    ),
    volumeMounts=listed(closed(["name", "mountPath"], name=STRING, mountPath=STRING, readOnly={"type": "boolean"})),
)
VOLUME = closed(
    ["name"],
    name=STRING,
    configMap=closed(["name"], name=STRING),
    hostPath=closed(["path"], path=STRING, type={"enum": ["DirectoryOrCreate", "Directory"]}),
    emptyDir=closed(),
)
DAEMON_SET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "apps/v1"},
    kind={"const": "DaemonSet"},
    metadata=METADATA,
    spec=closed(
        ["selector", "template"],
        selector=closed(matchLabels=LABELS),
        updateStrategy=closed(
            type={"enum": ["RollingUpdate", "OnDelete"]}, rollingUpdate=closed(maxUnavailable={"type": "integer"})
        ),
        template=closed(
            metadata=METADATA,
            spec=closed(
                ["containers"],
                terminationGracePeriodSeconds={"type": "integer"},
                automountServiceAccountToken={"type": "boolean"},
                containers=listed(CONTAINER),
                volumes=listed(VOLUME),
            ),
        ),
    ),
)


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    # The program has to exist where the unit names it.
    program = tmp_path / "dataflow"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/dataflow/bin/dataflow", str(program)))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


def test_the_unit_and_the_manifest_call_serve_with_options_that_it_has():
    known = {name for option in serve.params for name in option.opts}
    unit = re.search(r"^ExecStart=\S+ cache serve (.*)$", UNIT.read_text(), re.MULTILINE)
    assert unit is not None
    assert {word for word in unit[1].split() if word.startswith("--")} <= known
    _, daemon_set = yaml.safe_load_all(MANIFEST.read_text())
    args = daemon_set["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[:3] == ["dataflow", "cache", "serve"]
    assert {word.partition("=")[0] for word in args[3:]} <= known


def test_the_manifest_fits_the_schema_and_itself(tmp_path):
    config_map, daemon_set = yaml.safe_load_all(MANIFEST.read_text())
    jsonschema.validate(daemon_set, DAEMON_SET)
    spec = daemon_set["spec"]
    pod = spec["template"]["spec"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (tmp_path / "cache.toml").write_text(config_map["data"]["cache.toml"])
    config = DaemonConfig.from_toml(tmp_path / "cache.toml").cache
    in_memory = config.ring_bytes + sum(tier.capacity_bytes for tier in config.tiers if tier.path is None)
    in_memory += config.max_inflight_bytes
    assert in_memory < int(container["resources"]["requests"]["memory"].removesuffix("Gi")) << 30
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(tier.path in mounts for tier in config.tiers if tier.path is not None)
