"""What makes a step fast changes none of its numbers: precision, compiled steps, CUDA graphs; the plain version of the
update in benchmark/ is the same step."""

import contextlib
import shutil
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import buffers
import envs
import smac_offline_online as smac
from benchmark.speed import evaluation, precision, speed
from benchmark.speed.plain_update import NETWORKS, PlainAgent, plain_update, unstack
from plumbing.machine import compile_step, cuda_graph, matmul_precision

SMALL = dict(
    rl_batch=16, context_batch=8, q_hidden=(16, 16), policy_hidden=(16,), encoder_hidden=(16,)
)


@pytest.fixture
def set_up(request):
    """An agent, its optimizer and 20 batches; a test may give other sizes."""
    sizes, spec = SMALL | getattr(request, "param", {}), envs.SPECS["HopperParam"]
    args = smac.Args(env_id="HopperParam", lr=1e-3, **sizes)
    torch.manual_seed(0)
    agent, generator = (
        smac.Agent(spec.obs_dim, spec.action_dim, args),
        torch.Generator().manual_seed(0),
    )
    optimizer = torch.optim.Adam(
        [p for p in agent.parameters() if p.requires_grad], lr=args.lr, fused=True
    )
    buffer = speed.random_buffer(spec, num_tasks=5)
    return agent, optimizer, [smac.sample_batch(buffer, args, generator) for _ in range(20)], args


@pytest.mark.parametrize("online", [False, True])
def test_the_plain_update_ends_at_the_same_parameters(set_up, online):
    agent, optimizer, batches, args = set_up
    plain = PlainAgent(agent, args.lr)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    for batch in batches:
        smac.update(agent, optimizer, batch, args, online)
        plain_update(plain, batch, args, online)
    pairs = [(getattr(agent, name), getattr(plain, name)) for name in NETWORKS]
    for name in ("q", "q_target"):
        pairs += [(unstack(getattr(agent, name), i), getattr(plain, name)[i]) for i in range(2)]
    for ours, theirs in pairs:
        for value, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)
    moved = {
        name.split(".")[0]
        for name, value in agent.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved == {"policy", "q", "q_target"} | set(() if online else ("encoder", "decoder"))


def test_the_products_of_a_step_are_those_that_pytorch_makes(set_up):
    """Multiply-adds counted by PyTorch itself, in both phases."""
    agent, optimizer, batches, args = set_up
    for online in (False, True):
        with FlopCounterMode(display=False) as counter:
            smac.update(agent, optimizer, batches[0], args, online)
        found = speed.products(envs.SPECS["HopperParam"], args, online)
        assert counter.get_total_flops() == sum(2 * c * m * k * n for c, m, k, n in found)


HEADERS = Path(sysconfig.get_path("include"), "Python.h")


@pytest.mark.skipif(
    not (shutil.which("g++") and HEADERS.exists()),
    reason="needs a C++ compiler and Python's headers",
)
@pytest.mark.parametrize(
    "set_up", [dict(q_hidden=(16,), decoder_hidden=(16,))], ids=["shallow"], indirect=True
)
def test_the_compiled_update_ends_at_the_same_parameters(set_up):
    """In the self-supervised phase; losses and gradients are one graph."""
    agent, optimizer, batches, args = set_up
    start = {name: value.clone() for name, value in agent.state_dict().items()}
    for batch in batches:
        smac.update(agent, optimizer, batch, args, self_supervised=True)
    expected = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.load_state_dict(start)
    optimizer = torch.optim.Adam(
        [p for p in agent.parameters() if p.requires_grad], lr=args.lr, fused=True
    )
    counters = torch._dynamo.utils.counters["graph_break"]
    counters.clear()
    compiled = compile_step(smac.update)
    for batch in batches:
        compiled(agent, optimizer, batch, args, self_supervised=True)
    assert not [reason for reason in counters if "backward" in reason or "autograd" in reason]
    for name, value in agent.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_the_table_of_precisions(tmp_path, monkeypatch):
    def times(functions, rounds):
        for function in functions:
            function()
        return [(6.0, 7.0), (5.0, 6.0), (3.0, 4.0), (2.0, 3.0), (1.5, 1.0)]

    monkeypatch.setattr(precision, "times", times)
    monkeypatch.setattr(speed, "matmul_precision", lambda *_: "highest")
    monkeypatch.setattr(torch, "compile", lambda step: step)
    precision.main(precision.Args("PointDirection", file=tmp_path / "precision.md"))
    lines = (tmp_path / "precision.md").read_text().splitlines()[4:]
    rows = [line.strip("| ").split(" | ") for line in lines if line]
    phases = "offline", "self-supervised"
    assert [row[:2] for row in rows] == [[name, p] for name in precision.SIZES for p in phases]
    expected = ["6.00 (7.00)", "5.00 (6.00)", "3.00 (4.00)", "2.00 (3.00)", "1.50 (1.00)"]
    expected += ["highest", "2.00", "2.00", "4.00"]
    assert all(row[2:-1] == expected for row in rows)


def test_what_is_timed_goes_in_turn_in_orders_that_change():
    calls = []
    found = precision.times([lambda name=name: calls.append(name) for name in "abc"], 40)
    turns = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(found) == 3 and len(turns) == 43
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"} and len(set(turns)) == 6


def test_the_table_of_evaluations(tmp_path, capsys):
    file = tmp_path / "evaluation.md"
    evaluation.main(evaluation.Args(("PointDirection",), (1, 2), rounds=1, file=file))
    torch.set_num_threads(1)
    (name, num, steps, one, two, ratio) = file.read_text().splitlines()[-2].strip("| ").split(" | ")
    # 20 test and 10 training tasks, four times each; three episodes of 50 steps, and with the offline context one more
    assert [name, num, steps] == ["PointDirection", "120", str(50 * (3 * 120 + 40))]
    assert float(ratio) == pytest.approx(float(one) / float(two), abs=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("online", [False, True])
def test_the_cuda_graph_ends_at_the_same_parameters(online):
    """The draw of the batch is part of the graph: the same generator must give the same batches."""
    args, spec = smac.Args(env_id="HopperParam", lr=1e-3, **SMALL), envs.SPECS["HopperParam"]
    results = []
    for graph in (False, True):
        torch.manual_seed(0)
        agent = smac.Agent(spec.obs_dim, spec.action_dim, args).cuda()
        generator = torch.Generator("cuda").manual_seed(0)
        trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=args.lr, fused=True, capturable=True)
        buffer = speed.random_buffer(spec, num_tasks=5, device="cuda")

        sample, learn = smac.sample_batch, smac.update
        if graph:
            sample, learn = cuda_graph(sample), cuda_graph(learn)
        info = []
        for _ in range(20):
            step = learn(
                agent, optimizer, sample(buffer, args, generator), args, self_supervised=online
            )
            info.append({name: value.item() for name, value in step.items()})
        results.append((agent.state_dict(), info))
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-3, atol=1e-5)
    assert results[0][1][-1] == pytest.approx(results[1][1][-1], rel=1e-2)


