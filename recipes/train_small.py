"""Train a model that ships with mxn: tokenizer, training, export, held-out perplexity, model card.

    python recipes/train_small.py --shape llama --steps 3000 --out FOLDER

Needs a CPU and the packages that mxn itself needs. Interrupted runs continue when the same
command is given again; their state lies in the `--work` folder, outside the repository. The last
line on stdout with `--json` is the content of training.json. Start at `main`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from shakespeare.batches import Batches, encode
from shakespeare.bpe import train_tokenizer
from shakespeare.card import write_card
from shakespeare.corpus import TextSplit, load_split
from shakespeare.export import check_against_transformers, write_checkpoint
from shakespeare.nets import Network
from shakespeare.scores import score_baselines, score_checkpoint
from shakespeare.shapes import CONTEXT_TOKENS, SHAPES, make_config
from shakespeare.training import Settings, Trainer, train

SAMPLE_TOKENS = 160


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--long-steps", type=int, default=0, help="further steps of long rows")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, help="folder of the run's state")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--lr", type=float, help="learning rate; default: of Settings")
    parser.add_argument("--dropout", type=float, help="default: of Settings")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON on stdout")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.work is None:
        name = f"{arguments.shape}-{arguments.steps}-{arguments.seed}"
        arguments.work = Path("~/.cache/mxn-recipes").expanduser() / name
    return arguments


def make_settings(args: argparse.Namespace) -> Settings:
    settings = Settings(steps=args.steps, long_steps=args.long_steps, seed=args.seed)
    if args.lr is not None:
        settings = replace(settings, matrix_lr=args.lr, other_lr=args.lr)
    if args.dropout is not None:
        settings = replace(settings, dropout=args.dropout)
    return settings


def run_training(trainer: Trainer, tokenizer: Tokenizer, split: TextSplit) -> None:
    """Train to the end with a progress bar, or with a line per validation where there is no tty."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    valid_ids = torch.from_numpy(encode(tokenizer, split.valid))
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=trainer.settings.all_steps)
        notes: dict[str, str] = {}

        def report(event: dict[str, Any]) -> None:
            for key, value in event.items():
                notes[key] = f"{value:.3f}" if isinstance(value, float) else str(value)
            line = " ".join(f"{key} {value}" for key, value in notes.items())
            progress.update(task, completed=event["step"], description=line)
            if "valid_nats" in event:
                print(line, file=sys.stderr, flush=True)

        train(trainer, valid_ids, report)


def active_parameters(network: Network) -> int:
    """Return the parameters that one token passes through: of the experts, only the chosen."""
    config, total = network.config, sum(p.numel() for p in network.parameters())
    if config.model_type != "deepseek_v3":
        return total
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.n_routed_experts - config.num_experts_per_tok
    return total - len(network.routers()) * idle * expert


def sample(folder: Path, tokenizer: Tokenizer, heldout: str) -> dict[str, str]:
    """Continue a held-out passage with `transformers` and the checkpoint's own defaults."""
    from transformers import AutoModelForCausalLM

    prompt = "\n\n".join(heldout[len(heldout) // 2 :].split("\n\n")[1:4]) + "\n\n"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(encode(tokenizer, prompt))[None]
    torch.manual_seed(1)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, top_k=0
    )
    continuation = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    return {"prompt": prompt.rstrip("\n"), "continuation": continuation}


def command_line(args: argparse.Namespace) -> str:
    """Return the command that gives this checkpoint; the work folder does not matter for it."""
    words = ["python", "recipes/train_small.py"]
    names = ("shape", "steps", "long-steps", "seed", "threads", "vocab", "lr", "dropout", "out")
    for name in names:
        value = getattr(args, name.replace("-", "_"))
        if value not in (None, 0):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def export(
    trainer: Trainer, tokenizer: Tokenizer, split: TextSplit, args: argparse.Namespace
) -> dict[str, Any]:
    """Write the checkpoint, measure it, write training.json and the model card."""
    network, settings, folder = trainer.best(), trainer.settings, args.out
    write_checkpoint(network, tokenizer, folder)
    probe = torch.from_numpy(encode(tokenizer, split.valid))[:256]
    error = check_against_transformers(network, folder, probe)
    score = score_checkpoint(folder, split.heldout)
    scores = score_baselines(tokenizer, split) | {folder.name: score}
    facts = {
        "shape": args.shape,
        "command": command_line(args),
        "parameters": sum(p.numel() for p in network.parameters()),
        "active_parameters": active_parameters(network),
        "weight_bytes": (folder / "model.safetensors").stat().st_size,
        "vocab_size": tokenizer.get_vocab_size(),
        "context": CONTEXT_TOKENS,
        "heldout_tokens": score.num_tokens,
        "heldout_bytes": score.num_bytes,
        "heldout": {name: value.as_dict() for name, value in scores.items()},
        "export_relative_error": error,
        "epochs": round(
            settings.all_steps * settings.batch_tokens / trainer.batches.tokens_per_epoch, 1
        ),
        "best_step": trainer.state.best_step,
        "best_valid_nats": round(trainer.state.best_nats, 4),
        "training_seconds": round(trainer.state.seconds, 1),
        "training_cpu_seconds": round(trainer.state.cpu_seconds, 1),
        "threads": args.threads,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "settings": asdict(settings),
        "sample": sample(folder, tokenizer, split.heldout),
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    write_card(folder, facts)
    return facts


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    split = load_split()
    tokenizer = train_tokenizer(split.train, args.vocab)
    settings = make_settings(args)
    network = Network(make_config(args.shape, tokenizer.get_vocab_size()), settings.dropout)
    batches = Batches(
        tokenizer, split.train, seed=args.seed, dialogue_share=settings.dialogue_share
    )
    trainer = Trainer(network, batches, settings, args.work)
    if trainer.resume():
        print(f"continuing {args.work} at step {trainer.state.step}", file=sys.stderr)
    run_training(trainer, tokenizer, split)
    facts = export(trainer, tokenizer, split, args)
    print(json.dumps(facts["heldout"], indent=2), file=sys.stderr)
    if args.json:
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
