"""What stands in deploy/ is whole: it parses, and it says only flags and commands that there are."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokenmill
from coordinator import serve_flags
from coordinator.provisioning import consumers

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRIPTS = sorted(DEPLOY.glob("start_scripts/*/*.sh"))
KNOWN_FLAGS = {flag for action in serve_flags._parser()._actions for flag in action.option_strings}
GUIDE = {
    "single_node/single_node_tp.sh", "single_node/single_node_ep.sh", "multi_node/multi_node_tp_node0.sh",
    "multi_node/multi_node_tp_node1.sh", "multi_node/multi_node_ep_node0.sh", "multi_node/multi_node_ep_node1.sh",
    "single_pd_master/pd_master.sh", "single_pd_master/pd_prefill.sh", "single_pd_master/pd_decode.sh",
    "multi_pd_master/config_server.sh", "multi_pd_master/pd_master_1.sh", "multi_pd_master/pd_master_2.sh",
    "multi_pd_master/pd_prefill.sh", "multi_pd_master/pd_decode.sh"}


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [(path.name, document) for path in sorted(DEPLOY.rglob("*.yaml")) for document in yaml.safe_load_all(path.read_text())]


def serve_commands() -> list[tuple[str, list[str]]]:
    """Every `tokenmill serve …` of compose and Kubernetes, as arguments."""
    found = []
    for name, document in documents():
        found += [(name, shlex.split(service["command"])) for service in document.get("services", {}).values()]
        template = document.get("spec", {}).get("template", {})
        found += [(name, container["args"]) for container in template.get("spec", {}).get("containers", [])]
    return found


def test_every_yaml_parses_and_kubernetes_documents_name_their_kind() -> None:
    kinds = {document["kind"] for name, document in documents() if name != "compose.yaml"}
    assert {"StatefulSet", "Deployment", "Service", "ScaledObject", "PodDisruptionBudget"} <= kinds
    assert all(document["apiVersion"] and document["metadata"]["name"] for name, document in documents() if name != "compose.yaml")


def test_containers_are_started_with_flags_that_there_are() -> None:
    commands = serve_commands()
    assert len(commands) == 9
    for name, args in commands:
        assert args[0] == "serve", (name, args)
        assert {arg for arg in args if arg.startswith("--")} <= KNOWN_FLAGS, (name, args)
        assert all(isinstance(arg, str) for arg in args), (name, args)


def test_selectors_find_their_pods_and_workers_drain_before_they_are_stopped() -> None:
    for name, document in documents():
        if document.get("kind") not in ("StatefulSet", "Deployment"):
            continue
        spec = document["spec"]
        pod = spec["template"]
        assert spec["selector"]["matchLabels"] == pod["metadata"]["labels"], name
        container = pod["spec"]["containers"][0]
        assert "livenessProbe" in container and ("readinessProbe" in container or "startupProbe" in container), name
        if document["kind"] == "StatefulSet" and "model" in {mount["name"] for mount in container["volumeMounts"]}:
            drain = container["lifecycle"]["preStop"]["exec"]["command"][-1]
            waits_s = int(re.search(r"tokenmill drain .* --wait (\d+)", drain)[1])  # type: ignore[index]
            assert waits_s < pod["spec"]["terminationGracePeriodSeconds"], name


def test_autoscaling_counts_consumers_that_the_farm_makes() -> None:
    made = {(consumer.stream, consumer.name) for consumer in consumers("default_model_name")}
    triggers = [trigger["metadata"] for _, document in documents() if document.get("kind") == "ScaledObject"
                for trigger in document["spec"]["triggers"]]
    assert triggers and all((trigger["stream"], trigger["consumer"]) in made for trigger in triggers)


def test_all_commands_of_the_guide_have_their_script() -> None:
    assert {str(path.relative_to(DEPLOY / "start_scripts")) for path in SCRIPTS} == GUIDE


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_start_script_is_shell_and_says_flags_that_there_are(path: Path) -> None:
    assert subprocess.run(["sh", "-n", str(path)], capture_output=True).returncode == 0
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert set(re.findall(r"--\w+", text)) <= KNOWN_FLAGS
    # Without its arguments it says how it is used.
    if (usage := re.findall(r"<(\w+)>", path.read_text())):
        ran = subprocess.run(["sh", str(path)], capture_output=True, text=True)
        assert ran.returncode != 0 and f"<{usage[0]}>" in ran.stderr


def test_the_systemd_unit_runs_a_command_that_there_is() -> None:
    unit = (DEPLOY / "systemd/tokenmill@.service").read_text()
    start = re.search(r"^ExecStart=\S+/tokenmill (\w+) (.*)$", unit, re.M)
    assert start is not None and start[1] in tokenmill.COMMANDS
    assert set(re.findall(r"--\w+", start[2])) <= KNOWN_FLAGS