class FakeGraph:
    """A CUDA graph that counts: the order of calls, where there is no GPU."""

    def __init__(self):
        self.replays, self.generators = 0, []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made."""
    made, stream = [], types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(FakeGraph()) or made[-1])
    return made


def test_a_step_is_recorded_at_its_fourth_call_once_for_each_phase(graphs):
    calls, generator = [], torch.Generator()

    def step(generator, online):
        calls.append(online)
        return len(calls)

    fast = cuda_graph(step)
    assert [fast(generator, online=False) for _ in range(3)] == [1, 2, 3] and graphs == []
    assert [fast(generator, online=False) for _ in range(3)] == [4, 4, 4]  # what was recorded
    assert [graph.replays for graph in graphs] == [3] and graphs[0].generators == [generator]
    assert [fast(generator, online=True) for _ in range(5)] == [5, 6, 7, 8, 8]
    assert [graph.replays for graph in graphs] == [3, 2] and calls == 4 * [False] + 4 * [True]


def test_a_step_that_can_not_be_recorded_stops_the_run(graphs):
    """What it gets from a recorded function would keep its place, and what it gets from a plain one would not."""
    calls = []

    def step():
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return len(calls)

    fast = cuda_graph(step)
    assert [fast() for _ in range(3)] == [1, 2, 3]
    words = r"no CUDA graph can be made \(operation not permitted when stream is capturing\): --no-cuda-graph goes without"
    with pytest.raises(buffers.InputError, match=words):
        fast()


# ----- The precision of products, and `Run.fast`


@pytest.mark.parametrize(
    ("capability", "exact", "expected"),
    [("AVX512", True, "medium"), ("AVX512", False, "highest"), ("AVX2", True, "highest")],
)
def test_the_precision_is_that_of_the_kind_of_processor(monkeypatch, capability, exact, expected):
    """Not of how long a product takes; where "medium" rounds to bfloat16, as on some CPUs, it is not taken."""
    product = torch.Tensor.__matmul__

    def matmul(x, w):
        medium = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        return (
            product(x.bfloat16(), w.bfloat16()).float()
            if medium and not exact
            else product(x.double(), w.double())
        )

    monkeypatch.delenv("MATMUL_PRECISION", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    before = torch.get_float32_matmul_precision()
    assert matmul_precision.__wrapped__(torch.device("cpu"), 64, 32) == expected
    assert torch.get_float32_matmul_precision() == before


def test_a_step_runs_in_the_runs_precision_and_leaves_the_old_one(set_up, tmp_path):
    agent, optimizer, batches, args = set_up
    args.run_dir, args.device = str(tmp_path), "cpu"
    with buffers.Run(args, smac.__file__, agent=agent, optimizer=optimizer) as run:
        run.precision, before = "medium", torch.get_float32_matmul_precision()
        assert before == "highest"
        assert run.fast(torch.get_float32_matmul_precision)() == "medium"
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(ZeroDivisionError):
            run.fast(lambda: 1 / 0)()
        assert torch.get_float32_matmul_precision() == before
