"""docker/k8s: the API's schemas take it, its parts fit together, and the services take what it sets."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from epmesh_server.access import Identity, Role
from epmesh_server.certificates import Authority
from epmesh_server.cli import health, serving
from epmesh_server.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "k8s"
PAGE = (ROOT / "docs" / "deploy.md").read_text()
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
VERSIONS = ("1.28", kubernetes_validate.latest_version())  # the oldest that is promised, and the newest known
CONTROLLERS = ("StatefulSet", "Deployment")


def objects(*kinds: str) -> list[dict[str, Any]]:
    """The manifests' objects, of these kinds or all."""
    found = [one for path in FILES for one in yaml.safe_load_all(path.read_text())]
    return [one for one in found if not kinds or one["kind"] in kinds]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = (one for one in objects(kind) if one["metadata"]["name"] == name)
    return found


def pod(controller: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = controller["spec"]["template"]["spec"]
    return spec


def container(controller: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(controller)["containers"]
    return dict(only)


def environment(controller: dict[str, Any], **others: str) -> dict[str, str]:
    """What the container gets: variables put in, as for the first pod."""
    values: dict[str, str] = {}
    for one in container(controller)["env"]:
        first = f"{controller['metadata']['name']}-0"
        value = one["value"] if "value" in one else {"metadata.name": first}[one["valueFrom"]["fieldRef"]["fieldPath"]]
        values[one["name"]] = re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], value)
    return values | others


def title(one: dict[str, Any]) -> str:
    return f"{one['kind']}-{one['metadata']['name']}"


@pytest.fixture(params=objects(*CONTROLLERS), ids=title)
def controller(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("one", objects(), ids=title)
def test_the_api_knows_every_field(one: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_misspelt_field_and_a_value_of_another_type_would_be_found(version: str) -> None:
    for path, value in ((("minReadySecond",), 30), (("replicas",), "two"), (("template", "spec", "container"), [])):
        wrong = copy.deepcopy(named("StatefulSet", "epmesh-node"))
        target = wrong["spec"]
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)


def test_the_kustomization_has_every_file() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in FILES]
    assert {one["name"] for one in kustomization["images"]} == {
        container(one)["image"] for one in objects(*CONTROLLERS)
    }


def test_services_and_budgets_select_the_pods_of_their_component(controller: dict[str, Any]) -> None:
    labels = controller["spec"]["template"]["metadata"]["labels"]
    assert controller["spec"]["selector"]["matchLabels"] == labels
    component = controller["metadata"]["labels"]
    assert component == labels
    services = [one for one in objects("Service") if one["metadata"]["labels"] == component]
    budgets = [one for one in objects("PodDisruptionBudget") if one["metadata"]["labels"] == component]
    assert [one["spec"]["selector"] for one in services] == [labels]
    assert all(one["spec"]["selector"]["matchLabels"] == labels for one in budgets)
    assert bool(budgets) == (controller["spec"]["replicas"] > 1)
    if controller["kind"] == "StatefulSet":
        assert controller["spec"]["serviceName"] == services[0]["metadata"]["name"]
    ports = {one["name"] for one in container(controller)["ports"]}
    assert {one["targetPort"] for one in services[0]["spec"]["ports"]} <= ports


def test_pods_need_no_rights(controller: dict[str, Any]) -> None:
    spec, security = pod(controller), container(controller)["securityContext"]
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_pods_run_as_the_user_of_the_image(controller: dict[str, Any]) -> None:
    (uid,) = re.findall(r"useradd .*--uid (\d+)", (ROOT / "docker" / "Dockerfile").read_text())
    security = pod(controller)["securityContext"]
    assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {int(uid)}


def test_every_mount_has_a_volume_and_is_used(controller: dict[str, Any]) -> None:
    volumes = {one["name"] for one in pod(controller)["volumes"]}
    volumes |= {one["metadata"]["name"] for one in controller["spec"].get("volumeClaimTemplates", ())}
    assert {one["name"] for one in container(controller)["volumeMounts"]} == volumes


