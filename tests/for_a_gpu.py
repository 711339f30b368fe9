"""Compile a training step for a GPU with torch.compile, on a machine that has none.

    python3 -m tests.for_a_gpu [--capability 90] [--out DIR] [CFG ... [--set KEY=VALUE]]

For use before a GPU is borrowed for minutes. The network of each configuration is traced as for a GPU, its graphs are
marked as being on one, inductor generates its kernels, and Triton compiles these and our own to machine code. What
fails here fails there, after a minute of compilation. It also estimates how much the kernels read and write, without
cuDNN's and our own; --out keeps inductor's code, which shows copies and what is stored in float32. Criterion,
preprocessing and optimizer are skipped.

Run it with the GPU machine's version of PyTorch: another has another Triton, which may fail where this one does not.
It relies on PyTorch's internals, and is run by hand.
"""

import argparse
import collections
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch._functorch.config
import torch._inductor.config
import torch._inductor.fx_passes.post_grad
import torch._subclasses.fake_tensor as fake_tensor
import torch.utils._triton
import triton
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo import device_interface
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import decomposition
from torch._inductor.codecache import PyCodeCache
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from datasets.preprocessing import num_spectrogram_frames
from models import build_model, network_blocks, stem_kernels
from utils.compiling import OPTIONS
from utils.config import load_config

