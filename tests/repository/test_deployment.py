"""What is shipped for operators: the unit and the manifest are valid and call a command that exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from cache.address import SYSTEM_ADDRESS
from cache.daemon_config import DaemonConfig
from dataflow.cli.cache import serve

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "dataflow-cache.service"
MANIFEST = DEPLOY / "kubernetes" / "daemonset.yaml"
JOB = DEPLOY / "kubernetes" / "job.yaml"
BATCH = DEPLOY / "slurm" / "train.sbatch"

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

JOB_SCHEMA = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "batch/v1"},
    kind={"const": "Job"},
    metadata=METADATA,
    spec=closed(
        ["template"],
        template=closed(
            ["spec"],
            spec=closed(
                ["containers", "restartPolicy"],
                restartPolicy={"enum": ["Never", "OnFailure"]},
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


def test_the_job_finds_the_socket_that_the_manifest_makes():
    _, daemon_set = yaml.safe_load_all(MANIFEST.read_text())
    job = yaml.safe_load(JOB.read_text())
    jsonschema.validate(job, JOB_SCHEMA)
    cache, train = (document["spec"]["template"]["spec"] for document in (daemon_set, job))
    (folder,) = (volume["hostPath"]["path"] for volume in train["volumes"])
    assert folder in [volume.get("hostPath", {}).get("path") for volume in cache["volumes"]]
    (mount,) = train["containers"][0]["volumeMounts"]
    assert f"--socket={folder}/cache.sock" in cache["containers"][0]["args"]
    assert f"{mount['mountPath']}/cache.sock" == SYSTEM_ADDRESS


def test_the_batch_script_trains_beside_a_cache_and_ends_it(tmp_path):
    """On one node, where `srun` runs what it is given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    (programs / "python").write_text("#!/bin/sh\ndataflow cache status\nexit 3\n")
    (programs / "dataflow").write_text(f'#!/bin/sh\nexec {sys.executable} -m dataflow "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    script = tmp_path / "train.sbatch"
    settings = {"ram": "1MiB", "disk": str(tmp_path / "disk"), "disk_size": "1MiB"}
    text = BATCH.read_text().replace("/tmp/dataflow-$(id -u)", str(tmp_path / "run"))
    for name, value in settings.items():
        text, changed = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert changed == 1
    script.write_text(text)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 3, done.stderr
    assert f"{tmp_path}/run/7.sock: process" in done.stdout
    assert "listening at" in done.stderr
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == []
    assert (tmp_path / "disk" / "lock").exists()
