"""Which environments say that there are several processes, which say that there is one, and which are told wrong."""

import pytest

from jaxtune.clusters import HEARTBEAT, Place, find_place, seconds
from jaxtune.errors import ProcessError

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {  # as srun sets them on the second of two nodes with two tasks each
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_NUM_PROCESSES": "1", **POD},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},  # srun --pty bash
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": "WARNING: could not determine TPU worker hostnames or IP addresses, please set it"},
    ],
)
def test_one_process_is_alone(environment):
    assert find_place(environment) is None


def test_a_slurm_job_that_srun_did_not_start_is_alone_and_told(capsys):
    assert find_place({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8"}) is None
    assert "srun did not start this one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (EXPLICIT, Place("your launcher", "node1:1234", 4, 3)),
        ({**EXPLICIT, "JAX_LOCAL_DEVICE_IDS": "2,3"}, Place("your launcher", "node1:1234", 4, 3, (2, 3))),
        ({**SLURM, **EXPLICIT, "JAX_PROCESS_ID": "0"}, Place("your launcher", "node1:1234", 4, 0)),
        (
            {"JAX_COORDINATOR_ADDRESS": "job-0.pods:1234", "JAX_NUM_PROCESSES": "4", **POD},
            Place("your launcher", "job-0.pods:1234", 4, 3),
        ),
        ({"JAX_NUM_PROCESSES": "auto"}, Place("your launcher")),
        (SLURM, Place("Slurm")),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}, Place("Slurm", local_devices=(0, 1, 2, 3))),
        (
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"},
            Place("Open MPI", None, 4, 3, (1,)),
        ),
        ({**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "node1:1234"}, Place("Open MPI", "node1:1234", 4, 3, (1,))),
        ({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"}, Place("the TPU pod")),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, Place("the TPU pod")),
    ],
)
def test_several_processes_are_found(environment, place):
    assert find_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "JAX_NUM_PROCESSES is set, but not JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "node1:1"}, "JAX_COORDINATOR_ADDRESS is set, but not"),
        ({**EXPLICIT, "JAX_PROCESS_ID": "4"}, "process 4 of 4: they are counted from 0 to 3"),
        ({**EXPLICIT, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES is 'four'; it must be a whole number"),
        ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "node1"}, "it must be host:port"),
        ({**EXPLICIT, "JAX_LOCAL_DEVICE_IDS": "all"}, "it must be numbers of GPUs"),
        ({key: SLURM[key] for key in SLURM if key != "SLURM_LOCALID"}, "Slurm started several .* SLURM_LOCALID is not"),
        (OPEN_MPI, "This Open MPI does not say where process 0 is"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK is not in"),
        (POD, "pod 3 of an indexed Kubernetes job, and nothing says how many pods train together"),
    ],
)
def test_what_is_said_in_part_is_refused_with_what_to_do(environment, message):
    with pytest.raises(ProcessError, match=message):
        find_place(environment)


def test_the_variables_of_slurm_are_those_that_jax_reads(monkeypatch):
    from jax._src.clusters import ClusterEnv

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
    assert found == (f"node001:{4711 % 4096 + 61440}", 4, 3, [1])


def test_seconds_are_whole(monkeypatch):
    assert seconds({}, HEARTBEAT) == 100
    assert seconds({HEARTBEAT: "10"}, HEARTBEAT) == 10
    with pytest.raises(ProcessError, match="must be a whole number of seconds"):
        seconds({HEARTBEAT: "soon"}, HEARTBEAT)
