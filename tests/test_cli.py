"""The command line: what it prints, what it writes, and what it says to bad input."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels import cli, machine
from mmkernels.profiling import timing
from mmkernels.runtime.dispatch import BACKENDS, TABLES

HEARS = ["profile", "whisper", "--size", "tiny", "--seconds", "1", "--pool", "2", "--device", "cpu"]
TINY = ["profile", "flamingo", "--size", "tiny", "--images", "2", "--text-length", "12", "--device", "cpu"]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def mmkernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process."""
    monkeypatch.setattr(timing, "_BUDGET", 0.0)
    monkeypatch.setattr(timing, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(timing, "_ROUNDS_TOGETHER", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mmkernels", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return Ended(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(threads)


def test_profile_prints_tables_and_writes_json_and_picture(mmkernels, tmp_path: Path) -> None:
    photo = tmp_path / "a photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(photo)
    ended = mmkernels(*TINY, "--tokens", "8,4,8", "--image", photo, "--out", tmp_path / "new" / "folder")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "new" / "folder" / "profile.json").read_text())
    assert report["kind"] == "mmkernels profile"
    assert report["settings"]["tokens"] == [4, 8]
    assert report["settings"]["image"] == "a photo.png"
    assert str(tmp_path) not in json.dumps(report)
    assert (tmp_path / "new" / "folder" / "profile.png").stat().st_size > 10_000
    assert max(map(len, ended.out.splitlines())) <= 100
    assert "first token" in ended.out and "profile.png" in ended.out.replace("\n", "")
    assert "8 tokens x 2 images: against the naive baseline" in ended.out.replace("\n", " ")
    assert "[1/14] 4 tokens per image" in ended.err  # plain lines where there is no terminal
    assert "peak memory, naive" in ended.err and "reference" not in ended.err + ended.out  # one word everywhere


def test_profile_of_reducers(mmkernels, tmp_path: Path) -> None:
    ended = mmkernels(*TINY, "--reduce", "pool:2, select:0.25", "--backend", "fused", "--out", tmp_path)
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "profile.json").read_text())
    assert [cell["reducer"] for cell in report["cells"]] == ["none", "pool:2", "select:0.25"]
    with Image.open(tmp_path / "profile.png") as picture:
        assert min(picture.size) > 600
    assert max(map(len, ended.out.splitlines())) <= 100
    assert "fused, all 17 tokens: first token after" in ended.out.replace("\n", " ")
    assert "[1/10] none: weights" in ended.err and "[10/10] time to decode" in ended.err


def test_profile_with_a_report(mmkernels, tmp_path: Path) -> None:
    words = (
        "--size",
        "tiny",
        "--resolutions",
        "32, 64",
        "--reduce",
        "pool:2",
        "--text-length",
        "12",
        "--device",
        "cpu",
    )
    report = tmp_path / "new folder" / "report.html"
    ended = mmkernels("profile", "qwen2_5_vl", *words, "--out", tmp_path / "out", "--report", report)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["rows"] == ["64 none", "64 pool:2", "32 none", "32 pool:2"]
    page = report.read_text()
    assert page.startswith("<!doctype html>") and found["command"] in page and str(tmp_path) not in page
    assert "report.html (report, for a browser)" in " ".join(ended.out.split())
    assert max(map(len, ended.out.splitlines())) <= 100
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]


