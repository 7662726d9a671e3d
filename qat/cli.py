"""The `qat` command: compare methods over bit-widths, train one, evaluate a model, export it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from qat.hessian import MODES
from qat.layers.config import BITS, INITIAL_SCALES, SUPPORTED_BITS
from qat.study.config import MEASURED_LOSSES, METHODS, SmallLlamaConfig, StudyConfig, choose_device
from qat.study.workers import MOST_WORKERS, available_cores, quiet_torchao, threads
from qat.training.config import DTYPES, PRETRAINED_RATE, SCHEDULES, SMALL_LLAMA_RATE, TrainConfig
from qat.training.distillation import DistillationConfig
from qat.training.parq import PARQConfig
from qat.training.winq import PRESETS, WinQConfig
from spectra.backend.errors import InputError
from spectra.backend.version import __version__
from spectra.cli.command_line import (
    OneLineParser,
    add_formats,
    examples,
    interrupts_say,
    print_csv,
    print_json,
    run_command,
)
from spectra.cli.completion import add_completion
from spectra.runs.flat import flattened

TEXTS = "text files in UTF-8; of .jsonl, .csv, .tsv and .parquet the column 'text'"
LISTED_BITS = ",".join(f"{bits:g}" for bits in BITS)
# Options that have the name of the setting they give.
TRAINING_OPTIONS = (
    *("steps", "batch_size", "learning_rate", "schedule", "warmup", "weight_decay", "evaluate_every", "seed"),
    *("scale_learning_rate", "dtype", "compile", "accumulate", "activation_checkpointing", "rank_noise"),
    "telemetry_every",
)
STUDY_OPTIONS = (
    *("out", "model", "tokenizer", "dataset", "trust_remote_code", "device", "quantizer", "length"),
    *("group_size", "initial_scale"),
    *("activation_bits", "activation_symmetric", "cache_bits"),
    *("validation_sequences", "probes", "lanczos_steps", "deflate", "count_products", "measure_sequences"),
    *("save_every", "measured_loss"),
)


@partial(run_command, name="qat")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The words after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    options = build_parser().parse_args(arguments)
    quiet_torchao()
    options.command(options)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command and option."""
    parser = OneLineParser(
        prog="qat", description="Quantization-aware training of language models, watched through Hessian spectra."
    )
    parser.add_argument("--version", action="version", version=f"qat {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare = commands.add_parser(
        "compare",
        help="train by several methods at several bit-widths, and compare",
        **examples(
            "qat compare --bits 2,4 --out runs/study",
            "qat compare --bits 2 --model checkpoint --text notes.txt --steps 200 --out runs/own --csv",
        ),
    )
    compare.set_defaults(command=_compare)
    compare.add_argument(
        "--bits", default="1,2,4", help=f"of {LISTED_BITS} (default: 1,2,4); the unquantized model is trained too"
    )
    compare.add_argument("--methods", default=",".join(METHODS), help=f"default: {','.join(METHODS)}")
    compare.add_argument(
        "--workers", type=int, help="runs at once, a process each (default: one a core for the default model, else 1)"
    )
    compare.add_argument(
        "--no-reference",
        action="store_true",
        help="do not train the unquantized model, whose row is the reference of the table",
    )
    _add_study_options(compare)

    train = commands.add_parser(
        "train",
        help="train by one method at one bit-width",
        **examples(
            "qat train --bits 2 --out runs/2bit",
            "qat train --bits 4 --method baseline --model checkpoint --text notes.txt --out runs/4bit --json",
        ),
    )
    train.set_defaults(command=_train)
    train.add_argument("--bits", default="2", help=f"one of {LISTED_BITS} (default: 2)")
    train.add_argument("--method", default="winq", help="baseline or winq (default: winq)")
    _add_study_options(train)

    evaluate = commands.add_parser(
        "evaluate",
        help="the perplexity of a model on text files, or its scores on tasks of lm-eval",
        **examples(
            "qat evaluate runs/2bit/model --text notes.txt --block 128 --stride 64 --per-byte",
            "qat evaluate runs/2bit/model --tasks arc_easy,piqa --json",
        ),
    )
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument(
        "model", help="a model folder, plain, trained by qat or exported as packed, or a name on the Hugging Face hub"
    )
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", metavar="FILE", help=TEXTS)
    what.add_argument("--tasks", metavar="NAMES", help="tasks of lm-eval, separated by commas; globs work too")
    evaluate.add_argument("--tokenizer", metavar="NAME_OR_FOLDER", help="default: the model's own")
    evaluate.add_argument("--block", type=int, help="tokens a block (default: 2048, or the most that the model takes)")
    evaluate.add_argument(
        "--stride",
        type=int,
        help="tokens between the starts of blocks; each token counts once (default: blocks do not overlap)",
    )
    evaluate.add_argument(
        "--limit", type=int, help="blocks, or examples of a task, at most, from the first (default: all)"
    )
    evaluate.add_argument(
        "--batch-size", type=int, help="blocks or examples a forward pass (default: what fits into memory)"
    )
    evaluate.add_argument("--per-byte", action="store_true", help="the loss in bits a byte of the text, too")
    evaluate.add_argument(
        "--shots", type=int, help="examples with their answer before each question of a task (default: the task's own)"
    )
    evaluate.add_argument("--task-folder", metavar="DIR", help="a folder with tasks of your own, as YAML files")
    evaluate.add_argument(
        "--chat-template", action="store_true", help="put the questions of tasks into the tokenizer's chat template"
    )
    evaluate.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    evaluate.add_argument("--trust-remote-code", action="store_true", help="run the code that a hub model brings")
    add_formats(evaluate, json="print JSON instead of a sentence")

    export = commands.add_parser(
        "export",
        help="write a trained model in another format",
        **examples(
            "qat export runs/2bit/model --format packed --out packed",
            "qat export runs/2bit/model --format gguf --out gguf --json",
        ),
    )
    export.set_defaults(command=_export)
    export.add_argument("folder", help="what qat train left in OUT/model, or save_pretrained of a quantized model")
    export.add_argument("--format", required=True, help="packed (for qat.load), torchao, or gguf (for llama.cpp)")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    export.add_argument("--trust-remote-code", action="store_true", help="run the code that a model brings")
    add_formats(export, json="print JSON instead of a sentence")
    return parser


