"""`mmkernels profile hf`: any image-text-to-text model of transformers, before and after the patch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from rich.console import Console
from torch import nn

from mmkernels import cli
from mmkernels.options import BadInput
from mmkernels.profiling import hf_model, hf_profiler, html_report, plot, table
from mmkernels.profiling.command import run_profile
from mmkernels.profiling.hf_inputs import NEW_TOKENS, prepare, to_device
from mmkernels.profiling.hf_model import load_model, open_source
from mmkernels.profiling.hf_options import HFOptions
from mmkernels.profiling.hf_parts import Parts, Watch, divide, find_parts, watching
from mmkernels.profiling.hf_profiler import HFProfile, drift, profile
from mmkernels.profiling.options import ORIGINAL, PATCHED
from mmkernels.profiling.photo import default_photo
from mmkernels.testing.checkpoints import save

PHOTO = Image.open(default_photo()).convert("RGB")


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_profiler, "_BUDGET", 0.0)
    monkeypatch.setattr(hf_profiler, "_LEAST_ROUNDS", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that returns the folder of a small checkpoint, made once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def made(name: str) -> Path:
        return folder / name if (folder / name).exists() else save(name, folder / name)

    return made


def options(folder: Path, **more: Any) -> HFOptions:
    return HFOptions("hf", folder=folder, image=default_photo(), **{"resolutions": (32,)} | more)


def said(report: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table.render(report))
    return console.export_text()


# Whole profiles.


def test_a_profile_of_llava(checkpoint: Callable[[str], Path], tmp_path: Path, figures_of: Any) -> None:
    asked = options(checkpoint("llava"), resolutions=(32, 64), question="A dog?", train=True)
    figures = figures_of(plot)
    run_profile(asked, tmp_path, tmp_path / "report.html")
    report = json.loads((tmp_path / "profile.json").read_text())
    before, after = report["cells"]
    assert [cell["backend"] for cell in report["cells"]] == [ORIGINAL, PATCHED]
    for cell in (before, after):
        assert cell["tokens_per_image"] == 16 and cell["failed"] is None
        assert list(cell["seconds"]) == ["encode", "project", "prefill", "decode", "total", "train_step"]
        assert min(cell["seconds"].values()) > 0
        assert cell["peak_memory_bytes"] is not None and cell["train_peak_memory_bytes"] is not None
        first = cell["seconds"]["encode"] + cell["seconds"]["project"] + cell["seconds"]["prefill"]
        assert cell["seconds"]["total"] == pytest.approx(first)
    assert before["drift"] is None and before["amdahl"] == {}
    assert after["drift"]["same_tokens"] == NEW_TOKENS and after["drift"]["max_abs"] < 1e-4
    assert after["amdahl"]["total"]["speedup"] == pytest.approx(before["seconds"]["total"] / after["seconds"]["total"])
    assert report["parts"] == {
        "vision tower": "model.vision_tower (CLIPVisionModel)",
        "projector": "model.multi_modal_projector (LlavaMultiModalProjector)",
        "language model": "model.language_model (LlamaModel)",
    }
    assert any(row["op"] == "cross_attention" for row in report["replaced"]) and not report["not_found"]
    assert report["notes"] == ["The processor makes the same of 64 px as of 32 px."]
    command = "mmkernels profile hf --model llava --image grace_hopper.jpg --resolutions 32,64 --question 'A dog?' "
    assert report["command"] == command + "--dtype fp32 --device cpu --train"
    text = said(report)
    assert "same of 64 px as of 32 px" in text and "Patched: attention (cross_attention) of " in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    assert "16 visual tokens, after the patch: first token in" in table.summary(report)
    page = (tmp_path / "report.html").read_text()
    assert "9 of 9" in page and "What a visual token costs: llava" in page and "http" not in page.split("<body>")[1]
    assert len(figures) == 2 and "What a visual token costs: llava" in [text.get_text() for text in figures[0].texts]


@pytest.mark.parametrize(
    ("name", "tokens", "parts"),
    [
        ("mllama", [34, 34], "model.multi_modal_projector (Linear)"),
        pytest.param("paligemma", [16], "model.multi_modal_projector (PaliGemma", marks=pytest.mark.slow),
        pytest.param("janus", [16], "model.aligner (Janus", marks=pytest.mark.slow),
        pytest.param("blip_2", [8], "qformer (Blip2QFormerModel), language_projection", marks=pytest.mark.slow),
        pytest.param("idefics3", [4, 20], "model.connector (Idefics3Connector)", marks=pytest.mark.slow),
        pytest.param("smolvlm", [4, 20], "model.connector (SmolVLMConnector)", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", [4, 16], "", marks=pytest.mark.slow),
        pytest.param("internvl", [4, 20], "model.multi_modal_projector (InternVL", marks=pytest.mark.slow),
    ],
)
def test_families(name: str, tokens: list[int], parts: str, checkpoint: Callable[[str], Path]) -> None:
    if name in ("smolvlm", "qwen2_5_vl", "internvl"):
        _needs_torchvision()
    folder = checkpoint(name)
    sides = (16, 32) if name == "mllama" else (32, 64)  # one and two tiles, of which it always reads two
    report = profile(options(folder, resolutions=sides, random=True), PHOTO)
    found = [cell["tokens_per_image"] for cell in report["cells"] if cell["backend"] == PATCHED]
    assert found == tokens and all(cell["failed"] is None for cell in report["cells"])
    assert all(cell["drift"]["same_tokens"] == NEW_TOKENS for cell in report["cells"] if cell["backend"] == PATCHED)
    assert all(cell["drift"]["relative_l2"] < 1e-5 for cell in report["cells"] if cell["backend"] == PATCHED)
    assert {"vision tower", "language model"} <= report["parts"].keys()
    assert parts in report["parts"].get("projector", "") and bool(parts) == ("project" in report["stages"])
    assert [line.partition(":")[0] for line in report["not_found"]] == ["projector"] * (not parts)
    assert ("longest_edge" in report["about_sides"]) == (name in ("idefics3", "smolvlm"))
    assert table.summary(report) and said(report)
    assert any("Set to 0.5" in note for note in report["notes"]) == (name == "mllama")


def _needs_torchvision() -> None:
    try:
        import num2words  # noqa: F401
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the latter: of another version than torch
        pytest.skip(f"the processor of videos needs torchvision and num2words: {error}")


# What is measured.


@pytest.fixture(scope="module")
def llava(checkpoint: Callable[[str], Path]) -> SimpleNamespace:
    asked = options(checkpoint("llava"))
    source = open_source(asked)
    model, notes = load_model(asked, source)
    row = prepare(asked, source, PHOTO).prepared[0]
    return SimpleNamespace(options=asked, source=source, model=model, notes=notes, row=row)


def state_of(model: Any) -> list[Any]:
    """Returns what each module has: its class, the names of its attributes, and how many hooks."""
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return [*hooks, *((type(module), set(vars(module))) for module in model.modules())]


def test_a_model_is_as_it_was_after_it_was_watched(llava: SimpleNamespace) -> None:
    inputs = to_device(llava.row, llava.model)
    llava.model.generate(**inputs, max_new_tokens=1)  # leaves hooks of its own
    before = state_of(llava.model)
    measured = hf_profiler._Model(llava.options, llava.source, llava.model)
    out, watch = measured._answer(ORIGINAL, inputs, naming=True)
    assert state_of(llava.model) == before and llava.notes == []
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS
    assert len(watch.tokens) == NEW_TOKENS and watch.vectors == 16 and watch.tokens == sorted(watch.tokens)
    assert watch.in_features is not None and 0 < watch.in_tower < watch.in_features < watch.tokens[0] - watch.begin
    assert watch.between == [llava.model.model.multi_modal_projector]


def test_a_failure_leaves_nothing_in_the_model(llava: SimpleNamespace) -> None:
    before = state_of(llava.model)
    with pytest.raises(KeyError), watching(llava.model, find_parts(llava.model), naming=True):
        raise KeyError
    assert state_of(llava.model) == before
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks


def test_what_was_patched_is_measured(llava: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate runs on the attention that its name says, with the same weights."""
    seen: list[tuple[str, str]] = []
    measured = hf_profiler._Model(llava.options, llava.source, llava.model)
    answer = measured._answer

    def noted(name: str, *inputs: Any, **more: Any) -> Any:
        seen.append((name, measured.models[name].model.language_model.config._attn_implementation))
        return answer(name, *inputs, **more)

    monkeypatch.setattr(measured, "_answer", noted)
    measured.measure(llava.row, lambda step: None)
    before = llava.model.config.text_config._attn_implementation
    assert before != "mmkernels" and seen == [(ORIGINAL, before), (PATCHED, "mmkernels")] * 3
    first, second = (dict(measured.models[name].named_parameters()) for name in (ORIGINAL, PATCHED))
    assert first.keys() == second.keys() and all(x is second[name] for name, x in first.items())  # one in memory


