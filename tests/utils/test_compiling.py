"""Compiled is eager, forward and backward; a machine that cannot compile says so."""

import copy
import logging.handlers
import queue

import pytest
import torch
import torch._inductor.lowering
import torch.distributed as dist
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import decomposition
from torch.utils._pytree import tree_map

from datasets.preprocessing import BatchPrep, VideoPrep
from models import build_model, network_blocks
from models.audio import Conv2DNet
from models.network_blocks import R2Plus1dBlock, SpatialConv, SpatialMaxPool, StemConv, TemporalConv, global_max
from models.video import R2Plus1d
from utils import compiling
from utils.compiling import compiles, for_batch

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's kernels take no CPU's tensors where there is a GPU
aten = torch.ops.aten


class Small(nn.Module):
    """A stem, its pool and one pair of convolutions, their global maximum."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.pool = StemConv(3, 8, 7, 2), nn.BatchNorm3d(8), SpatialMaxPool()
        self.spatial, self.temporal = SpatialConv(8, 16, stride=2), TemporalConv(16, 16, stride=2)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn(self.stem(x))))
        return global_max(self.temporal(torch.relu(self.spatial(x)))).flatten(1)


@pytest.fixture
def compiler():
    if not compiles(True, CPU):
        pytest.skip(f"torch.compile does not work here: {compiling.obstacle('cpu')}")
    yield
    torch.compiler.reset()


def test_compiled_is_eager(compiler):
    torch.manual_seed(0)
    model, video = Small(), torch.randn(2, 3, 4, 24, 24).contiguous(memory_format=torch.channels_last_3d)
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for network in (model, compiled):
        model.zero_grad(set_to_none=True)
        loss = (network(video) * torch.arange(16.0)).square().mean()
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (loss, gradients), (found_loss, found) = results
    torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=0)
    for mine, other in zip(found, gradients, strict=True):
        assert (mine - other).abs().max() <= 1e-3 * other.abs().max().clamp_min(1e-3)


def backend_of(compiler):
    """A backend that gives `compiler` the graphs that inductor is given."""
    decompositions = decomposition.select_decomp_table()
    return aot_autograd(
        fw_compiler=compiler, decompositions=decompositions, partition_fn=min_cut_rematerialization_partition
    )


def compiled_nodes(function, x):
    """The operators, forward and backward, that inductor is given to compile for `function(x)`."""
    nodes = []

    def listen(graph, inputs):
        nodes.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.compile(function, backend=backend_of(listen))(x).sum().backward()
    torch.compiler.reset()
    return nodes


@pytest.fixture
def as_for_a_gpu(monkeypatch):
    """What is compiled for a GPU, compiled here."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(network_blocks, "compiled_for_a_gpu", lambda x: torch.compiler.is_compiling())


@pytest.mark.parametrize("training", [True, False])
def test_the_stem_compiled_for_a_gpu_is_the_stem(as_for_a_gpu, training):
    torch.manual_seed(0)
    stem = R2Plus1d(10).conv1.train(training).to(DEVICE)
    video = torch.randn(2, 3, 4, 22, 18).contiguous(memory_format=torch.channels_last_3d).to(DEVICE)
    results, start = [], copy.deepcopy(stem.state_dict())
    for forward in (stem, torch.compile(stem, backend="aot_eager", fullgraph=True)):
        stem.load_state_dict(start)
        pooled = forward(video)
        gradients = torch.autograd.grad(
            (pooled * torch.linspace(-1, 1, pooled.numel(), device=DEVICE).view_as(pooled)).sum(), stem.parameters()
        )
        results.append((pooled, gradients, dict(stem.state_dict())))
        assert pooled.is_contiguous(memory_format=torch.channels_last_3d)
    torch.compiler.reset()
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", [SpatialMaxPool, lambda: R2Plus1d(10).conv1])
def test_what_is_compiled_for_a_gpu_adds_no_gradients_in_random_order(compiler, as_for_a_gpu, part):
    """A scatter means atomics on a GPU: a run would not be the same twice."""
    video = torch.randn(1, 3, 2, 12, 12, device=DEVICE, requires_grad=True)
    called = {str(node.target) for node in compiled_nodes(part().to(DEVICE), video)}
    assert {"avssrl.pool_normalised.default", "avssrl.unpool_scaled.default"} <= called
    others = ("scatter", "index_put", "max_pool2d", "batch_norm")
    assert not [name for name in called - {"aten.slice_scatter.default"} if any(other in name for other in others)]