def _add_study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make: records, table, figures, report")
    add_formats(
        parser,
        json="print the rows of the table as JSON, all else on stderr",
        csv="print the rows of the table as CSV, all else on stderr",
    )

    start = parser.add_argument_group("model and text")
    start.add_argument(
        "--model", metavar="NAME_OR_FOLDER", help="a causal language model (default: a small Llama, trained here once)"
    )
    start.add_argument(
        "--tokenizer", metavar="NAME_OR_FOLDER", help="default: the model's own; 'train' trains one on the text"
    )
    start.add_argument("--text", nargs="+", metavar="FILE", help=f"{TEXTS} (default: Python's own source)")
    start.add_argument("--dataset", metavar="HUB_NAME", help="a dataset on the Hugging Face hub instead of files")
    start.add_argument("--length", type=int, help=_with_default(StudyConfig.length, "tokens a sequence"))
    small = SmallLlamaConfig
    start.add_argument("--vocabulary-size", type=int, help=_with_default(small.vocabulary_size, "of the default model"))
    start.add_argument(
        "--base-steps", type=int, help=_with_default(small.steps, "full-precision training steps of the default model")
    )
    start.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run code that a hub model brings"
    )
    start.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")

    training, given = parser.add_argument_group("training"), TrainConfig
    training.add_argument("--steps", type=int, help=_with_default(given.steps, "training steps"))
    training.add_argument(
        "--batch-size",
        type=int,
        help=_with_default(given.batch_size, "sequences a training step, on all ranks together"),
    )
    training.add_argument(
        "--lr",
        "--learning-rate",
        type=float,
        dest="learning_rate",
        help=f"peak learning rate (default: {SMALL_LLAMA_RATE:g}, and {PRETRAINED_RATE:g} for a --model)",
    )
    training.add_argument(
        "--scale-lr",
        type=float,
        dest="scale_learning_rate",
        help="peak learning rate of the learned scales (default: that of the weights)",
    )
    training.add_argument(
        "--schedule", help=_with_default(given.schedule, f"{', '.join(SCHEDULES)}: what wins can depend on it")
    )
    training.add_argument(
        "--warmup", type=float, help=_with_default(given.warmup, "share of the training steps with a rising rate")
    )
    training.add_argument(
        "--weight-decay", type=float, help=_with_default(given.weight_decay, "on matrices, never on scales")
    )
    training.add_argument(
        "--evaluate-every", type=int, help="training steps between validation losses (default: a sixteenth of the run)"
    )
    training.add_argument(
        "--telemetry-every", type=int, help="training steps between lines of telemetry (default: a 128th of the run)"
    )
    training.add_argument(
        "--validation-sequences",
        type=int,
        help=_with_default(StudyConfig.validation_sequences, "a validation loss is taken over"),
    )
    seeds = training.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=int, help=_with_default(given.seed, "of the data order, the weight noise and the probe vectors")
    )
    seeds.add_argument(
        "--seeds", metavar="0,1,2", help="train once with each seed, and say the spread; probe vectors are of the first"
    )
    training.add_argument(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="training steps between two checkpoints, from which the same command goes on after an interrupt; 0: none "
        "(default: by time, at most a fiftieth of the training)",
    )

    distillation, settings = parser.add_argument_group("distillation"), DistillationConfig
    distillation.add_argument(
        "--distill",
        nargs="?",
        type=float,
        const=settings.weight,
        metavar="WEIGHT",
        help="train with WEIGHT x KL(full precision || quantized) + (1 - WEIGHT) x cross-entropy (WEIGHT alone: "
        f"{settings.weight:g}; default: the cross-entropy)",
    )
    distillation.add_argument(
        "--distill-temperature", type=float, metavar="T", help=_with_default(settings.temperature, "divides the logits")
    )
    distillation.add_argument(
        "--distill-hidden",
        type=float,
        metavar="FACTOR",
        help=_with_default(0, "of the squared error of hidden states"),
    )

    speed = parser.add_argument_group("speed and memory")
    speed.add_argument(
        "--dtype",
        help=f"{', '.join(DTYPES)}: of matrix products; weights stay float32 (default: bfloat16 on a GPU that has it, "
        "for models of ten million parameters or more)",
    )
    speed.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile (default: on a GPU, for such models)",
    )
    speed.add_argument(
        "--accumulate", type=int, help=_with_default(given.accumulate, "parts that a batch is passed through in")
    )
    speed.add_argument(
        "--activation-checkpointing",
        action="store_true",
        default=None,
        help="compute activations again in the backward pass: less memory, a third more time",
    )
    speed.add_argument(
        "--rank-noise",
        help=_with_default(given.rank_noise, "under torchrun, weight noise that is the same on all ranks, or own"),
    )

    quantization, winq = parser.add_argument_group("quantization and WinQ"), PRESETS["paper"]
    quantization.add_argument(
        "--quantizer", help=_with_default(StudyConfig.quantizer, f"auto (by bit-width), {', '.join(SUPPORTED_BITS)}")
    )
    quantization.add_argument(
        "--group-size",
        type=int,
        help="columns of a row that share a scale, such as 32 (default: the whole row)",
    )
    quantization.add_argument(
        "--initial-scale",
        help=_with_default(
            StudyConfig.initial_scale, f"{', '.join(INITIAL_SCALES)}: learned scales start at the least squared error"
        ),
    )
    quantization.add_argument(
        "--activation-bits",
        type=int,
        help=_with_default(StudyConfig.activation_bits, "width of activations: 16 (full precision), 8 or 4, per token"),
    )
    quantization.add_argument(
        "--activation-asymmetric",
        dest="activation_symmetric",
        action="store_false",
        default=None,
        help="grids from the smallest to the largest activation (default: symmetric about zero)",
    )
    quantization.add_argument(
        "--cache-bits",
        type=int,
        help=_with_default(StudyConfig.cache_bits, "width of keys and values: 16, 8 or 4, per token and head"),
    )
    quantization.add_argument("--skip", nargs="+", metavar="GLOB", help="modules to leave in full precision")
    quantization.add_argument("--preset", help="WinQ as in the paper's text (paper, the default) or code (released)")
    quantization.add_argument(
        "--every",
        help=_with_default(winq.every, "WinQ resets every so many training steps, or at this part of the run"),
    )
    quantization.add_argument(
        "--alpha", type=float, help=_with_default(winq.alpha, "how far a reset moves toward the grid, 0 to 1")
    )
    quantization.add_argument(
        "--sigma", type=float, help=_with_default(winq.sigma, "standard deviation of WinQ's weight noise")
    )

    annealing, parq = parser.add_argument_group("annealing of --quantizer parq"), PARQConfig
    annealing.add_argument(
        "--parq-start",
        type=float,
        help=_with_default(parq.start, "part of the run that trains in full precision before the annealing"),
    )
    annealing.add_argument(
        "--parq-end", type=float, help=_with_default(parq.end, "part of the run after which weights are on the grid")
    )
    annealing.add_argument(
        "--parq-steepness", type=float, help=_with_default(parq.steepness, "of the sigmoid between the two, up to 100")
    )

    spectra = parser.add_argument_group("spectra")
    spectra.add_argument("--modes", help=f"which Hessians, of {','.join(MODES)} (default: {StudyConfig.modes[0]})")
    spectra.add_argument(
        "--probes",
        type=int,
        help=_with_default(StudyConfig.probes, "random probe vectors; more of them narrow the intervals"),
    )
    spectra.add_argument(
        "--lanczos-steps",
        type=int,
        help=_with_default(StudyConfig.lanczos_steps, "Lanczos steps a probe vector; more resolve finer"),
    )
    spectra.add_argument(
        "--deflate",
        type=int,
        help=_with_default(
            StudyConfig.deflate, "outlying eigenvalues measured first and projected out, which narrows most intervals"
        ),
    )
    spectra.add_argument(
        "--count-products",
        type=int,
        help=_with_default(
            StudyConfig.count_products, "products at most for the count of negative eigenvalues; 0 leaves it out"
        ),
    )
    spectra.add_argument(
        "--measured-loss",
        help=_with_default(
            StudyConfig.measured_loss, f"{' or '.join(MEASURED_LOSSES)}: the loss that --distill trains"
        ),
    )
    spectra.add_argument(
        "--measure-sequences",
        type=int,
        help=_with_default(StudyConfig.measure_sequences, "a spectrum's loss is taken over"),
    )