def test_everything_that_a_service_writes_to_is_on_a_volume(controller: dict[str, Any]) -> None:
    writable = [one["mountPath"] for one in container(controller)["volumeMounts"] if not one.get("readOnly")]
    given = environment(controller)
    for name in ("EPMESH_DATA_DIR", "EPMESH_RUNTIME_DIR"):
        assert name not in given or any(Path(given[name]).is_relative_to(path) for path in writable), name
    assert "/tmp" in writable


def test_probes_ask_the_port_that_the_service_listens_on(controller: dict[str, Any]) -> None:
    one = container(controller)
    ports = {port["containerPort"] for port in one["ports"]}
    names = {port["name"] for port in one["ports"]}
    for probe, options in (("readinessProbe", set()), ("livenessProbe", {"--alive"})):
        asked = one[probe]
        if "httpGet" in asked:
            assert asked["httpGet"]["port"] in names
            continue
        epmesh, command, *rest = asked["exec"]["command"]
        assert (epmesh, command, {word for word in rest if word.startswith("-")}) == ("epmesh", "health", options)
        assert int(rest[-1].rpartition(":")[2]) in ports


def test_probes_run_in_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(health, "check", lambda address, tls, ranks=0: asked.append((address, tls is not None, ranks)))
    node = named("StatefulSet", "epmesh-node")
    for probe in ("readinessProbe", "livenessProbe"):
        _, *command = container(node)[probe]["exec"]["command"]
        run(node, tmp_path, Identity(Role.NODE, "epmesh-node-0"), *command)
    assert asked == [("127.0.0.1:7400", True, 2), ("127.0.0.1:7400", True, 0)]  # ready with its ranks, alive without


def test_a_node_takes_what_its_pod_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serving, "serve", lambda *call: calls.append(call))
    node = named("StatefulSet", "epmesh-node")
    run(node, tmp_path, Identity(Role.NODE, "epmesh-node-0"), *container(node)["args"])
    ((settings, beside, hosted),) = calls
    assert (settings.node_id, settings.host, settings.advertise) == ("epmesh-node-0", "0.0.0.0", None)
    assert beside is None
    assert hosted.count == len(hosted.hold)
    assert {expert for held in hosted.hold for expert in held} == set(range(hosted.num_experts))
    assert pod(node)["terminationGracePeriodSeconds"] > hosted.drain_s
    host, port = settings.coordinator.split(":")
    assert int(port) in {one["port"] for one in named("Service", host)["spec"]["ports"]}
    assert {settings.port, settings.metrics_port} == {one["containerPort"] for one in container(node)["ports"]}


def test_a_coordinator_takes_what_its_pod_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serving, "coordinate", lambda *call: calls.append(call))
    coordinator = named("StatefulSet", "epmesh-coordinator")
    run(coordinator, tmp_path, Identity(Role.COORDINATOR), *container(coordinator)["args"])
    ((options, _),) = calls
    assert (options.host, options.insecure) == ("0.0.0.0", False)
    assert {options.port, options.metrics_port} == {one["containerPort"] for one in container(coordinator)["ports"]}


def test_every_variable_is_one_that_the_command_reads(controller: dict[str, Any]) -> None:
    given = {name for name in environment(controller) if name.startswith(("EPMESH_", "ROUTER_"))}
    if controller["kind"] == "Deployment":
        assert given <= set(re.findall(r"`(\w+)`", (ROOT / "examples" / "router_service" / "README.md").read_text()))
    else:
        (command,) = container(controller)["args"]
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).output
        assert [name for name in given if name not in shown] == []


def test_a_router_finds_the_nodes_service() -> None:
    host, port = environment(named("Deployment", "epmesh-router"))["EPMESH_MESH"].split(":")
    assert int(port) in {one["port"] for one in named("Service", host)["spec"]["ports"]}


