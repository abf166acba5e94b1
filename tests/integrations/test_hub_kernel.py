"""The folder that the package `kernels` loads: what is in it, and what it computes beside the installed mmkernels."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mmkernels"
needs_kernels = pytest.mark.integration("kernels")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder, built as a user builds it."""
    built = tmp_path_factory.mktemp("hub") / "mmkernels"
    command = [sys.executable, ROOT / "scripts" / "build_hub_kernel.py", built]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["build/torch-cpu", "build/torch-cuda", "build/torch-rocm"]
    return built


def run(code: str, *args: Any) -> str:
    """Returns what a program prints that has nothing loaded."""
    ended = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd="/")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_imports_are_relative_or_of_torch(folder: Path) -> None:
    allowed = {"torch", "numpy", "triton", *sys.stdlib_module_names}
    for path in (folder / "build" / "torch-cpu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {x.name.partition(".")[0] for x in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None and node.module.partition(".")[0] in allowed, path
            elif isinstance(node, ast.Attribute):  # the namespace of the installed package
                assert ast.unparse(node) != "torch.ops.mmkernels", path


def test_the_project_of_the_kernel_builder(folder: Path) -> None:
    build = (folder / "build.toml").read_text()
    assert 'backends = ["cpu", "cuda", "rocm"]' in build and 'pyext = ["json", "py"]' in build
    sources = folder / "torch-ext" / "mmkernels"
    names = {str(x.relative_to(sources)) for x in sources.rglob("*") if x.is_file()}
    assert {"__init__.py", "integrations/hub/layers.py", "ops/contrastive/info_nce/plan.py"} <= names
    tuned = {str(x.relative_to(PACKAGE)) for x in PACKAGE.rglob("tuned.json")}
    assert tuned <= names
    assert not {x for x in names if x.startswith(("models", "profiling", "cli", "nn"))}
    kept = []
    for backend in ("cpu", "cuda", "rocm"):
        variant = folder / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and names <= set(metadata["digest"]["files"])
        kept.append(metadata["id"])
    assert len(set(kept)) == 3 and all(x.isidentifier() for x in kept)


LOADED = """
import importlib.util, json, sys, torch, mmkernels
variant = sys.argv[1]
name = json.load(open(f"{variant}/metadata.json"))["id"]
spec = importlib.util.spec_from_file_location(name, f"{variant}/__init__.py")  # as the package kernels does
kernel = importlib.util.module_from_spec(spec)
sys.modules[name] = kernel
spec.loader.exec_module(kernel)
assert set(kernel.__all__) - {"layers", "flash_attn_forward", "supports_flash_attn"} < set(mmkernels.__all__)
assert set(mmkernels.ops.NAMES) <= set(kernel.__all__)
image, text = (torch.nn.functional.normalize(torch.randn(9, 16), dim=1).requires_grad_() for _ in range(2))
pairs = [(module.info_nce(image, text, 10.0, backend="chunked")) for module in (kernel, mmkernels)]
torch.testing.assert_close(*pairs)
grads = [torch.autograd.grad(x, (image, text)) for x in pairs]
torch.testing.assert_close(*grads)
query = torch.randn(1, 2, 5, 8)
mask = kernel.SpanMask.causal(5, 5)
out = torch.compile(lambda q: kernel.cross_attention(q, q, q, mask), backend="aot_eager", fullgraph=True)(query)
torch.testing.assert_close(out, mmkernels.cross_attention(query, query, query, mmkernels.SpanMask.causal(5, 5)))
ops = getattr(torch.ops, name)
assert ops.info_nce.default is not torch.ops.mmkernels.info_nce.default
assert not any(x.startswith(("mmkernels.integrations", "mmkernels.models")) for x in sys.modules)
print("both work")
"""


@pytest.mark.slow  # `make test-integrations` loads the kernel by the package itself
def test_beside_the_installed_package(folder: Path) -> None:
    """Loaded as `kernels` loads it, in a process that has mmkernels too: the same results, other operators."""
    assert run(LOADED, folder / "build" / "torch-cpu") == "both work"


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    command = [sys.executable, ROOT / "scripts" / "build_hub_kernel.py", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "folder must be new or of this program" in ended.stderr
    assert (tmp_path / "mine").exists()


@pytest.fixture(scope="session")
def kernel(folder: Path) -> Any:
    from kernels import get_local_kernel

    return get_local_kernel(folder)


@needs_kernels
def test_loaded_by_kernels(kernel: Any) -> None:
    from kernels import get_loaded_kernels

    name = get_loaded_kernels()[-1].metadata.id
    assert kernel.__name__ == name and name.startswith("_mmkernels_cpu_")
    x = torch.randn(6, 8)
    found = kernel.info_nce(x, x, 5.0)
    logits = 5.0 * x @ x.T
    torch.testing.assert_close(
        found, -logits.diagonal().mean() + (logits.logsumexp(0) + logits.logsumexp(1)).mean() / 2
    )


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def kernelized(model: Any) -> list[str]:
    """Returns the classes of the modules whose `forward` is now the kernel's."""
    return [type(x).__name__ for x in model.modules() if x.forward.__module__.startswith("_mmkernels_")]


@needs_kernels
def test_kernelize(folder: Path) -> None:
    """RMSNorm, transformers' slot, and CLIP's attention, made one; forward, gradients, and compiled."""
    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.modeling_clip import CLIPAttention
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    clip, llama = CLIPVisionModel(config).eval(), small_llama()
    replace_kernel_forward_from_hub(CLIPAttention, "CLIPAttention")
    declared = hasattr(LlamaRMSNorm, "kernel_layer_name")  # unless transformers is made for other versions of kernels
    replace_kernel_forward_from_hub(LlamaRMSNorm, "RMSNorm")
    layers = {name: {"cpu": LocalLayerRepository(folder, layer_name=name)} for name in ("CLIPAttention", "RMSNorm")}
    try:
        for model, inputs, name in (
            (clip, torch.randn(2, 3, 8, 8), "CLIPAttention"),
            (llama, torch.arange(12).view(2, 6), "LlamaRMSNorm"),
        ):
            expected = [x for x in model(inputs).values() if isinstance(x, torch.Tensor)]
            wanted = torch.autograd.grad(expected[0].square().sum(), list(model.parameters()), allow_unused=True)
            with use_kernel_mapping(layers, inherit_mapping=False):
                kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
            assert set(kernelized(model)) == {name}
            found = [x for x in model(inputs).values() if isinstance(x, torch.Tensor)]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            grads = torch.autograd.grad(found[0].square().sum(), list(model.parameters()), allow_unused=True)
            for one, other in zip(grads, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
            compiled = torch.compile(model, backend="aot_eager")(inputs)
            torch.testing.assert_close(compiled[0], expected[0], rtol=1e-4, atol=1e-5)
    finally:
        del CLIPAttention.kernel_layer_name
        if not declared:
            del LlamaRMSNorm.kernel_layer_name


def transformers_takes_kernels() -> None:
    """Skips the test where transformers is made for other versions of kernels."""
    from transformers.utils import import_utils, is_kernels_available

    if not is_kernels_available():
        import kernels

        wants = f"{import_utils.KERNELS_MIN_VERSION} to {import_utils.KERNELS_MAX_VERSION}"
        pytest.skip(f"this transformers takes kernels {wants}, not {kernels.__version__}")


@needs_kernels
def test_transformers_kernel_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``KernelConfig(use_local_kernel=True)``. transformers has no CPU among the devices that may have kernels."""
    transformers_takes_kernels()
    from transformers import KernelConfig
    from transformers.utils import kernel_config

    ids = torch.arange(12).view(2, 6)
    model = small_llama()
    expected = model(ids).logits
    config = KernelConfig({"RMSNorm": f"{folder}:RMSNorm"}, use_local_kernel=True)
    with pytest.raises(ValueError, match=r"Only devices in .* are supported, got: cpu"):
        small_llama().set_use_kernels(True, KernelConfig({"RMSNorm": f"{folder}:RMSNorm"}, use_local_kernel=True))
    monkeypatch.setattr(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", ["cpu"])
    model.set_use_kernels(True, config)
    assert kernelized(model) == ["LlamaRMSNorm"] * 5
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("padded", [False, True])
def test_transformers_attention_by_repository(folder: Path, monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """``attn_implementation="mmkernels/mmkernels"``, which the variable LOCAL_KERNELS finds in the folder."""
    transformers_takes_kernels()
    monkeypatch.setenv("LOCAL_KERNELS", f"mmkernels/mmkernels={folder}")
    model, ids = small_llama(), torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]) if padded else None
    kept = slice(None) if mask is None else mask.bool()
    model.set_attn_implementation("sdpa")
    expected = model(ids, attention_mask=mask).logits[kept]
    model.set_attn_implementation("mmkernels/mmkernels")
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[kept], expected, rtol=1e-4, atol=1e-5)
    answers = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    model.set_attn_implementation("sdpa")
    again = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(answers, again)