def _with_default(default: Any, meaning: str) -> str:
    return f"{meaning} (default: {default})"


def _compare(options: argparse.Namespace) -> None:
    workers = options.workers
    if workers is None:
        workers = min(available_cores(), MOST_WORKERS) if _is_small(options.model, options.device) else 1
    chosen = {"bits": _listed(options.bits), "methods": _listed(options.methods), "reference": not options.no_reference}
    config = _study_config(options, **chosen, workers=workers)
    from qat.study.compare import compare

    with _threads_for(config):
        rows = compare(config, say=_saying(options))
    if options.json:
        _print_rows(config, rows)
    if options.csv:
        print_csv([flattened(row) for row in rows])


def _print_rows(config: StudyConfig, rows: list[dict[str, Any]]) -> None:
    from qat.study.seeds import spread_rows

    print_json({"out": config.out, "rows": rows, **({"seeds": spread_rows(rows)} if config.seeds else {})})


def _train(options: argparse.Namespace) -> None:
    config = _study_config(options, bits=(options.bits,), methods=(options.method,))
    from qat.study.compare import train_one, train_seeds

    with _threads_for(config):
        several = bool(config.seeds)
        rows = train_seeds(config, say=_saying(options)) if several else [train_one(config, say=_saying(options))]
    if rows == [{}]:
        return  # one of several ranks, of which the first speaks
    if options.json and several:
        _print_rows(config, rows)
    elif options.json:
        print_json({"out": config.out, **rows[0]})
    if options.csv:
        print_csv([flattened(row) for row in rows])