def test_times_of_stages() -> None:
    stages = divide(Parts(None, None, {}), Watch(tower_end=None, tokens=[1.0])).stages
    assert [stage.name for stage in stages] == ["prefill", "decode"]
    tower, text = nn.Linear(2, 2), nn.Linear(2, 2)
    parts = Parts(tower, text, {tower: "tower", text: "text"})
    seen = Watch(begin=10.0, in_tower=2.0, tower_end=12.5, decoder_begin=13.0, tokens=[15.0, 15.5, 16.0])
    seen.between = [nn.Linear(2, 2)]
    assert divide(parts, seen).seconds(seen) == {"encode": 2.0, "project": 0.5, "prefill": 2.5, "decode": 0.5}
    within = dataclasses.replace(seen, in_features=3.0)
    assert divide(parts, within).seconds(within) == {"encode": 2.0, "project": 1.0, "prefill": 2.0, "decode": 0.5}
    bare = dataclasses.replace(within, between=[])
    assert divide(parts, bare).seconds(bare) == {"encode": 3.0, "prefill": 2.0, "decode": 0.5}
    hidden = dataclasses.replace(within, in_tower=0.0, tower_end=None)
    found = divide(Parts(None, None, {}), hidden)
    assert found.seconds(hidden) == {"encode": 3.0, "prefill": 2.0, "decode": 0.5}
    assert [line.partition(":")[0] for line in found.not_found] == ["vision tower", "language model"]


