"""Starts NVIDIA Triton Inference Server over emulated devices. Run by an environment of its own: it is not ours.

    python bench/servers/triton_start.py --port 8000 --folder /tmp/x --model heavy=heavy:2 --model light=light:2

The server is the one inside nvidia-pytriton's wheel, started by itself with its Python backend (no PyTriton). Each
model has the dynamic batcher's queue (with batches of one) with a time-out, so that what could not be in time is
refused instead of being computed. A bound as well (max_queue_size) would only cost: see docs/results/servers.md.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import pytriton
from emulated_device import REQUIREMENT_S, SERVICE_S, SLACK

HERE = Path(__file__).parent
TRITON = Path(pytriton.__file__).parent / "tritonserver"
AHEAD = 2
"""Requests per instance that Triton may take out of the queue before their turn: the time-out spares them."""
RETRIED_AFTER = 0.1
"""Share of the requirement that a request waits at a model if its refusal leads to another model."""
PRIORITY = {"heavy": 1, "light": 1000}
"""With --rate-limit=execution_count: the higher, the fewer of the chances an instance gets."""

CONFIG = """backend: "python"
max_batch_size: 1
input [{{ name: "image" data_type: TYPE_UINT8 dims: [ -1 ] }}]
output [{{ name: "rank" data_type: TYPE_INT32 dims: [ 1 ] }}]
instance_group [ {groups} ]
parameters {{ key: "slower" value: {{ string_value: "{slower}" }} }}
dynamic_batching {{
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {timeout_us}
  }}
}}
"""


def config(groups: dict[str, int], slower: float, retried: bool) -> str:
    """The configuration of a model with so many instances of each variant; `retried`: refusals go to another model."""
    per_s = sum(count / SERVICE_S[variant] for variant, count in groups.items())
    longest_s = max(SERVICE_S[variant] for variant in groups)
    ahead_s = AHEAD * sum(groups.values()) / per_s
    wait_s = RETRIED_AFTER * REQUIREMENT_S if retried else SLACK * REQUIREMENT_S - longest_s - ahead_s
    shown = ", ".join(
        f'{{ name: "{variant}" kind: KIND_CPU count: {count} rate_limiter {{ priority: {PRIORITY[variant]} }} }}'
        for variant, count in groups.items()
    )
    return CONFIG.format(groups=shown, slower=slower, timeout_us=int(1e6 * wait_s))


def write_repository(folder: Path, models: dict[str, dict[str, int]], slower: float, retried: str) -> None:
    """The model repository and the Python backend with the stub of this Python's version."""
    for name, groups in models.items():
        version = folder / "models" / name / "1"
        version.mkdir(parents=True)
        shutil.copy(HERE / "triton_model.py", version / "model.py")
        shutil.copy(HERE / "emulated_device.py", version)
        (version.parent / "config.pbtxt").write_text(config(groups, slower, name == retried))
    shutil.copytree(TRITON / "backends" / "python", folder / "backends" / "python")
    stub = TRITON / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(stub / "triton_python_backend_stub", folder / "backends" / "python")


def parsed(text: str) -> tuple[str, dict[str, int]]:
    """`NAME=VARIANT:COUNT,VARIANT:COUNT`."""
    name, _, groups = text.partition("=")
    return name, {one.partition(":")[0]: int(one.partition(":")[2]) for one in groups.split(",")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the model repository")
    parser.add_argument("--model", action="append", type=parsed, required=True, help="NAME=VARIANT:COUNT,...")
    parser.add_argument("--retried", default="", help="the model whose refusals clients send to another one")
    parser.add_argument(
        "--slower", type=float, default=1.0, help="multiplies service times, which the queues do not know"
    )
    asked = parser.parse_args()
    write_repository(asked.folder, dict(asked.model), asked.slower, asked.retried)
    libraries = Path(pytriton.__file__).parents[1] / "nvidia_pytriton.libs"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    server = str(TRITON / "bin" / "tritonserver")
    options = [
        f"--model-repository={asked.folder}/models",
        f"--backend-directory={asked.folder}/backends",
        "--http-address=127.0.0.1",
        f"--http-port={asked.port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--rate-limit=execution_count",
        "--disable-auto-complete-config",
    ]
    os.execve(server, [server, *options], environment)