def _evaluate(options: argparse.Namespace) -> None:
    """Print the perplexity, or the scores on tasks. Nothing is written."""
    _check_belongs(options, "--text", options.text, ("block", "stride", "per_byte"))
    _check_belongs(options, "--tasks", options.tasks, ("shots", "task_folder", "chat_template"))
    with interrupts_say("nothing was computed to the end"):
        if options.tasks is None:
            _print_perplexity(options)
        else:
            _print_scores(options)


def _check_belongs(options: argparse.Namespace, to: str, given: Any, names: Sequence[str]) -> None:
    """Raises InputError for an option that belongs to one that is not given."""
    for name in names:
        if given is None and not any(getattr(options, name) is unset for unset in (None, False)):
            raise InputError(f"--{name.replace('_', '-')} belongs to {to}: leave it out, or give {to}")


def _model_and_tokenizer(options: argparse.Namespace) -> tuple[Any, Any]:
    from qat.export.load import load_any
    from spectra.integrations.loading import load_tokenizer

    model = load_any(options.model, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(
        options.tokenizer or options.model,
        trust_remote_code=options.trust_remote_code,
        remedy="give --tokenizer NAME_OR_FOLDER",
    )
    return model, tokenizer


def _print_scores(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from qat.training.tasks import evaluate_tasks, in_table
    from spectra.backend.extras import need

    need("lm_eval")  # before the model is loaded
    device = choose_device(options.device)
    model, tokenizer = _model_and_tokenizer(options)
    with contextlib.redirect_stdout(sys.stderr):  # where progress belongs: tasks print to stdout
        scores = evaluate_tasks(
            model.to(device),
            tokenizer,
            _listed(options.tasks),
            folder=options.task_folder,
            shots=options.shots,
            limit=options.limit,
            batch_size=options.batch_size,
            chat_template=options.chat_template,
            trust_remote_code=options.trust_remote_code,
        )
    if options.json:
        print_json({"scores": [asdict(score) for score in scores]})
    else:
        print(in_table(scores))


def _print_perplexity(options: argparse.Namespace) -> None:
    import torch

    from qat.study.models import check_fit
    from qat.text.byte_ends import tokens_and_byte_ends
    from qat.text.corpus import Blocks
    from qat.training.evaluate import check_block, perplexity
    from qat.training.progress import progress_bar
    from spectra.integrations.loading import quiet_transformers
    from spectra.integrations.text_files import read_texts

    check_block(options.block, options.stride, options.limit)
    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(f"--batch-size is one block or more, got {options.batch_size}")
    text = "\n\n".join(read_texts(options.text))
    device = choose_device(options.device)
    model, tokenizer = _model_and_tokenizer(options)
    byte_ends = None
    with quiet_transformers():
        if options.per_byte:
            ids, byte_ends = tokens_and_byte_ends(tokenizer, text)
        else:
            ids = tokenizer(text, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    if len(tokens):
        check_fit(model, Blocks(tokens, 1))
    bar = progress_bar(1, "perplexity", "blocks")

    def show(done: int, total: int) -> None:
        """Move the bar."""
        bar.total = total
        bar.update(done - bar.n)

    with contextlib.closing(bar):
        result = perplexity(
            model.to(device),
            tokens,
            block=options.block,
            stride=options.stride,
            limit=options.limit,
            batch_size=options.batch_size,
            byte_ends=byte_ends,
            progress=show,
        )
    chosen = {"stride": result.stride, "bits_per_byte": result.bits_per_byte, "bytes": result.bytes}
    if options.json:
        print_json(
            {"perplexity": result.perplexity, "loss": result.loss, "tokens": result.tokens, "block": result.block}
            | {name: value for name, value in chosen.items() if value is not None}
        )
        return
    per_byte = "" if result.bytes is None else f", {result.bits_per_byte:.5f} bits a byte"
    overlap = "" if result.stride is None else f" that begin every {result.stride}"
    print(
        f"perplexity {result.perplexity:.4f}, loss {result.loss:.5f} nats a token{per_byte}, over {result.tokens:,} "
        f"tokens in blocks of {result.block}{overlap}"
    )


def _export(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from qat.export.command import export, in_words
    from spectra.integrations.loading import quiet_transformers

    with interrupts_say("nothing was written"), quiet_transformers():
        made = export(options.folder, options.out, format=options.format, trust_remote_code=options.trust_remote_code)
    if options.json:
        print_json(asdict(made))
    else:
        print(in_words(made))


def _threads_for(config: StudyConfig) -> contextlib.AbstractContextManager[None]:
    """One thread for the small Llama on a CPU, which gains little from more; else one for each available core."""
    return threads(1 if _is_small(config.model, config.device) else available_cores())


def _is_small(model: str | None, device: str | None) -> bool:
    return model is None and choose_device(device).type == "cpu"


def _study_config(options: argparse.Namespace, **chosen: Any) -> StudyConfig:
    """The options that were given, over the defaults of the settings classes, which check them."""
    base = _given(options, vocabulary_size="vocabulary_size", base_steps="steps")
    training = _given(options, **{name: name for name in TRAINING_OPTIONS})
    if options.model is not None:
        training.setdefault("learning_rate", PRETRAINED_RATE)
    settings = _given(options, **{name: name for name in STUDY_OPTIONS})
    if options.modes is not None:
        settings["modes"] = _listed(options.modes)
    return StudyConfig(
        **settings,
        **chosen,
        text=tuple(options.text or ()),
        skip=tuple(options.skip or ()),
        train=TrainConfig(**training),
        winq=_winq_config(options),
        seeds=_seeds(options.seeds),
        distillation=_distillation(options),
        parq=PARQConfig(**_given(options, parq_start="start", parq_end="end", parq_steepness="steepness")),
        small_llama=SmallLlamaConfig(**base),
    )


def _seeds(text: str | None) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in _listed(text or ""))
    except ValueError:
        raise InputError(f"--seeds is a list of whole numbers such as 0,1,2, got {text!r}") from None
    if text is not None and not seeds:
        raise InputError("--seeds is empty: give whole numbers, separated by commas")
    return seeds


def _distillation(options: argparse.Namespace) -> DistillationConfig | None:
    """The settings of distillation; None where it was not asked for."""
    given = _given(options, distill="weight", distill_temperature="temperature", distill_hidden="hidden")
    if options.distill is None and given:
        raise InputError("--distill-temperature and --distill-hidden set how --distill trains: give --distill too")
    return DistillationConfig(**given) if given else None


def _winq_config(options: argparse.Namespace) -> WinQConfig:
    """The preset, with the options that were given in place of its values."""
    preset = options.preset or "paper"
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    changes = _given(options, alpha="alpha", sigma="sigma")
    if options.every is not None:
        try:
            changes["every"] = int(options.every) if options.every.isdigit() else float(options.every)
        except ValueError:
            raise InputError(f"--every is a number of steps or a fraction of the run, got {options.every!r}") from None
    return replace(PRESETS[preset], **changes)


def _given(options: argparse.Namespace, **names: str) -> dict[str, Any]:
    """The options that were given, by the names that the settings classes have for them."""
    values = {name: getattr(options, option) for option, name in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _saying(options: argparse.Namespace) -> Callable[[str], None]:
    """Where the lines for people go: stdout is left to JSON and CSV."""
    return _say_on_stderr if options.json or options.csv else _say


def _say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, flush=True)  # a study takes minutes, and each line should appear at once, through a pipe too


if __name__ == "__main__":
    raise SystemExit(main())