def test_drift() -> None:
    def out(*rows: list[float]) -> SimpleNamespace:
        logits = [torch.tensor([row]) for row in rows]
        tokens = torch.cat([torch.zeros(1, 3, dtype=torch.long), *(x.argmax(-1, keepdim=True) for x in logits)], 1)
        return SimpleNamespace(logits=logits, sequences=tokens)

    same = drift(out([1.0, 2.0], [3.0, 1.0]), out([1.0, 2.0], [3.0, 1.5]))
    assert (same["max_abs"], same["same_tokens"], same["tokens"]) == (0.5, 2, 2)
    other = drift(out([1.0, 2.0], [3.0, 1.0], [9.0, 1.0]), out([1.0, 2.0], [1.0, 2.0], [1.0, 99.0]))
    assert (other["max_abs"], other["same_tokens"], other["tokens"]) == (2.0, 1, 3)  # no scores behind a difference


def test_a_patched_model_that_fails_leaves_the_other_row(llava: SimpleNamespace, monkeypatch: Any) -> None:
    measured = hf_profiler._Model(llava.options, llava.source, llava.model)
    answer = measured._answer

    def fails(name: str, *inputs: Any, **more: Any) -> Any:
        if name == PATCHED:
            raise KeyError("no such thing")
        return answer(name, *inputs, **more)

    monkeypatch.setattr(measured, "_answer", fails)
    before, after = measured.measure(llava.row, lambda step: None)
    assert after["failed"] == "KeyError: 'no such thing'" and after["seconds"] == {} and before["seconds"]["total"] > 0


