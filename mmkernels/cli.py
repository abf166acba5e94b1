"""The command ``mmkernels``: doctor, profile, bench, support, plan. Each command imports what it needs itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

from mmkernels.interrupts import ends_well, interruptible
from mmkernels.options import BadInput
from mmkernels.profiling.hf_options import HF, QUESTION, HFOptions
from mmkernels.profiling.options import REDUCERS, RESOLUTIONS, TOKENS, TOKENS_OF_BLIP2, VISION_LANGUAGE, Options
from mmkernels.profiling.sound_options import HEARING, POOL, SECONDS, SoundOptions
from mmkernels.runtime.dispatch import BackendError
from mmkernels.transformers_version import VersionError

try:
    import typer
except ImportError:  # `main` says what to install
    typer = None  # type: ignore[assignment]

PROFILE_OUT, BENCH_OUT, SUPPORT_OUT = Path("profiles"), Path("build/bench"), Path("build/support.md")
_TOKENS, _OF_BLIP2, _RESOLUTIONS, _REDUCERS = (
    ",".join(map(str, rows)) for rows in (TOKENS, TOKENS_OF_BLIP2, RESOLUTIONS, REDUCERS)
)
_SECONDS, _POOL = ",".join(f"{part:g}" for part in SECONDS), ",".join(map(str, POOL))


def main() -> None:
    """Entry point of the ``mmkernels`` script."""
    if isinstance(sys.stdout, TextIOWrapper):  # a path may have letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    with _one_line_errors(), ends_well("mmkernels"):
        if typer is None:
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        code = _app()(prog_name="mmkernels", standalone_mode=False)
        if code:  # of an end that typer found itself
            raise SystemExit(code)


def _app() -> typer.Typer:
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Fused, memory-linear kernels for multimodal models.",
    )
    for command in (doctor, profile, bench, support):
        app.command()(interruptible(command))
    plan = typer.Typer(no_args_is_help=True, help="Predict what a training step costs, before it is run.")
    plan.command("contrastive")(interruptible(plan_contrastive))
    app.add_typer(plan, name="plan")
    return app


def _path(text: str | Path) -> Path:
    """Returns an option's path; ``Path("")`` would be the current folder, and a shell leaves the ~ in ``--out=~/x``."""
    if not str(text):
        raise typer.BadParameter("must be a path, got an empty text")
    return Path(text).expanduser()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Bad input ends in one line on standard error and exit code 2; any other error in its traceback."""
    try:
        yield
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        if message:  # empty: help was printed instead
            print(f"mmkernels: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _message(error: Exception) -> str | None:
    """Returns what to tell the user; None: this is a fault of the program."""
    if isinstance(error, BadInput | BackendError | VersionError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        extra = "test" if package == "pytest" else "profile"
        return None if package == "mmkernels" else f'this needs {package}: pip install "mmkernels[{extra}]"'
    explain = getattr(error, "format_message", None)  # a wrong option or argument, found by typer
    if explain is not None:
        return str(explain())
    return "aborted" if typer is not None and isinstance(error, typer.Abort) else None


def doctor() -> None:
    """Show versions, devices, and which backends of each op are ready, or why not."""
    from mmkernels.doctor import print_doctor

    print_doctor()


def profile(
    model: Annotated[
        str,
        typer.Argument(help=f"flamingo, blip2, {', '.join((*VISION_LANGUAGE, *HEARING))}; or {HF}: --model says which"),
    ],
    image: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="FILE", help="Photograph; default: one that matplotlib ships."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help=f"Visual tokens per image of flamingo or blip2, one profile each; default: {_TOKENS}, of blip2 "
            f"{_OF_BLIP2}."
        ),
    ] = None,
    resolutions: Annotated[
        str | None,
        typer.Option(
            help="Images of as many pixels as squares of these sides, each with every one of --reduce; default: "
            f"{_RESOLUTIONS}, or the size of flamingo, deepseek_vl and janus."
        ),
    ] = None,
    reduce: Annotated[
        str | None,
        typer.Option(
            help="Instead of --tokens: ways to make all patches fewer tokens, compared with none: pool:2, tome:0.5, "
            "select:0.25, diverse:0.25, of flamingo shuffle:2 and perceiver:64, or a budget such as pool:<=256. "
            f"Default: {_REDUCERS}, or --tokens for flamingo and blip2; deepseek_vl2 takes none."
        ),
    ] = None,
    audio: Annotated[
        Path | None,
        typer.Option(
            parser=_path, metavar="FILE", help="Of a model that hears: a sound file; default: speech that is made."
        ),
    ] = None,
    seconds: Annotated[
        str | None,
        typer.Option(help=f"Of a model that hears: how much of the sound, one row each; default: {_SECONDS}."),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help=f"Of a model that hears: how many of the encoder's features become one token; default: {_POOL}."
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Images in the prompt, parts of the photograph; default: 1, of flamingo 5.")
    ] = None,
    text_length: Annotated[
        int | None, typer.Option(help="Text tokens in the prompt; default: 64, of flamingo 512, of whisper 4.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help='What to compare: "fused" (automatic choice), "reference" (naive), or a backend by name; default: '
            "fused, for flamingo, blip2 and models that hear fused,reference."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = Options.dtype,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")] = "",
    size: Annotated[
        str | None, typer.Option(help="Of the model: tiny, small or base; random weights. Default: small.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--model",
            parser=_path,
            metavar="FOLDER",
            help=f"A checkpoint of your own, instead of --size; of {HF} also a name on the Hub, such as org/name.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A question, for --model with a tokenizer; default: random tokens.")
    ] = None,
    question: Annotated[str | None, typer.Option(help=f"Of {HF}: what is asked; default: {QUESTION}")] = None,
    random: Annotated[
        bool,
        typer.Option("--random", help=f"Of {HF}: random weights; --model needs a configuration and a processor alone."),
    ] = False,
    train: Annotated[bool, typer.Option("--train", help="Also measure a training step.")] = False,
    out: Annotated[
        Path, typer.Option(parser=_path, metavar="FOLDER", help="For profile.json and profile.png.")
    ] = PROFILE_OUT,
    report: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="FILE.html", help="For a report to read in a browser, without a network."),
    ] = None,
) -> None:
    """Show what each visual token, or second of sound, costs: time by stage, peak memory, drift; fused beside naive."""
    from mmkernels.options import parse_list
    from mmkernels.profiling.command import run_profile
    from mmkernels.profiling.options import parse_numbers
    from mmkernels.profiling.photo import default_photo

    seen = {"image": image, "tokens": tokens, "resolutions": resolutions, "reduce": reduce, "images": images}
    heard = {"audio": audio, "seconds": seconds, "pool": pool}
    hears = model in HEARING
    for name, value in (seen | {"prompt": prompt} if hears else heard).items():
        if value is not None:
            what = f"hears: it takes --{', --'.join(heard)}" if hears else "does not hear"
            raise BadInput(f"--{name.replace('_', '-')} must not be given for {model}, which {what}; got {value}")
    backends = None if backend is None else parse_list(backend)
    device = device or _default_device()
    sides = None if resolutions is None else parse_numbers("--resolutions", resolutions, int, "224,448")
    image = default_photo() if image is None and not hears else image
    _check_kind(
        model,
        ours=seen | heard | {"text_length": text_length, "backend": backend, "size": size, "prompt": prompt},
        theirs={"question": question, "random": random or None},
    )
    if model == HF:
        assert image is not None
        asked = HFOptions(
            model, folder=folder, image=image, resolutions=sides, question=question, random=random, dtype=dtype,
            device=device, train=train,
        )  # fmt: skip
        return run_profile(asked, out, report)
    if hears:
        options: Options | SoundOptions = SoundOptions(
            model,
            audio=audio,
            seconds=None if seconds is None else parse_numbers("--seconds", seconds, float, "5,10,30"),
            pool=None if pool is None else parse_numbers("--pool", pool, int, "1,2,4"),
            text_length=text_length,
            backends=backends,
            dtype=dtype,
            device=device,
            size=size,
            folder=folder,
            train=train,
        )
    else:
        options = Options(
            model=model,
            image=image or default_photo(),
            tokens=None if tokens is None else parse_numbers("--tokens", tokens, int, "16,64"),
            reduce=None if reduce is None else parse_list(reduce),
            resolutions=sides,
            images=images,
            text_length=text_length,
            backends=backends,
            dtype=dtype,
            device=device,
            size=size,
            folder=folder,
            prompt=prompt,
            train=train,
        )
    run_profile(options, out, report)


def _check_kind(model: str, *, ours: Mapping[str, object], theirs: Mapping[str, object]) -> None:
    """Raises `BadInput` for an option of our models given with one of transformers, and the other way round."""
    for name, value in (ours if model == HF else theirs).items():
        if value is not None and name not in ("image", "resolutions"):
            takes = "--image, --resolutions, --question and --random" if model == HF else f"only {HF} takes it"
            what = f"whose options are {takes}" if model == HF else takes
            raise BadInput(f"--{name.replace('_', '-')} must not be given for {model}, {what}; got {value}")


def bench(
    op: Annotated[str | None, typer.Argument(help="An op, or a family of ops such as tokens; default: all.")] = None,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16, fp16 or a list; default: fp32,bf16, of which --quick takes one.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")] = "",
    filter: Annotated[str, typer.Option(help="Only rows whose name contains one of these, comma-separated.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Only the headline rows of each op: two minutes.")] = False,
    out: Annotated[
        Path, typer.Option(parser=_path, metavar="FOLDER", help="For the JSON and the picture.")
    ] = BENCH_OUT,
    save: Annotated[bool, typer.Option("--save", help="Write to benchmarks/results/<device>/ instead.")] = False,
) -> None:
    """Time ops beside their peers; correctness is checked first, and each row is saved as it finishes."""
    from mmkernels.bench.command import run_bench
    from mmkernels.options import parse_list

    device = device or _default_device()
    default = "fp32,bf16" if not quick else "fp32" if device == "cpu" else "bf16"
    run_bench(op, parse_list(dtype or default), device, filter, out, save=save, quick=quick)


def support(
    families: Annotated[list[str] | None, typer.Argument(help="Names as in the table; default: all of it.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every model type of transformers, small by rule: ten minutes or more.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="FILE", help=f"With --all: for the table; default: {SUPPORT_OUT}."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --all: speed and memory of larger models too; an hour or more.")
    ] = False,
) -> None:
    """Run small transformers models of each family on "mmkernels" and patched, and show which equal their own."""
    if every:
        from mmkernels.integrations.transformers.sweep_table import run_sweep

        fine = run_sweep(families or (), out or SUPPORT_OUT, measured=measure)
    elif out is not None:
        raise BadInput(f"--out is for the table of --all, which must be given too; got {out} alone")
    elif measure:
        raise BadInput("--measure is for the table of --all, which must be given too")
    else:
        from mmkernels.integrations.transformers.support_table import run_support

        fine = run_support(families or ())
    if not fine:
        raise SystemExit(1)


def plan_contrastive(
    batch: Annotated[
        str, typer.Option(help="Pairs over all ranks, or a list; default: 32k to 1M in powers of two.")
    ] = "",
    dim: Annotated[int | None, typer.Option(help="Channels of the features; default: 1024.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Processes, each with a GPU or a machine; default: 8.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the features: fp32, bf16 or fp16; default: bf16.")] = "",
    device: Annotated[
        str, typer.Option(help='"here": this machine, measured; or by data sheet: a100, h100, h200, b200.')
    ] = "here",
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s between two ranks, in one direction; default: the data sheet's.")
    ] = None,
    encoder_ms: Annotated[
        float | None, typer.Option(help="Time of a rank's encoders on the first batch, to compare the loss with.")
    ] = None,
    from_log: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="FILE", help="open_clip's training log or JSON lines: plan that run."),
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Hold the model against the ring on 2, 4 and 8 ranks of this machine, or not at all; default: one "
            "small step over 2 ranks.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of --check, after which no larger step begins.")] = 300.0,
    out: Annotated[
        Path | None, typer.Option(parser=_path, metavar="FILE", help="For a JSON file with all numbers.")
    ] = None,
) -> None:
    """Price a contrastive step over many ranks: memory, bytes on the wire, time, and which of them binds."""
    from mmkernels.planning.command import run_plan
    from mmkernels.planning.options import read_options

    options = read_options(
        batch=batch,
        dim=dim,
        ranks=ranks,
        dtype=dtype,
        device=device,
        bandwidth=bandwidth,
        encoder_ms=encoder_ms,
        log=from_log,
    )
    if not seconds > 0:
        raise BadInput(f"--seconds must be a number above 0, got {seconds}")
    run_plan(options, checking={None: "quick", True: "full", False: "none"}[check], limit=seconds, out=out)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
