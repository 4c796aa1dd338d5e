"""A run on the nodes of a Ray cluster: one launcher a node; when a node or a process is lost, all begin again and resume.

    python launch/ray_train.py --nodes 4 --processes 8 --address auto stgen/train.py --config FILE [key.sub=value ...]

On Kubernetes that command line is the `entrypoint` of a RayJob; `ray job submit --working-dir . -- COMMAND` sends it to a
cluster. Without an address it runs a local Ray, on which all "nodes" are this machine. The repository, its environment and
the run folder must be seen by all nodes.
"""

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

REPOSITORY = Path(__file__).resolve().parent.parent


@ray.remote(max_concurrency=2)  # `stop` must get through while `launch` waits
class Node:
    """One node's place in the run."""

    def __init__(self) -> None:
        self.launcher: subprocess.Popen[bytes] | None = None

    def meeting_point(self) -> tuple[str, int]:
        """This node's address, and a port that is free there."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def launch(self, node_arguments: list[str], config: str, directory: str) -> int:
        """Runs launch/node.sh to its end: its exit status."""
        # Ray limits the threads of its own tasks.
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        environment |= {"ACCELERATE_CONFIG": config, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [str(REPOSITORY / "launch" / "node.sh"), *node_arguments]
        self.launcher = subprocess.Popen(command, env=environment, cwd=directory)
        return self.launcher.wait()

    def stop(self) -> None:
        """Ends everything that was launched; what a process without its peers waits for will not come."""
        if self.launcher is None or self.launcher.poll() is not None:
            return
        launched = psutil.Process(self.launcher.pid)
        for process in (*launched.children(recursive=True), launched):
            process.send_signal(signal.SIGKILL)


def attempt(group: object, nodes: int, processes: int, gpus: float, config: str, command: list[str]) -> str | None:
    """Starts the run on all nodes: None once it has ended well, or what went wrong."""
    places = [
        Node.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(group, i)).remote()
        for i in range(nodes)
    ]
    try:
        head, port = ray.get(places[0].meeting_point.remote())
        waiting = {
            place.launch.remote([*map(str, (nodes, i, head, port, processes)), *command], config, os.getcwd()): i
            for i, place in enumerate(places)
        }
        while waiting:
            (ended,), _ = ray.wait(list(waiting))
            node = waiting.pop(ended)
            status = ray.get(ended)
            if status != 0:
                return f"the launcher of node {node} ended with status {status}"
        return None
    except ray.exceptions.RayError as error:
        return f"a node was lost: {' '.join(str(error).split())}"
    finally:
        for place in places:
            with contextlib.suppress(ray.exceptions.RayError):  # it may be the one that was lost
                ray.get(place.stop.remote(), timeout=30)
            ray.kill(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1, help="training processes of a node")
    parser.add_argument("--gpus", type=float, help="GPUs of a node; one a process by default, none with a *_cpu config")
    parser.add_argument("--config-file", default="configs/accelerate/ddp.yaml", help="strategy and precision")
    parser.add_argument("--address", help="cluster to join, auto for the one here; none runs a local Ray")
    parser.add_argument("--retries", type=int, default=3, help="how often a run that was cut off is begun again")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script and its arguments")
    arguments = parser.parse_args()
    on_cpu = arguments.config_file.endswith("cpu.yaml")
    gpus = arguments.gpus if arguments.gpus is not None else 0 if on_cpu else arguments.processes
    bundle = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    if arguments.address is None:
        # A token of this process alone; Ray would write one to ~/.ray, where later clusters of the user find it.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(address="local", num_cpus=arguments.nodes, object_store_memory=100 * 2**20, include_dashboard=False)
    else:
        ray.init(address=arguments.address)
    # A node each, which a local Ray has not.
    group = placement_group([bundle] * arguments.nodes, "PACK" if arguments.address is None else "STRICT_SPREAD")
    ray.get(group.ready())
    wrong = None
    for tries_left in range(arguments.retries, -1, -1):
        run = (arguments.processes, gpus, arguments.config_file, arguments.command)
        wrong = attempt(group, arguments.nodes, *run)
        if wrong is None:
            break
        print(f"{wrong}; {'it begins again and resumes' if tries_left else 'that was the last try'}", flush=True)
    remove_placement_group(group)
    ray.shutdown()
    sys.exit(0 if wrong is None else 1)


if __name__ == "__main__":
    main()