def test_each_node_sees_its_own_key_alone_and_keys_may_be_read_by_nobody_else() -> None:
    node = named("StatefulSet", "epmesh-node")
    (mount,) = (one for one in container(node)["volumeMounts"] if one["name"] == "tls")
    assert mount["subPathExpr"] == "$(POD_NAME)"
    (volume,) = (one["projected"] for one in pod(node)["volumes"] if one["name"] == "tls")
    for number, source in enumerate(volume["sources"]):
        secret, name = source["secret"], f"epmesh-node-{number}"
        assert secret["name"] == f"{name}-tls"
        assert [(one["key"], one["path"]) for one in secret["items"]] == [
            (key, f"{name}/{key}") for key in ("ca.crt", "tls.crt", "tls.key")
        ]
        assert secret.get("optional", False) == (number >= node["spec"]["replicas"])
    modes = [one["secret"]["defaultMode"] for other in objects(*CONTROLLERS) for one in secrets_of(pod(other))]
    assert {*modes, volume["defaultMode"]} == {0o440}


def test_the_page_makes_every_secret() -> None:
    wanted = {one["secret"]["secretName"] for other in objects(*CONTROLLERS) for one in secrets_of(pod(other))}
    made = set(re.findall(r"kubectl create secret generic (\S+)", PAGE))
    assert wanted <= made
    assert "epmesh-node-$number-tls" in made


def admitted(component: str, port: int, source: dict[str, str], namespace: str) -> bool:
    """Whether the policies let a pod with these labels in this namespace reach the port; "epmesh" is the mesh's own."""
    (policy,) = (
        one["spec"] for one in objects("NetworkPolicy") if component_of(one["spec"]["podSelector"]) == component
    )
    return any(
        any(one["port"] <= port <= one.get("endPort", one["port"]) for one in rule["ports"])
        and ("from" not in rule or any(matches(peer, source, namespace) for peer in rule["from"]))
        for rule in policy["ingress"]
    )


def component_of(selector: dict[str, Any]) -> str:
    return str(selector["matchLabels"]["app.kubernetes.io/component"])


def matches(peer: dict[str, Any], source: dict[str, str], namespace: str) -> bool:
    """Whether a pod is meant: by its labels within the mesh's namespace, or by the name of its own."""
    if "namespaceSelector" in peer:
        return bool(peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": namespace})
    return namespace == "epmesh" and peer["podSelector"]["matchLabels"].items() <= source.items()


def test_policies_let_in_who_must_reach_a_port_and_nobody_else() -> None:
    labels = {
        component_of(one["spec"]["selector"]): one["spec"]["selector"]["matchLabels"] for one in objects(*CONTROLLERS)
    }
    sources = {name: (label, "epmesh") for name, label in labels.items()}
    sources |= {"stranger": ({}, "epmesh"), "prometheus": ({}, "monitoring"), "impostor": (labels["node"], "other")}
    wanted = {
        ("node", 7400): {"node", "router"},
        ("node", 32768): {"node", "router"},  # links and fronts: the kernel's free ports, 32768 to 60999 in a pod
        ("node", 60999): {"node", "router"},
        ("node", 7402): {"prometheus"},
        ("coordinator", 7401): {"node"},
        ("coordinator", 7403): {"prometheus"},
        ("router", 8080): set(sources),
    }
    for (component, port), names in wanted.items():
        assert {name for name, source in sources.items() if admitted(component, port, *source)} == names, (
            component,
            port,
        )
    listening = {
        (component_of(one["spec"]["selector"]), port["containerPort"])
        for one in objects(*CONTROLLERS)
        for port in container(one)["ports"]
    }
    assert listening <= wanted.keys()


def test_every_container_asks_for_what_it_needs_and_its_memory_is_bounded(controller: dict[str, Any]) -> None:
    resources = container(controller)["resources"]
    assert resources["requests"].keys() == {"cpu", "memory"}
    assert "memory" in resources["limits"]


def secrets_of(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The volumes of a pod that are one secret."""
    return (one for one in spec["volumes"] if "secret" in one)


def run(controller: dict[str, Any], directory: Path, identity: Identity, *arguments: str) -> None:
    """Runs a command with the environment of a pod, and certificates that were made for it."""
    place = directory / "tls"
    if not place.exists():
        Authority.make(directory / "authority").issue(place, [identity])
    given = environment(controller, EPMESH_TLS_DIR=str(place), EPMESH_LOG_LEVEL="error")
    done = CliRunner().invoke(app, arguments, env=given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