GPU = torch.device("cuda", 0)
CASES = {  # configurations, and the keys to change; of small clips and batches other kernels are made
    "configs/VGGSound-N1024.yaml": [],
    "configs/grid/vicreg.yaml": [],
    "configs/demo/xid.yaml": ["dataset.batch_size=16"],
    "configs/demo/vicreg.yaml": ["dataset.batch_size=16"],
}
BYTES = {"float32": 4, "bfloat16": 2, "bool": 1, "int8": 1, "int64": 8, "int32": 4}
KERNEL = re.compile(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
Properties = collections.namedtuple(
    "Properties",
    "name major minor multi_processor_count max_threads_per_multi_processor warp_size regs_per_multiprocessor "
    "total_memory shared_memory_per_block shared_memory_per_block_optin shared_memory_per_multiprocessor "
    "gcnArchName L2_cache_size max_threads_per_block",
)


class Captured(Exception):
    """Raised instead of running a graph."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cfgs", metavar="CFG", nargs="*", help=f"pre-training configurations; default: {', '.join(CASES)}"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key; repeatable")
    parser.add_argument("--capability", type=int, default=90, help="compute capability: 90 for an H100, 80 for an A100")
    parser.add_argument("--out", type=Path, help="folder for inductor's code")
    args = parser.parse_args()
    cases = {cfg: args.set for cfg in args.cfgs} or {cfg: changes + args.set for cfg, changes in CASES.items()}
    graphs = {cfg: graphs_of(cfg, changes) for cfg, changes in cases.items()}
    pretend(args.capability)
    compile_ours(args.capability)
    failed = 0
    for cfg, pair in graphs.items():
        for direction, graph in zip(("forward", "backward"), pair, strict=True):
            code = code_of(graph)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"{Path(cfg).stem}-{direction}.py").write_text(code)
            kernels = KERNEL.findall(code)
            bad = [name for name, source in kernels if not compiles(name, source)]
            told = f"{len(kernels)} kernels, {bytes_moved(code, graph) / 1e9:.1f} GB; {len(bad)} of them do not compile"
            print(f"{cfg}, {direction}: {told}", *bad, sep="\n    ")
            failed += len(bad)
    sys.exit(1 if failed else 0)


def graphs_of(cfg_file: str, changes: Sequence[str] = ()) -> list[torch.fx.GraphModule]:
    """A network's forward and backward graphs in bf16, as torch.compile traces them for a GPU."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return _stop

    cfg = load_config(cfg_file, changes)
    network_blocks.compiled_for_a_gpu = lambda x: torch.compiler.is_compiling()
    network_blocks.StemConv._channel_group = staticmethod(lambda x: 8)
    torch._C._conv_determine_backend_memory_format = lambda *args: torch.channels_last  # as for cuDNN, on a CPU too
    backend = aot_autograd(
        fw_compiler=keep,
        decompositions=decomposition.select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    net = torch.compile(build_model(cfg["model"]).train(), backend=backend, fullgraph=True, dynamic=False)
    try:
        with (
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            torch.autocast("cpu", torch.bfloat16),
        ):
            net(*inputs_of(cfg))
    except Captured:
        torch.compiler.reset()
    return graphs


def _stop(*args):
    raise Captured


_stop._boxed_call = True


def inputs_of(cfg: dict) -> list[torch.Tensor]:
    """A batch of clips and sound in the configuration's shapes, uninitialised."""
    data = cfg["dataset"]
    batch, size = data["batch_size"], data["crop_size"]
    frames = round(data["video_clip_duration"] * data["video_fps"])
    clips = [torch.empty(batch, frames, size, size, 3).permute(0, 4, 1, 2, 3) for _ in range(2)]
    if cfg["model"]["arch"] == "vicreg_v_wrapper":
        return clips
    spec, samples = data["spec_params"], round(data["audio_clip_duration"] * data["audio_srate"])
    times = num_spectrogram_frames(samples, spec["n_fft"], spec["hop_length"])
    return [clips[0], torch.empty(batch, 1, spec["n_mels"], times)]


def pretend(capability: int) -> None:
    """Make PyTorch and Triton assume a GPU, as far as generating and compiling kernels is concerned."""
    major, minor = divmod(capability, 10)
    memory = (80 << 30, 49152, 232448, 233472) if capability >= 90 else (80 << 30, 49152, 166912, 167936)
    properties = Properties(f"sm_{capability}", major, minor, 132, 2048, 32, 65536, *memory, "", 50 << 20, 1024)

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_active_torch_device(self):
            return GPU

    for interface in (device_interface.CudaInterface, device_interface.CudaInterface.Worker):
        interface.get_device_properties = staticmethod(lambda device=None: properties)
        interface.current_device = staticmethod(lambda: 0)
    device_interface.CudaInterface.is_available = staticmethod(lambda: True)
    device_interface.CudaInterface.get_compute_capability = staticmethod(lambda device=None: capability)
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: (major, minor)
    torch.cuda.current_device, torch.cuda.device_count = lambda: 0, lambda: 1
    torch.cuda.is_available = lambda: True
    fake_tensor.init_gpu_context = lambda device: None
    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda *args: triton.runtime.driver.set_active(Driver())
    for module in (torch.utils._triton, *sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("torch._inductor", "torch.utils._triton")):
            if hasattr(module, "has_triton"):
                module.has_triton = lambda *args: True


def code_of(graph: torch.fx.GraphModule) -> str:
    """Inductor's code for a graph that was captured on a CPU, as if it were on the GPU."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def on_gpu(value):
        if not isinstance(value, torch.Tensor):
            return value
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return fake_tensor.FakeTensor(mode, meta, GPU)

    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(on_gpu, node.meta["val"])
        node.meta.pop("tensor_meta", None)
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": GPU}
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with V.set_fake_mode(mode), DebugContext(), torch._inductor.config.patch(OPTIONS):
        torch._inductor.fx_passes.post_grad.post_grad_passes(graph, is_inference=False)
        lowered = GraphLowering(graph, shape_env=mode.shape_env)
        with V.set_graph_handler(lowered):
            lowered.run(*inputs)
            code, _ = lowered.codegen()
    return code.value


def compile_ours(capability: int) -> None:
    """Compile the kernels of models/stem_kernels.py for bf16; Triton's errors propagate."""
    sizes = dict.fromkeys(("elements", "height", "width", "channels"), "i32")
    constants = {"CELLS": stem_kernels.CELLS, "BLOCK": 64, "RELU": True}
    for kernel in (stem_kernels._pool, stem_kernels._unpool):
        known = {name: value for name, value in constants.items() if name in kernel.arg_names}
        tensors = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(("x", "y", "d_y", "d_x", "winners"), "*bf16")
        types = tensors | {"places": "*i8"} | sizes | dict.fromkeys(known, "constexpr")
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, known)
        triton.compile(source, target=GPUTarget("cuda", capability, 32))
        print(f"{kernel.__name__}: compiles")


def bytes_moved(code: str, graph: torch.fx.GraphModule) -> int:
    """Estimate the bytes that inductor's kernels read and write: each tensor argument once, or twice if in place.

    Outputs of other kernels are assumed to be bf16 if the code does not give their type.
    """
    parameters = {
        kernel: re.findall(r"\w+", line)
        for kernel, line in re.findall(r"^def (triton_\w+)\((.*?)(?:, XBLOCK|\):)", code, re.MULTILINE)
    }
    inputs = {node.name: node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"}
    sizes, total = {name: value.numel() * value.element_size() for name, value in inputs.items()}, 0
    for line in code.splitlines():
        if found := re.match(r" +(\w+) = empty_strided_cuda\(\(([\d, ]*)\), .*, torch\.(\w+)\)", line):
            sizes[found[1]] = _elements(found[2]) * BYTES[found[3]]
        elif found := re.match(r" +(\w+) = (?:reinterpret_tensor\()?(\w+)(?:;|, \()", line):
            sizes[found[1]] = sizes.get(found[2], 0)
        elif found := re.match(r" +assert_\w+\((buf\d+), \(([\d, ]*)\), \([\d, ]*\)(?:, torch\.(\w+))?", line):
            sizes.setdefault(found[1], _elements(found[2]) * BYTES[found[3] or "bfloat16"])
        elif found := re.match(r" +(triton_\w+)\.run\((.*), stream=", line):
            for parameter, tensor in zip(parameters[found[1]], found[2].split(", "), strict=False):
                total += sizes.get(tensor, 0) * (2 if parameter.startswith("in_out") else 1)
    return total


def _elements(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size.strip())


def compiles(name: str, source: str) -> bool:
    """Whether Triton compiles a kernel to machine code; if not, PyTorch's log gives the reason."""
    kernel = getattr(PyCodeCache.load(source), name)
    try:
        kernel.precompile(warm_cache_only=True)
    except (RuntimeError, triton.CompilationError):
        return False
    return True


if __name__ == "__main__":
    main()