def test_profile_of_sound(mmkernels, tmp_path: Path) -> None:
    ended = mmkernels(*HEARS, "--backend", "fused", "--out", tmp_path, "--report", tmp_path / "report.html")
    assert ended.code == 0 and "1 s of sound in 50 tokens" in " ".join(ended.out.split())
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["rows"] == ["1 s, pool 1", "1 s, pool 2"] and found["sound"]["made"]
    assert found["command"] in (tmp_path / "report.html").read_text()
    assert max(map(len, ended.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["profile", "clip"],
            "must be one of flamingo, qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, deepseek_vl, ",
        ),
        (["profile"], "model"),
        ([*TINY, "--tokens", "16,many"], "--tokens must be integers, such as 16,64; got '16,many'"),
        ([*TINY, "--tokens", "0"], "--tokens must be integers from 1 to 65536, such as 16,64; got 0"),
        ([*TINY, "--tokens", "4,-4"], "got 4,-4"),
        ([*TINY, "--tokens", "99999999"], "got 99999999"),
        ([*TINY, "--tokens", ","], "got nothing"),
        ([*TINY, "--reduce", "pool"], '--reduce pool: a reducer must be "none", "pool:2"'),
        ([*TINY, "--reduce", "pool:2", "--tokens", "4"], "--tokens and --reduce can't be given together"),
        ([*TINY, "--reduce", "none,select:17"], "--reduce select:17: keep must be from 1 to 16"),
        ([*TINY, "--reduce", ""], "--reduce must be 1 to 24 reducers, such as pool:2,tome:0.5; got nothing"),
        ([*TINY, "--images", "0"], "--images must be from 1 to 1000, got 0"),
        ([*TINY, "--images", "few"], "--images"),
        ([*TINY, "--text-length", "2"], "--text-length must be above the number of images"),
        ([*TINY, "--backend", "fused,fastest"], "--backend must be one of"),
        ([*TINY, "--backend", "triton"], "can't run this call. triton: "),
        ([*TINY, "--backend", ","], "--backend must be one of"),
        ([*TINY, "--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16; got 'fp8'"),
        ([*TINY, "--device", "gpu"], "--device must be cpu, cuda or cuda:<number>; got 'gpu'"),
        ([*TINY, "--device", "cuda:99"], "--device must be one that torch can use here, such as cpu; got 'cuda:99'"),
        ([*TINY, "--size", "huge"], "--size must be one of tiny, small, base; got 'huge'"),
        ([*TINY, "--image", "missing.jpg"], "--image must be a file, got no such file: missing.jpg"),
        ([*TINY, "--image", ""], "'--image': must be a path, got an empty text"),
        ([*TINY, "--image", "."], "--image .: must be an image, got a folder"),
        ([*TINY, "--image", __file__], "test_cli.py: must be an image, got a format that Pillow does not know"),
        ([*TINY, "--out", "/proc/here"], "--out /proc/here can't be written to"),
        ([*TINY, "--out", ""], "'--out': must be a path, got an empty text"),
        ([*TINY, "--out", __file__], f"--out must be a folder, got the file {__file__}"),
        ([*TINY, "--out", f"{__file__}/inside"], "inside can't be written to: Not a directory"),
        ([*TINY, "--report", ""], "'--report': must be a path, got an empty text"),
        ([*TINY, "--report", "."], "--report must be a file, got the folder ."),
        ([*TINY, "--report", "/proc/here.html"], "--report /proc/here.html can't be written to"),
        ([*TINY, "--image", __file__, "--report", __file__], "must be an image"),
        ([*TINY, "--resolutions", "64,many"], "--resolutions must be integers, such as 224,448; got '64,many'"),
        ([*TINY, "--resolutions", "32", "--tokens", "4"], "--tokens and --resolutions can't be given together"),
        ([*TINY, "--model", "here"], "--model must be for one of qwen2_vl"),
        (["profile", "qwen3_vl", "--tokens", "4"], "--tokens must not be given for qwen3_vl"),
        (["profile", "qwen3_vl", "--model", "/nowhere"], "--model: "),
        (["profile", "qwen3_vl", "--prompt", "Why?"], "--prompt must be given with --model"),
        ([*TINY, "--audio", "a.wav"], "--audio must not be given for flamingo, which does not hear; got a.wav"),
        ([*TINY, "--pool", "2"], "--pool must not be given for flamingo, which does not hear; got 2"),
        ([*HEARS, "--tokens", "4"], "--tokens must not be given for whisper, which hears: it takes --audio, --seconds"),
        ([*HEARS, "--image", "a.jpg"], "--image must not be given for whisper, which hears: it takes --audio"),
        ([*HEARS, "--prompt", "Why?"], "--prompt must not be given for whisper, which hears"),
        ([*HEARS, "--audio", "missing.wav"], "--audio must be a file, got no such file: missing.wav"),
        ([*HEARS, "--audio", "."], "--audio .: must be a sound, got a folder"),
        ([*HEARS, "--audio", __file__], "test_cli.py: must be a whole sound"),
        ([*HEARS, "--seconds", "5,many"], "--seconds must be numbers, such as 5,10,30; got '5,many'"),
        ([*HEARS, "--seconds", "0"], "--seconds must be 1 to 12 times from 0.1 to 30 s in steps of 0.1"),
        ([*HEARS, "--pool", "1.5"], "--pool must be integers, such as 1,2,4; got '1.5'"),
        (["bench", "--out", ""], "'--out': must be a path, got an empty text"),
        (["bench", "--out", __file__], f"--out must be a folder, got the file {__file__}"),
        (["bench", "no_such_op"], "op must be one of"),
        (["bench", "--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16; got 'fp8'"),
        (["bench", "--dtype", ","], "--dtype must be one of fp32, bf16, fp16; got ''"),
        (["support", "llama", "clap"], "family must be one of llama, "),
        (["support", ""], "family must be one of llama, "),
        (["support", "--every"], "--every"),
        (["support", "--all", "lama"], "model type must be one that transformers "),
        (["support", "--all", "llama", "--out", "/proc/here/support.md"], "--out /proc/here can't be written to"),
        (["support", "--all", "llama", "--out", "/"], "--out must be a file, got the folder /"),
        (["support", "--all", "llama", "--out", ""], "'--out': must be a path, got an empty text"),
        (["support", "llama", "--out", "here.md"], "--out is for the table of --all, which must be given too"),
        (["support", "llama", "--measure"], "--measure is for the table of --all, which must be given too"),
        (["fly"], "fly"),
        (["doctor", "--fast"], "--fast"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(mmkernels, arguments: list[str], message: str, tmp_path: Path) -> None:
    if "--out" not in arguments and arguments[0] == "profile":
        arguments = [*arguments, "--out", str(tmp_path)]
    ended = mmkernels(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    lines = [line for line in ended.err.splitlines() if not line.startswith("[")]  # but progress
    assert len(lines) == 1 and lines[0].startswith("mmkernels: ")
    assert message in lines[0]
    assert not list(tmp_path.glob("*.json"))


def _truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:500])


def _huge(path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path)


@pytest.mark.parametrize(
    "make", [_truncated, _huge, lambda path: path.write_text("not a picture"), lambda path: path.mkdir(), Path.touch],
    ids=["truncated", "huge", "text", "folder", "empty"],
)  # fmt: skip
def test_bad_image(mmkernels, tmp_path: Path, make) -> None:
    make(tmp_path / "photo.png")
    ended = mmkernels(*TINY, "--image", tmp_path / "photo.png", "--out", tmp_path / "out")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1 and "photo.png" in ended.err


def test_files_that_stand_where_results_go(mmkernels, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "profile.png")
    photo = (tmp_path / "profile.png").read_bytes()
    ended = mmkernels(*TINY, "--image", tmp_path / "profile.png", "--out", tmp_path)
    assert ended.code == 2 and "--out must be a folder in which profile.png is not the photograph" in ended.err
    assert (tmp_path / "profile.png").read_bytes() == photo
    for name in ("photo.png", "out/profile.png"):
        (tmp_path / "photo.png").write_bytes(photo)
        files = ("--image", tmp_path / "photo.png", "--out", tmp_path / "out", "--report", tmp_path / name)
        ended = mmkernels(*TINY, *files)
        assert ended.code == 2 and "--report must be a file of its own" in ended.err
        assert (tmp_path / "photo.png").read_bytes() == photo
    (tmp_path / "profile.json").mkdir()
    ended = mmkernels(*TINY, "--out", tmp_path)
    assert ended.code == 2 and ended.err.endswith("in which profile.json is a folder\n")


def test_an_option_s_path_may_begin_with_the_home_folder() -> None:
    """A shell leaves the ~ in ``--out=~/x``."""
    assert cli._path("~/x") == Path.home() / "x" and cli._path(cli.PROFILE_OUT) == cli.PROFILE_OUT


def test_letters_that_a_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of a folder's name; before, what had been measured was followed by an error's traceback."""
    stream = TextIOWrapper(BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(cli, "_app", lambda: lambda **options: print("written to \u00f6"))
    cli.main()
    stream.flush()
    assert stream.buffer.getvalue() == rb"written to \xf6" + os.linesep.encode()


def test_doctor_counts_threads(mmkernels, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine.describe_machine()
    for threads, words in ((1, ", 1 thread\n"), (2, ", 2 threads\n")):
        monkeypatch.setattr(machine, "describe_machine", lambda threads=threads: facts | {"torch_threads": threads})
        assert any(f"{line.rstrip()}\n".endswith(words) for line in mmkernels("doctor").out.splitlines())


def test_doctor_names_every_op_and_backend(mmkernels) -> None:
    ended = mmkernels("doctor")
    assert ended.code == 0
    assert torch.__version__ in ended.out
    assert all(name in ended.out for name in (*TABLES, *BACKENDS, "host extension"))
    line = next(line for line in ended.out.splitlines() if line.strip().startswith("merge_attention"))
    assert line.split()[-2:] == ["ready", "ready"] and " - " in line
    assert max(map(len, ended.out.splitlines())) <= 100


def test_doctor_gives_reasons(mmkernels, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.runtime.dispatch import Backend

    entry = Backend("triton", lambda *args: None, lambda *args: "there is no GPU")
    monkeypatch.setitem(TABLES, "some_op", (entry,))
    ended = mmkernels("doctor")
    assert "no [1]" in ended.out and "[1] triton: there is no GPU" in ended.out


def test_support_prints_a_row_for_each_family(mmkernels) -> None:
    ended = mmkernels("support", "llama", "blip_2", "siglip", "vilt")
    assert ended.code == 0, ended.err
    assert max(map(len, ended.out.splitlines())) <= 120
    lines, patched = (part.splitlines() for part in ended.out.split("after mmkernels.patch:"))
    rows = {line.split()[0]: line for line in lines if line[1:2].isalpha()}
    assert rows["llama"].split()[1:] == ["2", "of", "2", "2", *"0001", "0", *["yes"] * 3, "all"]
    assert "all: greedy, sampled, beam, static, assisted" in ended.out
    assert "all but assisted [1]" in " ".join(rows["blip_2"].split())
    assert "4 of 5" in rows["siglip"] and "0 of 2" in rows["vilt"] and "yes" not in rows["vilt"]
    after = {line.split()[0]: " ".join(line.split()) for line in patched if line[1:2].isalpha()}
    assert "cross_attention" in after["llama"] and "yes yes yes" in after["llama"]
    notes = " ".join(ended.out.split())
    assert "[1] assisted generation, on transformers' own attention too: TypeError" in notes
    assert "[2] modules with an attention of their own: MultiheadAttention" in notes
    assert "[3] transformers keeps its own attention, eager" in notes
    assert f"torch {torch.__version__}" in notes and "cross_attention ran on " in notes
    assert "calls)" in notes and "no backend" not in notes
    assert "[4/4] vilt" in ended.err
    assert all(line.startswith("[") for line in ended.err.splitlines())


def test_support_ends_with_1_where_a_family_fails(mmkernels, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    right = transformers.PreTrainedModel.set_attn_implementation
    but_for_ours = lambda self, name: None if name == "mmkernels" else right(self, name)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "set_attn_implementation", but_for_ours)
    ended = mmkernels("support", "llama", "vilt")
    assert ended.code == 1
    assert "[1] forward: called where the model is built with it, but not where it is set" in ended.out
    assert mmkernels("support", "vilt").code == 0


def test_help(mmkernels) -> None:
    ended = mmkernels("--help")
    assert ended.code == 0 and all(command in ended.out for command in ("doctor", "profile", "bench", "support"))
    assert mmkernels("profile", "--help").code == 0
    assert mmkernels().code == 2


def test_as_a_module() -> None:
    ended = subprocess.run([sys.executable, "-m", "mmkernels", "--help"], capture_output=True, text=True)
    assert ended.returncode == 0 and "Usage: mmkernels " in ended.stdout


PROFILE, SUPPORT = ["profile", "flamingo"], ["support", "llama"]
MISSING = {"typer": PROFILE, "matplotlib": PROFILE, "transformers": SUPPORT, "rich": SUPPORT}

WITHOUT = """
import os, sys
import torch  # once for all of them
for package, command in MISSING.items():
    child = os.fork()
    if not child:
        sys.modules[package] = None
        sys.argv = ["mmkernels", *command]
        from mmkernels.cli import main
        main()
    print(package, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_missing_package_says_what_to_install() -> None:
    code = f"MISSING = {MISSING}\n{WITHOUT}"
    environment = os.environ | {"TYPER_USE_RICH": "0"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ended.stdout.splitlines() == [f"{package} 2" for package in MISSING]
    assert ended.stderr.splitlines() == [
        f'mmkernels: this needs {package}: pip install "mmkernels[profile]"' for package in MISSING
    ]