def test_no_masks_are_kept_for_the_backward_pass(as_for_a_gpu):
    """Of what ReLU let pass: BN's input, which is kept, says it too."""
    kept = []

    def listen(graph, inputs):
        (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        kept.append([node.meta["val"] for node in outputs if node is not None])
        return make_boxed_func(graph.forward)

    x = torch.randn(2, 16, 4, 24, 24).contiguous(memory_format=torch.channels_last_3d)
    torch.compile(R2Plus1dBlock(16, 32, stride=2), backend=backend_of(listen))(x).sum().backward()
    torch.compiler.reset()
    masks, all_kept = (sum(x.numel() for x in kept[0] if x.dtype in kinds) for kinds in ([torch.bool], [torch.float32]))
    assert len(kept) == 2 and masks < 0.01 * all_kept


class UnroundedInterpreter(torch.fx.Interpreter):
    """Computes a graph as inductor does on a GPU: inside a kernel bf16 is float32, and what is computed anew, too."""

    KERNELS = {aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default}

    def call_function(self, target, args, kwargs):
        if target is torch.ops.prims.convert_element_type.default and args[1] is torch.bfloat16:
            return args[0].float()
        return super().call_function(target, _cast(args, torch.bfloat16) if target in self.KERNELS else args, kwargs)

    def run_node(self, node):
        value = super().run_node(node)
        if node.op == "output":  # stored, in the format that it has
            kept = [getattr(n.meta["val"], "dtype", None) if n is not None else None for n in node.args[0]]
            return [_cast(v, dtype) for v, dtype in zip(value, kept, strict=True)]
        return _cast(value, torch.float32)


def _cast(values, dtype):
    def cast(value):
        floating = isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16)
        return value.to(dtype) if floating else value

    return tree_map(cast, values)


@pytest.mark.parametrize(("kind", "shape"), [(R2Plus1d, (4, 3, 2, 40, 40)), (Conv2DNet, (4, 1, 32, 40))])
def test_gradients_do_not_hang_on_what_a_gpu_rounds(compiler, as_for_a_gpu, kind, shape):
    """Where a number is compared with one that was rounded, neither is the maximum, say, and a gradient is 0/0."""
    torch.manual_seed(0)
    network, inputs = kind(10).to(DEVICE), torch.randn(shape).to(DEVICE)
    backend = backend_of(lambda graph, inputs: make_boxed_func(UnroundedInterpreter(graph).run))
    gradients = []
    for forward, autocast in ((network, False), (torch.compile(network, backend=backend), True)):
        network.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            pooled = forward(inputs).flatten(1)
        (pooled.float() * torch.linspace(-1, 1, 512, device=DEVICE)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.compiler.reset()
    assert F.cosine_similarity(*gradients, dim=0) > 0.7  # bf16 moves some maxima


def test_compiled_preprocessing_is_eager(compiler):
    prepare, frames = VideoPrep(), torch.randint(256, (2, 3, 12, 12, 3), dtype=torch.uint8)
    change = torch.tensor([[1.0, 1.1, 0.9, 1.2, 0.05], [0.0, 0.8, 1.2, 0.7, -0.1]])
    expected = prepare(frames, change)
    found = torch.compile(prepare, fullgraph=True, dynamic=False)(frames, change)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_rest_is_not_compiled_anew():
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(inputs[-1]))
        return graph

    network = torch.compile(nn.ReLU(), backend=backend, dynamic=False)
    for size in (4, 4, 2, 4):
        with for_batch(whole=size == 4):
            assert len(network(torch.ones(size, 3))) == size
    assert sizes == [4]
    torch.compiler.reset()