def test_a_model_with_nothing_to_patch(checkpoint: Callable[[str], Path], monkeypatch: Any) -> None:
    def nothing(model: Any, **more: Any) -> Any:
        raise ValueError("model must have a part that mmkernels can replace")

    monkeypatch.setattr("mmkernels.integrations.patching.patch", nothing)
    report = profile(options(checkpoint("llava")), PHOTO)
    assert [cell["backend"] for cell in report["cells"]] == [ORIGINAL]
    assert "Not patched: model must have" in said(report) and "before the patch" in table.summary(report)
    html_report.render(report, PHOTO, b"")


# What can't be profiled.


def test_sides_of_photographs(checkpoint: Callable[[str], Path]) -> None:
    asked = options(checkpoint("idefics3"), resolutions=(64, 32, 33))
    rows = prepare(asked, open_source(asked), PHOTO)
    assert [(row.side, row.markers) for row in rows.prepared] == [(32, 4), (33, 20)]
    assert "longest edge" in rows.how and rows.notes == ("The processor makes the same of 64 px as of 33 px.",)


def test_options_that_can_not_be() -> None:
    for folder, words in ((None, "got none"), (Path(__file__), "got the file"), (Path("a/b/c"), "got a/b/c")):
        with pytest.raises(BadInput, match=words):
            HFOptions("hf", folder=folder, image=default_photo())
    with pytest.raises(BadInput, match="--resolutions must be 1 to"):
        options(Path("org/name"), resolutions=(0,))
    assert options(Path("org/name")).name == "org/name" and options(Path(".")).name == Path.cwd().name


def test_a_name_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = "--model: the configuration of org/none-such, which is no folder here, can't be loaded: We couldn't connect"
    with pytest.raises(BadInput, match=words):
        open_source(options(Path("org/none-such")))


def test_folders_that_lack_something(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"the configuration of the folder .* can't be loaded"):
        open_source(options(tmp_path))
    transformers.CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="AutoModelForImageTextToText loads, got the model type clip"):
        open_source(options(tmp_path))
    shutil.copytree(checkpoint("llava"), tmp_path / "llava", ignore=lambda *_: {"model.safetensors"})
    asked = options(tmp_path / "llava")
    with pytest.raises(BadInput, match=r"the model of the folder llava can't be loaded: .*\(--random makes"):
        load_model(asked, open_source(asked))
    random = options(tmp_path / "llava", random=True, dtype="bf16")
    model, _ = load_model(random, open_source(random))
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16} and not model.training
    (tmp_path / "llava" / "processor_config.json").unlink()
    with pytest.raises(BadInput, match="the folder llava"):
        open_source(asked)


def test_weights_that_do_not_fit(llava: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_model, "_free_memory", lambda device: 1000)
    with pytest.raises(BadInput, match=r"--model must fit into memory: llava has 0\.0 billion weights"):
        load_model(llava.options, llava.source)


def test_a_prompt_that_is_too_long(llava: SimpleNamespace) -> None:
    long = options(llava.options.folder, question="a" * 5000)
    with pytest.raises(BadInput, match="--resolutions must leave the prompt and 9 tokens more within 2048, got"):
        HFProfile(long, PHOTO)


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("hf", {"size": "tiny"}, "--size must not be given for hf, whose options are --image, --resolutions"),
        ("hf", {"text_length": 3}, "--text-length must not be given for hf"),
        ("hf", {"audio": Path("a.wav")}, "--audio must not be given for hf, which does not hear"),
        ("hf", {}, "--model must be given for hf"),
        ("internvl", {"question": "?"}, "--question must not be given for internvl, only hf takes it"),
        ("whisper", {"random": True}, "--random must not be given for whisper, only hf takes it"),
    ],
)
def test_options_of_other_models(model: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        cli.profile(model, **given)