def test_on_a_gpu_every_training_pass_begins_a_step_of_cuda_graphs(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(0))
    for on_gpu, whole in ((False, True), (True, True), (True, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
        with for_batch(whole):
            assert len(begun) == on_gpu
        begun.clear()


def test_measuring_between_epochs_compiles_nothing():
    graphs, frames = [], torch.randint(256, (2, 3, 12, 12, 3), dtype=torch.uint8)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    prepare, change = BatchPrep({"color": [0.4, 0.4, 0.0, 0.0]}, None, CPU), torch.zeros(2, 5)
    prepare.video.compile(backend=backend, dynamic=False)
    prepare({"frames": frames, "frames_2": frames})
    assert graphs == []
    prepare({"frames": frames, "frames_2": frames, "video_aug": change, "video_aug_2": change})
    assert len(graphs) == 1
    torch.compiler.reset()


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, caplog):
    compiling.obstacle.cache_clear()

    def broken(function):
        raise RuntimeError("no C++\ncompiler found")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiles(True, CPU) is False
    assert "going on without: RuntimeError: no C++ compiler found" in caplog.text
    compiling.obstacle.cache_clear()
    assert compiles(None, CPU) is False and compiles(False, torch.device("cuda")) is False


def test_gloo_between_gpus_is_no_place_to_compile(tmp_path, caplog):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    compiling.obstacle.cache_clear()
    try:
        assert compiles(None, torch.device("cuda")) is False
    finally:
        dist.destroy_process_group()
        compiling.obstacle.cache_clear()
    assert "going on without: gloo's gather" in caplog.text


def _rank_that_may_have_no_compiler(own_rank, file):
    """Rank 1's machine has no compiler; rank 0's log is what the user sees."""

    def compile(function):
        if own_rank == 1:
            raise OSError("no space left on device")
        return function

    lines = logging.handlers.QueueHandler(queue.SimpleQueue())
    logging.getLogger("avssrl").addHandler(lines)
    torch.compile = compile
    dist.init_process_group("gloo", f"file://{file}", rank=own_rank, world_size=2)
    assert compiles(False, CPU) is False and compiles(True, CPU) is False
    assert "going on without: rank 1: OSError: no space left on device" in lines.queue.get_nowait().getMessage()
    if own_rank == 0:
        assert compiles(True, CPU) is False  # settled: no rank has to answer again
    dist.destroy_process_group()


def test_a_rank_that_cannot_compile_keeps_all_from_it(run_ranks, tmp_path):
    run_ranks(_rank_that_may_have_no_compiler, 2, str(tmp_path / "store"))


@pytest.mark.parametrize("arch", ["av_wrapper", "vicreg_wrapper", "vicreg_v_wrapper"])
def test_a_training_model_is_one_graph_and_is_compiled_once(arch):
    head = {"proj_dim": [16, 8]} if arch == "av_wrapper" else {"exp_dim": [16, 8]}
    args = {**head, "video_backbone": "R2Plus1d", "video_backbone_args": {"depth": 10}}
    if arch != "vicreg_v_wrapper":
        args |= {"audio_backbone": "Conv2DNet"}
    model, video = build_model({"arch": arch, "args": args}).train(), torch.randn(2, 3, 4, 32, 32)
    second = video.flip(0) if arch == "vicreg_v_wrapper" else torch.randn(2, 1, 32, 20)
    model.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            sum(emb.square().mean() for emb in model(video, second)).backward()
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                model.eval().forward(video[:1], second[:1])  # measuring on held-out clips, between steps
            model.train()
    torch.compiler.reset()
